//! What of held-out rows is resampled: sums over the rows of a prompt, from which the metrics of any resample follow.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::{
    data::samples::Sample,
    report::metrics::{BINS, Row, bin_of},
};

/// Columns of a unit's sums beside those of the calibration error's bins.
const SUMS: usize = 5;
/// How many numbers a unit has.
pub const COLUMNS: usize = SUMS + BINS;

/// Sums over the rows of a prompt's responses: responses to one prompt are not independent of one another.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Unit {
    pub rows: f64,
    pub nll: f64,
    /// NaN where the truth is not known; JSON has it as null.
    #[serde(deserialize_with = "nan_of_null")]
    pub kl: f64,
    pub brier: f64,
    pub correct: f64,
    /// Confidence less correct, of the rows in each bin.
    pub gaps: [f64; BINS],
}

fn nan_of_null<'de, D: serde::Deserializer<'de>>(value: D) -> Result<f64, D::Error> {
    Ok(Option::deserialize(value)?.unwrap_or(f64::NAN))
}

impl Unit {
    fn add(&mut self, row: &Row) {
        self.rows += 1.0;
        self.nll += row.nll;
        self.kl += row.kl.unwrap_or(f64::NAN);
        self.brier += row.brier;
        self.correct += row.correct;
        self.gaps[bin_of(row.confidence)] += row.confidence - row.correct;
    }

    /// All its numbers.
    pub fn columns(&self) -> [f64; COLUMNS] {
        let mut columns = [0.0; COLUMNS];
        let sums = [self.rows, self.nll, self.kl, self.brier, self.correct];
        columns[..SUMS].copy_from_slice(&sums);
        columns[SUMS..].copy_from_slice(&self.gaps);
        columns
    }
}

/// NLL, KL, expected calibration error, Brier score and accuracy of rows, whose units' [columns](Unit::columns) have these sums.
pub fn metrics(sums: &[f64]) -> [f64; 5] {
    let rows = sums[0];
    let ece: f64 = sums[SUMS..].iter().map(|gap| gap.abs()).sum();
    [sums[1], sums[2], ece, sums[3], sums[4]].map(|sum| sum / rows)
}

/// Units of those rows that `include` holds for, in an order that follows from the samples alone. `rows` are each sample's.
pub fn units(samples: &[&Sample], rows: &[Vec<Row>], include: impl Fn(&Row) -> bool) -> Vec<Unit> {
    let mut units: BTreeMap<&[u32], Unit> = BTreeMap::new();
    for (sample, rows) in samples.iter().zip(rows) {
        for row in rows.iter().filter(|row| include(row)) {
            units.entry(sample.prompt_tokens()).or_default().add(row);
        }
    }
    units.into_values().collect()
}
