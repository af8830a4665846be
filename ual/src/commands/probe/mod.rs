//! `ual probe` compares the trainings on a small head over a frozen model's hidden states.

pub mod args;
pub mod hidden;
pub mod questions;
pub mod run;
