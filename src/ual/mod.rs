//! Uncertainty-aware learning: from a sample's uncertainty to its label smoothing, and from samples to rows of the loss.
//!
//! "Uncertainty Aware Learning for Language Model Alignment" (arXiv 2406.04854) fine-tunes on samples whose
//! uncertainty was elicited from a more capable model, and sets the label smoothing of every sample by it: the abstract
//! says that much, and it is all of the paper that was at hand. This crate's own choices are
//!
//! * the shape of the map: ε(u) = min(scale·u, max), and 0 for u ≤ 0. Only ratios of uncertainties matter, so their unit
//!   does not. [`Shape`] has others, for ablation;
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
//!
//! [`Layout`] makes inputs, response-only targets and smoothing of padded and of packed batches; [`collect`] reads
//! uncertainties that may be missing.

mod curve;
mod map;
mod rows;

use std::fmt::Display;

use candle_core::{Result, bail};

pub use curve::Shape;
pub use map::SmoothingMap;
pub use rows::Layout;

/// The uncertainties of samples, each with what names it (an id, a line number), in their order.
///
/// Fails at the first sample whose uncertainty is missing (`None`) or not finite, naming it.
///
/// ```
/// use candle_cross_entropy::ual;
///
/// # fn main() -> candle_core::Result<()> {
/// assert_eq!(ual::collect([("a", Some(0.5)), ("b", Some(0.0))])?, [0.5, 0.0]);
/// let error = ual::collect([("a", Some(0.5)), ("b", None)]).unwrap_err();
/// assert!(error.to_string().contains("sample b has no uncertainty"));
/// # Ok(())
/// # }
/// ```
pub fn collect(samples: impl IntoIterator<Item = (impl Display, Option<f32>)>) -> Result<Vec<f32>> {
    samples
        .into_iter()
        .map(|(id, uncertainty)| match uncertainty {
            Some(u) if u.is_finite() => Ok(u),
            Some(u) => bail!("sample {id}: uncertainty is {u}; it must be finite"),
            None => bail!("sample {id} has no uncertainty"),
        })
        .collect()
}
