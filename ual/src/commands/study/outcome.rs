//! What a training of the study came to.

use serde::Serialize;

use crate::{commands::study::clusters::Clusters, report::run::Run};

/// A training of a seed, and what it came to.
#[derive(Serialize)]
pub struct Outcome {
    pub seed: u64,
    pub run: Run,
    pub clusters: Option<Clusters>,
}
