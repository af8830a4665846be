//! The values inside the tensors of a call, read on the host; an error for a bad one.

use std::fmt::Display;

use candle_core::{D, DType, Result, Tensor, bail};
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

/// Entries of targets that a thread reads at least.
const ENTRIES_PER_TASK: usize = 1 << 11;

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
        let k = self.entries_a_row();
        let is_class = |target: i64| (0..self.vocab as i64).contains(&target);
        let read = |i: usize, entries: &mut [(usize, f64)]| {
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
                    let (start, here) = (i * k, i * k..(i + 1) * k);
                    let row = named[here.clone()].iter().zip(&probabilities[here]);
                    let mut count = 0;
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
        let read = |argument: &str, values: &Option<Tensor>| -> Result<Option<Vec<f64>>> {
            let Some(values) = values else {
                return Ok(None);
            };
            let values = values.to_dtype(DType::F64)?.to_vec1::<f64>()?;
            let is_bad = |v: &f64| !(v.is_finite() && *v >= 0.0);
            // All of them first, without a way out of the loop, so that it vectorises.
            if values.iter().fold(false, |any, v| any | is_bad(v))
                && let Some(class) = values.iter().position(is_bad)
            {
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
            let count = prior.len() as f64;
            let mut mean = sum(prior) / count;
            if mean.is_infinite() {
                mean = prior.iter().map(|u| u / count).sum();
            }
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

/// In several chains, as one would wait for each addition.
fn sum(values: &[f64]) -> f64 {
    let (chunks, rest) = values.as_chunks::<16>();
    let mut sums = [0.0; 16];
    for chunk in chunks {
        for (sum, v) in sums.iter_mut().zip(chunk) {
            *sum += v;
        }
    }
    sums.iter().chain(rest).sum()
}

/// Sorts a row's entries by class, and makes one of those that name the same; how many are left.
fn merge_equal(row: &mut [(usize, f64)]) -> usize {
    if row.windows(2).all(|pair| pair[0].0 < pair[1].0) {
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
