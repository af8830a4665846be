//! Active learning by gradient norms, after LPLgrad: Gul et al., "LPLgrad: Optimizing Active Learning Through Gradient Norm
//! Sample Selection and Auxiliary Model Training", arXiv 2411.15217.
//!
//! Of the unlabelled samples those are sent to be labelled whose predictions' entropy H has the largest gradient. With
//! logits z = W·h, that gradient by W is ∂H/∂z·hᵀ, and
//!
//! ```text
//! score_i = ‖∂H_i/∂W‖² = ‖∂H_i/∂z‖²·‖h_i‖²      ∂H/∂z_k = −p_k·(log p_k + H)
//! ```
//!
//! The paper takes the gradient by all parameters; the output layer alone is this crate's reading, by which no backward is
//! needed. Its second network, which predicts losses, is left out.

use candle_core::{D, Result, Tensor};
use candle_cross_entropy::Reduction;

use crate::adaptation::{entropy_alone, nothing};

/// Scores (N) of hidden states (N, D) and output projection W (V, D).
pub fn scores(hidden: &Tensor, weight: &Tensor) -> Result<Tensor> {
    let (hidden, weight) = (hidden.detach(), weight.detach());
    let logits = hidden.matmul(&weight.t()?)?;
    let targets = nothing(&logits)?;
    let (_, gradient) = entropy_alone()
        .reduction(Reduction::None)
        .loss_and_grad_inplace_without_stats(logits, targets)?;
    gradient.sqr()?.sum(D::Minus1)? * hidden.sqr()?.sum(D::Minus1)?
}

/// The k samples with the largest scores, the largest first.
pub fn select(scores: &Tensor, k: usize) -> Result<Vec<u32>> {
    let mut order = scores.arg_sort_last_dim(false)?.to_vec1::<u32>()?;
    order.truncate(k);
    Ok(order)
}
