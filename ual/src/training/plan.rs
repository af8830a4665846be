//! What a training does: steps, batches, learning rate.

use clap::ValueEnum;
use serde::Serialize;

/// What the loss is computed from.
#[derive(Clone, Copy, Debug, Default, ValueEnum, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Loss {
    /// From hidden states and output projection, which the loss makes logits of in tiles: less memory
    #[default]
    Linear,
    /// From all logits, which the model computes
    Logits,
}

#[derive(Clone, Copy, Debug, Serialize)]
pub struct Plan {
    pub steps: usize,
    /// Samples in a batch.
    pub batch: usize,
    /// Batches of a step.
    pub accumulate: usize,
    pub loss: Loss,
    pub learning_rate: f64,
    pub weight_decay: f64,
    /// Largest norm of all gradients together.
    pub clip: f64,
    pub seed: u64,
    /// How many points the loss curve has, and of how many held-out samples at most.
    pub points: usize,
    pub curve_samples: usize,
}

impl Plan {
    /// Up in the first tenth of the steps, then a cosine down to a tenth of the peak.
    pub fn learning_rate_of(&self, step: usize) -> f64 {
        let warmup = self.steps.div_ceil(10);
        let share = if step <= warmup {
            step as f64 / warmup as f64
        } else {
            let done = (step - warmup) as f64 / (self.steps - warmup) as f64;
            0.1 + 0.45 * (1.0 + (std::f64::consts::PI * done).cos())
        };
        self.learning_rate * share
    }
}
