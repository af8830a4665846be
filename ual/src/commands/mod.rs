//! The commands of the program `ual`, each its arguments and its run.

pub mod data;
pub mod elicit;
pub mod finetune;
pub mod probe;
pub mod study;
