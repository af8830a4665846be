//! The loss curve of a training.

use serde::{Deserialize, Serialize};

use crate::report::{run::Group, units::Unit};

/// A point of the loss curves: negative log-likelihood without smoothing, so that methods can be compared.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub struct Point {
    pub step: usize,
    /// Mean over the batches since the point before.
    pub train_nll: f64,
    pub held_out_nll: f64,
    /// Of all samples that were set aside for validation, where there are any.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub validation_nll: Option<f64>,
}

/// What early stopping would have kept: the point with the least validation NLL, the first of equals.
#[derive(Clone, Serialize, Deserialize)]
pub struct Stopped {
    pub step: usize,
    pub validation_nll: f64,
    pub held_out: Measured,
}

/// What a model predicts of the held-out samples.
#[derive(Clone, Serialize, Deserialize)]
pub struct Measured {
    pub groups: Vec<Group>,
    /// Of each group what intervals are made of.
    pub units: Vec<Vec<Unit>>,
}

#[derive(Clone, Default, Serialize, Deserialize)]
pub struct Curve {
    pub points: Vec<Point>,
    pub seconds: f64,
    pub tokens_per_second: f64,
    /// So far; with validation samples alone.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stopped: Option<Stopped>,
}
