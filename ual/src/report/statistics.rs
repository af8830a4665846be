//! Intervals of what seeds differ in.

use rand::{Rng, SeedableRng, rngs::StdRng};
use serde::Serialize;

const RESAMPLES: usize = 10_000;
/// Of the interval.
const CONFIDENCE: f64 = 0.95;
/// Of the resampling, so that a report can be made again.
const SEED: u64 = 0xb007;

/// A mean, and where 95 % of the means of resamples are.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Interval {
    pub mean: f64,
    pub low: f64,
    pub high: f64,
}

impl Interval {
    /// Whether it says which sign the mean has.
    pub fn excludes_0(&self) -> bool {
        self.low > 0.0 || self.high < 0.0
    }
}

/// The percentile bootstrap (Efron, 1979): means of 10,000 resamples with replacement, always the same for the same values.
/// None of fewer than two values. Of n values it is too narrow by a factor of about √((n−1)/n).
pub fn bootstrap(values: &[f64]) -> Option<Interval> {
    if values.len() < 2 {
        return None;
    }
    let mut rng = StdRng::seed_from_u64(SEED);
    let n = values.len() as f64;
    let mut resample = || {
        let drawn = (0..values.len()).map(|_| values[rng.random_range(0..values.len())]);
        drawn.sum::<f64>() / n
    };
    let means = (0..RESAMPLES).map(|_| resample()).collect();
    Some(Interval {
        mean: values.iter().sum::<f64>() / n,
        ..percentiles(means)
    })
}

/// Of the means of resamples. `mean` is theirs.
pub fn percentiles(mut means: Vec<f64>) -> Interval {
    means.sort_by(f64::total_cmp);
    let last = (means.len() - 1) as f64;
    let at = |share: f64| means[(last * share).round() as usize];
    let outside = (1.0 - CONFIDENCE) / 2.0;
    Interval {
        mean: means.iter().sum::<f64>() / means.len() as f64,
        low: at(outside),
        high: at(1.0 - outside),
    }
}
