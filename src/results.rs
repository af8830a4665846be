//! What the loss returns beside a tensor.

use candle_core::Tensor;

/// Statistics of every row, from the same pass as the loss. Each has the targets' shape, is f32 (f64 for f64 logits)
/// unless stated, 0 for ignored rows, and never takes part in a gradient.
#[derive(Clone, Debug)]
pub struct RowStats {
    /// Negative log-likelihood of the target, −log p_y, or −Σ t log p of a distribution, in nats: without smoothing, weights
    /// and z-loss.
    pub nll: Tensor,
    /// Log-sum-exp of the (scaled, capped) logits, in nats.
    pub lse: Tensor,
    /// Entropy of the predicted distribution, −Σ p log p, in nats.
    pub entropy: Tensor,
    /// Probability of the predicted class.
    pub max_prob: Tensor,
    /// ‖p·Σq − q‖², q the smoothed target: the squared norm of the gradient by z with w = 1, no class weights, no weight of
    /// the entropy and no z-loss.
    pub grad_norm_sq: Tensor,
    /// Class of the largest logit, the lowest index among equals; u32.
    pub predicted: Tensor,
}

/// Loss, its gradient by the logits, and the rows' statistics.
#[derive(Clone, Debug)]
pub struct LossAndGrad {
    /// A scalar, or the targets' shape for [`Reduction::None`](crate::Reduction::None); f32 (f64 for f64 logits).
    pub loss: Tensor,
    /// Gradient of the reduced loss by the logits, their shape and type. With [`Reduction::None`](crate::Reduction::None), row i is the
    /// gradient of loss_i.
    pub grad: Tensor,
    /// Statistics of every row.
    pub stats: RowStats,
}
