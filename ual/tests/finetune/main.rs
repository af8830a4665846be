//! `ual finetune`, and the modules that its numbers rest on.

mod data;
mod layers;
mod metrics;
mod optimizer;
#[cfg(unix)] // programs are killed
mod pretrained;
mod runs;
