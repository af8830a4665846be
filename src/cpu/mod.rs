//! The CPU path: rows in parallel, or pieces of rows where rows are few, each vectorised for the instruction set
//! found at run time.

mod element;
pub(crate) mod linear;
mod memory;
mod parallel;
mod real;
mod row;
mod tasks;

use candle_core::{
    CpuStorage, DType, Device, Layout, Result, Tensor, WithDType, backend::BackendStorage, bail,
};

use self::{
    element::{Element, Precise},
    memory::{GradRows, Logits, readable},
    parallel::{differentiate, evaluate, evaluate_and_differentiate},
    row::{Normaliser, RowResult},
};
use crate::{
    Reduction, RowStats,
    call::{Call, Row},
    op::{self, Forward, Fused},
};

/// What the forward leaves for the backward.
pub(crate) struct Saved {
    rows: Vec<Option<Row>>,
    normalisers: Vec<Normaliser>,
}

/// Evaluates an expression with `$x` as a slice of the logits' elements.
macro_rules! with_elements {
    ($call:expr, $storage:expr, $cast:ident, $x:ident => $body:expr) => {
        match $storage {
            CpuStorage::F32(x) if $call.softcap.is_some() => {
                let $x = bytemuck::$cast::<f32, Precise>(x);
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

pub(crate) fn forward(
    call: &Call,
    logits: &CpuStorage,
    layout: &Layout,
    stats: bool,
) -> Result<Forward<CpuStorage>> {
    let rows = call.read_rows()?;
    let (results, normalisers) =
        with_elements!(call, logits, cast_slice, x => evaluate(call, &rows, x, layout, stats)?);
    let dtype = result_type(logits.dtype());
    let (loss, stats) = forward_result(call, &rows, &results, dtype, stats)?;
    Ok(Forward {
        loss,
        stats,
        saved: op::Saved::Cpu(Saved { rows, normalisers }),
    })
}

/// The reduced loss, and the statistics if they are asked for, of type `dtype`.
fn forward_result(
    call: &Call,
    rows: &[Option<Row>],
    results: &[RowResult],
    dtype: DType,
    stats: bool,
) -> Result<(CpuStorage, Option<RowStats>)> {
    let losses = reduce(call, rows, results);
    let loss = if dtype == DType::F64 {
        f64::to_cpu_storage_owned(losses)
    } else {
        narrow_storage(losses)
    };
    let stats = stats.then(|| row_stats(call, results, dtype)).transpose()?;
    Ok((loss, stats))
}

pub(crate) fn backward(
    call: &Call,
    saved: &op::Saved,
    upstream: &Tensor,
    logits: &CpuStorage,
    layout: &Layout,
) -> Result<CpuStorage> {
    with_elements!(call, logits, cast_slice, x => {
        let mut grad = bytemuck::zeroed_vec(call.rows * call.width);
        let out = GradRows::contiguous(call.rows, call.width, &mut grad);
        differentiate(call, saved, upstream, Logits::Separate(x, readable(layout)?), &out)?;
        Ok(Element::storage(grad))
    })
}

pub(crate) fn backward_inplace(
    call: &Call,
    saved: &op::Saved,
    upstream: &Tensor,
    logits: &mut CpuStorage,
    layout: &Layout,
) -> Result<()> {
    with_elements!(call, logits, cast_slice_mut, x => {
        let out = GradRows::inside(call, x, layout)?;
        differentiate(call, saved, upstream, Logits::InPlace, &out)
    })
}

pub(crate) fn fused(
    call: &Call,
    logits: &CpuStorage,
    layout: &Layout,
) -> Result<(CpuStorage, Fused)> {
    let rows = call.read_rows()?;
    with_elements!(call, logits, cast_slice, x => {
        let mut grad = bytemuck::zeroed_vec(call.rows * call.width);
        let out = GradRows::contiguous(call.rows, call.width, &mut grad);
        let results = evaluate_and_differentiate(call, &rows, Logits::Separate(x, readable(layout)?), &out);
        let dtype = result_type(logits.dtype());
        Ok((Element::storage(grad), fused_result(call, &rows, &results, dtype)?))
    })
}

pub(crate) fn fused_inplace(
    call: &Call,
    logits: &mut CpuStorage,
    layout: &Layout,
) -> Result<Fused> {
    let rows = call.read_rows()?;
    let dtype = result_type(logits.dtype());
    let results = with_elements!(call, logits, cast_slice_mut, x => {
        let out = GradRows::inside(call, x, layout)?;
        evaluate_and_differentiate(call, &rows, Logits::InPlace, &out)
    });
    fused_result(call, &rows, &results, dtype)
}

/// Type of loss and statistics.
fn result_type(logits: DType) -> DType {
    if logits == DType::F64 {
        DType::F64
    } else {
        DType::F32
    }
}

fn narrow_storage(values: Vec<f64>) -> CpuStorage {
    f32::to_cpu_storage_owned(values.into_iter().map(|v| v as f32).collect())
}

/// What row losses are divided by.
fn divisor(call: &Call, rows: &[Option<Row>]) -> f64 {
    match call.reduction {
        Reduction::None | Reduction::Sum => 1.0,
        Reduction::SumOver(n) => n,
        Reduction::Mean => {
            let total: f64 = rows.iter().flatten().map(|row| row.weight).sum();
            if total == 0.0 { 1.0 } else { total }
        }
    }
}

/// The elements of the result.
fn reduce(call: &Call, rows: &[Option<Row>], results: &[RowResult]) -> Vec<f64> {
    let losses = results.iter().map(|r| r.loss);
    match call.reduction {
        Reduction::None => losses.collect(),
        _ => vec![losses.sum::<f64>() / divisor(call, rows)],
    }
}

fn fused_result(
    call: &Call,
    rows: &[Option<Row>],
    results: &[RowResult],
    dtype: DType,
) -> Result<Fused> {
    let loss = Tensor::from_vec(reduce(call, rows, results), call.loss_shape(), &Device::Cpu)?
        .to_dtype(dtype)?;
    Ok(Fused {
        loss,
        stats: row_stats(call, results, dtype)?,
    })
}

fn row_stats(call: &Call, results: &[RowResult], dtype: DType) -> Result<RowStats> {
    let shape = call.shape.as_slice();
    let float = |value: fn(&RowResult) -> f64| {
        Tensor::from_vec(
            results.iter().map(value).collect::<Vec<_>>(),
            shape,
            &Device::Cpu,
        )?
        .to_dtype(dtype)
    };
    Ok(RowStats {
        nll: float(|r| r.nll)?,
        lse: float(|r| r.lse)?,
        entropy: float(|r| r.entropy)?,
        max_prob: float(|r| r.max_prob)?,
        grad_norm_sq: float(|r| r.grad_norm_sq)?,
        predicted: Tensor::from_vec(
            results.iter().map(|r| r.predicted).collect::<Vec<_>>(),
            shape,
            &Device::Cpu,
        )?,
    })
}
