//! Hard pseudo-labels with weights by entropy, after SeMi: Wang et al., "When Imbalanced Semi-Supervised Learning Meets
//! Mining Hard Examples", arXiv 2501.06004.
//!
//! An unlabelled sample whose prediction p is certain enough gets its predicted class as a label. Among these, the harder
//! ones, those of higher entropy H, weigh more (the paper's online hard example mining):
//!
//! ```text
//! loss = mean over labelled of nll + (1/N) Σ_{accepted} w_i·nll_i      w_i = 1 − s + s·H(p_i)/ln V
//! ```
//!
//! The weights are those of the authors' code. It accepts by max p ≥ threshold; to accept by entropy, H/ln V ≤ threshold,
//! is this crate's reading. Left out: two augmentations of each sample, balanced memory bank, logit adjustment.

use candle_core::{DType, Result, Tensor};
use candle_cross_entropy::{CrossEntropy, Reduction};

/// Rows that get no pseudo-label.
pub const IGNORED: i64 = -100;

pub struct PseudoLabels {
    /// (N) i64, `IGNORED` where the entropy is above the threshold.
    pub targets: Tensor,
    /// (N) f32.
    pub weights: Tensor,
}

/// From logits (N, V): `threshold` and `hardness` s in \[0, 1\], the former a share of the largest entropy, ln V.
pub fn label(logits: &Tensor, threshold: f64, hardness: f64) -> Result<PseudoLabels> {
    let (rows, classes) = logits.dims2()?;
    let any = Tensor::zeros(rows, DType::U32, logits.device())?;
    // Entropy and arg max come with the loss, whatever the target.
    let (_, stats) = CrossEntropy::new().forward_with_stats(&logits.detach(), &any)?;
    let entropy = (stats.entropy / (classes as f64).ln())?;
    let ignored = Tensor::full(IGNORED, rows, logits.device())?;
    let predicted = stats.predicted.to_dtype(DType::I64)?;
    Ok(PseudoLabels {
        targets: entropy.le(threshold)?.where_cond(&predicted, &ignored)?,
        weights: entropy.affine(hardness, 1.0 - hardness)?,
    })
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
        .forward(unlabelled, &labels.targets)?;
    labelled + unlabelled
}
