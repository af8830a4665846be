//! Confidence weights, learned so that a step with them helps on trusted samples.
//!
//! Kye et al., "Meta-Learned Confidence for Few-shot Learning", arXiv 2002.12017, learn over tasks how much to trust each
//! unlabelled sample. This is the idea for one task, by the rule of Ren et al., "Learning to Reweight Examples for Robust
//! Deep Learning", arXiv 1803.09050: after one step θ' = θ − η·Σ ε_i ∇loss_i, the loss L of a small trusted set changes
//! with ε_i, at ε = 0, by
//!
//! ```text
//! ∂L(θ')/∂ε_i = −η·⟨∇L(θ), ∇loss_i(θ)⟩         w_i = max(0, ⟨∇L, ∇loss_i⟩) / Σ_j max(0, …)
//! ```
//!
//! Ren et al. differentiate through the step. As only the change along v = ∇L counts, two forward passes give it for all
//! samples at once, by a central difference, which is this crate's choice:
//!
//! ```text
//! ⟨∇L, ∇loss_i⟩ ≈ ‖v‖·(loss_i(θ + δ·v/‖v‖) − loss_i(θ − δ·v/‖v‖)) / 2δ
//! ```

use candle_core::{Result, Tensor, Var};
use candle_cross_entropy::{CrossEntropy, Reduction};

/// ⟨∇L, ∇loss_i⟩ (N) of samples with targets (N), whose logits (N, V) the closure computes at the current parameters, and
/// the trusted loss L. `delta` is the norm of the parameters' displacement; they are put back.
pub fn alignment(
    parameters: &[Var],
    logits: impl Fn() -> Result<Tensor>,
    targets: &Tensor,
    trusted: &Tensor,
    delta: f64,
) -> Result<Tensor> {
    let gradients = trusted.backward()?;
    let (mut saved, mut norm_sq) = (Vec::new(), 0.0);
    for parameter in parameters {
        if let Some(gradient) = gradients.get(parameter) {
            norm_sq += f64::from(gradient.sqr()?.sum_all()?.to_scalar::<f32>()?);
            saved.push((parameter, parameter.copy()?.detach(), gradient));
        }
    }
    let norm = norm_sq.sqrt().max(f64::MIN_POSITIVE);
    let losses = |displacement: f64| {
        for (parameter, value, gradient) in &saved {
            parameter.set(&(value + (*gradient * (displacement / norm))?)?)?;
        }
        let rows = CrossEntropy::new().reduction(Reduction::None);
        rows.forward(&logits()?.detach(), targets)
    };
    let difference = (losses(delta)? - losses(-delta)?)?;
    for (parameter, value, _) in &saved {
        parameter.set(value)?;
    }
    difference * (norm / (2.0 * delta))
}

/// Weights (N) with sum 1, those of samples that point away from the trusted ones 0; all 0 where no sample helps.
pub fn weights(alignment: &Tensor) -> Result<Tensor> {
    let positive = alignment.relu()?;
    let total = positive.sum_all()?.maximum(f32::MIN_POSITIVE)?;
    positive.broadcast_div(&total)
}

/// The loss of logits (N, V) and targets (N) under weights (N) with sum 1.
pub fn loss(logits: &Tensor, targets: &Tensor, weights: &Tensor) -> Result<Tensor> {
    CrossEntropy::new()
        .row_weights(weights)
        .reduction(Reduction::Sum)
        .forward(logits, targets)
}
