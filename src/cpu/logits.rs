//! The loss of logits on the CPU.

use candle_core::{CpuStorage, Layout, Result, Tensor, backend::BackendStorage, bail};
use half::{bf16, f16};

use super::{
    Cpu,
    element::{Element, InOrder, Precise},
    memory::{GradRows, Logits, readable},
    probabilities::Locked,
    results::{Inputs, Saved, forward_result, fused_result, result_type},
    rows::{differentiate_all, evaluate, evaluate_and_differentiate},
};
use crate::{
    backend::{Backend, Forward, Fused},
    call::Call,
    shard,
};

/// Evaluates an expression with `$x` as a slice of the logits' elements.
macro_rules! with_elements {
    ($call:expr, $storage:expr, $cast:ident, $x:ident => $body:expr) => {
        match $storage {
            CpuStorage::F32(x) if $call.softcap.is_some() => {
                let $x = bytemuck::$cast::<f32, Precise<f32>>(x);
                $body
            }
            CpuStorage::F16(x) if $call.softcap.is_some() => {
                let $x = bytemuck::$cast::<f16, Precise<f16>>(x);
                $body
            }
            CpuStorage::BF16(x) if $call.softcap.is_some() => {
                let $x = bytemuck::$cast::<bf16, Precise<bf16>>(x);
                $body
            }
            CpuStorage::BF16(x) if $call.is_general_here() => {
                let $x = bytemuck::$cast::<bf16, InOrder>(x);
                $body
            }
            CpuStorage::F32($x) => $body,
            CpuStorage::F64($x) => $body,
            CpuStorage::F16($x) => $body,
            CpuStorage::BF16($x) => $body,
            other => bail!("logits: {:?}, must be f32, f16, bf16 or f64", other.dtype()),
        }
    };
}

impl Backend for Cpu {
    type Storage = CpuStorage;
    type Saved = Saved;

    fn forward(
        call: &Call,
        logits: &CpuStorage,
        layout: &Layout,
        stats: bool,
    ) -> Result<Forward<CpuStorage, Saved>> {
        let inputs = Inputs::read(call, stats)?;
        let locked = Locked::of(call.probabilities());
        let probabilities = locked.rows()?;
        let given = inputs.given(call, probabilities.as_ref());
        let evaluate =
            || with_elements!(call, logits, cast_slice, x => evaluate(given, x, layout, stats));
        let (results, normalisers) = shard::settle(call, evaluate())?;
        let dtype = result_type(logits.dtype());
        let (loss, stats) = forward_result(call, &inputs, &results, dtype, stats)?;
        Ok(Forward {
            loss,
            stats,
            saved: Saved {
                inputs,
                normalisers,
            },
        })
    }

    fn backward(
        call: &Call,
        saved: &Saved,
        upstream: &Tensor,
        logits: &CpuStorage,
        layout: &Layout,
    ) -> Result<CpuStorage> {
        let locked = Locked::of(call.probabilities());
        let probabilities = locked.rows()?;
        let given = saved.inputs.given(call, probabilities.as_ref());
        with_elements!(call, logits, cast_slice, x => {
            let mut grad = bytemuck::zeroed_vec(call.rows * call.width);
            let out = GradRows::contiguous(call.rows, call.width, &mut grad);
            differentiate_all(given, saved, upstream, Logits::Separate(x, readable(layout)?), &out)?;
            Ok(Element::storage(grad))
        })
    }

    fn backward_inplace(
        call: &Call,
        saved: &Saved,
        upstream: &Tensor,
        logits: &mut CpuStorage,
        layout: &Layout,
    ) -> Result<()> {
        let locked = Locked::of(call.probabilities());
        let probabilities = locked.rows()?;
        let given = saved.inputs.given(call, probabilities.as_ref());
        with_elements!(call, logits, cast_slice_mut, x => {
            let out = GradRows::inside(call, x, layout)?;
            differentiate_all(given, saved, upstream, Logits::InPlace, &out)
        })
    }

    fn loss_and_grad(
        call: &Call,
        logits: &CpuStorage,
        layout: &Layout,
        stats: bool,
    ) -> Result<(CpuStorage, Fused)> {
        let inputs = Inputs::read(call, stats)?;
        let locked = Locked::of(call.probabilities());
        let probabilities = locked.rows()?;
        let given = inputs.given(call, probabilities.as_ref());
        let dtype = result_type(logits.dtype());
        with_elements!(call, logits, cast_slice, x => {
            let mut grad = bytemuck::zeroed_vec(call.rows * call.width);
            let out = GradRows::contiguous(call.rows, call.width, &mut grad);
            let logits = Logits::Separate(x, readable(layout)?);
            let results = evaluate_and_differentiate(given, logits, &out, stats);
            let results = shard::settle(call, results)?;
            Ok((Element::storage(grad), fused_result(call, &inputs, &results, dtype, stats)?))
        })
    }

    fn loss_and_grad_inplace(
        call: &Call,
        logits: &mut CpuStorage,
        layout: &Layout,
        stats: bool,
    ) -> Result<Fused> {
        let inputs = Inputs::read(call, stats)?;
        let locked = Locked::of(call.probabilities());
        let probabilities = locked.rows()?;
        let given = inputs.given(call, probabilities.as_ref());
        let dtype = result_type(logits.dtype());
        let results = with_elements!(call, logits, cast_slice_mut, x => {
            let out = GradRows::inside(call, x, layout)?;
            shard::settle(call, evaluate_and_differentiate(given, Logits::InPlace, &out, stats))?
        });
        fused_result(call, &inputs, &results, dtype, stats)
    }
}
