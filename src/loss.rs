//! The entry points of the loss.

use candle_core::{Result, Tensor};

use crate::{
    call::{Call, Groups},
    linear, op,
    options::CrossEntropy,
    reference,
    results::{LossAndGrad, RowStats},
    targets::Targets,
};

impl CrossEntropy {
    /// The loss, differentiable in the logits: a scalar, or the targets' shape for [`Reduction::None`](crate::Reduction::None). f32, f64 for
    /// f64 logits.
    ///
    /// The forward reads the logits once; `backward()` reads them once more and writes their gradient. Without a
    /// tracked input no gradient is computed and the logits are never written.
    pub fn forward(&self, logits: &Tensor, targets: impl Into<Targets>) -> Result<Tensor> {
        Ok(op::forward(self.call(logits, targets)?, logits, false)?.0)
    }

    /// [`forward`](Self::forward) with the statistics of every row from the same pass.
    pub fn forward_with_stats(
        &self,
        logits: &Tensor,
        targets: impl Into<Targets>,
    ) -> Result<(Tensor, RowStats)> {
        let (loss, stats) = op::forward(self.call(logits, targets)?, logits, true)?;
        Ok((loss, stats.expect("asked for")))
    }

    /// Loss, gradient and statistics in one pass, outside candle's graph.
    pub fn loss_and_grad(
        &self,
        logits: &Tensor,
        targets: impl Into<Targets>,
    ) -> Result<LossAndGrad> {
        op::loss_and_grad(self.call(logits, targets)?, logits, true).map(with_stats)
    }

    /// [`loss_and_grad`](Self::loss_and_grad) that writes the gradient over the logits and returns their memory as
    /// `grad`. Every tensor that shares it sees the change. Rows that overlap, or whose elements are not adjacent,
    /// are an error. After an error for a negative probability, or one that is not finite, of targets that have one for each
    /// class, other rows are overwritten: these values are seen as they are used.
    pub fn loss_and_grad_inplace(
        &self,
        logits: Tensor,
        targets: impl Into<Targets>,
    ) -> Result<LossAndGrad> {
        op::loss_and_grad_inplace(self.call(&logits, targets)?, logits, true).map(with_stats)
    }

    /// Loss and gradient, bit for bit those of [`loss_and_grad`](Self::loss_and_grad), without the statistics, for
    /// trainers that look at none: on CUDA a third fewer instructions for the sums, and fewer bytes a row.
    pub fn loss_and_grad_without_stats(
        &self,
        logits: &Tensor,
        targets: impl Into<Targets>,
    ) -> Result<(Tensor, Tensor)> {
        let call = self.call(logits, targets)?;
        op::loss_and_grad(call, logits, false).map(|(loss, grad, _)| (loss, grad))
    }

    /// [`loss_and_grad_inplace`](Self::loss_and_grad_inplace) without the statistics: loss, and the logits' memory with
    /// the gradient.
    pub fn loss_and_grad_inplace_without_stats(
        &self,
        logits: Tensor,
        targets: impl Into<Targets>,
    ) -> Result<(Tensor, Tensor)> {
        let call = self.call(&logits, targets)?;
        op::loss_and_grad_inplace(call, logits, false).map(|(loss, grad, _)| (loss, grad))
    }

    /// The loss of the logits hidden·weightᵀ + bias, which never are in memory as a whole: hidden states (…, D), output
    /// projection (V, D), bias (V), all of one type and on one device, targets (…). Differentiable in hidden, weight and
    /// bias. The result is that of [`forward`](Self::forward), with its options but for `inplace_backward`; `vocab_size`
    /// leaves the last rows of weight and bias out.
    ///
    /// The logits are computed in tiles: slices of the vocabulary, or, where there are more rows than classes, blocks of
    /// rows. Beside inputs and gradients, and beside what [`memory_budget`](Self::memory_budget) lets it keep, it takes a
    /// tile and, in the backward, sums of 4·min(N, V)·D bytes (on the CPU, for f16 and bf16, as much again for a copy in
    /// f32, and none of the sums for f32). Products are accumulated in f32 and gradients rounded once; on CUDA logits are
    /// rounded to their type as in a model that computes them whole, on the CPU they stay f32.
    ///
    /// Rows that are ignored or have weight 0 are left out of the products on the CPU, on CUDA with
    /// [`compact_rows`](Self::compact_rows). Products come from the device's library (gemm, cuBLAS), which need not give a
    /// row the same last bit for another number of rows.
    ///
    /// The idea is that of Wijmans et al., "Cut Your Losses in Large-Vocabulary Language Models", arXiv 2411.09009, with
    /// products by the library and no gradients filtered out.
    pub fn forward_linear(
        &self,
        hidden: &Tensor,
        weight: &Tensor,
        bias: Option<&Tensor>,
        targets: impl Into<Targets>,
    ) -> Result<Tensor> {
        Ok(linear::forward(self, hidden, weight, bias, &targets.into(), false)?.0)
    }

    /// [`forward_linear`](Self::forward_linear) with the statistics of every row from the same pass.
    pub fn forward_linear_with_stats(
        &self,
        hidden: &Tensor,
        weight: &Tensor,
        bias: Option<&Tensor>,
        targets: impl Into<Targets>,
    ) -> Result<(Tensor, RowStats)> {
        let (loss, stats) = linear::forward(self, hidden, weight, bias, &targets.into(), true)?;
        Ok((loss, stats.expect("asked for")))
    }

    /// The oracle: the same results in f64 on the CPU, by plain loops written to be read beside the formulas. Accepts
    /// tensors on any device; everything it returns is f64 (`predicted` u32) on the CPU. Of whole rows: with
    /// [`vocab_shard`](Self::vocab_shard) or [`data_parallel`](Self::data_parallel) an error.
    pub fn reference(&self, logits: &Tensor, targets: impl Into<Targets>) -> Result<LossAndGrad> {
        reference::loss_and_grad(self, logits, &targets.into())
    }
}

impl CrossEntropy {
    /// The checked arguments; other ranks are told of an error.
    fn call(&self, logits: &Tensor, targets: impl Into<Targets>) -> Result<Call> {
        Groups::of(self).tell(Call::new(self, logits, &targets.into()))
    }
}

fn with_stats((loss, grad, stats): op::LossGradStats) -> LossAndGrad {
    let stats = stats.expect("asked for");
    LossAndGrad { loss, grad, stats }
}

/// Mean cross-entropy of logits (…, V) and targets (…): takes the place of `candle_nn::loss::cross_entropy`, and of
/// `nll(log_softmax(logits), targets)`.
///
/// Rows whose target is −100 are ignored, which candle-nn has no notion of. The loss of f16 and bf16 logits is f32, where
/// candle-nn's has their type: an auxiliary loss in bf16 is added as `(loss + auxiliary.to_dtype(DType::F32)?)?`.
pub fn cross_entropy(logits: &Tensor, targets: impl Into<Targets>) -> Result<Tensor> {
    CrossEntropy::new().forward(logits, targets)
}
