//! Rows whose classes come in parts: tiles of `forward_linear`, slices of a vocabulary on several ranks.

use candle_core::Result;

use super::{
    dots::{Dots, Sum},
    element::Element,
    finish::{self, Named, Normaliser, RowResult, Sums, set_exponents},
    parallel::{Given, NO_COLUMN, Scratch, Work, check_probabilities, for_each_row, row_partial},
    real::Real,
    row::{self, Partial},
    transform::{Form, Transform, with_path},
};
use crate::{
    call::{Call, Row, RowTarget},
    shard::{self, Slice},
};

/// What is known of a row after some of its classes.
#[derive(Clone)]
pub(super) struct Running {
    others: Partial,
    /// Of the target's one class, which is left out of the sums.
    target_logit: f64,
    predicted: u32,
    /// Of rows of the general kind.
    general: Option<Box<General>>,
}

impl Default for Running {
    fn default() -> Self {
        Self {
            others: Partial::EMPTY,
            target_logit: f64::NAN,
            predicted: 0,
            general: None,
        }
    }
}

#[derive(Clone, Default)]
struct General {
    dots: Dots,
    /// Logits of a few classes that the target names, of which none is left out.
    entries: Vec<f64>,
}

/// Merges the logits of a stretch of the classes, of row i those that `x(i)` is, into its rows' results.
pub(super) fn merge_stretch<'x, T: Element>(
    work: &Work<T>,
    x: impl Fn(usize) -> &'x [T] + Sync + Send,
    running: &mut [Running],
    stats: bool,
) {
    let call = work.given.call;
    with_path!(T, call, call.is_general_in_parts(), FORM, GENERAL => match stats || GENERAL {
        true => merge_rows::<T, FORM, true, GENERAL>(work, x, running),
        false => merge_rows::<T, FORM, false, GENERAL>(work, x, running),
    });
}

fn merge_rows<'x, T: Element, const FORM: Form, const STATS: bool, const GENERAL: bool>(
    work: &Work<T>,
    x: impl Fn(usize) -> &'x [T] + Sync + Send,
    running: &mut [Running],
) {
    let width = work.columns.len();
    for_each_row(
        width,
        running,
        || Scratch::new(width, false, GENERAL),
        |i, running, scratch, shared| {
            let Some(row) = work.row(i) else { return };
            let x = x(i);
            let logit = |column: usize| row::one(x[column]).f64();
            let target = match row.target {
                RowTarget::Class(class) => work.column(class),
                _ => None,
            };
            if let Some(column) = target {
                running.target_logit = logit(column);
            }
            if GENERAL {
                let named = work.named(row);
                let entries = &mut running.general.get_or_insert_default().entries;
                entries.resize(named.len(), f64::NAN);
                for (entry, &(class, _)) in entries.iter_mut().zip(named) {
                    if let Some(column) = work.column(class) {
                        *entry = logit(column);
                    }
                }
            }
            let (partial, dots) = row_partial::<T, FORM, STATS, false, GENERAL>(
                work,
                i,
                x,
                target.unwrap_or(NO_COLUMN),
                scratch,
                shared,
            );
            let predicted = match STATS && partial.largest > running.others.largest {
                true => work.columns.start as u32 + row::largest_column(x, &partial),
                false => 0,
            };
            running.merge::<FORM>(&partial, &dots, predicted, &work.exact);
        },
    );
}

impl Running {
    /// Merges the sums of a stretch behind those that are known, in which `predicted` has the largest logit.
    fn merge<const FORM: Form>(
        &mut self,
        partial: &Partial,
        dots: &Dots,
        predicted: u32,
        exact: &Transform<f64>,
    ) {
        if partial.largest > self.others.largest {
            self.predicted = predicted;
        }
        let all = self.others.merge::<FORM>(*partial, exact);
        if let Some(general) = &mut self.general {
            let before = general.dots.related::<FORM>(&self.others, &all, exact);
            general.dots = before.plus(dots.related::<FORM>(partial, &all, exact));
        }
        self.others = all;
    }

    /// Appends [`shard::values_a_row`].
    fn push_to(&self, call: &Call, stats: bool, values: &mut Vec<f64>) {
        let end = values.len() + shard::values_a_row(call, stats);
        let o = &self.others;
        values.extend([
            o.largest,
            o.exp,
            o.largest_classes as f64,
            o.linear,
            o.classes as f64,
            self.target_logit,
        ]);
        if call.is_general_in_parts() || stats {
            values.extend([o.weighted, o.squares, self.predicted.into()]);
        }
        if call.is_general_in_parts() {
            let none = General::default();
            let General { dots, entries } = self.general.as_deref().unwrap_or(&none);
            for sum in [dots.shares, dots.target, dots.weighted_target] {
                values.extend([sum.mass, sum.linear]);
            }
            values.extend(dots.prior);
            values.extend(dots.target_products);
            // Neither is an error: a probability that is bad is the rank's own to say.
            values.push(f64::from(
                u8::from(dots.out_of_reach) + 2 * u8::from(dots.bad),
            ));
            values.extend(entries);
        }
        values.resize(end, f64::NAN);
    }

    /// The inverse, and of another rank's.
    fn from_values(row: &Row, call: &Call, stats: bool, values: &[f64]) -> Self {
        let mut values = values.iter().copied();
        let mut next = || values.next().expect("as many as were pushed");
        let mut partial = Partial::EMPTY;
        partial.largest = next();
        partial.exp = next();
        partial.largest_classes = next() as usize;
        partial.linear = next();
        partial.classes = next() as usize;
        let mut running = Self {
            target_logit: next(),
            ..Self::default()
        };
        if call.is_general_in_parts() || stats {
            partial.weighted = next();
            partial.squares = next();
            running.predicted = next() as u32;
        }
        if call.is_general_in_parts() {
            let mut dots = Dots::default();
            for sum in [
                &mut dots.shares,
                &mut dots.target,
                &mut dots.weighted_target,
            ] {
                *sum = Sum {
                    mass: next(),
                    linear: next(),
                };
            }
            dots.prior = [next(), next(), next()];
            dots.target_products = [next(), next(), next()];
            let flags = next() as u8;
            (dots.out_of_reach, dots.bad) = (flags & 1 != 0, flags & 2 != 0);
            let named = match row.target {
                RowTarget::Entries { count, .. } => count as usize,
                _ => 0,
            };
            let entries = (0..named).map(|_| next()).collect();
            running.general = Some(Box::new(General { dots, entries }));
        }
        running.others = partial;
        running
    }

    /// Merges those of another slice of the classes behind these.
    fn merge_slice<const FORM: Form>(
        &mut self,
        other: &Self,
        slice: &Slice,
        (row, given): (&Row, Given),
        exact: &Transform<f64>,
    ) {
        if let RowTarget::Class(class) = row.target
            && slice.classes.contains(&class)
        {
            self.target_logit = other.target_logit;
        }
        let mut dots = Dots::default();
        if let (Some(general), Some(other)) = (&mut self.general, &other.general) {
            let named = given.rows.named(row.target).iter();
            for ((entry, theirs), (class, _)) in
                general.entries.iter_mut().zip(&other.entries).zip(named)
            {
                if slice.classes.contains(class) {
                    *entry = *theirs;
                }
            }
            dots = other.dots;
        }
        self.merge::<FORM>(&other.others, &dots, other.predicted, exact);
    }
}

/// Loss, statistics and normaliser of every row, whose classes of this rank are all merged: once with those of the other ranks, if
/// there are any.
pub(super) fn finish_rows(
    given: Given,
    stats: bool,
    mut running: Vec<Running>,
) -> Result<(Vec<RowResult>, Vec<Normaliser>)> {
    let call = given.call;
    let exact = Transform::new(call);
    if call.groups.vocab_shard.is_some() {
        let mut values = Vec::new();
        for running in &running {
            running.push_to(call, stats, &mut values);
        }
        let inputs = (given.rows, given.classes);
        let slices = shard::gather_slices(call, stats, inputs, values)?;
        with_path!(f64, call, false, FORM, _GENERAL => {
            merge_slices::<FORM>(given, stats, &slices, &mut running, &exact)
        });
    }
    let rows = given.rows.rows.iter().zip(&running);
    let finish = with_path!(f64, call, false, FORM, _GENERAL => finish::<FORM>);
    let (results, normalisers): (Vec<_>, _) = rows
        .map(|(row, running)| finish(given, row.as_ref(), running, &exact))
        .unzip();
    check_probabilities(given, &results)?;
    Ok((results, normalisers))
}

/// The rows' results from those of all slices.
fn merge_slices<const FORM: Form>(
    given: Given,
    stats: bool,
    slices: &[Slice],
    running: &mut [Running],
    exact: &Transform<f64>,
) {
    let call = given.call;
    let width = shard::values_a_row(call, stats);
    for (i, (row, running)) in given.rows.rows.iter().zip(running).enumerate() {
        let Some(row) = row else { continue };
        let of = |slice: &Slice| {
            Running::from_values(row, call, stats, &slice.values[i * width..][..width])
        };
        let (first, others) = slices.split_first().expect("this rank's at least");
        *running = of(first);
        for slice in others {
            running.merge_slice::<FORM>(&of(slice), slice, (row, given), exact);
        }
    }
}

/// Loss, statistics and normaliser of a row whose classes are all merged.
fn finish<const FORM: Form>(
    given: Given,
    row: Option<&Row>,
    running: &Running,
    exact: &Transform<f64>,
) -> (RowResult, Normaliser) {
    let Some(row) = row else {
        return Default::default();
    };
    let none = General::default();
    let General { dots, entries } = running.general.as_deref().unwrap_or(&none);
    let mut named: Vec<_> = match row.target {
        RowTarget::Class(class) => vec![Named::new(class, 1.0, running.target_logit, true)],
        target => {
            let with_logits = given.rows.named(target).iter().zip(entries);
            with_logits
                .map(|(&(class, t), &logit)| Named::new(class, t, logit, false))
                .collect()
        }
    };
    set_exponents::<FORM>(&mut named, running.others.largest, exact);
    let sums = Sums {
        others: &running.others,
        dots,
        named: &named,
        predicted: running.predicted,
    };
    finish::finish::<FORM>(given.call, given.classes, row, &sums, exact)
}
