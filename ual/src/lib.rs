//! Uncertainty-aware learning (arXiv 2406.04854) of small language models, on the loss of
//! [`candle_cross_entropy`]: the program `ual` and what it is made of.
//!
//! Each module uses those above it only:
//!
//! | | |
//! |---|---|
//! | [`digest`] | hashes of files |
//! | [`files`] | files that are whole whenever the program is killed, a folder for one process at a time |
//! | [`text`] | from text to tokens: the tokenizer of a GGUF file, chat templates |
//! | [`data`] | samples of a file or made up, estimated uncertainties, batches and how their sequences are packed |
//! | [`model`] | the decoder and its layers, GGUF and safetensors in and out |
//! | [`report`] | metrics, loss curves, tables, pictures, progress bars |
//! | [`training`] | options, methods, optimizer, checkpoints, processes that train together, the training itself, evaluation |
//! | [`commands`] | `ual elicit`, `ual finetune`, `ual study`, `ual probe`, `ual data` |

pub mod commands;
pub mod data;
pub mod digest;
pub mod failure;
pub mod files;
pub mod model;
pub mod report;
pub mod text;
pub mod training;
