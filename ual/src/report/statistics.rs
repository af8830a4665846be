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
    let mean = |values: &[f64]| values.iter().sum::<f64>() / values.len() as f64;
    let means = resampled(values, RESAMPLES, |values| Some(mean(values)));
    Some(Interval {
        mean: mean(values),
        ..percentiles(means)
    })
}

/// A number of each of so many resamples of the values, with replacement; always the same.
pub fn resampled<T: Copy>(
    values: &[T],
    resamples: usize,
    of: impl Fn(&[T]) -> Option<f64>,
) -> Vec<f64> {
    let mut rng = StdRng::seed_from_u64(SEED);
    let mut resample = || {
        let drawn = (0..values.len()).map(|_| values[rng.random_range(0..values.len())]);
        of(&drawn.collect::<Vec<_>>())
    };
    (0..resamples).filter_map(|_| resample()).collect()
}

/// Intervals of `width` numbers, each a mean over seeds, of which each has so many `units` of its own. A resample draws seeds
/// with replacement, and for each one drawn as many of its units as it has, anew and with replacement; of one seed, units alone.
/// `values` computes the numbers of a seed from how often each of its units was drawn; once, for the means themselves, all
/// have been drawn once. Each interval is moved by what the resamples' mean differs from that mean: nothing to speak of for
/// numbers that are linear in the units, the bias of resampling for others. None of no seeds.
pub fn nested_bootstrap(
    units: &[usize],
    width: usize,
    values: impl Fn(usize, &[f64], &mut [f64]),
) -> Vec<Interval> {
    if units.is_empty() {
        return Vec::new();
    }
    let mut rng = StdRng::seed_from_u64(SEED);
    let (seeds, mut of_seed) = (units.len() as f64, vec![0.0; width]);
    let mut add = |sums: &mut [f64], seed: usize, weights: &[f64]| {
        values(seed, weights, &mut of_seed);
        sums.iter_mut().zip(&of_seed).for_each(|(s, v)| *s += v);
    };
    let mut means = vec![0.0; width];
    for (seed, &units) in units.iter().enumerate() {
        add(&mut means, seed, &vec![1.0; units]);
    }
    let mut resampled = vec![Vec::with_capacity(RESAMPLES); width];
    for _ in 0..RESAMPLES {
        let mut sums = vec![0.0; width];
        for _ in units {
            let seed = rng.random_range(0..units.len());
            let mut weights = vec![0.0; units[seed]];
            for _ in 0..units[seed] {
                weights[rng.random_range(0..units[seed])] += 1.0;
            }
            add(&mut sums, seed, &weights);
        }
        let sums = resampled.iter_mut().zip(sums);
        sums.for_each(|(means, sum)| means.push(sum / seeds));
    }
    let centred = |(resampled, sum): (Vec<f64>, f64)| {
        let (interval, mean) = (percentiles(resampled), sum / seeds);
        let bias = interval.mean - mean;
        Interval {
            mean,
            low: interval.low - bias,
            high: interval.high - bias,
        }
    };
    resampled.into_iter().zip(means).map(centred).collect()
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
