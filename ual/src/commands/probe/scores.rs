//! What heads' predictions are worth against the distribution of people's responses.

use anyhow::{Context, Result};
use candle_core::{Device, Tensor};
use candle_cross_entropy::{CrossEntropy, Reduction};

use crate::report::metrics::{Row, Summary, entropy, mean, summarise};

/// Samples that a head is measured on.
pub struct Measured {
    /// (N, K) f32: the share of people who gave each response.
    truth: Tensor,
    /// Of every sample.
    rows: Vec<Truth>,
    /// Names and members.
    parts: Vec<(&'static str, Vec<usize>)>,
}

struct Truth {
    shares: Vec<f64>,
    entropy: f64,
    /// Σ q².
    squares: f64,
}

impl Measured {
    /// `truths` are distributions over the first of K outputs.
    pub fn new(
        truths: Vec<Vec<f64>>,
        outputs: usize,
        parts: Vec<(&'static str, Vec<usize>)>,
    ) -> Result<Self> {
        let padded = truths
            .iter()
            .flat_map(|shares| (0..outputs).map(|k| shares.get(k).copied().unwrap_or(0.0) as f32));
        let truth = Tensor::from_vec(padded.collect(), (truths.len(), outputs), &Device::Cpu)?;
        let rows = truths.into_iter().map(|shares| Truth {
            entropy: entropy(shares.iter().copied()),
            squares: shares.iter().map(|q| q * q).sum(),
            shares,
        });
        Ok(Self {
            truth,
            rows: rows.collect(),
            parts,
        })
    }

    /// Of logits (N, K): expectations over the distribution of responses. A summary a part.
    pub fn summaries(&self, logits: &Tensor) -> Result<Vec<Option<Summary>>> {
        let rows = self.scored(logits)?;
        let part = |(_, members): &(_, Vec<usize>)| {
            let rows: Vec<Row> = members.iter().map(|&i| rows[i]).collect();
            summarise(&rows)
        };
        Ok(self.parts.iter().map(part).collect())
    }

    /// The mean over all samples.
    pub fn nll(&self, logits: &Tensor) -> Result<f64> {
        let nll = self.scored(logits)?.into_iter().map(|row| row.nll);
        mean(nll).context("there is a sample")
    }

    fn scored(&self, logits: &Tensor) -> Result<Vec<Row>> {
        let loss = CrossEntropy::new().reduction(Reduction::None);
        let (_, stats) = loss.forward_with_stats(logits, &self.truth)?;
        let columns = [
            &stats.nll,
            &stats.entropy,
            &stats.max_prob,
            &stats.grad_norm_sq,
        ];
        let [nll, entropy, confidence, distance] = columns.map(|column| column.to_vec1::<f32>());
        let (nll, entropy, confidence, distance) = (nll?, entropy?, confidence?, distance?);
        let predicted = stats.predicted.to_vec1::<u32>()?;
        let row = |(i, truth): (usize, &Truth)| Row {
            uncertainty: 0.0,
            group: 0,
            nll: f64::from(nll[i]),
            entropy: f64::from(entropy[i]),
            confidence: f64::from(confidence[i]),
            correct: truth
                .shares
                .get(predicted[i] as usize)
                .copied()
                .unwrap_or(0.0),
            // The mean over responses y of ‖p − e_y‖² is ‖p − q‖² + 1 − ‖q‖².
            brier: f64::from(distance[i]) + 1.0 - truth.squares,
            kl: Some(f64::from(nll[i]) - truth.entropy),
        };
        Ok(self.rows.iter().enumerate().map(row).collect())
    }
}
