//! `ual probe` asks when uncertainty-aware smoothing helps, where many trainings are cheap: on a small head over a frozen model's
//! last hidden states ([`hidden`], computed once). Every seed draws samples ([`trainings`]); all [`arms`] with all mean
//! smoothings are then trained side by side ([`heads`]) and measured along their epochs against the distribution of people's
//! responses ([`scores`]). What is chosen is chosen on a validation part ([`outcome`]); arms are compared seed by seed, with
//! bootstrap intervals ([`compare`]). [`stretches`] finds the best smoothing at each uncertainty.

pub mod args;
pub mod arms;
pub mod compare;
pub mod heads;
pub mod hidden;
pub mod outcome;
pub mod pictures;
pub mod questions;
pub mod run;
pub mod scores;
pub mod stretches;
pub mod summary;
pub mod trainings;
