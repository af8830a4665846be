//! The loss as custom operations of candle.
//!
//! Each operation has one tensor argument, the logits; targets, smoothing and weights are fields, so candle's
//! backward never sees them. What a forward leaves for its backward, and the statistics, go past the graph as well:
//! an operation has one output.

use std::sync::{Arc, OnceLock};

#[cfg(feature = "cuda")]
use candle_core::CudaStorage;
use candle_core::{CpuStorage, CustomOp1, InplaceOp1, Layout, Result, Shape, Tensor, bail};

use crate::{
    LossAndGrad, RowStats,
    call::{Call, row_offsets},
    cpu,
};

/// What a backend's forward returns; `S` is its storage, `K` what it keeps for the backward.
pub(crate) struct Forward<S, K = Saved> {
    /// Of [`Call::loss_shape`].
    pub loss: S,
    pub stats: Option<RowStats>,
    pub saved: K,
}

/// What a backend's single pass returns beside the gradient.
pub(crate) struct Fused {
    pub loss: Tensor,
    pub stats: RowStats,
}

/// Normalisers of the rows, from the forward to the backward.
pub(crate) enum Saved {
    Cpu(cpu::Saved),
    #[cfg(feature = "cuda")]
    Cuda(crate::cuda::Saved),
}

pub(crate) fn forward(
    call: Call,
    logits: &Tensor,
    stats: bool,
) -> Result<(Tensor, Option<RowStats>)> {
    let logits = with_readable_rows(logits)?;
    let op = ForwardOp(Arc::new(ForwardState {
        call,
        stats,
        saved: OnceLock::new(),
        row_stats: OnceLock::new(),
    }));
    let state = op.0.clone();
    let loss = logits.apply_op1(op)?;
    Ok((loss, state.row_stats.get().cloned()))
}

pub(crate) fn loss_and_grad(call: Call, logits: &Tensor) -> Result<LossAndGrad> {
    let op = FusedOp {
        call,
        result: OnceLock::new(),
    };
    let grad = with_readable_rows(&logits.detach())?.apply_op1_no_bwd(&op)?;
    Ok(op.finish(grad))
}

pub(crate) fn loss_and_grad_inplace(call: Call, logits: Tensor) -> Result<LossAndGrad> {
    let logits = logits.detach();
    if call.rows == 0 {
        return loss_and_grad(call, &logits); // candle has no in-place operation on nothing
    }
    let dims = logits.dims();
    let Some(rows) = row_offsets(logits.layout()) else {
        bail!(
            "logits: strides {:?} for shape {dims:?}, must have stride 1 inside a row to be overwritten",
            logits.stride()
        );
    };
    if !rows.disjoint(call.width) {
        bail!(
            "logits: strides {:?} for shape {dims:?} overlap, must be rows of their own to be overwritten",
            logits.stride()
        );
    }
    let op = FusedOp {
        call,
        result: OnceLock::new(),
    };
    logits.inplace_op1(&op)?;
    Ok(op.finish(logits))
}

/// The logits, copied if the backends could not read their rows where they are.
fn with_readable_rows(logits: &Tensor) -> Result<Tensor> {
    if row_offsets(logits.layout()).is_some() {
        Ok(logits.clone())
    } else {
        logits.contiguous()
    }
}

struct ForwardOp(Arc<ForwardState>);

struct ForwardState {
    call: Call,
    stats: bool,
    saved: OnceLock<Saved>,
    row_stats: OnceLock<RowStats>,
}

impl ForwardState {
    fn keep<S>(&self, forward: Forward<S>) -> (S, Shape) {
        let _ = self.saved.set(forward.saved);
        if let Some(stats) = forward.stats {
            let _ = self.row_stats.set(stats);
        }
        (forward.loss, self.call.loss_shape().into())
    }
}

impl CustomOp1 for ForwardOp {
    fn name(&self) -> &'static str {
        "cross-entropy"
    }

    fn cpu_fwd(&self, logits: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        Ok(self
            .0
            .keep(cpu::forward(&self.0.call, logits, layout, self.0.stats)?))
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(&self, logits: &CudaStorage, layout: &Layout) -> Result<(CudaStorage, Shape)> {
        Ok(self.0.keep(crate::cuda::forward(
            &self.0.call,
            logits,
            layout,
            self.0.stats,
        )?))
    }

    fn bwd(&self, logits: &Tensor, _loss: &Tensor, grad_loss: &Tensor) -> Result<Option<Tensor>> {
        let call = &self.0.call;
        // Detached throughout: nothing in here may enter the graph, or it would keep the logits alive.
        let is_parameter = logits.is_variable();
        let logits = logits.detach();
        let op = BackwardOp {
            call,
            saved: self.0.saved.get().expect("the forward ran"),
            upstream: grad_loss.detach().contiguous()?.flatten_all()?,
        };
        let writable = row_offsets(logits.layout()).is_some_and(|rows| rows.disjoint(call.width));
        if call.inplace_backward && writable && !is_parameter && call.rows > 0 {
            logits.inplace_op1(&op)?;
            Ok(Some(logits))
        } else {
            Ok(Some(logits.apply_op1_no_bwd(&op)?))
        }
    }
}

struct BackwardOp<'a> {
    call: &'a Call,
    saved: &'a Saved,
    /// Gradient of the result, contiguous: a value, or one a row.
    upstream: Tensor,
}

impl CustomOp1 for BackwardOp<'_> {
    fn name(&self) -> &'static str {
        "cross-entropy-backward"
    }

    fn cpu_fwd(&self, logits: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let grad = cpu::backward(self.call, self.saved, &self.upstream, logits, layout)?;
        Ok((grad, layout.shape().clone()))
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(&self, logits: &CudaStorage, layout: &Layout) -> Result<(CudaStorage, Shape)> {
        let grad = crate::cuda::backward(self.call, self.saved, &self.upstream, logits, layout)?;
        Ok((grad, layout.shape().clone()))
    }
}

impl InplaceOp1 for BackwardOp<'_> {
    fn name(&self) -> &'static str {
        "cross-entropy-backward-inplace"
    }

    fn cpu_fwd(&self, logits: &mut CpuStorage, layout: &Layout) -> Result<()> {
        cpu::backward_inplace(self.call, self.saved, &self.upstream, logits, layout)
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(&self, logits: &mut CudaStorage, layout: &Layout) -> Result<()> {
        crate::cuda::backward_inplace(self.call, self.saved, &self.upstream, logits, layout)
    }
}

struct FusedOp {
    call: Call,
    result: OnceLock<Fused>,
}

impl FusedOp {
    fn keep(&self, result: Fused) {
        let _ = self.result.set(result);
    }

    fn finish(self, grad: Tensor) -> LossAndGrad {
        let Fused { loss, stats } = self.result.into_inner().expect("the operation ran");
        LossAndGrad { loss, grad, stats }
    }
}

impl CustomOp1 for FusedOp {
    fn name(&self) -> &'static str {
        "cross-entropy-with-gradient"
    }

    fn cpu_fwd(&self, logits: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let (grad, result) = cpu::fused(&self.call, logits, layout)?;
        self.keep(result);
        Ok((grad, layout.shape().clone()))
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(&self, logits: &CudaStorage, layout: &Layout) -> Result<(CudaStorage, Shape)> {
        let (grad, result) = crate::cuda::fused(&self.call, logits, layout)?;
        self.keep(result);
        Ok((grad, layout.shape().clone()))
    }
}

impl InplaceOp1 for FusedOp {
    fn name(&self) -> &'static str {
        "cross-entropy-with-gradient-inplace"
    }

    fn cpu_fwd(&self, logits: &mut CpuStorage, layout: &Layout) -> Result<()> {
        self.keep(cpu::fused_inplace(&self.call, logits, layout)?);
        Ok(())
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(&self, logits: &mut CudaStorage, layout: &Layout) -> Result<()> {
        self.keep(crate::cuda::fused_inplace(&self.call, logits, layout)?);
        Ok(())
    }
}
