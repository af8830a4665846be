//! Held-out metrics: calibration and quality of the predicted distributions.

use serde::{Deserialize, Serialize};

/// What one predicted token contributes.
#[derive(Clone, Copy, Debug)]
pub struct Row {
    /// Uncertainty of its sample.
    pub uncertainty: f32,
    /// Of its sample.
    pub group: usize,
    pub nll: f64,
    pub entropy: f64,
    /// Probability of the predicted token.
    pub confidence: f64,
    /// 1 where that is right, 0 where it is not; of several answers the share that it is.
    pub correct: f64,
    /// Σ (p_k − 1[k = y])².
    pub brier: f64,
    /// From the true distribution to the predicted, where the true one is known.
    pub kl: Option<f64>,
}

/// Means over rows.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub struct Summary {
    pub rows: usize,
    pub nll: f64,
    pub ece: f64,
    pub brier: f64,
    pub entropy: f64,
    pub accuracy: f64,
    pub kl: Option<f64>,
}

/// A bin of the reliability diagram.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Bin {
    pub rows: usize,
    pub confidence: f64,
    pub accuracy: f64,
}

/// Of the reliability diagram.
pub const BINS: usize = 15;

/// Which of them a confidence is in.
pub fn bin_of(confidence: f64) -> usize {
    let bin = (confidence * BINS as f64).ceil() as usize;
    bin.clamp(1, BINS) - 1
}

/// The mean; None of nothing.
pub fn mean(values: impl Iterator<Item = f64>) -> Option<f64> {
    let (sum, count) = values.fold((0.0, 0usize), |(sum, count), value| {
        (sum + value, count + 1)
    });
    (count > 0).then(|| sum / count as f64)
}

/// Of a distribution, in nats; 0 of nothing.
pub fn entropy(shares: impl Iterator<Item = f64>) -> f64 {
    let sum: f64 = shares.filter(|&p| p > 0.0).map(|p| -p * p.ln()).sum();
    sum.max(0.0) // that of one answer is -0
}

/// Means over the rows; None of no rows.
pub fn summarise(rows: &[Row]) -> Option<Summary> {
    let average = |value: fn(&Row) -> f64| mean(rows.iter().map(value));
    Some(Summary {
        rows: rows.len(),
        nll: average(|row| row.nll)?,
        ece: expected_calibration_error(&reliability(rows)),
        brier: average(|row| row.brier)?,
        entropy: average(|row| row.entropy)?,
        accuracy: average(|row| row.correct)?,
        kl: mean(rows.iter().filter_map(|row| row.kl)),
    })
}

/// Mean confidence and accuracy in 15 bins (a, b] of equal width over confidence.
pub fn reliability(rows: &[Row]) -> [Bin; BINS] {
    let mut bins = [Bin::default(); BINS];
    for row in rows {
        let bin = &mut bins[bin_of(row.confidence)];
        bin.rows += 1;
        bin.confidence += row.confidence;
        bin.accuracy += row.correct;
    }
    for bin in bins.iter_mut().filter(|bin| bin.rows > 0) {
        bin.confidence /= bin.rows as f64;
        bin.accuracy /= bin.rows as f64;
    }
    bins
}

/// Mean distance of confidence and accuracy, every bin weighted by its rows.
pub fn expected_calibration_error(bins: &[Bin]) -> f64 {
    let rows: usize = bins.iter().map(|bin| bin.rows).sum();
    bins.iter()
        .map(|bin| bin.rows as f64 * (bin.confidence - bin.accuracy).abs())
        .sum::<f64>()
        / rows.max(1) as f64
}

/// What parts certain samples, below it, from uncertain ones: the median of their uncertainties (of an even number, the
/// upper one of the two). Where half of them are the least there is, the next larger: they are certain. None of nothing.
pub fn threshold(mut uncertainties: Vec<f32>) -> Option<f32> {
    uncertainties.sort_by(f32::total_cmp);
    let (least, median) = (
        *uncertainties.first()?,
        uncertainties[uncertainties.len() / 2],
    );
    let larger = uncertainties.iter().find(|&&u| u > least);
    Some(larger.map_or(median, |&larger| median.max(larger)))
}

/// Rows of certain samples and of uncertain ones.
pub fn split(rows: &[Row], threshold: f32) -> (Vec<Row>, Vec<Row>) {
    rows.iter().partition(|row| row.uncertainty < threshold)
}
