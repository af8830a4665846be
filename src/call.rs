//! One call of the loss, its arguments checked and brought to the form the backends read.

use std::fmt::Display;

use candle_core::{D, DType, Device, Result, Tensor, bail};

use crate::{
    options::{CrossEntropy, Reduction, RowValue, Smoothing},
    rows::row_offsets,
    targets::Targets,
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
    /// Classes (rows) or (rows, k), contiguous, u32 or i64. Probabilities of a few classes (rows, k), contiguous, f64 or on
    /// CUDA f32; of all (…, `width` or at least `vocab`) in the caller's type, rows as [`row_offsets`] takes them.
    pub targets: Targets,
    /// (rows), contiguous, f64; on CUDA (…, 1), f32, with strides of any kind. `None` for the uniform value.
    pub smoothing: Option<Tensor>,
    pub uniform_smoothing: f32,
    /// The same; `None` for 1.
    pub weights: Option<Tensor>,
    /// As smoothing.
    pub entropy_weight: Option<Tensor>,
    pub uniform_entropy_weight: f32,
    /// (`vocab`), contiguous, f64 or on CUDA f32; `None` for 1.
    pub class_weights: Option<Tensor>,
    /// The same; `None` for an even one.
    pub smoothing_prior: Option<Tensor>,
    pub ignore_index: i64,
    pub z_loss: f32,
    pub softcap: Option<f32>,
    pub logit_scale: f32,
    pub reduction: Reduction,
    pub inplace_backward: bool,
    pub check_inputs: bool,
}

/// What a row that is not ignored is given beside its logits.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Row {
    pub target: RowTarget,
    pub smoothing: f64,
    pub weight: f64,
    pub entropy_weight: f64,
    /// What it counts in a mean: its weight, times that of its class where it has one.
    pub count: f64,
}

#[derive(Clone, Copy, Debug)]
pub(crate) enum RowTarget {
    Class(usize),
    /// Of [`Rows::entries`].
    Entries {
        start: usize,
        count: u32,
    },
    /// A row of the tensor of probabilities.
    Probabilities,
}

/// Every row, `None` for ignored ones.
#[derive(Clone, Debug, Default)]
pub(crate) struct Rows {
    pub rows: Vec<Option<Row>>,
    /// Classes and probabilities of rows that have a few; no class twice in a row.
    pub entries: Vec<(usize, f64)>,
}

impl Rows {
    /// The classes that a target names, with their probabilities, where there are several.
    pub fn named(&self, target: RowTarget) -> &[(usize, f64)] {
        match target {
            RowTarget::Entries { start, count } => &self.entries[start..][..count as usize],
            _ => &[],
        }
    }
}

/// What classes are given, a value for each of [`Call::vocab`].
#[derive(Clone, Debug, Default)]
pub(crate) struct ClassValues {
    /// `None` for 1.
    pub weights: Option<Vec<f64>>,
    /// `None` for an even one.
    pub prior: Option<Vec<f64>>,
}

impl ClassValues {
    pub fn weight(&self, class: usize) -> f64 {
        self.weights.as_ref().map_or(1.0, |weights| weights[class])
    }

    /// 1 where there is no prior: what counts are its ratios.
    pub fn prior(&self, class: usize) -> f64 {
        self.prior.as_ref().map_or(1.0, |prior| prior[class])
    }
}

/// What is wrong with a row.
#[derive(Clone, Copy)]
enum BadValue {
    Target,
    Smoothing,
    Weight,
    EntropyWeight,
}

/// Kernels count columns in 32 bits, and some way beyond a row's end.
const MAX_WIDTH: usize = i32::MAX as usize - (1 << 14);

impl Call {
    pub fn new(options: &CrossEntropy, logits: &Tensor, targets: &Targets) -> Result<Self> {
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
        targets: &Targets,
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
        targets: &Targets,
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
        let targets = match row_targets(targets, &shape, (vocab, width), rows)? {
            // Without entries every row is ignored.
            Targets::TopK { classes, .. } if classes.dims() == [count, 0] => {
                Targets::Classes(Tensor::full(options.ignore_index, count, tensor.device())?)
            }
            targets => targets,
        };
        let row_type = value_type(tensor);
        let per_row = |argument, values, may_be_mask| {
            row_values(argument, values, may_be_mask, &shape, row_type, rows)
        };
        let (smoothing, uniform_smoothing) = match &options.smoothing {
            Smoothing::PerRow(values) => (Some(per_row("smoothing", values, false)?), 0.0),
            &Smoothing::Uniform(value) if (0.0..=1.0).contains(&value) => (None, value),
            Smoothing::Uniform(value) => bail!("smoothing: {value}, must be in [0, 1]"),
        };
        let weights = match &options.row_weights {
            Some(values) => Some(per_row("row_weights", values, true)?),
            None => None,
        };
        let (entropy_weight, uniform_entropy_weight) = match &options.entropy_weight {
            RowValue::PerRow(values) => (Some(per_row("entropy_weight", values, false)?), 0.0),
            &RowValue::Uniform(value) if value.is_finite() => (None, value),
            RowValue::Uniform(value) => bail!("entropy_weight: {value}, must be finite"),
        };
        let per_class = |argument, values: &Option<Tensor>| {
            let read = |values| class_values(argument, values, (vocab, width), rows);
            values.as_ref().map(read).transpose()
        };
        let call = Self {
            class_weights: per_class("class_weights", &options.class_weights)?,
            smoothing_prior: per_class("smoothing_prior", &options.smoothing_prior)?,
            entropy_weight,
            uniform_entropy_weight,
            targets,
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
        };
        Ok(call)
    }

    /// Whether the loss needs more of every logit than a class or a few a row, smoothed evenly, do: values of the classes,
    /// probabilities, the entropy.
    pub fn is_general(&self) -> bool {
        self.class_weights.is_some()
            || self.smoothing_prior.is_some()
            || self.weighs_entropy()
            || self.probabilities().is_some()
    }

    /// Whether a row's entropy has a weight.
    pub fn weighs_entropy(&self) -> bool {
        self.entropy_weight.is_some() || self.uniform_entropy_weight != 0.0
    }

    /// The targets, if they are a probability for each class.
    pub fn probabilities(&self) -> Option<&Tensor> {
        match &self.targets {
            Targets::Probabilities(values) => Some(values),
            _ => None,
        }
    }

    /// Whether classes have weights or a prior.
    #[cfg(feature = "cuda")]
    pub fn has_class_values(&self) -> bool {
        self.class_weights.is_some() || self.smoothing_prior.is_some()
    }

    /// Whether a row's target is more than one class, smoothed evenly.
    #[cfg(feature = "cuda")]
    pub fn has_distributions(&self) -> bool {
        self.is_general() || !matches!(self.targets, Targets::Classes(_))
    }

    /// Where everything is.
    pub fn device(&self) -> &Device {
        match &self.targets {
            Targets::Classes(values)
            | Targets::Probabilities(values)
            | Targets::TopK {
                classes: values, ..
            } => values.device(),
        }
    }

    /// The shape of the result.
    pub fn loss_shape(&self) -> &[usize] {
        match self.reduction {
            Reduction::None => &self.shape,
            _ => &[],
        }
    }

    /// Reads the rows' values; an error for the first bad one.
    pub fn read_rows(&self, classes: &ClassValues) -> Result<Rows> {
        let mut entries = Vec::new();
        let rows = self.read_each_row(classes, &mut entries)?;
        Ok(Rows {
            rows: rows.into_iter().collect::<Result<_>>()?,
            entries,
        })
    }

    /// [`read_rows`](Self::read_rows) with an error for every bad row. Waits for the device if that is not the CPU.
    pub fn read_each_row(
        &self,
        classes: &ClassValues,
        entries: &mut Vec<(usize, f64)>,
    ) -> Result<Vec<Result<Option<Row>>>> {
        let integers = |values: &Tensor| -> Result<Vec<i64>> {
            values.to_dtype(DType::I64)?.flatten_all()?.to_vec1()
        };
        let floats = |values: &Tensor| -> Result<Vec<f64>> {
            values.to_dtype(DType::F64)?.flatten_all()?.to_vec1()
        };
        let per_row = |values: &Option<Tensor>| values.as_ref().map(floats).transpose();
        let smoothing = per_row(&self.smoothing)?;
        let weights = per_row(&self.weights)?;
        let entropy_weights = per_row(&self.entropy_weight)?;
        let (named, probabilities) = match &self.targets {
            Targets::Classes(classes) => (integers(classes)?, Vec::new()),
            Targets::TopK {
                classes,
                probabilities,
            } => (integers(classes)?, floats(probabilities)?),
            Targets::Probabilities(_) => Default::default(),
        };
        let is_class = |target: i64| (0..self.vocab as i64).contains(&target);
        let mut read = |i: usize| {
            let mut count = 1.0;
            let target = match &self.targets {
                Targets::Classes(_) if named[i] == self.ignore_index => return Ok(None),
                Targets::Classes(_) if is_class(named[i]) => {
                    let class = named[i] as usize;
                    count = classes.weight(class);
                    RowTarget::Class(class)
                }
                Targets::Classes(_) => return Err(self.bad_value(BadValue::Target, i, named[i])),
                Targets::TopK { .. } => {
                    let k = named.len() / self.rows;
                    let (start, here) = (entries.len(), i * k..(i + 1) * k);
                    let row = named[here.clone()].iter().zip(&probabilities[here]);
                    for (&class, &probability) in row {
                        if class == self.ignore_index {
                            continue;
                        }
                        if !is_class(class) {
                            return Err(self.bad_value(BadValue::Target, i, class));
                        }
                        if !(probability.is_finite() && probability >= 0.0) {
                            return Err(bad_probability(i, class as usize, probability));
                        }
                        entries.push((class as usize, probability));
                    }
                    merge_equal(entries, start);
                    if entries.len() == start {
                        return Ok(None);
                    }
                    RowTarget::Entries {
                        start,
                        count: (entries.len() - start) as u32, // no class twice
                    }
                }
                Targets::Probabilities(_) => RowTarget::Probabilities,
            };
            let value = |values: &Option<Vec<f64>>, uniform: f64| {
                values.as_ref().map_or(uniform, |values| values[i])
            };
            let smoothing = value(&smoothing, self.uniform_smoothing.into());
            let weight = value(&weights, 1.0);
            let entropy_weight = value(&entropy_weights, self.uniform_entropy_weight.into());
            if !(0.0..=1.0).contains(&smoothing) {
                return Err(self.bad_value(BadValue::Smoothing, i, smoothing));
            }
            if !(weight.is_finite() && weight >= 0.0) {
                return Err(self.bad_value(BadValue::Weight, i, weight));
            }
            if !entropy_weight.is_finite() {
                return Err(self.bad_value(BadValue::EntropyWeight, i, entropy_weight));
            }
            Ok(Some(Row {
                target,
                smoothing,
                weight,
                entropy_weight,
                count: weight * count,
            }))
        };
        Ok((0..self.rows).map(&mut read).collect())
    }

    /// What reads a row of `values`, the targets' probabilities, `vocab` of them; an error for the first bad one.
    pub fn probability_reader(
        &self,
        values: &Tensor,
    ) -> Result<impl Fn(usize) -> Result<Vec<f64>> + use<>> {
        let (rows, vocab, width) = (self.rows, self.vocab, values.dim(D::Minus1)?);
        let values = values.reshape((rows, width))?.narrow(1, 0, vocab)?;
        Ok(move |i: usize| {
            let row: Vec<f64> = values.get(i)?.to_dtype(DType::F64)?.to_vec1()?;
            match row.iter().position(|t| !(t.is_finite() && *t >= 0.0)) {
                Some(class) => Err(bad_probability(i, class, row[class])),
                None => Ok(row),
            }
        })
    }

    /// Reads the classes' values; an error for the first bad one.
    pub fn read_classes(&self) -> Result<ClassValues> {
        let read = |argument: &str, values: &Option<Tensor>| -> Result<Option<Vec<f64>>> {
            let Some(values) = values else {
                return Ok(None);
            };
            let values = values.to_dtype(DType::F64)?.to_vec1::<f64>()?;
            if let Some(class) = values.iter().position(|v| !(v.is_finite() && *v >= 0.0)) {
                bail!(
                    "{argument}: class {class} has {}, must be finite and not negative",
                    values[class]
                );
            }
            Ok(Some(values))
        };
        let mut prior = read("smoothing_prior", &self.smoothing_prior)?;
        if let Some(prior) = &mut prior {
            // Only ratios count: with a mean of 1, squares are in range.
            let mean = prior.iter().map(|u| u / prior.len() as f64).sum::<f64>();
            if mean == 0.0 {
                bail!("smoothing_prior: 0 for every class, must be positive for one");
            }
            prior.iter_mut().for_each(|u| *u /= mean);
        }
        Ok(ClassValues {
            weights: read("class_weights", &self.class_weights)?,
            prior,
        })
    }

    /// The call about the rows whose numbers `ids` (n) has, as a flat list.
    pub fn select(&self, ids: &Tensor) -> Result<Self> {
        let targets = match &self.targets {
            // Its rows may be of more than one dimension.
            Targets::Probabilities(values) => {
                let width = values.dim(D::Minus1)?;
                Targets::Probabilities(values.reshape(((), width))?)
            }
            targets => targets.clone(),
        };
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
            targets: targets.try_map(|values| values.index_select(ids, 0))?,
            smoothing: self.smoothing.as_ref().map(select_values).transpose()?,
            weights: self.weights.as_ref().map(select_values).transpose()?,
            entropy_weight: self
                .entropy_weight
                .as_ref()
                .map(select_values)
                .transpose()?,
            ..self.clone()
        })
    }

    /// The error for a value inside a tensor, the same on every device.
    fn bad_value(&self, kind: BadValue, row: usize, value: impl Display) -> candle_core::Error {
        let (argument, rule) = match kind {
            BadValue::Target => (
                "targets",
                format!(
                    "must be 0 to {} or the ignore_index {}{}",
                    self.vocab - 1,
                    self.ignore_index,
                    // candle's own operations take no value for this index.
                    match &self.targets {
                        Targets::Classes(classes)
                            if classes.dtype() == DType::U32
                                && value.to_string() == u32::MAX.to_string() =>
                            "; .ignore_index(u32::MAX.into()) ignores such rows",
                        _ => "",
                    }
                ),
            ),
            BadValue::Smoothing => ("smoothing", "must be in [0, 1]".into()),
            BadValue::Weight => ("row_weights", "must be finite and not negative".into()),
            BadValue::EntropyWeight => ("entropy_weight", "must be finite".into()),
        };
        candle_core::Error::Msg(format!("{argument}: row {row} has {value}, {rule}")).bt()
    }
}

/// The error for a probability, the same on every device.
pub(crate) fn bad_probability(row: usize, class: usize, value: impl Display) -> candle_core::Error {
    candle_core::Error::Msg(format!(
        "targets: row {row} has probability {value} for class {class}, must be finite and not negative"
    ))
    .bt()
}

/// Sorts the entries from `start` on by class, and makes one of those that name the same.
fn merge_equal(entries: &mut Vec<(usize, f64)>, start: usize) {
    let row = &mut entries[start..];
    if row.windows(2).all(|pair| pair[0].0 < pair[1].0) {
        return;
    }
    row.sort_by_key(|&(class, _)| class);
    let mut last = 0;
    for next in 1..row.len() {
        if row[next].0 == row[last].0 {
            row[last].1 += row[next].1;
        } else {
            last += 1;
            row[last] = row[next];
        }
    }
    entries.truncate(start + last + 1);
}

/// Targets of rows of this `shape`, of the form that [`Call::targets`] has.
fn row_targets(
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
                probabilities: unshared(probabilities, tensor)?
                    .to_dtype(value_type(tensor))?
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
fn class_values(
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
    unshared(values, rows.1)?
        .narrow(0, 0, vocab)?
        .to_dtype(value_type(rows.1))?
        .contiguous()
}

/// Type of values beside logits where these are.
fn value_type(logits: &Tensor) -> DType {
    if logits.device().is_cpu() {
        DType::F64
    } else {
        DType::F32
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
