//! `ual elicit` scores the uncertainty of instruction data: of each sample, how uncertain the right response to its prompt
//! is, which `ual finetune --data` turns into label smoothing. See `docs/elicitation.md`.
//!
//! [`remote`] asks a stronger model over an OpenAI-compatible chat endpoint, [`local`] takes the entropy of a model's
//! predictions. [`answers`] keeps what is there on the disk.

pub mod answers;
pub mod args;
pub mod client;
pub mod limits;
pub mod local;
pub mod log;
pub mod progress;
pub mod prompt;
pub mod remote;
pub mod run;
pub mod samples;
pub mod secrets;
pub mod stream;
