//! The rows of a call whose logits are all there: results, gradients, or both while a row is in the cache.

use candle_core::{Layout, Result, Tensor};
use rayon::prelude::*;

use super::{
    dispatch::dispatch,
    dots::Dots,
    element::Element,
    finish::{self, Named, Normaliser, RowResult, Sums, set_exponents},
    gradient::GradFactors,
    memory::{GradRows, Logits, readable},
    parallel::{
        Given, PIECES_PER_TASK, Scratch, Work, check_probabilities, differentiate_rows,
        differentiate_tile, for_each_row, row_partial, write_gradient,
    },
    results::Saved,
    row::{self, PIECE, Partial},
    running::{self, Running, merge_stretch},
    tasks::{KeptGeneralGradients, KeptGradients, buffers},
    transform::{CAPPED, Form, with_path},
};
use crate::call::Row;

/// Loss, statistics and normaliser of every row.
pub(super) fn evaluate<T: Element>(
    given: Given,
    x: &[T],
    layout: &Layout,
    stats: bool,
) -> Result<(Vec<RowResult>, Vec<Normaliser>)> {
    let call = given.call;
    let starts = readable(layout)?;
    let work = Work::all(given);
    let columns = call.columns.len();
    let x = |i: usize| &x[starts.of(i)..][..columns];
    if call.groups.vocab_shard.is_some() {
        return evaluate_slice(&work, x, stats);
    }
    let mut results = vec![(RowResult::default(), Normaliser::default()); call.rows];
    let general = call.is_general();
    let evaluate_row = with_path!(T, call, general, FORM, GENERAL => match stats || GENERAL {
        true => evaluate_row::<T, FORM, true, GENERAL>,
        false => evaluate_row::<T, FORM, false, GENERAL>,
    });
    for_each_row(
        columns,
        &mut results,
        || Scratch::new(columns, false, general),
        |i, result, scratch, shared| {
            if let Some(row) = work.row(i) {
                *result = evaluate_row(&work, i, row, x(i), scratch, shared);
            }
        },
    );
    let (results, normalisers): (Vec<RowResult>, _) = results.into_iter().unzip();
    check_probabilities(given, &results)?;
    Ok((results, normalisers))
}

/// [`evaluate`] of a slice of the vocabulary, with the other ranks.
fn evaluate_slice<'x, T: Element>(
    work: &Work<T>,
    x: impl Fn(usize) -> &'x [T] + Sync + Send,
    stats: bool,
) -> Result<(Vec<RowResult>, Vec<Normaliser>)> {
    let mut running = vec![Running::default(); work.given.call.rows];
    merge_stretch(work, x, &mut running, stats);
    running::finish_rows(work.given, stats, running)
}

fn evaluate_row<T: Element, const FORM: Form, const STATS: bool, const GENERAL: bool>(
    work: &Work<T>,
    i: usize,
    row: &Row,
    x: &[T],
    scratch: &mut Scratch<T>,
    shared: bool,
) -> (RowResult, Normaliser) {
    let left_out = work.left_out(row, x);
    let sums = row_partial::<T, FORM, STATS, false, GENERAL>(work, i, x, left_out, scratch, shared);
    finish_row::<T, FORM, STATS>(work, row, x, left_out, &sums, &mut scratch.named)
}

fn finish_row<T: Element, const FORM: Form, const STATS: bool>(
    work: &Work<T>,
    row: &Row,
    x: &[T],
    left_out: usize,
    (others, dots): &(Partial, Dots),
    named: &mut Vec<Named>,
) -> (RowResult, Normaliser) {
    let predicted = if STATS {
        row::largest_column(x, others)
    } else {
        0
    };
    work.list_named(row, x, left_out, named);
    set_exponents::<FORM>(named, others.largest, &work.exact);
    let sums = Sums {
        others,
        dots,
        named,
        predicted,
    };
    let Given { call, classes, .. } = work.given;
    finish::finish::<FORM>(call, classes, row, &sums, &work.exact)
}

/// [`differentiate_tile`] of all logits.
pub(super) fn differentiate_all<T: Element>(
    given: Given,
    saved: &Saved,
    upstream: &Tensor,
    logits: Logits<T>,
    out: &GradRows<T>,
) -> Result<()> {
    let (work, call) = (Work::all(given), given.call);
    let general = call.is_general_here();
    differentiate_tile(&work, saved, upstream, general, logits, out, call.rows)
}

/// Loss, statistics and gradient of every row, a row at a time while it is in the cache.
pub(super) fn evaluate_and_differentiate<T: Element>(
    given: Given,
    logits: Logits<T>,
    out: &GradRows<T>,
    stats: bool,
) -> Result<Vec<RowResult>> {
    let call = given.call;
    if call.groups.vocab_shard.is_some() {
        let work = Work::all(given);
        // SAFETY: nothing is written meanwhile.
        let x = |i| unsafe { logits.stretch(out, i, 0..call.columns.len()) };
        let (results, normalisers) = evaluate_slice(&work, x, stats)?;
        let (scale, general) = (1.0 / given.divisor, call.is_general_here());
        differentiate_rows(
            &work,
            &normalisers,
            |_| scale,
            general,
            logits,
            out,
            call.rows,
        );
        return Ok(results);
    }
    let results = with_path!(T, call, call.is_general(), FORM, GENERAL => match stats || GENERAL {
        true => evaluate_and_differentiate_with::<T, FORM, true, GENERAL>(given, logits, out),
        false => evaluate_and_differentiate_with::<T, FORM, false, GENERAL>(given, logits, out),
    });
    check_probabilities(given, &results)?;
    Ok(results)
}

fn evaluate_and_differentiate_with<
    T: Element,
    const FORM: Form,
    const STATS: bool,
    const GENERAL: bool,
>(
    given: Given,
    logits: Logits<T>,
    out: &GradRows<T>,
) -> Vec<RowResult> {
    let call = given.call;
    let (scale, columns) = (1.0 / given.divisor, call.columns.len());
    let work = Work::all(given);
    // A softcap's slope needs the logits once more, the entropy's gradient the exponents, so there is nothing to gain from
    // keeping exponentials.
    let keep = FORM != CAPPED && !call.weighs_entropy();
    let mut results = vec![RowResult::default(); call.rows];
    for_each_row(
        columns,
        &mut results,
        || Scratch::new(columns, keep, GENERAL),
        |i, result, scratch, shared| {
            let Some(row) = work.row(i) else {
                let named = &mut scratch.named;
                write_gradient::<T, FORM, GENERAL>(&work, i, None, logits, out, named, shared);
                return;
            };
            // SAFETY: the row is this call's alone, and `x` is not used once the gradient is written.
            let x = unsafe { logits.stretch(out, i, 0..columns) };
            let left_out = work.left_out(row, x);
            let sums = if keep {
                row_partial::<T, FORM, STATS, true, GENERAL>(&work, i, x, left_out, scratch, shared)
            } else {
                row_partial::<T, FORM, STATS, false, GENERAL>(
                    &work, i, x, left_out, scratch, shared,
                )
            };
            let named = &mut scratch.named;
            let normaliser;
            (*result, normaliser) =
                finish_row::<T, FORM, STATS>(&work, row, x, left_out, &sums, named);
            let factors = GradFactors::new(call, row, &normaliser, scale);
            match &factors {
                Some(factors) if keep && factors.in_range => {
                    write_kept_gradient::<T, FORM, GENERAL>(
                        &work, i, scratch, out, factors, shared,
                    );
                    work.write_named::<FORM>(i, &scratch.named, out, factors);
                }
                factors => {
                    let (factors, named) = (factors.as_ref(), &mut scratch.named);
                    write_gradient::<T, FORM, GENERAL>(
                        &work, i, factors, logits, out, named, shared,
                    );
                }
            }
        },
    );
    results
}

/// Gradient of row `i`, but for that of classes which its target names, from the exponentials in the scratch memory.
fn write_kept_gradient<T: Element, const FORM: Form, const GENERAL: bool>(
    work: &Work<T>,
    i: usize,
    scratch: &mut Scratch<T>,
    out: &GradRows<T>,
    factors: &GradFactors<T::Real>,
    shared: bool,
) {
    let Scratch {
        partials,
        kept,
        buffers: own_buffers,
        ..
    } = scratch;
    let call = work.given.call;
    // SAFETY: the row is this call's alone, and padding no other task's.
    unsafe { out.stretch(i, call.columns.len()..call.width) }.fill(T::default());
    let run = |first_column, partials: &[Partial], kept: &mut [T::Real], buffers: &mut _| {
        let of = KeptGradients::<T, FORM> {
            kept,
            partials,
            out,
            row: i,
            first_column,
            exact: &work.exact,
            factors,
        };
        if GENERAL {
            let general = &work.general;
            dispatch(KeptGeneralGradients {
                of,
                general,
                buffers,
            });
        } else {
            dispatch(of);
        }
    };
    if shared {
        let stretch = PIECES_PER_TASK * PIECE;
        let tasks = partials
            .par_chunks(PIECES_PER_TASK)
            .zip(kept.par_chunks_mut(stretch));
        tasks.enumerate().for_each(|(t, (partials, kept))| {
            run(t * stretch, partials, kept, &mut buffers(GENERAL));
        });
    } else {
        run(0, partials, kept, own_buffers);
    }
}
