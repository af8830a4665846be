//! Rows, or pieces of rows where rows are few, shared out among threads.

use std::ops::Range;

use candle_core::{DType, Result, Tensor};
use rayon::prelude::*;

use super::{
    dispatch::dispatch,
    dots::Dots,
    element::Element,
    finish::{Named, Normaliser, RowResult, set_exponents},
    general::General,
    gradient::{GradFactors, named_gradient},
    memory::{GradRows, Logits},
    probabilities::Probabilities,
    real::Real,
    results::{Inputs, Saved},
    row::{self, PIECE, Partial},
    tasks::{Buffers, GeneralGradients, GeneralPartials, Gradients, Partials, buffers},
    transform::{Form, Transform, with_path},
};
use crate::{
    call::{Call, ClassValues, Row, RowTarget, Rows},
    targets::Targets,
    tiles::Tile,
};

/// Fewer rows than this a thread, and the pieces of a row are shared out as well.
const FEW_ROWS: usize = 4;
/// Up to so many logits in all, the calling thread is done before others would be awake.
const SMALL: usize = 1 << 15;
/// Pieces a task where they are shared out.
pub(super) const PIECES_PER_TASK: usize = 8;

fn rows_are_few(rows: usize, vocab: usize) -> bool {
    rows < FEW_ROWS * rayon::current_num_threads() && vocab > PIECE * PIECES_PER_TASK
}

/// What a call is given beside logits.
#[derive(Clone, Copy)]
pub(super) struct Given<'a> {
    pub call: &'a Call,
    pub rows: &'a Rows,
    pub classes: &'a ClassValues,
    pub probabilities: Option<&'a Probabilities<'a>>,
    /// What row losses are divided by.
    pub divisor: f64,
}

impl Inputs {
    pub(super) fn given<'a>(
        &'a self,
        call: &'a Call,
        probabilities: Option<&'a Probabilities<'a>>,
    ) -> Given<'a> {
        Given {
            call,
            rows: &self.rows,
            classes: &self.classes,
            probabilities,
            divisor: self.divisor,
        }
    }
}

/// The same in the form that rows of logits of type `T` are computed in: of all rows and classes, or of a tile.
pub(super) struct Work<'a, T: Element> {
    pub given: Given<'a>,
    first_row: usize,
    /// Classes, from the first column on.
    pub columns: Range<usize>,
    transform: Transform<T::Real>,
    pub exact: Transform<f64>,
    pub general: General<'a, T::Real>,
    /// Whether a class of each row is left out of the sums.
    leaves_out: bool,
}

/// A column that no row has.
pub(super) const NO_COLUMN: usize = usize::MAX;

impl<'a, T: Element> Work<'a, T> {
    /// Of a tile of this rank's classes.
    pub fn of_tile(given: Given<'a>, tile: &Tile) -> Self {
        let Range { start, end } = tile.classes;
        let first = given.call.columns.start;
        Self::new(given, tile.rows.start, first + start..first + end)
    }

    fn new(given: Given<'a>, first_row: usize, columns: Range<usize>) -> Self {
        let first = (first_row, columns.start - given.call.columns.start);
        let probabilities = given.probabilities.map(|values| (values, first));
        Self {
            transform: Transform::new(given.call),
            exact: Transform::new(given.call),
            general: General::new(given.classes, probabilities, &columns),
            columns,
            first_row,
            // Which of several has the largest logit is known only after the last part.
            leaves_out: matches!(given.call.targets, Targets::Classes(_)),
            given,
        }
    }

    /// Of all rows and this rank's classes.
    pub fn all(given: Given<'a>) -> Self {
        let work = Self::new(given, 0, given.call.columns.clone());
        match given.call.groups.vocab_shard {
            Some(_) => work,
            None => Self {
                leaves_out: given.probabilities.is_none(),
                ..work
            },
        }
    }

    /// Of row `i` of the tile.
    pub fn row(&self, i: usize) -> Option<&Row> {
        self.given.rows.rows[self.first_row + i].as_ref()
    }

    /// The classes that the target of a row names, with their probabilities.
    pub fn named(&self, row: &Row) -> &[(usize, f64)] {
        self.given.rows.named(row.target)
    }

    /// The column of a class in the tile.
    pub fn column(&self, class: usize) -> Option<usize> {
        self.columns
            .contains(&class)
            .then(|| class - self.columns.start)
    }

    /// The column that is left out of the sums of a row: the target's, or, of those that it names, that with the largest
    /// logit, as its p may be near 1.
    pub fn left_out(&self, row: &Row, x: &[T]) -> usize {
        match row.target {
            RowTarget::Class(class) => self.column(class).unwrap_or(NO_COLUMN),
            RowTarget::Entries { .. } => {
                // Far apart in memory: all at once.
                for column in self.named(row).iter().filter_map(|e| self.column(e.0)) {
                    row::prefetch(&x[column]);
                }
                let mut best = (NO_COLUMN, T::Real::NEG_INFINITY);
                for column in self.named(row).iter().filter_map(|e| self.column(e.0)) {
                    let logit = row::one(x[column]);
                    if best.0 == NO_COLUMN || logit > best.1 {
                        best = (column, logit);
                    }
                }
                best.0
            }
            RowTarget::Probabilities => NO_COLUMN,
        }
    }

    /// Lists the classes in the tile that the target of a row names.
    pub fn list_named(&self, row: &Row, x: &[T], left_out: usize, named: &mut Vec<Named>) {
        named.clear();
        let mut push = |class, t| {
            if let Some(column) = self.column(class) {
                let logit = row::one(x[column]).f64();
                named.push(Named::new(class, t, logit, column == left_out));
            }
        };
        match row.target {
            RowTarget::Class(class) => push(class, 1.0),
            _ => self
                .named(row)
                .iter()
                .for_each(|&(class, t)| push(class, t)),
        }
    }

    /// Puts the gradient of the classes in the tile that a row's target names right.
    pub fn write_named<const FORM: Form>(
        &self,
        i: usize,
        named: &[Named],
        out: &GradRows<T>,
        factors: &GradFactors<T::Real>,
    ) {
        // SAFETY: the row is this call's alone, and nothing of it is in use.
        let grad = unsafe { out.stretch(i, 0..self.columns.len()) };
        for named in named {
            let values = self.given.classes;
            let gradient = named_gradient::<T::Real, FORM>(named, values, &self.exact, factors);
            let column = named.class - self.columns.start;
            T::narrow(&[gradient], &mut grad[column..column + 1]);
        }
    }
}

/// A thread's memory, used again for each of its rows.
pub(super) struct Scratch<T: Element> {
    pub partials: Vec<Partial>,
    dots: Vec<Dots>,
    pub kept: Vec<T::Real>,
    pub named: Vec<Named>,
    pub buffers: Buffers<T::Real>,
}

impl<T: Element> Scratch<T> {
    pub(super) fn new(vocab: usize, keep: bool, general: bool) -> Self {
        let pieces = vocab.div_ceil(PIECE);
        Self {
            partials: vec![Partial::EMPTY; pieces],
            dots: vec![Dots::default(); if general { pieces } else { 0 }],
            kept: vec![T::Real::ZERO; if keep { vocab } else { 0 }],
            named: Vec::new(),
            buffers: buffers(general),
        }
    }
}

/// The pieces of row `i`, evaluated into the scratch memory and merged in order, whoever evaluated them. `target` is the
/// column that is left out.
pub(super) fn row_partial<
    T: Element,
    const FORM: Form,
    const STATS: bool,
    const KEEP: bool,
    const GENERAL: bool,
>(
    work: &Work<T>,
    i: usize,
    x: &[T],
    target: usize,
    scratch: &mut Scratch<T>,
    shared: bool,
) -> (Partial, Dots) {
    let Scratch {
        partials,
        dots,
        kept,
        buffers: own_buffers,
        ..
    } = scratch;
    let transforms = (&work.transform, &work.exact);
    let run = |first_piece,
               partials: &mut [Partial],
               dots: &mut [Dots],
               kept: &mut [T::Real],
               buffers: &mut Buffers<T::Real>| {
        if GENERAL {
            dispatch(GeneralPartials::<T, FORM> {
                x,
                row: i,
                first_piece,
                target,
                leaves_out: work.leaves_out,
                transforms,
                general: &work.general,
                partials,
                dots,
                kept,
                buffers,
            });
        } else {
            dispatch(Partials::<T, FORM, STATS, KEEP> {
                x,
                first_piece,
                target,
                transforms,
                partials,
                kept,
            });
        }
    };
    if shared {
        // As many parts of each, empty ones of what there is not.
        let tasks = partials.len().div_ceil(PIECES_PER_TASK);
        let mut dots = dots.chunks_mut(PIECES_PER_TASK);
        let mut kept = kept.chunks_mut(PIECES_PER_TASK * PIECE);
        let beside: Vec<_> = (0..tasks)
            .map(|_| {
                (
                    dots.next().unwrap_or_default(),
                    kept.next().unwrap_or_default(),
                )
            })
            .collect();
        partials
            .par_chunks_mut(PIECES_PER_TASK)
            .zip(beside)
            .enumerate()
            .for_each(|(t, (partials, (dots, kept)))| {
                run(
                    t * PIECES_PER_TASK,
                    partials,
                    dots,
                    kept,
                    &mut buffers(GENERAL),
                );
            });
    } else {
        run(0, partials, dots, kept, own_buffers);
    }
    let exact = &work.exact;
    let all = partials
        .iter()
        .fold(Partial::EMPTY, |all, &more| all.merge::<FORM>(more, exact));
    let of_piece = |(partial, &dots): (&Partial, &Dots)| dots.related::<FORM>(partial, &all, exact);
    let dots = partials.iter().zip(&*dots).map(of_piece);
    (all, dots.fold(Dots::default(), Dots::plus))
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

/// An error for the first row with a bad probability in its target.
pub(super) fn check_probabilities(given: Given, results: &[RowResult]) -> Result<()> {
    match (
        given.probabilities,
        results.iter().position(|result| result.bad),
    ) {
        (Some(probabilities), Some(row)) => Err(probabilities.error_in(row, &given.call.columns)),
        _ => Ok(()),
    }
}

/// Gradient of row `i` from its logits, `factors` unless it is 0. `named` is scratch memory.
pub(super) fn write_gradient<T: Element, const FORM: Form, const GENERAL: bool>(
    work: &Work<T>,
    i: usize,
    factors: Option<&GradFactors<T::Real>>,
    logits: Logits<T>,
    out: &GradRows<T>,
    named: &mut Vec<Named>,
    shared: bool,
) {
    let (Some(factors), Some(row)) = (factors, work.row(i)) else {
        // SAFETY: the row is this call's alone, and nothing of it is in use.
        unsafe { out.stretch(i, 0..out.width()) }.fill(T::default());
        return;
    };
    let vocab = work.columns.len();
    // SAFETY: as above; padding is no other task's.
    unsafe { out.stretch(i, vocab..out.width()) }.fill(T::default());
    let target = match row.target {
        RowTarget::Class(class) if !GENERAL => {
            named.clear();
            work.column(class).unwrap_or(NO_COLUMN)
        }
        _ => {
            // SAFETY: as above; `x` is not used once the gradient is written.
            let x = unsafe { logits.stretch(out, i, 0..vocab) };
            let left_out = match factors.has_left_out() {
                true => work.left_out(row, x),
                false => NO_COLUMN,
            };
            work.list_named(row, x, left_out, named);
            set_exponents::<FORM>(named, factors.largest(), &work.exact);
            NO_COLUMN
        }
    };
    let write = |columns| {
        if GENERAL {
            dispatch(GeneralGradients::<T, FORM> {
                logits,
                out,
                row: i,
                columns,
                general: &work.general,
                transform: &work.transform,
                exact: &work.exact,
                factors,
            });
        } else {
            dispatch(Gradients::<T, FORM> {
                logits,
                out,
                row: i,
                columns,
                target,
                values: work.given.classes,
                transform: &work.transform,
                exact: &work.exact,
                factors,
            });
        }
    };
    if shared {
        let stretch = PIECE * PIECES_PER_TASK;
        (0..vocab.div_ceil(stretch))
            .into_par_iter()
            .for_each(|s| write(s * stretch..((s + 1) * stretch).min(vocab)));
    } else {
        write(0..vocab);
    }
    if target == NO_COLUMN {
        work.write_named::<FORM>(i, named, out, factors);
    }
}

/// Gradient of every row of a tile, all where it is one, from the forward's normalisers.
pub(super) fn differentiate_tile<T: Element>(
    work: &Work<T>,
    saved: &Saved,
    upstream: &Tensor,
    general: bool,
    logits: Logits<T>,
    out: &GradRows<T>,
    rows: usize,
) -> Result<()> {
    let upstream = upstream.to_dtype(DType::F64)?.to_vec1::<f64>()?;
    let scale =
        |row: usize| upstream[if upstream.len() == 1 { 0 } else { row }] / saved.inputs.divisor;
    differentiate_rows(work, &saved.normalisers, scale, general, logits, out, rows);
    Ok(())
}

/// Gradient of every row of a tile; `scale` of a row is everything that multiplies it but its weight.
pub(super) fn differentiate_rows<T: Element>(
    work: &Work<T>,
    normalisers: &[Normaliser],
    scale: impl Fn(usize) -> f64 + Sync + Send,
    general: bool,
    logits: Logits<T>,
    out: &GradRows<T>,
    rows: usize,
) {
    let call = work.given.call;
    let write = with_path!(T, call, general, FORM, GENERAL => write_gradient::<T, FORM, GENERAL>);
    for_each_row(
        work.columns.len(),
        &mut vec![(); rows],
        Vec::new,
        |i, (), named, shared| {
            let at = work.first_row + i;
            let factors = work
                .row(i)
                .and_then(|row| GradFactors::new(call, row, &normalisers[at], scale(at)));
            write(work, i, factors.as_ref(), logits, out, named, shared);
        },
    );
}
