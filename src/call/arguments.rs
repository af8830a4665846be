//! The tensors of a call, checked and brought to the form the backends read.

use candle_core::{D, DType, Result, Tensor, bail};

use crate::{rows::row_offsets, targets::Targets};

/// Targets of rows of this `shape`, of the form that [`Call::targets`] has.
pub(super) fn row_targets(
    targets: &Targets,
    shape: &[usize],
    (vocab, width): (usize, usize),
    rows: (&str, &Tensor),
) -> Result<Targets> {
    let (argument, tensor) = rows;
    let count: usize = shape.iter().product();
    let with_shape = |what: &str, values: &Tensor, last: &[usize]| {
        let expected = [shape, last].concat();
        if values.dims() != expected {
            bail!(
                "{what}: shape {:?}, must be {expected:?} for {argument} of shape {:?}",
                values.dims(),
                tensor.dims()
            );
        }
        Ok(())
    };
    let classes = |values: &Tensor, last: &[usize]| {
        with_shape("targets", values, last)?;
        let values = match values.dtype() {
            DType::U32 | DType::I64 => values.detach(),
            DType::U8 => values.to_dtype(DType::U32)?, // as the kernels read them
            other => bail!("targets: {}, must be u8, u32 or i64", other.as_str()),
        };
        same_device("targets", &values, rows)?;
        values.contiguous()?.reshape([&[count], last].concat())
    };
    let floats = |what: &str, values: &Tensor| {
        if !values.dtype().is_float() {
            bail!("{what}: {}, must be a float type", values.dtype().as_str());
        }
        same_device(what, values, rows)
    };
    Ok(match targets {
        Targets::Classes(values) => Targets::Classes(classes(values, &[])?),
        Targets::TopK {
            classes: named,
            probabilities,
        } => {
            let k = match named.dims() {
                [first @ .., k] if first == shape => *k,
                other => bail!(
                    "targets: shape {other:?}, must be {shape:?} and one dimension more for {argument} of shape {:?}",
                    tensor.dims()
                ),
            };
            let what = "probabilities of the targets";
            floats(what, probabilities)?;
            with_shape(what, probabilities, &[k])?;
            Targets::TopK {
                classes: classes(named, &[k])?,
                probabilities: as_read(unshared(probabilities, tensor)?)?
                    .contiguous()?
                    .reshape((count, k))?,
            }
        }
        Targets::Probabilities(values) => {
            floats("targets", values)?;
            match values.dims() {
                // What stands beside padding is not read.
                [first @ .., last] if first == shape && [vocab, width].contains(last) => {}
                other => bail!(
                    "targets: {} of shape {other:?}, must be u8, u32 or i64 of shape {shape:?}, or floats of shape {:?}, for \
                     {argument} of shape {:?}",
                    values.dtype().as_str(),
                    [shape, &[vocab]].concat(),
                    tensor.dims()
                ),
            }
            let values = match values.dtype() {
                DType::F16 | DType::BF16 | DType::F32 => values.detach(),
                DType::F64 if tensor.device().is_cpu() => values.detach(),
                _ => values.detach().to_dtype(DType::F32)?,
            };
            // What is overwritten in place must not be read meanwhile.
            Targets::Probabilities(match row_offsets(values.layout()) {
                Some(_) if !shares_memory(&values, tensor) => values,
                _ => values.copy()?.contiguous()?,
            })
        }
    })
}

/// Values of the classes, (`vocab`).
pub(super) fn class_values(
    argument: &str,
    values: &Tensor,
    (vocab, width): (usize, usize),
    rows: (&str, &Tensor),
) -> Result<Tensor> {
    if !values.dtype().is_float() {
        bail!(
            "{argument}: {}, must be a float type",
            values.dtype().as_str()
        );
    }
    // Those of padding are not read.
    match values.dims() {
        &[length] if length == vocab || length == width => {}
        other => bail!("{argument}: shape {other:?}, must be [{vocab}], a value for each class"),
    }
    same_device(argument, values, rows)?;
    as_read(unshared(values, rows.1)?.narrow(0, 0, vocab)?)?.contiguous()
}

/// Values of a float type as they are read: by kernels in f32, on the CPU as they are.
fn as_read(values: Tensor) -> Result<Tensor> {
    match values.device().is_cpu() {
        true => Ok(values),
        false => values.to_dtype(DType::F32),
    }
}

/// Type of values beside logits where these are.
pub(super) fn value_type(logits: &Tensor) -> DType {
    if logits.device().is_cpu() {
        DType::F64
    } else {
        DType::F32
    }
}

pub(super) fn same_device(
    argument: &str,
    tensor: &Tensor,
    (other, rows): (&str, &Tensor),
) -> Result<()> {
    if !tensor.device().same_device(rows.device()) {
        bail!(
            "{argument}: on {:?}, must be on {:?} with {other}",
            tensor.device().location(),
            rows.device().location()
        );
    }
    Ok(())
}

/// The values, copied where they are a view of the logits: they must be read before these are locked, and overwritten, in place.
fn unshared(values: &Tensor, logits: &Tensor) -> Result<Tensor> {
    match shares_memory(values, logits) {
        true => Ok(values.copy()?.detach()),
        false => Ok(values.detach()),
    }
}

fn shares_memory(a: &Tensor, b: &Tensor) -> bool {
    let storage = |tensor: &Tensor| std::ptr::from_ref(&*tensor.storage_and_layout().0);
    storage(a) == storage(b)
}

/// A value a row, broadcast to the targets' shape: flattened, or on CUDA (…, 1), a view where kernels can read that. A copy
/// would cost a launch and an upload, which a CUDA graph could not replay.
pub(super) fn row_values(
    argument: &str,
    values: &Tensor,
    may_be_mask: bool,
    shape: &[usize],
    dtype: DType,
    rows: (&str, &Tensor),
) -> Result<Tensor> {
    let is_mask = may_be_mask && values.dtype() == DType::U8;
    if !(values.dtype().is_float() || is_mask) {
        bail!(
            "{argument}: {}, must be a float type{}",
            values.dtype().as_str(),
            if may_be_mask { " or a u8 mask" } else { "" }
        );
    }
    same_device(argument, values, rows)?;
    let original = unshared(values, rows.1)?;
    let Ok(values) = original.broadcast_as(shape) else {
        bail!(
            "{argument}: shape {:?}, must be broadcastable to the targets' shape {shape:?}",
            values.dims()
        );
    };
    if values.device().is_cpu() {
        // After the broadcast: candle's conversions give a contiguous result.
        return values.to_dtype(dtype)?.contiguous()?.flatten_all();
    }
    let values = original
        .to_dtype(dtype)?
        .broadcast_as(shape)?
        .unsqueeze(D::Minus1)?;
    // Kernels count them in 32 bits.
    let steps = values.dims().iter().zip(values.stride());
    let last: usize = steps
        .map(|(&size, &stride)| size.saturating_sub(1) * stride)
        .sum();
    match row_offsets(values.layout()) {
        Some(_) if u32::try_from(last).is_ok() => Ok(values),
        _ => values.contiguous(),
    }
}
