//! `ual study` gathers evidence: plain fine-tuning, constant smoothing, uncertainty-aware smoothing, and the controls that
//! [`arms`] describes, over several seeds; held-out metrics and the clustering of tokens in the last hidden layer, in a
//! Markdown report with pictures.
//!
//! With `--smoothings` every arm that smooths is trained with each of several mean smoothings, and with `--validation` a share of
//! the training samples is set aside: each arm is reported with the smoothing that predicts them best at the end of training,
//! and with the smoothing and the step that do (early stopping), so that arms are compared each at its best. Differences have
//! intervals, see [`compare`].
//!
//! All options of `ual finetune` are its own. A seed changes data, batches, the control and the weights that training begins
//! with (of a given model, those of its adapters).

pub mod args;
pub mod arms;
pub mod choice;
pub mod clusters;
pub mod compare;
pub mod outcome;
pub mod pictures;
pub mod run;
pub mod summary;
