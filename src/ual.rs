//! Uncertainty-aware learning: from a sample's uncertainty to its label smoothing.
//!
//! "Uncertainty Aware Learning for Language Model Alignment" (arXiv 2406.04854) fine-tunes on samples whose
//! uncertainty was elicited from a more capable model, and sets the label smoothing of every sample by it: the abstract
//! says that much, and it is all of the paper that was at hand. This crate's own choices are
//!
//! * the shape of the map: ε(u) = min(scale·u, max), and 0 for u ≤ 0. Only ratios of uncertainties matter, so their unit
//!   does not;
//! * that `scale` follows from the data: it is the one that makes the mean smoothing of a data set a given value, after
//!   clipping. Uniform smoothing with the same value is then a fair baseline: both spend the same smoothing;
//! * that the map is fitted once, on the training samples, and saved with the run. A batch's composition does not
//!   change a sample's smoothing.
//!
//! ```
//! use candle_core::{Device, Tensor};
//! use candle_cross_entropy::{CrossEntropy, ual::SmoothingMap};
//!
//! # fn main() -> candle_core::Result<()> {
//! let uncertainties = [0.0f32, 0.25, 0.5, 1.25]; // of the training samples
//! let map = SmoothingMap::fit(&uncertainties, 0.125, 0.5)?;
//! assert_eq!(map.smoothing(0.5)?, 0.125); // the mean uncertainty gets the mean smoothing
//!
//! let batch = [1.25f32, 0.0];
//! let logits = Tensor::zeros((2, 8, 1000), candle_core::DType::F32, &Device::Cpu)?;
//! let targets = Tensor::zeros((2, 8), candle_core::DType::U32, &Device::Cpu)?;
//! let smoothing = map.smoothing_column(&batch, logits.device())?; // (2, 1): broadcasts over the sequence
//! let loss = CrossEntropy::new().smoothing(smoothing).forward(&logits, &targets)?;
//! # Ok(())
//! # }
//! ```

use candle_core::{Device, Result, Tensor, bail};
use serde::{Deserialize, Serialize};

/// Map from uncertainty to smoothing, ε(u) = min(scale·u, max) and 0 for u ≤ 0, whose mean over the data it was
/// fitted on is a given one.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(try_from = "Unchecked")]
pub struct SmoothingMap {
    // f32 so that its shortest decimal form reads back as the same number, in any format.
    scale: f32,
    max: f32,
}

#[derive(Deserialize)]
#[serde(rename = "SmoothingMap")]
struct Unchecked {
    scale: f32,
    max: f32,
}

impl TryFrom<Unchecked> for SmoothingMap {
    type Error = String;

    fn try_from(Unchecked { scale, max }: Unchecked) -> std::result::Result<Self, String> {
        if !(scale.is_finite() && scale >= 0.0) {
            return Err(format!(
                "scale is {scale}; it must be finite and at least 0"
            ));
        }
        if !(0.0..=1.0).contains(&max) {
            return Err(format!("max is {max}; it must be in [0, 1]"));
        }
        Ok(Self { scale, max })
    }
}

impl SmoothingMap {
    /// The map whose mean smoothing over `uncertainties` is `mean`, with no value above `max`.
    ///
    /// Fails when `max` is outside \[0, 1\], when `mean` is outside \[0, max\], when an uncertainty is not finite, and
    /// when no scale gives that mean because too many uncertainties are 0 or less.
    pub fn fit(uncertainties: &[f32], mean: f32, max: f32) -> Result<Self> {
        if !(0.0..=1.0).contains(&max) {
            bail!("max is {max}; it must be in [0, 1]")
        }
        if !(0.0..=max).contains(&mean) {
            bail!("mean is {mean}; it must be in [0, max], and max is {max}")
        }
        if uncertainties.is_empty() {
            bail!("uncertainties is empty; there must be one of each training sample")
        }
        check_finite(uncertainties)?;
        if mean == 0.0 {
            return Ok(Self { scale: 0.0, max });
        }

        let mut positive: Vec<f64> = uncertainties
            .iter()
            .filter(|&&u| u > 0.0)
            .map(|&u| f64::from(u))
            .collect();
        let cap = f64::from(max);
        let budget = f64::from(mean) * uncertainties.len() as f64;
        let reachable = cap * positive.len() as f64;
        // Half an f32 step of tolerance: mean and max that are meant to be equal may come from different sums.
        if budget > reachable * (1.0 + f64::from(f32::EPSILON) / 2.0) {
            bail!(
                "mean is {mean}; it must be at most {}: of {} uncertainties {} are above 0, and max is {max}",
                reachable / uncertainties.len() as f64,
                uncertainties.len(),
                positive.len(),
            )
        }

        // The mean after clipping is the smallest, over all numbers of clipped values, of the mean with that many of
        // the largest at `max` and the others unclipped. So the scale is the largest of the solutions of these linear
        // equations. Summed from the smallest up, so that no small value is lost beside a large one.
        positive.sort_by(f64::total_cmp);
        let mut unclipped = 0.0;
        let mut scale = 0f64;
        for (i, u) in positive.iter().enumerate() {
            unclipped += u;
            let clipped = cap * (positive.len() - 1 - i) as f64;
            scale = scale.max((budget - clipped) / unclipped);
        }
        if scale > f64::from(f32::MAX) {
            bail!(
                "uncertainties above 0 start at {:e}; they are too small to be scaled",
                positive[0]
            )
        }
        Ok(Self {
            scale: scale as f32,
            max,
        })
    }

    /// The smoothing of a sample, in \[0, max\]. Fails when `uncertainty` is not finite.
    pub fn smoothing(&self, uncertainty: f32) -> Result<f32> {
        if !uncertainty.is_finite() {
            bail!("uncertainty is {uncertainty}; it must be finite")
        }
        Ok(self.evaluate(uncertainty))
    }

    /// The smoothing of the B samples of a batch as a (B, 1) tensor, which broadcasts over targets (B, T).
    pub fn smoothing_column(&self, uncertainties: &[f32], device: &Device) -> Result<Tensor> {
        check_finite(uncertainties)?;
        let values: Vec<f32> = uncertainties.iter().map(|&u| self.evaluate(u)).collect();
        Tensor::from_vec(values, (uncertainties.len(), 1), device)
    }

    /// The largest smoothing the map gives.
    pub fn max(&self) -> f32 {
        self.max
    }

    /// Smoothing per unit of uncertainty, where it is not clipped.
    pub fn scale(&self) -> f32 {
        self.scale
    }

    fn evaluate(&self, uncertainty: f32) -> f32 {
        (f64::from(self.scale) * f64::from(uncertainty)).clamp(0.0, f64::from(self.max)) as f32
    }
}

fn check_finite(uncertainties: &[f32]) -> Result<()> {
    match uncertainties.iter().position(|u| !u.is_finite()) {
        Some(i) => bail!(
            "uncertainties[{i}] is {}; it must be finite",
            uncertainties[i]
        ),
        None => Ok(()),
    }
}
