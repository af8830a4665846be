//! `ual finetune`, and the modules that its numbers rest on.

mod data;
#[cfg(unix)] // modes, limits, and the models of `pretrained`
mod folders;
mod last_layers;
mod layers;
mod metrics;
mod optimizer;
#[cfg(unix)] // programs are killed
mod pretrained;
mod ranks;
mod runs;
