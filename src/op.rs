//! The loss of logits as custom operations of candle.
//!
//! Each operation has one tensor argument, the logits; targets, smoothing and weights are fields, so candle's
//! backward never sees them. What a forward leaves for its backward, and the statistics, go past the graph as well:
//! an operation has one output.

use std::sync::{Arc, OnceLock};

#[cfg(feature = "cuda")]
use candle_core::CudaStorage;
use candle_core::{CpuStorage, CustomOp1, InplaceOp1, Layout, Result, Shape, Tensor, bail};

#[cfg(feature = "cuda")]
use crate::cuda::Cuda;
use crate::{
    backend::{Backend, Fused, Past},
    call::Call,
    cpu::Cpu,
    results::RowStats,
    rows::row_offsets,
};

pub(crate) fn forward(
    call: Call,
    logits: &Tensor,
    stats: bool,
) -> Result<(Tensor, Option<RowStats>)> {
    let logits = with_readable_rows(logits)?;
    let op = ForwardOp(Arc::new(ForwardState {
        call,
        stats,
        past: Past::default(),
    }));
    let state = op.0.clone();
    let loss = logits.apply_op1(op)?;
    Ok((loss, state.past.stats()))
}

/// Loss, gradient and, if asked for, statistics.
pub(crate) type LossGradStats = (Tensor, Tensor, Option<RowStats>);

pub(crate) fn loss_and_grad(call: Call, logits: &Tensor, stats: bool) -> Result<LossGradStats> {
    let op = FusedOp::new(call, stats);
    let grad = with_readable_rows(&logits.detach())?.apply_op1_no_bwd(&op)?;
    Ok(op.finish(grad))
}

pub(crate) fn loss_and_grad_inplace(
    call: Call,
    logits: Tensor,
    stats: bool,
) -> Result<LossGradStats> {
    let logits = logits.detach();
    if call.rows == 0 {
        return loss_and_grad(call, &logits, stats); // candle has no in-place operation on nothing
    }
    call.groups.tell(check_overwritable(&call, &logits))?;
    let op = FusedOp::new(call, stats);
    logits.inplace_op1(&op)?;
    Ok(op.finish(logits))
}

fn check_overwritable(call: &Call, logits: &Tensor) -> Result<()> {
    let (dims, strides) = (logits.dims(), logits.stride());
    let Some(rows) = row_offsets(logits.layout()) else {
        bail!(
            "logits: strides {strides:?} for shape {dims:?}, must have stride 1 inside a row to be overwritten"
        );
    };
    if !rows.disjoint(call.width) {
        bail!(
            "logits: strides {strides:?} for shape {dims:?} overlap, must be rows of their own to be overwritten"
        );
    }
    Ok(())
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
    past: Past,
}

impl ForwardState {
    fn run<B: Backend>(&self, logits: &B::Storage, layout: &Layout) -> Result<(B::Storage, Shape)> {
        let forward = B::forward(&self.call, logits, layout, self.stats)?;
        Ok((self.past.keep(forward), self.call.loss_shape().into()))
    }
}

impl CustomOp1 for ForwardOp {
    fn name(&self) -> &'static str {
        "cross-entropy"
    }

    fn cpu_fwd(&self, logits: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        self.0.run::<Cpu>(logits, layout)
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(&self, logits: &CudaStorage, layout: &Layout) -> Result<(CudaStorage, Shape)> {
        self.0.run::<Cuda>(logits, layout)
    }

    fn bwd(&self, logits: &Tensor, _loss: &Tensor, grad_loss: &Tensor) -> Result<Option<Tensor>> {
        let ForwardState { call, past, .. } = &*self.0;
        // Detached throughout: nothing in here may enter the graph, or it would keep the logits alive.
        let is_parameter = logits.is_variable();
        let logits = logits.detach();
        let op = BackwardOp {
            call,
            past,
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
    past: &'a Past,
    /// Gradient of the result, contiguous: a value, or one a row.
    upstream: Tensor,
}

impl BackwardOp<'_> {
    fn run<B: Backend>(&self, logits: &B::Storage, layout: &Layout) -> Result<(B::Storage, Shape)> {
        let saved = self.past.saved::<B::Saved>()?;
        let grad = B::backward(self.call, saved, &self.upstream, logits, layout)?;
        Ok((grad, layout.shape().clone()))
    }

    fn run_inplace<B: Backend>(&self, logits: &mut B::Storage, layout: &Layout) -> Result<()> {
        let saved = self.past.saved::<B::Saved>()?;
        B::backward_inplace(self.call, saved, &self.upstream, logits, layout)
    }
}

impl CustomOp1 for BackwardOp<'_> {
    fn name(&self) -> &'static str {
        "cross-entropy-backward"
    }

    fn cpu_fwd(&self, logits: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        self.run::<Cpu>(logits, layout)
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(&self, logits: &CudaStorage, layout: &Layout) -> Result<(CudaStorage, Shape)> {
        self.run::<Cuda>(logits, layout)
    }
}

impl InplaceOp1 for BackwardOp<'_> {
    fn name(&self) -> &'static str {
        "cross-entropy-backward-inplace"
    }

    fn cpu_fwd(&self, logits: &mut CpuStorage, layout: &Layout) -> Result<()> {
        self.run_inplace::<Cpu>(logits, layout)
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(&self, logits: &mut CudaStorage, layout: &Layout) -> Result<()> {
        self.run_inplace::<Cuda>(logits, layout)
    }
}

struct FusedOp {
    call: Call,
    stats: bool,
    result: OnceLock<Fused>,
}

impl FusedOp {
    fn new(call: Call, stats: bool) -> Self {
        Self {
            call,
            stats,
            result: OnceLock::new(),
        }
    }

    fn run<B: Backend>(&self, logits: &B::Storage, layout: &Layout) -> Result<(B::Storage, Shape)> {
        let (grad, result) = B::loss_and_grad(&self.call, logits, layout, self.stats)?;
        let _ = self.result.set(result);
        Ok((grad, layout.shape().clone()))
    }

    fn run_inplace<B: Backend>(&self, logits: &mut B::Storage, layout: &Layout) -> Result<()> {
        let result = B::loss_and_grad_inplace(&self.call, logits, layout, self.stats)?;
        let _ = self.result.set(result);
        Ok(())
    }

    fn finish(self, grad: Tensor) -> LossGradStats {
        let Fused { loss, stats } = self.result.into_inner().expect("the operation ran");
        (loss, grad, stats)
    }
}

impl CustomOp1 for FusedOp {
    fn name(&self) -> &'static str {
        "cross-entropy-with-gradient"
    }

    fn cpu_fwd(&self, logits: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        self.run::<Cpu>(logits, layout)
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(&self, logits: &CudaStorage, layout: &Layout) -> Result<(CudaStorage, Shape)> {
        self.run::<Cuda>(logits, layout)
    }
}

impl InplaceOp1 for FusedOp {
    fn name(&self) -> &'static str {
        "cross-entropy-with-gradient-inplace"
    }

    fn cpu_fwd(&self, logits: &mut CpuStorage, layout: &Layout) -> Result<()> {
        self.run_inplace::<Cpu>(logits, layout)
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(&self, logits: &mut CudaStorage, layout: &Layout) -> Result<()> {
        self.run_inplace::<Cuda>(logits, layout)
    }
}
