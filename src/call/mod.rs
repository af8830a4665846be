//! One call of the loss, its arguments checked and brought to the form the backends read.

mod arguments;
mod values;

use std::ops::Range;

use candle_core::{D, DType, Device, Result, Tensor, bail};

use self::arguments::{class_values, row_targets, row_values, same_device, value_type};
pub(crate) use self::values::{ClassValues, PerClass, Row, RowTarget, Rows, bad_probability};
use crate::{
    options::{CrossEntropy, Reduction, RowValue, Smoothing},
    parallel::Ranks,
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
    /// Classes of the whole vocabulary.
    pub vocab: usize,
    /// Those of the columns: all, or this rank's. `width` less the padding.
    pub columns: Range<usize>,
    pub groups: Groups,
    /// Of the logits, or of the factors that they are products of.
    pub dtype: DType,
    /// Whether the hidden states that the logits are products of are in candle's graph.
    pub hidden_is_tracked: bool,
    /// Of all rows the numbers of these, and how many there are, where some are left out.
    pub chosen: Option<(usize, Vec<u32>)>,
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

/// The groups of ranks that a call belongs to.
#[derive(Clone, Debug, Default)]
pub(crate) struct Groups {
    pub vocab_shard: Option<Ranks>,
    pub data_parallel: Option<Ranks>,
}

impl Groups {
    pub fn of(options: &CrossEntropy) -> Self {
        Self {
            vocab_shard: options
                .vocab_shard
                .as_ref()
                .map(|shard| shard.ranks.clone()),
            data_parallel: options.data_parallel.clone(),
        }
    }
}

/// Kernels count columns in 32 bits, and some way beyond a row's end.
const MAX_WIDTH: usize = i32::MAX as usize - (1 << 14);
/// [`predicted`](crate::RowStats::predicted) is a u32.
const MAX_VOCABULARY: usize = u32::MAX as usize;

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
        Ok(Self {
            hidden_is_tracked: hidden.track_op(),
            ..Self::of_rows(options, ("hidden", hidden), width, targets)?
        })
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
        let groups = Groups::of(options);
        let (columns, vocabulary) = match &options.vocab_shard {
            None => (0..vocab, vocab),
            Some(shard) => {
                let (first, vocabulary) = (shard.first_class, shard.vocabulary);
                let end = first.checked_add(vocab);
                let most = if on_cpu { MAX_VOCABULARY } else { MAX_WIDTH };
                if vocabulary > most || end.is_none_or(|end| end > vocabulary) {
                    bail!(
                        "vocab_shard: {vocab} classes from {first} on of a vocabulary of {vocabulary}, must be within it, and it \
                         at most {most}"
                    );
                }
                (first..first + vocab, vocabulary)
            }
        };
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
            // A rank's padding is not the vocabulary's.
            let width = if groups.vocab_shard.is_some() {
                vocabulary
            } else {
                width
            };
            let read = |values| class_values(argument, values, (vocabulary, width), rows);
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
            vocab: vocabulary,
            columns,
            groups: groups.clone(),
            dtype: tensor.dtype(),
            hidden_is_tracked: false,
            chosen: None,
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

    /// Whether it does where a row's classes come in parts: which of a few classes that the target names has the largest logit,
    /// and would be left out of the sums, is known only after the last part.
    pub fn is_general_in_parts(&self) -> bool {
        self.is_general() || matches!(self.targets, Targets::TopK { .. })
    }

    /// Whether it does for the logits of this call, which are all of a row's, or a rank's part.
    pub fn is_general_here(&self) -> bool {
        match self.groups.vocab_shard {
            Some(_) => self.is_general_in_parts(),
            None => self.is_general(),
        }
    }

    /// Classes that the target of a row names, if it names several.
    pub fn entries_a_row(&self) -> usize {
        match &self.targets {
            Targets::TopK { classes, .. } if self.rows > 0 => classes.elem_count() / self.rows,
            _ => 0,
        }
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
            chosen: match self.groups.vocab_shard {
                Some(_) => Some((self.rows, ids.to_vec1()?)),
                None => None,
            },
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
}
