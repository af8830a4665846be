//! From the results of rows to what the loss returns, and what it keeps for the backward.

use candle_core::{CpuStorage, DType, Device, Result, Tensor, WithDType};

use super::finish::{Normaliser, RowResult};
use crate::{
    backend::Fused,
    call::{Call, ClassValues, Rows},
    options::Reduction,
    results::RowStats,
    shard,
};

/// What rows and classes are given beside the logits.
pub(crate) struct Inputs {
    pub(super) rows: Rows,
    pub(super) classes: ClassValues,
    /// What row losses are divided by.
    pub(super) divisor: f64,
}

impl Inputs {
    /// Reads them; an error for the first bad value, of this rank or another one. Where ranks share a vocabulary, the call goes
    /// on with `stats` or without.
    pub(super) fn read(call: &Call, stats: bool) -> Result<Self> {
        let read = || {
            let classes = call.read_classes()?;
            let rows = call.read_rows(&classes)?;
            Ok((rows, classes))
        };
        let read = read();
        let count = |(rows, _): &(Rows, ClassValues)| -> f64 {
            rows.rows.iter().flatten().map(|row| row.count).sum()
        };
        let count = shard::count_of_all(call, read.as_ref().map(count));
        let inputs = read.and_then(|(rows, classes)| {
            Ok(Self {
                rows,
                classes,
                divisor: divisor(call, count?),
            })
        });
        shard::tell_slices(call, stats, inputs)
    }
}

/// What the forward leaves for the backward.
pub(crate) struct Saved {
    pub(super) inputs: Inputs,
    pub(super) normalisers: Vec<Normaliser>,
}

/// The reduced loss, and the statistics if they are asked for, of type `dtype`.
pub(super) fn forward_result(
    call: &Call,
    inputs: &Inputs,
    results: &[RowResult],
    dtype: DType,
    stats: bool,
) -> Result<(CpuStorage, Option<RowStats>)> {
    let losses = reduce(call, inputs, results);
    let loss = if dtype == DType::F64 {
        f64::to_cpu_storage_owned(losses)
    } else {
        narrow_storage(losses)
    };
    let stats = stats.then(|| row_stats(call, results, dtype)).transpose()?;
    Ok((loss, stats))
}

/// Type of loss and statistics.
pub(super) fn result_type(logits: DType) -> DType {
    if logits == DType::F64 {
        DType::F64
    } else {
        DType::F32
    }
}

fn narrow_storage(values: Vec<f64>) -> CpuStorage {
    f32::to_cpu_storage_owned(values.into_iter().map(|v| v as f32).collect())
}

/// What row losses are divided by, where rows count so much in all.
fn divisor(call: &Call, count: f64) -> f64 {
    match call.reduction {
        Reduction::None | Reduction::Sum => 1.0,
        Reduction::SumOver(n) => n,
        Reduction::Mean if count == 0.0 => 1.0,
        Reduction::Mean => count,
    }
}

/// The elements of the result.
fn reduce(call: &Call, inputs: &Inputs, results: &[RowResult]) -> Vec<f64> {
    let losses = results.iter().map(|r| r.loss);
    match call.reduction {
        Reduction::None => losses.collect(),
        // Of no rows, `sum` is −0.
        _ => vec![(0.0 + losses.sum::<f64>()) / inputs.divisor],
    }
}

pub(super) fn fused_result(
    call: &Call,
    inputs: &Inputs,
    results: &[RowResult],
    dtype: DType,
    stats: bool,
) -> Result<Fused> {
    let loss = Tensor::from_vec(
        reduce(call, inputs, results),
        call.loss_shape(),
        &Device::Cpu,
    )?
    .to_dtype(dtype)?;
    Ok(Fused {
        loss,
        stats: stats.then(|| row_stats(call, results, dtype)).transpose()?,
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
