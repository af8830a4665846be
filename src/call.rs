//! One call of the loss, its arguments checked and brought to the form the backends read.

use candle_core::{D, DType, Result, Tensor, bail};

use crate::{
    kernels::abi::BadValue,
    options::{CrossEntropy, Reduction, Smoothing},
    rows::row_offsets,
};

/// Checked arguments, apart from the logits themselves.
#[derive(Clone, Debug)]
pub(crate) struct Call {
    /// The targets' shape, which is that of row losses and statistics.
    pub shape: Vec<usize>,
    /// Number of rows: the product of `shape`.
    pub rows: usize,
    /// Length of a row, padding included.
    pub width: usize,
    /// Classes: `width` less the padding.
    pub vocab: usize,
    /// (rows), contiguous, u32 or i64.
    pub targets: Tensor,
    /// (rows), contiguous, f64; on CUDA (…, 1), f32, with strides of any kind. `None` for the uniform value.
    pub smoothing: Option<Tensor>,
    pub uniform_smoothing: f32,
    /// The same; `None` for 1.
    pub weights: Option<Tensor>,
    pub ignore_index: i64,
    pub z_loss: f32,
    pub softcap: Option<f32>,
    pub logit_scale: f32,
    pub reduction: Reduction,
    pub inplace_backward: bool,
    pub check_inputs: bool,
}

/// Target, smoothing and weight of a row that is not ignored.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Row {
    pub target: usize,
    pub smoothing: f64,
    pub weight: f64,
}

/// Kernels count columns in 32 bits, and some way beyond a row's end.
const MAX_WIDTH: usize = i32::MAX as usize - (1 << 14);

impl Call {
    pub fn new(options: &CrossEntropy, logits: &Tensor, targets: &Tensor) -> Result<Self> {
        let width = match logits.dims() {
            [] => bail!("logits: a scalar, must have shape (…, V)"),
            [.., width] => *width,
        };
        if width == 0 || width > MAX_WIDTH {
            bail!("logits: rows of length {width}, must be 1 to {MAX_WIDTH}");
        }
        Self::of_rows(options, ("logits", logits), width, targets)
    }

    /// The same for logits that are products of `hidden` (…, D) and `weight` (V, D), plus `bias` (V).
    pub fn linear(
        options: &CrossEntropy,
        hidden: &Tensor,
        weight: &Tensor,
        bias: Option<&Tensor>,
        targets: &Tensor,
    ) -> Result<Self> {
        let depth = match hidden.dims() {
            [] | [.., 0] => bail!(
                "hidden: shape {:?}, must be (…, D) with D at least 1",
                hidden.dims()
            ),
            [.., depth] => *depth,
        };
        let width = match weight.dims() {
            &[width, d] if d == depth && (1..=MAX_WIDTH).contains(&width) => width,
            shape => bail!(
                "weight: shape {shape:?}, must be (V, {depth}) with V 1 to {MAX_WIDTH} for hidden of shape {:?}",
                hidden.dims()
            ),
        };
        let mut parameters = vec![("weight", weight)];
        if let Some(bias) = bias {
            if bias.dims() != [width] {
                bail!(
                    "bias: shape {:?}, must be [{width}] for weight of shape {:?}",
                    bias.dims(),
                    weight.dims()
                );
            }
            parameters.push(("bias", bias));
        }
        for (argument, tensor) in parameters {
            if tensor.dtype() != hidden.dtype() {
                bail!(
                    "{argument}: {}, must be {} as hidden",
                    tensor.dtype().as_str(),
                    hidden.dtype().as_str()
                );
            }
            same_device(argument, tensor, ("hidden", hidden))?;
        }
        Self::of_rows(options, ("hidden", hidden), width, targets)
    }

    /// `rows` is the argument with a row (its last dimension) for each target.
    fn of_rows(
        options: &CrossEntropy,
        rows: (&str, &Tensor),
        width: usize,
        targets: &Tensor,
    ) -> Result<Self> {
        let (argument, tensor) = rows;
        let shape = tensor.dims()[..tensor.rank() - 1].to_vec();
        let count: usize = shape.iter().product();
        if count > i32::MAX as usize {
            bail!("{argument}: {count} rows, must be at most {}", i32::MAX);
        }
        let on_cpu = tensor.device().is_cpu();
        match tensor.dtype() {
            DType::F32 | DType::F16 | DType::BF16 => {}
            DType::F64 if on_cpu => {}
            DType::F64 => bail!(
                "{argument}: f64 on {:?}, must be f32, f16 or bf16 there",
                tensor.device().location()
            ),
            other => bail!(
                "{argument}: {}, must be f32, f16, bf16 or (on the CPU) f64",
                other.as_str()
            ),
        }
        if targets.dims() != shape {
            bail!(
                "targets: shape {:?}, must be {shape:?} for {argument} of shape {:?}",
                targets.dims(),
                tensor.dims()
            );
        }
        let targets = match targets.dtype() {
            DType::U32 | DType::I64 => targets.detach(),
            DType::U8 => targets.to_dtype(DType::U32)?, // as the kernels read them
            other => bail!("targets: {}, must be u8, u32 or i64", other.as_str()),
        };
        same_device("targets", &targets, rows)?;
        let vocab = options.vocab_size.unwrap_or(width);
        if vocab == 0 || vocab > width {
            bail!("vocab_size: {vocab}, must be 1 to {width}, the length of a row of logits");
        }
        if !(options.z_loss.is_finite() && options.z_loss >= 0.0) {
            bail!(
                "z_loss: {}, must be finite and not negative",
                options.z_loss
            );
        }
        if let Some(c) = options.softcap
            && !(c.is_finite() && c > 0.0)
        {
            bail!("softcap: {c}, must be finite and greater than 0");
        }
        if !(options.logit_scale.is_finite() && options.logit_scale > 0.0) {
            bail!(
                "logit_scale: {}, must be finite and greater than 0",
                options.logit_scale
            );
        }
        if let Reduction::SumOver(n) = options.reduction
            && !(n.is_finite() && n > 0.0)
        {
            bail!("reduction: SumOver({n}), n must be finite and greater than 0");
        }
        let row_type = if on_cpu { DType::F64 } else { DType::F32 };
        let (smoothing, uniform_smoothing) = match &options.smoothing {
            Smoothing::PerRow(values) => (
                Some(row_values(
                    "smoothing",
                    values,
                    false,
                    &shape,
                    row_type,
                    rows,
                )?),
                0.0,
            ),
            &Smoothing::Uniform(value) if (0.0..=1.0).contains(&value) => (None, value),
            Smoothing::Uniform(value) => bail!("smoothing: {value}, must be in [0, 1]"),
        };
        let weights = match &options.row_weights {
            Some(values) => Some(row_values(
                "row_weights",
                values,
                true,
                &shape,
                row_type,
                rows,
            )?),
            None => None,
        };
        Ok(Self {
            targets: targets.contiguous()?.reshape(count)?,
            shape,
            rows: count,
            width,
            vocab,
            smoothing,
            uniform_smoothing,
            weights,
            ignore_index: options.ignore_index,
            z_loss: options.z_loss,
            softcap: options.softcap,
            logit_scale: options.logit_scale,
            reduction: options.reduction,
            inplace_backward: options.inplace_backward,
            check_inputs: options.check_inputs,
        })
    }

    /// The shape of the result.
    pub fn loss_shape(&self) -> &[usize] {
        match self.reduction {
            Reduction::None => &self.shape,
            _ => &[],
        }
    }

    /// Reads the rows' values: `None` for ignored rows, an error for the first bad value.
    pub fn read_rows(&self) -> Result<Vec<Option<Row>>> {
        self.read_each_row()?.into_iter().collect()
    }

    /// [`read_rows`](Self::read_rows) with an error for every bad value. Waits for the device if that is not the CPU.
    pub fn read_each_row(&self) -> Result<Vec<Result<Option<Row>>>> {
        let targets = self.targets.to_dtype(DType::I64)?.to_vec1::<i64>()?;
        let per_row = |values: &Option<Tensor>| {
            let read = |values: &Tensor| {
                let values = values.to_dtype(DType::F64)?.flatten_all()?;
                values.to_vec1::<f64>()
            };
            values.as_ref().map(read).transpose()
        };
        let (smoothing, weights) = (per_row(&self.smoothing)?, per_row(&self.weights)?);
        let read = |(i, target): (usize, i64)| {
            if target == self.ignore_index {
                return Ok(None);
            }
            let smoothing = smoothing
                .as_ref()
                .map_or(f64::from(self.uniform_smoothing), |s| s[i]);
            let weight = weights.as_ref().map_or(1.0, |w| w[i]);
            if !(0..self.vocab as i64).contains(&target) {
                return Err(self.bad_value(BadValue::Target, i, target));
            }
            if !(0.0..=1.0).contains(&smoothing) {
                return Err(self.bad_value(BadValue::Smoothing, i, smoothing));
            }
            if !(weight.is_finite() && weight >= 0.0) {
                return Err(self.bad_value(BadValue::Weight, i, weight));
            }
            Ok(Some(Row {
                target: target as usize,
                smoothing,
                weight,
            }))
        };
        Ok(targets.into_iter().enumerate().map(read).collect())
    }

    /// The call about the rows whose numbers `ids` (n) has, as a flat list.
    pub fn select(&self, ids: &Tensor) -> Result<Self> {
        let select = |values: &Tensor| values.index_select(ids, 0);
        let select_values = |values: &Tensor| {
            let selected = values.flatten_all()?.index_select(ids, 0)?;
            match ids.device().is_cpu() {
                true => Ok(selected),
                false => selected.unsqueeze(D::Minus1),
            }
        };
        Ok(Self {
            shape: ids.dims().to_vec(),
            rows: ids.elem_count(),
            targets: select(&self.targets)?,
            smoothing: self.smoothing.as_ref().map(select_values).transpose()?,
            weights: self.weights.as_ref().map(select_values).transpose()?,
            ..self.clone()
        })
    }

    /// The error for a value inside a tensor, the same on every device.
    pub fn bad_value(
        &self,
        kind: BadValue,
        row: usize,
        value: impl std::fmt::Display,
    ) -> candle_core::Error {
        let (argument, rule) = match kind {
            BadValue::Target => (
                "targets",
                format!(
                    "must be 0 to {} or the ignore_index {}{}",
                    self.vocab - 1,
                    self.ignore_index,
                    // candle's own operations take no value for this index.
                    match self.targets.dtype() {
                        DType::U32 if value.to_string() == u32::MAX.to_string() =>
                            "; .ignore_index(u32::MAX.into()) ignores such rows",
                        _ => "",
                    }
                ),
            ),
            BadValue::Smoothing => ("smoothing", "must be in [0, 1]".into()),
            BadValue::Weight => ("row_weights", "must be finite and not negative".into()),
        };
        candle_core::Error::Msg(format!("{argument}: row {row} has {value}, {rule}")).bt()
    }
}

fn same_device(argument: &str, tensor: &Tensor, (other, rows): (&str, &Tensor)) -> Result<()> {
    if !tensor.device().same_device(rows.device()) {
        bail!(
            "{argument}: on {:?}, must be on {:?} with {other}",
            tensor.device().location(),
            rows.device().location()
        );
    }
    Ok(())
}

fn shares_memory(a: &Tensor, b: &Tensor) -> bool {
    let storage = |tensor: &Tensor| std::ptr::from_ref(&*tensor.storage_and_layout().0);
    storage(a) == storage(b)
}

/// A value a row, broadcast to the targets' shape: flattened, or on CUDA (…, 1), a view where kernels can read that. A copy
/// would cost a launch and an upload, which a CUDA graph could not replay.
fn row_values(
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
    // A view of the logits must be read before they are locked, and overwritten, in place.
    let values = if shares_memory(values, rows.1) {
        values.copy()?
    } else {
        values.clone()
    };
    let original = values.detach();
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
