//! What trainings came to, and what is chosen of it on the validation part.

use serde::Serialize;

use crate::{
    commands::probe::arms::{Method, Spread},
    report::metrics::Summary,
};

/// After so many epochs.
#[derive(Clone, Debug, Serialize)]
pub struct Point {
    pub epoch: usize,
    /// Over the validation part's own responses.
    pub validation_nll: f64,
    /// Of the held-out samples: a summary a [part](crate::commands::probe::trainings::PARTS).
    pub parts: Vec<Option<Summary>>,
}

/// A training.
#[derive(Clone, Debug, Serialize)]
pub struct Curve {
    pub method: Method,
    pub spread: Spread,
    pub mean_smoothing: f32,
    pub points: Vec<Point>,
}

/// All trainings of a seed on so many samples.
#[derive(Clone, Debug, Serialize)]
pub struct Outcome {
    pub seed: u64,
    pub size: usize,
    pub curves: Vec<Curve>,
}

/// When a training ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub enum Ending {
    /// After all epochs.
    Last,
    /// Where its validation loss is least.
    Early,
}

impl Curve {
    /// Where it ends, by the validation part.
    pub fn end(&self, ending: Ending) -> &Point {
        let last = self.points.last().expect("the last epoch is measured");
        match ending {
            Ending::Last => last,
            Ending::Early => self
                .points
                .iter()
                .min_by(|a, b| a.validation_nll.total_cmp(&b.validation_nll))
                .unwrap_or(last),
        }
    }
}

impl Outcome {
    /// Of the trainings of an arm, one a mean smoothing, that whose end has the least validation loss, and its end.
    pub fn chosen(&self, arm: (Method, Spread), ending: Ending) -> Option<(&Curve, &Point)> {
        let of_arm = self.of(arm).map(|curve| (curve, curve.end(ending)));
        of_arm.min_by(|a, b| a.1.validation_nll.total_cmp(&b.1.validation_nll))
    }

    pub fn of(&self, (method, spread): (Method, Spread)) -> impl Iterator<Item = &Curve> {
        self.curves
            .iter()
            .filter(move |curve| curve.method == method && curve.spread == spread)
    }
}
