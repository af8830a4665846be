//! Active learning by gradient norms, after LPLgrad: Gul et al., "LPLgrad: Optimizing Active Learning Through Gradient Norm
//! Sample Selection and Auxiliary Model Training", arXiv 2411.15217.
//!
//! Of the unlabelled samples those are sent to be labelled whose gradient is largest. With logits z = W·h, prediction p
//! and q the one-hot vector of the predicted class, the loss at that class has the gradient (p − q)·hᵀ by W, and
//!
//! ```text
//! score_i = ‖∂loss_i/∂W‖² = ‖p_i − q_i‖²·‖h_i‖²
//! ```
//!
//! whose first factor comes with the loss, so that no backward is needed. The paper takes the norm of the gradient of the
//! prediction's entropy by all parameters; the loss at the predicted class, and the output layer alone, are this crate's
//! reading. Its second network, which predicts losses, is left out.

use candle_core::{D, Result, Tensor};
use candle_cross_entropy::CrossEntropy;

/// Scores (N) of hidden states (N, D) and output projection W (V, D).
pub fn scores(hidden: &Tensor, weight: &Tensor) -> Result<Tensor> {
    let (hidden, weight) = (hidden.detach(), weight.detach());
    let predicted = hidden.matmul(&weight.t()?)?.argmax(D::Minus1)?;
    let (_, stats) =
        CrossEntropy::new().forward_linear_with_stats(&hidden, &weight, None, &predicted)?;
    stats.grad_norm_sq * hidden.sqr()?.sum(D::Minus1)?
}

/// The k samples with the largest scores, the largest first.
pub fn select(scores: &Tensor, k: usize) -> Result<Vec<u32>> {
    let mut order = scores.arg_sort_last_dim(false)?.to_vec1::<u32>()?;
    order.truncate(k);
    Ok(order)
}
