//! Feasible Learning: Ramirez, Hounie et al., arXiv 2501.14912.
//!
//! No mean is minimised: any model will do whose loss is at most c on every sample. Every sample has a multiplier λ_i ≥ 0,
//! and the step is a descent of the Lagrangian in the model, after an ascent in the multipliers:
//!
//! ```text
//! min_θ max_{λ≥0}  Σ λ_i·(loss_i − c)          λ_i ← max(0, λ_i + η·(loss_i − c − λ_i/α))
//! ```
//!
//! With a finite α this is the paper's resilient form: a sample that cannot meet c gets a slack s_i at the price of α/2·s_i²,
//! whose best value is λ_i/α, so its multiplier settles instead of growing without bound. The multipliers start at 0 as in
//! the authors' code. That they move before the model in each step, and that the Lagrangian is divided by the number of
//! samples, is this crate's choice.

use candle_core::{Result, Tensor};
use candle_cross_entropy::{CrossEntropy, Reduction};

pub struct Feasible {
    /// λ (N), of all training samples.
    pub multipliers: Tensor,
    /// c: the largest loss that a sample may have, in nats.
    pub bound: f64,
    /// η.
    pub dual_rate: f64,
    /// α; infinite for no slack.
    pub alpha: f64,
}

impl Feasible {
    /// The loss of logits (N, V) and targets (N) of all samples; moves the multipliers.
    pub fn loss(&mut self, logits: &Tensor, targets: &Tensor) -> Result<Tensor> {
        let losses = CrossEntropy::new()
            .reduction(Reduction::None)
            .forward(logits, targets)?;
        let slack = (&self.multipliers / self.alpha)?;
        let violation = ((losses.detach() - self.bound)? - slack)?;
        self.multipliers = (&self.multipliers + violation * self.dual_rate)?.relu()?;
        // −λ·c has no gradient by the model.
        (losses * &self.multipliers)?.mean_all()
    }
}
