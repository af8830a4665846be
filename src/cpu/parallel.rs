//! Rows, or pieces of rows where rows are few, shared out among threads.

use candle_core::{DType, Layout, Result, Tensor};
use rayon::prelude::*;

use super::{
    element::Element,
    memory::{GradRows, Logits, readable},
    real::Real,
    results::{Saved, divisor},
    row::{
        self, CAPPED, Form, GradFactors, Normaliser, PIECE, Partial, RowResult, Transform,
        with_form,
    },
    tasks::{Gradients, KeptGradients, Partials, dispatch},
};
use crate::call::{Call, Row};

/// Fewer rows than this a thread, and the pieces of a row are shared out as well.
const FEW_ROWS: usize = 4;
/// Up to so many logits in all, the calling thread is done before others would be awake.
const SMALL: usize = 1 << 15;
/// Pieces a task where they are shared out.
const PIECES_PER_TASK: usize = 8;

fn rows_are_few(rows: usize, vocab: usize) -> bool {
    rows < FEW_ROWS * rayon::current_num_threads() && vocab > PIECE * PIECES_PER_TASK
}

/// A thread's memory, used again for each of its rows.
pub(super) struct Scratch<R> {
    partials: Vec<Partial>,
    kept: Vec<R>,
}

impl<R: Real> Scratch<R> {
    pub(super) fn new(vocab: usize, keep: bool) -> Self {
        Self {
            partials: vec![Partial::EMPTY; vocab.div_ceil(PIECE)],
            kept: vec![R::ZERO; if keep { vocab } else { 0 }],
        }
    }
}

/// The row's pieces, evaluated into the scratch memory and merged in order, whoever evaluated them.
pub(super) fn row_partial<T: Element, const FORM: Form, const STATS: bool, const KEEP: bool>(
    x: &[T],
    target: usize,
    transforms: (&Transform<T::Real>, &Transform<f64>),
    scratch: &mut Scratch<T::Real>,
    shared: bool,
) -> Partial {
    let Scratch { partials, kept } = scratch;
    let run = |first_piece, partials: &mut [Partial], kept: &mut [T::Real]| {
        dispatch(Partials::<T, FORM, STATS, KEEP> {
            x,
            first_piece,
            target,
            transforms,
            partials,
            kept,
        });
    };
    if !shared {
        run(0, partials, kept);
    } else if KEEP {
        let tasks = partials
            .par_chunks_mut(PIECES_PER_TASK)
            .zip(kept.par_chunks_mut(PIECES_PER_TASK * PIECE));
        tasks
            .enumerate()
            .for_each(|(t, (partials, kept))| run(t * PIECES_PER_TASK, partials, kept));
    } else {
        let tasks = partials.par_chunks_mut(PIECES_PER_TASK);
        tasks
            .enumerate()
            .for_each(|(t, partials)| run(t * PIECES_PER_TASK, partials, &mut []));
    }
    let exact = transforms.1;
    partials
        .iter()
        .fold(Partial::EMPTY, |all, &more| all.merge::<FORM>(more, exact))
}

/// Runs `f` on every row of `vocab` logits and its result: in parallel, or, where rows are few, one by one, and `f` is
/// told to share its work out. Little work stays with the calling thread.
pub(super) fn for_each_row<R: Send, S>(
    vocab: usize,
    results: &mut [R],
    scratch: impl Fn() -> S + Sync + Send,
    f: impl Fn(usize, &mut R, &mut S, bool) + Sync + Send,
) {
    let rows = results.len();
    let small = rows * vocab <= SMALL;
    if small || rows_are_few(rows, vocab) {
        let mut scratch = scratch();
        results
            .iter_mut()
            .enumerate()
            .for_each(|(i, r)| f(i, r, &mut scratch, !small));
    } else {
        // Few enough tasks that making their scratch memory costs nothing, enough to balance threads.
        let rows_per_task = rows.div_ceil(16 * rayon::current_num_threads()).max(1);
        results
            .par_chunks_mut(rows_per_task)
            .enumerate()
            .for_each_init(scratch, |scratch, (t, results)| {
                results
                    .iter_mut()
                    .enumerate()
                    .for_each(|(r, result)| f(t * rows_per_task + r, result, scratch, false));
            });
    }
}

/// Loss, statistics and normaliser of every row.
pub(super) fn evaluate<T: Element>(
    call: &Call,
    rows: &[Option<Row>],
    x: &[T],
    layout: &Layout,
    stats: bool,
) -> Result<(Vec<RowResult>, Vec<Normaliser>)> {
    let starts = readable(layout)?;
    let (transform, exact) = (Transform::new(call), Transform::new(call));
    let mut results = vec![(RowResult::default(), Normaliser::default()); call.rows];
    let evaluate_row = with_form!(call, FORM => match stats {
        true => evaluate_row::<T, FORM, true>,
        false => evaluate_row::<T, FORM, false>,
    });
    for_each_row(
        call.vocab,
        &mut results,
        || Scratch::new(call.vocab, false),
        |i, result, scratch, shared| {
            if let Some(row) = &rows[i] {
                *result = evaluate_row(
                    call,
                    row,
                    &x[starts.of(i)..][..call.vocab],
                    (&transform, &exact),
                    scratch,
                    shared,
                );
            }
        },
    );
    Ok(results.into_iter().unzip())
}

fn evaluate_row<T: Element, const FORM: Form, const STATS: bool>(
    call: &Call,
    row: &Row,
    x: &[T],
    transforms: (&Transform<T::Real>, &Transform<f64>),
    scratch: &mut Scratch<T::Real>,
    shared: bool,
) -> (RowResult, Normaliser) {
    let others = row_partial::<T, FORM, STATS, false>(x, row.target, transforms, scratch, shared);
    finish_row::<T, FORM, STATS>(call, row, x, &others, transforms.1)
}

fn finish_row<T: Element, const FORM: Form, const STATS: bool>(
    call: &Call,
    row: &Row,
    x: &[T],
    others: &Partial,
    exact: &Transform<f64>,
) -> (RowResult, Normaliser) {
    let x_y = row::one(x[row.target]).f64();
    let predicted = if STATS {
        row::largest_column(x, others)
    } else {
        0
    };
    row::finish::<FORM>(call, row, x_y, predicted, others, exact)
}

/// Gradient of row `i` from its `vocab` logits.
pub(super) fn write_gradient<T: Element, const FORM: Form>(
    vocab: usize,
    row: Option<(usize, Option<GradFactors<T::Real>>)>,
    i: usize,
    logits: Logits<T>,
    out: &GradRows<T>,
    (transform, exact): (&Transform<T::Real>, &Transform<f64>),
    shared: bool,
) {
    let Some((target, Some(factors))) = row else {
        // SAFETY: the row is this call's alone, and nothing of it is in use.
        unsafe { out.stretch(i, 0..out.width()) }.fill(T::default());
        return;
    };
    // SAFETY: as above; padding is no other task's.
    unsafe { out.stretch(i, vocab..out.width()) }.fill(T::default());
    let write = |columns| {
        dispatch(Gradients::<T, FORM> {
            logits,
            out,
            row: i,
            columns,
            target,
            transform,
            exact,
            factors: &factors,
        });
    };
    if shared {
        let stretch = PIECE * PIECES_PER_TASK;
        (0..vocab.div_ceil(stretch))
            .into_par_iter()
            .for_each(|s| write(s * stretch..((s + 1) * stretch).min(vocab)));
    } else {
        write(0..vocab);
    }
}

/// Gradient of every row from the forward's normalisers.
pub(super) fn differentiate<T: Element>(
    call: &Call,
    saved: &Saved,
    upstream: &Tensor,
    logits: Logits<T>,
    out: &GradRows<T>,
) -> Result<()> {
    let upstream = upstream.to_dtype(DType::F64)?.to_vec1::<f64>()?;
    let divisor = divisor(call, &saved.rows);
    let (transform, exact) = (Transform::new(call), Transform::new(call));
    for_each_row(
        call.vocab,
        &mut vec![(); call.rows],
        || (),
        |i, (), (), shared| {
            let row = saved.rows[i].map(|row| {
                let scale = upstream[if upstream.len() == 1 { 0 } else { i }] / divisor;
                (
                    row.target,
                    GradFactors::new(call, &row, &saved.normalisers[i], scale),
                )
            });
            let transforms = (&transform, &exact);
            with_form!(call, FORM => {
                write_gradient::<T, FORM>(call.vocab, row, i, logits, out, transforms, shared)
            });
        },
    );
    Ok(())
}

/// Loss, statistics and gradient of every row, a row at a time while it is in the cache.
pub(super) fn evaluate_and_differentiate<T: Element>(
    call: &Call,
    rows: &[Option<Row>],
    logits: Logits<T>,
    out: &GradRows<T>,
    stats: bool,
) -> Vec<RowResult> {
    with_form!(call, FORM => match stats {
        true => evaluate_and_differentiate_with::<T, FORM, true>(call, rows, logits, out),
        false => evaluate_and_differentiate_with::<T, FORM, false>(call, rows, logits, out),
    })
}

fn evaluate_and_differentiate_with<T: Element, const FORM: Form, const STATS: bool>(
    call: &Call,
    rows: &[Option<Row>],
    logits: Logits<T>,
    out: &GradRows<T>,
) -> Vec<RowResult> {
    let scale = 1.0 / divisor(call, rows);
    let (transform, exact) = (Transform::new(call), Transform::new(call));
    let transforms = (&transform, &exact);
    // A softcap's slope needs the logits once more, so there is nothing to gain from keeping exponentials.
    let keep = FORM != CAPPED;
    let mut results = vec![RowResult::default(); call.rows];
    for_each_row(
        call.vocab,
        &mut results,
        || Scratch::new(call.vocab, keep),
        |i, result, scratch, shared| {
            let row = rows[i].map(|row| {
                // SAFETY: the row is this call's alone, and `x` is not used once the gradient is written.
                let x = unsafe { logits.stretch(out, i, 0..call.vocab) };
                let others = if keep {
                    row_partial::<T, FORM, STATS, true>(x, row.target, transforms, scratch, shared)
                } else {
                    row_partial::<T, FORM, STATS, false>(x, row.target, transforms, scratch, shared)
                };
                let (row_result, normaliser) =
                    finish_row::<T, FORM, STATS>(call, &row, x, &others, &exact);
                *result = row_result;
                (
                    row.target,
                    x[row.target],
                    GradFactors::new(call, &row, &normaliser, scale),
                )
            });
            match row {
                Some((target, x_y, Some(factors))) if keep && factors.in_range => {
                    write_kept_gradient::<T, FORM>(call, i, scratch, out, &factors, &exact, shared);
                    // SAFETY: as above.
                    let grad = unsafe { out.stretch(i, target..target + 1) };
                    T::narrow(
                        &[row::target_gradient::<T, FORM>(x_y, &exact, &factors)],
                        grad,
                    );
                }
                row => {
                    let row = row.map(|(target, _, factors)| (target, factors));
                    write_gradient::<T, FORM>(call.vocab, row, i, logits, out, transforms, shared);
                }
            }
        },
    );
    results
}

/// Gradient of row `i`, but for the target's, from the exponentials in the scratch memory.
fn write_kept_gradient<T: Element, const FORM: Form>(
    call: &Call,
    i: usize,
    scratch: &mut Scratch<T::Real>,
    out: &GradRows<T>,
    factors: &GradFactors<T::Real>,
    exact: &Transform<f64>,
    shared: bool,
) {
    let Scratch { partials, kept } = scratch;
    // SAFETY: the row is this call's alone, and padding no other task's.
    unsafe { out.stretch(i, call.vocab..call.width) }.fill(T::default());
    let run = |first_column, partials: &[Partial], kept: &mut [T::Real]| {
        dispatch(KeptGradients::<T, FORM> {
            kept,
            partials,
            out,
            row: i,
            first_column,
            exact,
            factors,
        });
    };
    if shared {
        let stretch = PIECES_PER_TASK * PIECE;
        let tasks = partials
            .par_chunks(PIECES_PER_TASK)
            .zip(kept.par_chunks_mut(stretch));
        tasks
            .enumerate()
            .for_each(|(t, (partials, kept))| run(t * stretch, partials, kept));
    } else {
        run(0, partials, kept);
    }
}
