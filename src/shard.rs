//! What the ranks of a call tell each other: that they do the same, which classes each has, that one has failed.

use std::{
    hash::{DefaultHasher, Hash, Hasher},
    ops::Range,
};

use candle_core::{Device, Result, Tensor, bail};

use crate::{
    call::{Call, ClassValues, Groups, PerClass, Row, RowTarget, Rows},
    options::Reduction,
    parallel::Ranks,
};

impl Groups {
    /// The result; of an error, one before the call's first exchange, the other ranks are told, which would wait otherwise.
    pub fn tell<T>(&self, result: Result<T>) -> Result<T> {
        if let Err(error) = &result {
            // What others say is of no use any more.
            let _ = exchange(DATA_PARALLEL, &self.data_parallel, failure(error));
            let _ = exchange(VOCAB_SHARD, &self.vocab_shard, failure(error));
        }
        result
    }
}

const DATA_PARALLEL: &str = "data_parallel";
const VOCAB_SHARD: &str = "vocab_shard";

/// What is gathered of a rank that has some of the classes: so many values of each row.
pub(crate) struct Slice {
    pub classes: Range<usize>,
    pub values: Vec<f64>,
}

/// Numbers that each rank sends before those of its rows. A failed rank sends its message in their place.
const HEADER: usize = 64;
const FAILED: f64 = 1.0;

/// The slices of all ranks, in the order of their classes, from [`values_a_row`] of each row of this one's. An error on every rank
/// if one has failed, if slices overlap or leave a gap, or if what the ranks are given differs.
pub(crate) fn gather_slices(
    call: &Call,
    stats: bool,
    (rows, classes): (&Rows, &ClassValues),
    values: Vec<f64>,
) -> Result<Vec<Slice>> {
    let fields = fields(call, Some((rows, classes)), stats);
    let mut message = header(&fields);
    message.extend(values);
    let all = exchange(VOCAB_SHARD, &call.groups.vocab_shard, message)?;
    check_alike(&fields, &all)?;
    slices_of(call, all)
}

/// [`gather_slices`] of values that follow on the device: what ranks are given is compared here, as far as it is known. `given` are
/// the rows' and the classes' values, where they were read.
#[cfg(feature = "cuda")]
pub(crate) fn agree(call: &Call, stats: bool, given: Option<(&Rows, &ClassValues)>) -> Result<()> {
    let fields = fields(call, given, stats);
    let all = exchange(VOCAB_SHARD, &call.groups.vocab_shard, header(&fields))?;
    check_alike(&fields, &all)?;
    slices_of(call, all).map(drop)
}

/// An error if a rank's fields are not those of the first.
fn check_alike(fields: &[Field], all: &[Vec<f64>]) -> Result<()> {
    for (rank, message) in all.iter().enumerate() {
        let others = message[1..].iter().zip(&all[0][1..]);
        for ((name, _, compared), (value, first)) in fields.iter().zip(others) {
            if value.to_bits() == first.to_bits() {
                continue;
            }
            match compared {
                Compared::Value => {
                    bail!("vocab_shard: {name} is {value} on rank {rank}, {first} on rank 0")
                }
                Compared::Contents => {
                    bail!("vocab_shard: {name} on rank {rank}: not what rank 0 has")
                }
                Compared::No => {}
            }
        }
    }
    Ok(())
}

/// Whose classes are what, from the first on.
fn slices_of(call: &Call, all: Vec<Vec<f64>>) -> Result<Vec<Slice>> {
    let mut slices: Vec<(usize, Slice)> = all
        .into_iter()
        .map(|mut message| {
            let values = message.split_off(HEADER);
            let (first, count) = (message[1] as usize, message[2] as usize);
            let classes = first..first + count;
            Slice { classes, values }
        })
        .enumerate()
        .collect();
    slices.sort_by_key(|(_, slice)| slice.classes.start);
    let mut end = 0;
    let mut before = None;
    for (rank, Slice { classes, .. }) in &slices {
        if let (Some(before), true) = (before, classes.start < end) {
            bail!(
                "vocab_shard: ranks {before} and {rank} both have class {}",
                classes.start
            );
        }
        if classes.start > end {
            bail!(
                "vocab_shard: no rank has class {end}; rank {rank} begins at {}",
                classes.start
            );
        }
        (end, before) = (classes.end, Some(rank));
    }
    if end != call.vocab {
        bail!(
            "vocab_shard: no rank has class {end} of a vocabulary of {}",
            call.vocab
        );
    }
    Ok(slices.into_iter().map(|(_, slice)| slice).collect())
}

fn header(fields: &[Field]) -> Vec<f64> {
    let mut message = vec![0.0; HEADER];
    for (to, field) in message[1..].iter_mut().zip(fields) {
        *to = field.1;
    }
    message
}

/// Tells the ranks that wait in [`gather_slices`], or in [`agree`], of an error.
pub(crate) fn tell_slices<T>(call: &Call, stats: bool, result: Result<T>) -> Result<T> {
    if let Err(error) = &result {
        let mut message = failure(error);
        if call.device().is_cpu() {
            message.resize(HEADER + call.rows * values_a_row(call, stats), 0.0);
        }
        let _ = exchange(VOCAB_SHARD, &call.groups.vocab_shard, message);
    }
    result
}

/// Numbers of each row that the ranks of a vocabulary exchange: a partial result, of which statistics and what stands beside the
/// logits need more.
pub(crate) fn values_a_row(call: &Call, stats: bool) -> usize {
    let plain = 6;
    if call.is_general_in_parts() {
        plain + 3 + 13 + call.entries_a_row()
    } else if stats {
        plain + 3
    } else {
        plain
    }
}

/// The sum over all ranks of what rows count in a mean: of `local`, this rank's, or the error that it has come to, of which the
/// others are told.
pub(crate) fn count_of_all(
    call: &Call,
    local: std::result::Result<f64, &candle_core::Error>,
) -> Result<f64> {
    if call.groups.data_parallel.is_none() {
        return Ok(local.unwrap_or_default());
    }
    let message = match local {
        Ok(count) => {
            let (kind, divisor) = reduction(call);
            let checks_again = f64::from(u8::from(checks_again(call)));
            let mut message = vec![0.0, count, kind, divisor, checks_again];
            message.resize(HEADER, 0.0);
            message
        }
        Err(error) => failure(error),
    };
    let all = exchange(DATA_PARALLEL, &call.groups.data_parallel, message)?;
    for (rank, message) in all.iter().enumerate() {
        let again = match call.device().is_cpu() {
            true => "form of the targets",
            false => "check_inputs",
        };
        for (name, field) in [("reduction", 2..4), (again, 4..5)] {
            if message[field.clone()] != all[0][field] {
                bail!("{DATA_PARALLEL}: {name} on rank {rank}: not what rank 0 has");
            }
        }
    }
    Ok(all.iter().map(|message| message[1]).sum())
}

/// Whether values are checked after the ranks have agreed: probabilities, as they are used, and what a device checks.
fn checks_again(call: &Call) -> bool {
    match call.device().is_cpu() {
        true => call.probabilities().is_some(),
        false => call.check_inputs,
    }
}

/// The result, of rows that are checked as they are used, or an error of another rank that has rows of the same batch.
pub(crate) fn settle<T>(call: &Call, result: Result<T>) -> Result<T> {
    if call.groups.data_parallel.is_none() || !checks_again(call) {
        return result;
    }
    let message = match &result {
        Ok(_) => vec![0.0; HEADER],
        Err(error) => failure(error),
    };
    let others = exchange(DATA_PARALLEL, &call.groups.data_parallel, message);
    let result = result?;
    others.map(|_| result)
}

/// What each rank sends; an error if one has failed. Nothing where there are no ranks.
fn exchange(what: &str, ranks: &Option<Ranks>, message: Vec<f64>) -> Result<Vec<Vec<f64>>> {
    let Some(ranks) = ranks else {
        return Ok(Vec::new());
    };
    let length = message.len();
    let all = ranks
        .0
        .all_gather(&Tensor::from_vec(message, length, &Device::Cpu)?);
    let all = match all {
        Ok(all) => all.to_vec2::<f64>()?,
        // Of a rank that has failed before it knew its rows the length is the header's.
        Err(error) => bail!(
            "{what}: {error}; they must be {HEADER} and those of all rows, {HEADER} alone of a rank that has failed"
        ),
    };
    for (rank, message) in all.iter().enumerate() {
        if message[0] == FAILED {
            bail!("{what}: rank {rank} failed: {}", text(&message[1..HEADER]));
        }
    }
    Ok(all)
}

/// Six bytes of a message in each number: more would not be exact.
const BYTES: usize = 6;

fn failure(error: &candle_core::Error) -> Vec<f64> {
    let text = error.to_string();
    let mut message = vec![FAILED];
    message.extend(
        text.lines()
            .next()
            .unwrap_or_default()
            .as_bytes()
            .chunks(BYTES)
            .map(|bytes| {
                let mut word = [0; 8];
                word[..bytes.len()].copy_from_slice(bytes);
                u64::from_le_bytes(word) as f64
            }),
    );
    message.resize(HEADER, 0.0);
    message
}

fn text(words: &[f64]) -> String {
    let bytes: Vec<u8> = words
        .iter()
        .flat_map(|word| (*word as u64).to_le_bytes().into_iter().take(BYTES))
        .filter(|byte| *byte != 0)
        .collect();
    String::from_utf8_lossy(&bytes).into_owned()
}

/// How ranks' values of a field are compared.
enum Compared {
    No,
    Value,
    /// By a digest.
    Contents,
}

/// Name and value of what ranks are given.
type Field = (&'static str, f64, Compared);

/// What ranks must be given alike, and the classes of each.
fn fields(call: &Call, given: Option<(&Rows, &ClassValues)>, stats: bool) -> Vec<Field> {
    use Compared::{Contents, No, Value};
    let (kind, divisor) = reduction(call);
    let flag = |value: bool| f64::from(u8::from(value));
    let mut fields = vec![
        ("first class", call.columns.start as f64, No),
        ("number of classes", call.columns.len() as f64, No),
        ("vocabulary", call.vocab as f64, Value),
        ("number of rows", call.rows as f64, Value),
        ("rows that count", digest([&call.chosen]), Contents),
        ("statistics", flag(stats), Contents),
        (
            "type of the logits",
            digest([call.dtype.as_str()]),
            Contents,
        ),
        (
            "gradient of the hidden states",
            flag(call.hidden_is_tracked),
            Contents,
        ),
        ("ignore_index", call.ignore_index as f64, Value),
        ("z_loss", call.z_loss.into(), Value),
        ("softcap", call.softcap.map_or(0.0, f64::from), Value),
        ("logit_scale", call.logit_scale.into(), Value),
        ("reduction", kind, Contents),
        ("n of SumOver", divisor, Value),
        ("check_inputs", flag(given.is_some()), Value),
    ];
    let Some((rows, classes)) = given else {
        return fields;
    };
    let of_rows = |value: fn(&Row) -> f64| {
        let values = rows.rows.iter().map(|row| row.as_ref().map(value));
        digest(values.map(|value| value.map(f64::to_bits)))
    };
    // There is a class at least, so that values that there are not are nothing else.
    let of_classes = |values: &Option<PerClass>| {
        let values = values.iter().flat_map(|v| (0..v.len()).map(|k| v.get(k)));
        digest(values.map(f64::to_bits))
    };
    let targets = rows.rows.iter().map(|row| {
        row.map(|row| {
            let named = rows.named(row.target).iter();
            (
                match row.target {
                    RowTarget::Class(class) => class,
                    _ => usize::MAX,
                },
                named
                    .map(|&(class, t)| (class, t.to_bits()))
                    .collect::<Vec<_>>(),
            )
        })
    });
    fields.extend([
        ("targets", digest(targets), Contents),
        ("smoothing", of_rows(|row| row.smoothing), Contents),
        ("row_weights", of_rows(|row| row.weight), Contents),
        (
            "entropy_weight",
            of_rows(|row| row.entropy_weight),
            Contents,
        ),
        ("class_weights", of_classes(&classes.weights), Contents),
        ("smoothing_prior", of_classes(&classes.prior), Contents),
    ]);
    fields
}

fn reduction(call: &Call) -> (f64, f64) {
    match call.reduction {
        Reduction::None => (0.0, 0.0),
        Reduction::Sum => (1.0, 0.0),
        Reduction::Mean => (2.0, 0.0),
        Reduction::SumOver(n) => (3.0, n),
    }
}

/// Of 48 bits, which a number holds exactly; the same in every process of one program.
fn digest<T: Hash>(items: impl IntoIterator<Item = T>) -> f64 {
    let mut hasher = DefaultHasher::new();
    for item in items {
        item.hash(&mut hasher);
    }
    (hasher.finish() >> 16) as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_of_errors_arrive() {
        for sent in ["", "targets", "row 3 of “x” has −1 …", &"long ".repeat(200)] {
            let message = failure(&candle_core::Error::Msg(sent.into()));
            assert_eq!((message.len(), message[0]), (HEADER, FAILED));
            let expected = &sent.as_bytes()[..sent.len().min((HEADER - 1) * BYTES)];
            assert_eq!(
                text(&message[1..]).as_bytes(),
                String::from_utf8_lossy(expected).as_bytes()
            );
        }
    }

    #[test]
    fn digests_tell_order_and_absence() {
        assert_eq!(digest([1, 2]), digest([1, 2]));
        assert_ne!(digest([1, 2]), digest([2, 1]));
        assert_ne!(digest([Some(0u64)]), digest([None::<u64>]));
        assert!(digest([1]) < 2f64.powi(48));
    }
}
