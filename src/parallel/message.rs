//! What ranks tell each other ahead of an operation, so that all see whether they do alike, and the values that they give then.

use std::fmt;

use candle_core::{DType, Result, Tensor, bail};

/// What ranks do together.
#[derive(Clone, Copy, Debug)]
pub(super) enum Operation {
    AllGather,
    AllReduceSum,
}

/// Types of tensors that are sent, in an order that all ranks have.
pub(super) const TYPES: [DType; 7] = [
    DType::F32,
    DType::F64,
    DType::F16,
    DType::BF16,
    DType::U8,
    DType::U32,
    DType::I64,
];

/// Dimensions that a tensor may have.
const MAX_DIMS: usize = 8;

/// Of a tensor: the operation's number, the type's number, how many dimensions, and these.
pub(super) type Header = [i64; 3 + MAX_DIMS];

/// In place of a type's number: a tensor that is not sent.
const REFUSED: i64 = -1;

/// What a rank says ahead of an operation on a tensor, or that it cannot take part.
pub(super) fn header(operation: Operation, local: Option<&Tensor>) -> Header {
    let mut header = [0; _];
    header[0] = operation as i64;
    header[1] = REFUSED;
    if let Some(local) = local {
        let dtype = TYPES.iter().position(|t| *t == local.dtype());
        header[1] = dtype.map_or(REFUSED, |dtype| dtype as i64);
        header[2] = local.rank() as i64;
        for (to, dim) in header[3..].iter_mut().zip(local.dims()) {
            *to = *dim as i64;
        }
    }
    header
}

/// What is wrong where a rank does or gives something else than the first, the same on every rank.
pub(super) fn check_headers(headers: &[Header]) -> Result<()> {
    let mut given = Vec::new();
    for (rank, header) in headers.iter().enumerate() {
        if header[0] != headers[0][0] {
            let name = |operation| match operation == Operation::AllGather as i64 {
                true => "all_gather",
                false => "all_reduce_sum",
            };
            let (this, first) = (name(header[0]), name(headers[0][0]));
            bail!("rank {rank} called {this}, rank 0 {first}");
        }
        match usize::try_from(header[1]).ok().and_then(|t| TYPES.get(t)) {
            Some(dtype) => given.push((*dtype, &header[3..][..MAX_DIMS.min(header[2] as usize)])),
            None => bail!("rank {rank} gave a tensor of a type that is not sent"),
        }
    }
    check_alike(&given)
}

/// The same of types and shapes.
pub(super) fn check_alike<S: PartialEq + fmt::Debug>(given: &[(DType, S)]) -> Result<()> {
    let (first_type, first) = &given[0];
    for (rank, (dtype, shape)) in given.iter().enumerate() {
        if dtype != first_type || shape != first {
            bail!(
                "rank {rank} gave {} of shape {shape:?}, rank 0 {} of shape {first:?}",
                dtype.as_str(),
                first_type.as_str()
            );
        }
    }
    Ok(())
}

/// An error of a tensor that has no [`Header`].
pub(super) fn check_sent(local: &Tensor) -> Result<()> {
    if local.rank() > MAX_DIMS {
        bail!("{} dimensions, must be at most {MAX_DIMS}", local.rank());
    }
    if !TYPES.contains(&local.dtype()) {
        let names = TYPES.map(|t| t.as_str()).join(", ");
        bail!("{}, must be one of {names}", local.dtype().as_str());
    }
    Ok(())
}

/// The tensor, contiguous, if it is one that is sent from the CPU.
pub(super) fn on_cpu(local: &Tensor) -> Result<Tensor> {
    check_sent(local)?;
    if !local.device().is_cpu() {
        let place = local.device().location();
        bail!("a tensor on {place:?}, must be on the CPU");
    }
    local.detach().contiguous()
}

/// Evaluates an expression with `$values` as what a contiguous tensor on the CPU holds.
macro_rules! with_values {
    ($tensor:expr, $values:ident: $($kind:ident)|+ => $body:expr) => {{
        let (storage, layout) = $tensor.storage_and_layout();
        let span = layout.start_offset()..layout.start_offset() + layout.shape().elem_count();
        match &*storage {
            $(candle_core::Storage::Cpu(candle_core::CpuStorage::$kind(values)) => {
                let $values = &values[span];
                $body
            })+
            _ => candle_core::bail!("{} is not sent", $tensor.dtype().as_str()),
        }
    }};
}
pub(super) use with_values;

/// The sum in rank order, that of f16 and bf16 accumulated in f32 and rounded once.
pub(super) fn sum(all: &[Tensor]) -> Result<Tensor> {
    let dtype = accumulated_in(all[0].dtype());
    let mut sum = all[0].to_dtype(dtype)?;
    for other in &all[1..] {
        sum = (sum + other.to_dtype(dtype)?)?;
    }
    sum.to_dtype(all[0].dtype())
}

/// The type of a sum on its way.
pub(super) fn accumulated_in(dtype: DType) -> DType {
    match dtype {
        DType::F16 | DType::BF16 => DType::F32,
        dtype => dtype,
    }
}
