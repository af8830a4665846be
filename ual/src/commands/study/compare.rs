//! Uncertainty-aware learning less each other arm: differences with intervals.

use crate::{
    commands::study::{
        arms::{SFT, SPREAD_ALIKE, UAL},
        outcome::{Chosen, Entry},
    },
    report::{
        statistics::{Interval, nested_bootstrap},
        units::{COLUMNS, metrics},
    },
};

/// What is compared: the metrics of [`metrics`], and whether lower is better.
pub const COMPARED: [(&str, bool); 5] = [
    ("NLL", true),
    ("KL", true),
    ("ECE", true),
    ("Brier", true),
    ("accuracy", false),
];

/// A difference in one metric, over one group of held-out samples.
pub struct Difference {
    pub interval: Interval,
    /// In how many of the seeds the first one is better.
    pub better: usize,
    pub seeds: usize,
    /// Whether lower is better.
    lower: bool,
}

impl Difference {
    /// Whether the first is better or worse, where the interval says.
    pub fn verdict(&self) -> Option<bool> {
        let below = self.interval.mean < 0.0;
        self.interval.excludes_0().then_some(below == self.lower)
    }
}

/// Two entries by their numbers, over one group.
pub struct Comparison {
    pub first: usize,
    pub less: usize,
    pub group: usize,
    /// A difference for each of [`COMPARED`], where the metric is known.
    pub differences: [Option<Difference>; COMPARED.len()],
}

/// UAL less each other arm, both with early stopping or both at the end; at the end also less plain fine-tuning with early
/// stopping, the simplest remedy against overfitting. And UAL that is spread otherwise less plain fine-tuning and less constant
/// smoothing that is spread alike.
fn pairs(entries: &[Entry]) -> Vec<(usize, usize)> {
    let mut pairs = Vec::new();
    for (first, ual) in entries.iter().enumerate().filter(|(_, e)| e.arm == UAL) {
        for (less, other) in entries.iter().enumerate() {
            let alike = other.early == ual.early && other.arm != UAL;
            if alike || (other.early && other.arm == SFT) {
                pairs.push((first, less));
            }
        }
    }
    for (first, ual) in entries.iter().enumerate() {
        let alike = SPREAD_ALIKE.iter().find(|(name, _)| ual.arm == *name);
        let Some((_, constant)) = alike else {
            continue;
        };
        for (less, other) in entries.iter().enumerate() {
            if other.early == ual.early && (other.arm == SFT || other.arm == *constant) {
                pairs.push((first, less));
            }
        }
    }
    pairs.sort_by_key(|&(first, _)| !entries[first].early); // what answers the question comes first
    pairs
}

/// The columns of a seed's units, entry by entry: all entries predict the same held-out samples.
fn matrix(entries: &[&Chosen], group: usize) -> Vec<Vec<f64>> {
    let units = entries.first().map_or(0, |first| first.units[group].len());
    let row = |unit: usize| {
        let columns = entries.iter().map(|e| e.units[group][unit].columns());
        columns.flatten().collect()
    };
    (0..units).map(row).collect()
}

/// Of all groups.
pub fn comparisons(entries: &[Entry]) -> Vec<Comparison> {
    let pairs = pairs(entries);
    let seeds = entries.first().map_or(0, |entry| entry.seeds.len());
    let groups = entries.first().and_then(|entry| entry.seeds.first());
    let groups = groups.map_or(0, |chosen| chosen.groups.len());
    let of_group = |group: usize| {
        let matrices = (0..seeds).map(|seed| {
            let of_seed: Vec<&Chosen> = entries.iter().map(|e| &e.seeds[seed]).collect();
            matrix(&of_seed, group)
        });
        let matrices: Vec<_> = matrices.filter(|units| !units.is_empty()).collect();
        of_units(&matrices, entries.len(), &pairs, group)
    };
    (0..groups).flat_map(of_group).collect()
}

/// Of one group, of whose seeds `matrices` are the units.
fn of_units(
    matrices: &[Vec<Vec<f64>>],
    entries: usize,
    pairs: &[(usize, usize)],
    group: usize,
) -> Vec<Comparison> {
    let values = |seed: usize, weights: &[f64], values: &mut [f64]| {
        let mut sums = vec![0.0; entries * COLUMNS];
        for (row, &weight) in matrices[seed].iter().zip(weights) {
            if weight > 0.0 {
                let sums = sums.iter_mut().zip(row);
                sums.for_each(|(sum, value)| *sum += weight * value);
            }
        }
        let of_entries: Vec<_> = sums.chunks(COLUMNS).map(metrics).collect();
        for (values, &(first, less)) in values.chunks_mut(COMPARED.len()).zip(pairs) {
            for (metric, value) in values.iter_mut().enumerate() {
                *value = of_entries[first][metric] - of_entries[less][metric];
            }
        }
    };
    let units: Vec<usize> = matrices.iter().map(Vec::len).collect();
    let width = pairs.len() * COMPARED.len();
    let intervals = nested_bootstrap(&units, width, values);
    let mut of_seeds = vec![vec![0.0; width]; units.len()];
    for (seed, of_seed) in of_seeds.iter_mut().enumerate() {
        values(seed, &vec![1.0; units[seed]], of_seed);
    }
    let comparison = |(pair, &(first, less)): (usize, &(usize, usize))| Comparison {
        first,
        less,
        group,
        differences: std::array::from_fn(|metric| {
            let (at, lower) = (pair * COMPARED.len() + metric, COMPARED[metric].1);
            let interval = *intervals.get(at)?;
            let better = |d: &f64| if lower { *d < 0.0 } else { *d > 0.0 };
            let of_seeds = of_seeds.iter().map(|of_seed| of_seed[at]);
            interval.mean.is_finite().then(|| Difference {
                interval,
                better: of_seeds.filter(better).count(),
                seeds: units.len(),
                lower,
            })
        }),
    };
    pairs.iter().enumerate().map(comparison).collect()
}
