//! Test-time adaptation: Tent, Wang et al., "Tent: Fully Test-Time Adaptation by Entropy Minimization", arXiv 2006.10726.
//!
//! A model that meets data unlike what it was trained on goes on training there, without labels, on the entropy of its own
//! predictions:
//!
//! ```text
//! loss = mean_i H(p_i)      H(p) = −Σ_k p_k·log p_k      ∂H/∂z_k = −p_k·(log p_k + H)
//! ```
//!
//! The paper adapts the scales and shifts of normalisation layers and their statistics; here it is the first layer, as there
//! is no other that normalises.

use candle_core::{DType, Result, Tensor};
use candle_cross_entropy::{CrossEntropy, Reduction, Targets};

/// The loss of logits (N, V).
pub fn loss(logits: &Tensor) -> Result<Tensor> {
    entropy(Reduction::Mean).forward(logits, nothing(logits)?)
}

/// H of each row, reduced so.
pub fn entropy(reduction: Reduction) -> CrossEntropy {
    CrossEntropy::new().entropy_weight(1.0).reduction(reduction)
}

/// Targets without mass for logits (N, V): a class for each row, with probability 0.
pub fn nothing(logits: &Tensor) -> Result<Targets> {
    let (shape, device) = ((logits.dim(0)?, 1), logits.device());
    Ok(Targets::top_k(
        &Tensor::zeros(shape, DType::U32, device)?,
        &Tensor::zeros(shape, DType::F32, device)?,
    ))
}
