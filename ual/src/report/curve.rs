//! The loss curve of a training.

use serde::{Deserialize, Serialize};

/// A point of the loss curves: negative log-likelihood without smoothing, so that methods can be compared.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub struct Point {
    pub step: usize,
    /// Mean over the batches since the point before.
    pub train_nll: f64,
    pub held_out_nll: f64,
}

#[derive(Clone, Default, Serialize, Deserialize)]
pub struct Curve {
    pub points: Vec<Point>,
    pub seconds: f64,
    pub tokens_per_second: f64,
}
