//! The methods that are compared.

use candle_core::{Result, Tensor};
use candle_cross_entropy::{CrossEntropy, ual::SmoothingMap};

use crate::data::{batches::Batch, samples::Sample};

/// What sets a sample's label smoothing.
#[derive(Clone)]
pub enum Method {
    /// Supervised fine-tuning: no smoothing.
    Sft,
    Constant(f32),
    /// Uncertainty-aware learning.
    Ual(SmoothingMap),
    /// Another one, with its smoothing spread by a prior (V) instead of evenly.
    Spread(Box<Method>, Tensor),
}

impl Method {
    pub fn name(&self) -> &'static str {
        match self {
            Self::Sft => "SFT",
            Self::Constant(_) => "constant",
            Self::Ual(_) => "UAL",
            Self::Spread(method, _) => method.name(),
        }
    }

    /// Over the rows of the samples' responses.
    pub fn mean_smoothing(&self, samples: &[Sample]) -> Result<f32> {
        Ok(match self {
            Self::Sft => 0.0,
            Self::Constant(smoothing) => *smoothing,
            Self::Spread(method, _) => method.mean_smoothing(samples)?,
            Self::Ual(map) => {
                let of_rows: Vec<f32> = samples.iter().flat_map(Sample::of_rows).collect();
                let smoothing = map.smoothing_values(&of_rows)?;
                let sum: f64 = smoothing.iter().copied().map(f64::from).sum();
                (sum / smoothing.len() as f64) as f32
            }
        })
    }

    pub fn loss(&self, batch: &Batch) -> Result<CrossEntropy> {
        let loss = CrossEntropy::new();
        Ok(match self {
            Self::Sft => loss,
            Self::Constant(smoothing) => loss.smoothing(*smoothing),
            Self::Spread(method, prior) => method.loss(batch)?.smoothing_prior(prior),
            // (B, 1): the loss broadcasts it over the sequence.
            Self::Ual(map) => {
                let (uncertainties, device) = (&batch.uncertainties, batch.targets.device());
                loss.smoothing(batch.layout.smoothing(map, uncertainties, device)?)
            }
        })
    }
}
