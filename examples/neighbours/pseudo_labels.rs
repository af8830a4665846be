//! Pseudo-labels for imbalanced classes with weights by entropy, after SeMi: Wang et al., "When Imbalanced Semi-Supervised
//! Learning Meets Mining Hard Examples", arXiv 2501.06004.
//!
//! The few labelled samples have the classes with frequencies π, the unlabelled ones evenly: predictions q are adjusted for
//! it. An unlabelled sample that is certain gets its class as a label; the others are held to q itself, a soft target. The
//! harder a sample, the more it weighs (the paper's online hard example mining):
//!
//! ```text
//! q    = softmax((z − τ·log π)/T)
//! t    = the class of q where H(q)/ln V ≤ threshold, else q
//! loss = mean over labelled of nll + (1/N) Σ_i w_i·Σ_k −t_ik·log p_ik      w_i = 1 − s + s·H(q_i)/ln V
//! ```
//!
//! Adjustment, soft targets and weights are those of the authors' code. It accepts by max q ≥ threshold; to accept by
//! entropy is this crate's reading. Left out: two augmentations of each sample, balanced memory bank, a second head that is
//! trained on z + τ·log π.

use candle_core::{DType, Result, Tensor};
use candle_cross_entropy::{CrossEntropy, Reduction};
use candle_nn::{encoding::one_hot, ops::softmax};

pub struct Labeller {
    /// τ·log π, (V) f32.
    pub adjustment: Tensor,
    /// T.
    pub temperature: f64,
    /// A share of the largest entropy, ln V.
    pub threshold: f64,
    /// s.
    pub hardness: f64,
}

pub struct PseudoLabels {
    /// Whether a row has a class as its target, (N) u8.
    pub accepted: Tensor,
    /// t, (N, V) f32.
    pub targets: Tensor,
    /// w, (N) f32.
    pub weights: Tensor,
}

/// log π (V) of so many samples a class, each of which has some.
pub fn log_frequencies(counts: &Tensor) -> Result<Tensor> {
    let counts = counts.to_dtype(DType::F32)?;
    counts.broadcast_div(&counts.sum_all()?)?.log()
}

impl Labeller {
    /// From logits (N, V).
    pub fn label(&self, logits: &Tensor) -> Result<PseudoLabels> {
        let (rows, classes) = logits.dims2()?;
        let logits = logits.detach().broadcast_sub(&self.adjustment)?;
        let logits = (logits / self.temperature)?;
        let any = Tensor::zeros(rows, DType::U32, logits.device())?;
        // Entropy and arg max come with the loss, whatever the target.
        let (_, stats) = CrossEntropy::new().forward_with_stats(&logits, &any)?;
        let entropy = (stats.entropy / (classes as f64).ln())?;
        let accepted = entropy.le(self.threshold)?;
        let hard = one_hot(stats.predicted, classes, 1f32, 0f32)?;
        let soft = softmax(&logits, 1)?;
        Ok(PseudoLabels {
            targets: accepted
                .unsqueeze(1)?
                .broadcast_as((rows, classes))?
                .where_cond(&hard, &soft)?,
            weights: entropy.affine(self.hardness, 1.0 - self.hardness)?,
            accepted,
        })
    }
}

/// The loss of labelled logits (M, V) with targets (M), and unlabelled logits (N, V).
pub fn loss(
    (logits, targets): (&Tensor, &Tensor),
    (unlabelled, labels): (&Tensor, &PseudoLabels),
) -> Result<Tensor> {
    let labelled = CrossEntropy::new().forward(logits, targets)?;
    let unlabelled = CrossEntropy::new()
        .row_weights(&labels.weights)
        .reduction(Reduction::SumOver(unlabelled.dim(0)? as f64))
        .forward(unlabelled, &labels.targets)?; // probabilities
    labelled + unlabelled
}
