//! Reliable-sample selection, after UPET: Wang et al., "Uncertainty-aware Parameter-Efficient Self-training for
//! Semi-supervised Language Understanding", arXiv 2310.13022.
//!
//! A teacher predicts unlabelled samples several times, each time with other units dropped (Monte-Carlo dropout), and
//! keeps as pseudo-labels those that are confident and certain. With p_t the prediction of pass t, p̄ their mean, and H
//! the entropy,
//!
//! ```text
//! B     = H(p̄) − mean_t H(p_t)                     what the passes disagree about (BALD)
//! score = α·max p̄ + (1−α)·(1 − B/ln V)
//! ```
//!
//! Confidence and certainty 1 − B are the paper's; the authors' code draws samples in proportion to 1 − B within each
//! pseudo-class. The sum of both, its scale ln V, and taking the k best instead of drawing are this crate's.

use candle_core::{D, DType, Result, Tensor};
use candle_cross_entropy::{CrossEntropy, RowStats};
use candle_nn::ops::softmax;

pub struct Scores {
    /// B (N) in nats, at least 0 but for rounding.
    pub disagreement: Tensor,
    /// (N).
    pub score: Tensor,
    /// Arg max of p̄, (N) u32.
    pub predicted: Tensor,
}

/// From logits (N, V) of every pass.
pub fn scores(passes: &[Tensor], alpha: f64) -> Result<Scores> {
    let classes = passes[0].dim(D::Minus1)? as f64;
    let mean = |tensors: Vec<Tensor>| Tensor::stack(&tensors, 0)?.mean(0);
    let of_passes = passes.iter().map(|logits| Ok(stats(logits)?.entropy));
    let probabilities = passes.iter().map(|logits| softmax(logits, D::Minus1));
    // Logarithms of probabilities are logits: the loss's statistics are those of p̄.
    let of_mean = stats(&mean(probabilities.collect::<Result<_>>()?)?.log()?)?;
    let disagreement = (&of_mean.entropy - mean(of_passes.collect::<Result<_>>()?)?)?;
    let certainty = disagreement.affine(-1.0 / classes.ln(), 1.0)?;
    Ok(Scores {
        score: ((of_mean.max_prob * alpha)? + (certainty * (1.0 - alpha))?)?,
        predicted: of_mean.predicted,
        disagreement,
    })
}

fn stats(logits: &Tensor) -> Result<RowStats> {
    let any = Tensor::zeros(logits.dim(0)?, DType::U32, logits.device())?;
    Ok(CrossEntropy::new().forward_with_stats(logits, &any)?.1)
}

/// The student's targets (N), i64: the prediction of the k samples with the best scores, else −100, which the loss
/// ignores.
pub fn select(scores: &Scores, k: usize) -> Result<Tensor> {
    let predicted = scores.predicted.to_vec1::<u32>()?;
    let mut targets = vec![-100i64; predicted.len()];
    let best = scores.score.arg_sort_last_dim(false)?.to_vec1::<u32>()?;
    for &i in best.iter().take(k) {
        targets[i as usize] = i64::from(predicted[i as usize]);
    }
    Tensor::new(targets, scores.score.device())
}
