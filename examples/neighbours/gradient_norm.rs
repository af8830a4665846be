//! Active learning by gradient norms, after LPLgrad: Gul et al., "LPLgrad: Optimizing Active Learning Through Gradient Norm
//! Sample Selection and Auxiliary Model Training", arXiv 2411.15217.
//!
//! Of the unlabelled samples those are sent to be labelled whose gradient is largest. The paper's is that of the
//! prediction's entropy H(p), which needs no label. With logits z = W·h its gradient by the output layer W is an outer
//! product, whose norm is that of its factors, so that no backward by parameters is needed:
//!
//! ```text
//! score_i = ‖∂H(p_i)/∂W‖² = ‖∂H/∂z_i‖²·‖h_i‖²      ∂H/∂z_k = −p_k·(log p_k + H)
//! ```
//!
//! That is 0 where p is even: the entropy is at its maximum there, and the most uncertain samples are passed over. The loss
//! at the predicted class y has no such hole, with q = 1 at y and 0 elsewhere; its first factor is a statistic of the loss:
//!
//! ```text
//! score_i = ‖∂(−log p_y)/∂W‖² = ‖p_i − q_i‖²·‖h_i‖²
//! ```
//!
//! The paper takes all parameters; the output layer alone is this example's. Its second network, which predicts losses, is
//! left out.

use candle_core::{D, Result, Tensor};
use candle_cross_entropy::{CrossEntropy, Reduction};

use crate::adaptation::{entropy, nothing};

/// Scores (N) by the gradient of the entropy, of hidden states (N, D) and output projection W (V, D).
pub fn entropy_scores(hidden: &Tensor, weight: &Tensor) -> Result<Tensor> {
    let (hidden, weight) = (hidden.detach(), weight.detach());
    let logits = hidden.matmul(&weight.t()?)?;
    let nothing = nothing(&logits)?;
    let of_entropy = entropy(Reduction::Sum).loss_and_grad_inplace(logits, nothing)?;
    of_entropy.grad.sqr()?.sum(D::Minus1)? * hidden.sqr()?.sum(D::Minus1)?
}

/// Scores (N) by the gradient of the loss at the predicted class.
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
