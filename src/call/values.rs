//! The values inside the tensors of a call, read on the host; an error for a bad one.

use std::fmt::Display;

use candle_core::{D, DType, Device, Layout, Result, Storage, StorageRef, Tensor, WithDType, bail};
use rayon::prelude::*;

use super::Call;
use crate::targets::Targets;

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
    /// Classes and probabilities of rows that have a few, as many places a row as the targets have; no class twice in a row.
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
    pub weights: Option<PerClass>,
    /// `None` for an even one.
    pub prior: Option<PerClass>,
}

/// A value for each class, of f64 if they are given so, else of f32: of many, fresh memory takes most of the time.
#[derive(Clone, Debug)]
pub(crate) enum PerClass {
    F32(Vec<f32>),
    F64(Vec<f64>),
}

impl PerClass {
    pub fn len(&self) -> usize {
        match self {
            Self::F32(values) => values.len(),
            Self::F64(values) => values.len(),
        }
    }

    pub fn get(&self, class: usize) -> f64 {
        match self {
            Self::F32(values) => values[class].into(),
            Self::F64(values) => values[class],
        }
    }
}

impl ClassValues {
    pub fn weight(&self, class: usize) -> f64 {
        self.weights
            .as_ref()
            .map_or(1.0, |weights| weights.get(class))
    }

    /// 1 where there is no prior: what counts are its ratios.
    pub fn prior(&self, class: usize) -> f64 {
        self.prior.as_ref().map_or(1.0, |prior| prior.get(class))
    }
}

/// Entries of targets that a thread reads at least.
const ENTRIES_PER_TASK: usize = 1 << 11;

/// Values that a thread reads at a time.
const VALUES_PER_TASK: usize = 1 << 12;

/// What is wrong with a row.
#[derive(Clone, Copy)]
enum BadValue {
    Target,
    Smoothing,
    Weight,
    EntropyWeight,
}

impl Call {
    /// Reads the rows' values; an error for the first bad one.
    pub fn read_rows(&self, classes: &ClassValues) -> Result<Rows> {
        let (rows, entries) = self.read_each_row(classes)?;
        Ok(Rows {
            rows: rows.into_iter().collect::<Result<_>>()?,
            entries,
        })
    }

    /// [`read_rows`](Self::read_rows) with an error for every bad row. Waits for the device if that is not the CPU.
    #[allow(clippy::type_complexity)]
    pub fn read_each_row(
        &self,
        classes: &ClassValues,
    ) -> Result<(Vec<Result<Option<Row>>>, Vec<(usize, f64)>)> {
        let floats = |values: &Tensor| -> Result<Vec<f64>> {
            values.to_dtype(DType::F64)?.flatten_all()?.to_vec1()
        };
        let per_row = |values: &Option<Tensor>| values.as_ref().map(floats).transpose();
        let smoothing = per_row(&self.smoothing)?;
        let weights = per_row(&self.weights)?;
        let entropy_weights = per_row(&self.entropy_weight)?;
        let (named, probabilities) = match &self.targets {
            Targets::Classes(classes) => (Some(on_host(classes)?), None),
            Targets::TopK {
                classes,
                probabilities,
            } => (Some(on_host(classes)?), Some(on_host(probabilities)?)),
            Targets::Probabilities(_) => (None, None),
        };
        // Read where they are: of many, fresh memory for copies takes longer than all else here.
        let named = named.as_ref().map(Tensor::storage_and_layout);
        let named = named.as_ref().map(Integers::of).transpose()?;
        let named = named.unwrap_or(Integers::U32(&[]));
        let probabilities = probabilities.as_ref().map(Tensor::storage_and_layout);
        let probabilities = probabilities.as_ref().map(Floats::of).transpose()?;
        let probabilities = probabilities.unwrap_or(Floats::F32(&[]));
        let k = self.entries_a_row();
        let is_class = |target: i64| (0..self.vocab as i64).contains(&target);
        let read = |i: usize, entries: &mut [(usize, f64)]| {
            let mut count = 1.0;
            let target = match &self.targets {
                Targets::Classes(_) if named.get(i) == self.ignore_index => return Ok(None),
                Targets::Classes(_) if is_class(named.get(i)) => {
                    let class = named.get(i) as usize;
                    count = classes.weight(class);
                    RowTarget::Class(class)
                }
                Targets::Classes(_) => {
                    return Err(self.bad_value(BadValue::Target, i, named.get(i)));
                }
                Targets::TopK { .. } => {
                    let start = i * k;
                    let mut count = 0;
                    for at in start..start + k {
                        let (class, probability) = (named.get(at), probabilities.get(at));
                        if class == self.ignore_index {
                            continue;
                        }
                        if !is_class(class) {
                            return Err(self.bad_value(BadValue::Target, i, class));
                        }
                        if !(probability.is_finite() && probability >= 0.0) {
                            return Err(bad_probability(i, class as usize, probability));
                        }
                        entries[count] = (class as usize, probability);
                        count += 1;
                    }
                    if count == 0 {
                        return Ok(None);
                    }
                    let count = merge_equal(&mut entries[..count]) as u32; // no class twice
                    RowTarget::Entries { start, count }
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
        let mut entries = vec![(0, 0.0); self.rows * k];
        let rows = match k {
            0 => (0..self.rows).map(|i| read(i, &mut [])).collect(),
            _ => entries
                .par_chunks_mut(k)
                .enumerate()
                .with_min_len(ENTRIES_PER_TASK.div_ceil(k))
                .map(|(i, entries)| read(i, entries))
                .collect(),
        };
        Ok((rows, entries))
    }

    /// What reads a row of `values`, the targets' probabilities, `vocab` of them; an error for the first bad one.
    pub fn probability_reader(
        &self,
        values: &Tensor,
    ) -> Result<impl Fn(usize) -> Result<Vec<f64>> + use<>> {
        let (rows, columns, width) = (self.rows, self.columns.clone(), values.dim(D::Minus1)?);
        let values = values.reshape((rows, width))?.narrow(1, 0, columns.len())?;
        Ok(move |i: usize| {
            let row: Vec<f64> = values.get(i)?.to_dtype(DType::F64)?.to_vec1()?;
            match row.iter().position(|t| !(t.is_finite() && *t >= 0.0)) {
                Some(at) => Err(bad_probability(i, columns.start + at, row[at])),
                None => Ok(row),
            }
        })
    }

    /// Reads the classes' values; an error for the first bad one.
    pub fn read_classes(&self) -> Result<ClassValues> {
        let read = |argument, values: &Option<Tensor>, is_prior| -> Result<Option<PerClass>> {
            let Some(values) = values else {
                return Ok(None);
            };
            Ok(Some(match values.dtype() {
                DType::F64 => PerClass::F64(read_classes(argument, values, is_prior)?),
                _ => PerClass::F32(read_classes(argument, values, is_prior)?),
            }))
        };
        Ok(ClassValues {
            prior: read("smoothing_prior", &self.smoothing_prior, true)?,
            weights: read("class_weights", &self.class_weights, false)?,
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

type Locked<'a> = (StorageRef<'a>, &'a Layout);

/// The elements of a tensor in the host's memory, without gaps.
enum Integers<'a> {
    U32(&'a [u32]),
    I64(&'a [i64]),
}

enum Floats<'a> {
    F32(&'a [f32]),
    F64(&'a [f64]),
}

/// A tensor in the host's memory, without gaps, as [`Integers`] or [`Floats`] may be.
fn on_host(values: &Tensor) -> Result<Tensor> {
    let values = values.to_device(&Device::Cpu)?.contiguous()?;
    match values.dtype() {
        DType::F16 | DType::BF16 => values.to_dtype(DType::F32),
        _ => Ok(values),
    }
}

/// The elements of a tensor that [`on_host`] gave.
fn elements<'a, T: WithDType>((storage, layout): &'a Locked) -> Result<&'a [T]> {
    match (&**storage, layout.contiguous_offsets()) {
        (Storage::Cpu(storage), Some((start, end))) => {
            Ok(&T::cpu_storage_as_slice(storage)?[start..end])
        }
        _ => bail!("values: not in the host's memory, or with gaps"),
    }
}

impl<'a> Integers<'a> {
    fn of(locked: &'a Locked) -> Result<Self> {
        Ok(match locked.0.dtype() {
            DType::U32 => Self::U32(elements(locked)?),
            _ => Self::I64(elements(locked)?),
        })
    }

    fn get(&self, i: usize) -> i64 {
        match self {
            Self::U32(values) => values[i].into(),
            Self::I64(values) => values[i],
        }
    }
}

impl<'a> Floats<'a> {
    fn of(locked: &'a Locked) -> Result<Self> {
        Ok(match locked.0.dtype() {
            DType::F32 => Self::F32(elements(locked)?),
            _ => Self::F64(elements(locked)?),
        })
    }

    fn get(&self, i: usize) -> f64 {
        match self {
            Self::F32(values) => values[i].into(),
            Self::F64(values) => values[i],
        }
    }
}

/// The classes' values; an error for the first bad one. A prior is divided by a power of 2.
fn read_classes<T: WithDType + Default + Into<f64>>(
    argument: &str,
    values: &Tensor,
    is_prior: bool,
) -> Result<Vec<T>> {
    let given = on_host(values)?.to_dtype(T::DTYPE)?;
    let locked = given.storage_and_layout();
    let given = elements::<T>(&locked)?;
    // By several threads, that share its page faults.
    let mut values = vec![T::default(); given.len()];
    values
        .par_chunks_mut(VALUES_PER_TASK)
        .zip(given.par_chunks(VALUES_PER_TASK))
        .for_each(|(to, from)| to.copy_from_slice(from));
    let is_bad = |v: &T| {
        let v: f64 = (*v).into();
        !(v.is_finite() && v >= 0.0)
    };
    // All of them first, without a way out of the loop, so that it vectorises.
    let any_bad = |values: &[T]| values.iter().fold(false, |any, v| any | is_bad(v));
    if values.par_chunks(VALUES_PER_TASK).any(any_bad)
        && let Some(class) = values.iter().position(is_bad)
    {
        bail!(
            "{argument}: class {class} has {}, must be finite and not negative",
            values[class].into()
        );
    }
    if is_prior {
        let count = values.len() as f64;
        let mut mean = sum(&values, 1.0) / count;
        if mean.is_infinite() {
            mean = sum(&values, count);
        }
        if mean == 0.0 {
            bail!("{argument}: 0 for every class, must be positive for one");
        }
        // Only ratios count: with a mean near 1, squares are in range. A power of 2 rounds nothing.
        let least = match T::DTYPE {
            DType::F32 => f32::MIN_POSITIVE.into(),
            _ => f64::MIN_POSITIVE,
        };
        let power = f64::from_bits(mean.to_bits() & f64::INFINITY.to_bits());
        let power = T::from_f64(power.max(least));
        let divide = |part: &mut [T]| part.iter_mut().for_each(|u| *u /= power);
        values.par_chunks_mut(VALUES_PER_TASK).for_each(divide);
    }
    Ok(values)
}

/// Σ v / `divisor`, by parts: the same whoever takes them.
fn sum<T: Copy + Into<f64> + Sync>(values: &[T], divisor: f64) -> f64 {
    // In several chains, as one would wait for each addition.
    let of_part = |values: &[T]| {
        let (chunks, rest) = values.as_chunks::<16>();
        let mut sums = [0.0; 16];
        for chunk in chunks {
            for (sum, &v) in sums.iter_mut().zip(chunk) {
                *sum += v.into() / divisor;
            }
        }
        let rest = rest.iter().map(|&v| v.into() / divisor);
        sums.iter().sum::<f64>() + rest.sum::<f64>()
    };
    let parts: Vec<f64> = values.par_chunks(VALUES_PER_TASK).map(of_part).collect();
    parts.iter().sum()
}

/// Makes one of a row's entries that name the same class; how many are left, sorted by class if there may be such.
fn merge_equal(row: &mut [(usize, f64)]) -> usize {
    // A bit for each remainder of a class: where none comes twice, no class does. Most rows need no sorting then.
    const WORDS: usize = 64;
    let mut seen = [0u64; WORDS];
    let mut again = 0;
    for &(class, _) in &*row {
        let (word, bit) = (&mut seen[class / 64 % WORDS], 1 << (class % 64));
        again |= *word & bit;
        *word |= bit;
    }
    if again == 0 {
        return row.len();
    }
    row.sort_unstable_by_key(|&(class, _)| class);
    let mut last = 0;
    for next in 1..row.len() {
        if row[next].0 == row[last].0 {
            row[last].1 += row[next].1;
        } else {
            last += 1;
            row[last] = row[next];
        }
    }
    last + 1
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_of_one_class_become_one() {
        let merged = |classes: &[usize]| {
            let entry = |(i, &class): (usize, &usize)| (class, f64::from(1 << i));
            let mut row: Vec<_> = classes.iter().enumerate().map(entry).collect();
            let count = merge_equal(&mut row);
            row.truncate(count);
            row
        };
        assert_eq!(merged(&[]), []);
        assert_eq!(merged(&[7, 3]), [(7, 1.0), (3, 2.0)]);
        assert_eq!(merged(&[7, 3, 7]), [(3, 2.0), (7, 5.0)]);
        // Alike for the bits, and no more.
        assert_eq!(merged(&[4099, 3]), [(3, 2.0), (4099, 1.0)]);
        assert_eq!(merged(&[4099, 3, 4099, 3]), [(3, 10.0), (4099, 5.0)]);
    }
}
