//! Instance-reweighted distributionally robust optimisation, IR-DRO: Chen et al., "Take the Bull by the Horns: Hard
//! Sample-Reweighted Continual Training Improves LLM Generalization", arXiv 2402.14270.
//!
//! The model minimises what an adversary maximises over the samples' weights w (Σ w = 1), who pays τ for leaving the
//! uniform u:
//!
//! ```text
//! min_θ max_w  Σ w_i·loss_i − τ·KL(w ‖ u)      w_i = exp(loss_i/τ) / Σ_j exp(loss_j/τ)
//! ```
//!
//! The weights are a constant of the step, over a batch as in the authors' code. There loss_i is the mean over a sample's
//! tokens; here a sample is one row.

use candle_core::{Result, Tensor};
use candle_cross_entropy::{CrossEntropy, Reduction};
use candle_nn::ops::softmax;

/// The loss of logits (N, V), targets (N), and the samples' weights (N). τ > 0, in nats.
pub fn loss(logits: &Tensor, targets: &Tensor, tau: f64) -> Result<(Tensor, Tensor)> {
    let losses = CrossEntropy::new()
        .reduction(Reduction::None)
        .forward(logits, targets)?;
    let weights = softmax(&(losses.detach() / tau)?, 0)?;
    // A product with row losses, and so one pass over the logits: row weights would have to be known before it.
    Ok(((losses * &weights)?.sum_all()?, weights))
}
