//! The CPU path: rows in parallel, or pieces of rows where rows are few, each vectorised for the instruction set
//! found at run time.

mod element;
mod real;
mod row;

use candle_core::{
    CpuStorage, DType, Device, Layout, Result, Tensor, WithDType, backend::BackendStorage, bail,
};

use rayon::prelude::*;

use self::{
    element::{Element, Precise},
    real::Real,
    row::{GradFactors, Normaliser, PIECE, Partial, RowResult, Transform},
};
use crate::{
    Reduction, RowStats,
    call::{Call, Row, row_offsets},
    kernel_abi::{MAX_ROW_DIMS, RowOffsets},
    op::{self, Forward, Fused},
};

/// What the forward leaves for the backward.
pub(crate) struct Saved {
    rows: Vec<Option<Row>>,
    normalisers: Vec<Normaliser>,
}

/// Evaluates an expression with `$x` as a slice of the logits' elements.
macro_rules! with_elements {
    ($call:expr, $storage:expr, $cast:ident, $x:ident => $body:expr) => {
        match $storage {
            CpuStorage::F32(x) if $call.softcap.is_some() => {
                let $x = bytemuck::$cast::<f32, Precise>(x);
                $body
            }
            CpuStorage::F32($x) => $body,
            CpuStorage::F64($x) => $body,
            CpuStorage::F16($x) => $body,
            CpuStorage::BF16($x) => $body,
            other => bail!("logits: {:?}, must be f32, f16, bf16 or f64", other.dtype()),
        }
    };
}

pub(crate) fn forward(
    call: &Call,
    logits: &CpuStorage,
    layout: &Layout,
    stats: bool,
) -> Result<Forward<CpuStorage>> {
    let rows = call.read_rows()?;
    let (results, normalisers) =
        with_elements!(call, logits, cast_slice, x => evaluate(call, &rows, x, layout, stats)?);
    let dtype = result_type(logits.dtype());
    let losses = reduce(call, &rows, &results);
    Ok(Forward {
        loss: if dtype == DType::F64 {
            f64::to_cpu_storage_owned(losses)
        } else {
            narrow_storage(losses)
        },
        stats: stats
            .then(|| row_stats(call, &results, dtype))
            .transpose()?,
        saved: op::Saved::Cpu(Saved { rows, normalisers }),
    })
}

pub(crate) fn backward(
    call: &Call,
    saved: &op::Saved,
    upstream: &Tensor,
    logits: &CpuStorage,
    layout: &Layout,
) -> Result<CpuStorage> {
    with_elements!(call, logits, cast_slice, x => {
        let mut grad = bytemuck::zeroed_vec(call.rows * call.width);
        let out = GradRows::contiguous(call, &mut grad);
        differentiate(call, saved, upstream, Logits::Separate(x, readable(layout)?), &out)?;
        Ok(Element::storage(grad))
    })
}

pub(crate) fn backward_inplace(
    call: &Call,
    saved: &op::Saved,
    upstream: &Tensor,
    logits: &mut CpuStorage,
    layout: &Layout,
) -> Result<()> {
    with_elements!(call, logits, cast_slice_mut, x => {
        let out = GradRows::inside(call, x, layout)?;
        differentiate(call, saved, upstream, Logits::InPlace, &out)
    })
}

pub(crate) fn fused(
    call: &Call,
    logits: &CpuStorage,
    layout: &Layout,
) -> Result<(CpuStorage, Fused)> {
    let rows = call.read_rows()?;
    with_elements!(call, logits, cast_slice, x => {
        let mut grad = bytemuck::zeroed_vec(call.rows * call.width);
        let out = GradRows::contiguous(call, &mut grad);
        let results = evaluate_and_differentiate(call, &rows, Logits::Separate(x, readable(layout)?), &out);
        let dtype = result_type(logits.dtype());
        Ok((Element::storage(grad), fused_result(call, &rows, &results, dtype)?))
    })
}

pub(crate) fn fused_inplace(
    call: &Call,
    logits: &mut CpuStorage,
    layout: &Layout,
) -> Result<Fused> {
    let rows = call.read_rows()?;
    let dtype = result_type(logits.dtype());
    let results = with_elements!(call, logits, cast_slice_mut, x => {
        let out = GradRows::inside(call, x, layout)?;
        evaluate_and_differentiate(call, &rows, Logits::InPlace, &out)
    });
    fused_result(call, &rows, &results, dtype)
}

/// Type of loss and statistics.
fn result_type(logits: DType) -> DType {
    if logits == DType::F64 {
        DType::F64
    } else {
        DType::F32
    }
}

fn narrow_storage(values: Vec<f64>) -> CpuStorage {
    f32::to_cpu_storage_owned(values.into_iter().map(|v| v as f32).collect())
}

/// What row losses are divided by.
fn divisor(call: &Call, rows: &[Option<Row>]) -> f64 {
    match call.reduction {
        Reduction::None | Reduction::Sum => 1.0,
        Reduction::SumOver(n) => n,
        Reduction::Mean => {
            let total: f64 = rows.iter().flatten().map(|row| row.weight).sum();
            if total == 0.0 { 1.0 } else { total }
        }
    }
}

/// The elements of the result.
fn reduce(call: &Call, rows: &[Option<Row>], results: &[RowResult]) -> Vec<f64> {
    let losses = results.iter().map(|r| r.loss);
    match call.reduction {
        Reduction::None => losses.collect(),
        _ => vec![losses.sum::<f64>() / divisor(call, rows)],
    }
}

fn fused_result(
    call: &Call,
    rows: &[Option<Row>],
    results: &[RowResult],
    dtype: DType,
) -> Result<Fused> {
    let loss = Tensor::from_vec(reduce(call, rows, results), call.loss_shape(), &Device::Cpu)?
        .to_dtype(dtype)?;
    Ok(Fused {
        loss,
        stats: row_stats(call, results, dtype)?,
    })
}

fn row_stats(call: &Call, results: &[RowResult], dtype: DType) -> Result<RowStats> {
    let shape = call.shape.as_slice();
    let float = |value: fn(&RowResult) -> f64| {
        Tensor::from_vec(
            results.iter().map(value).collect::<Vec<_>>(),
            shape,
            &Device::Cpu,
        )?
        .to_dtype(dtype)
    };
    Ok(RowStats {
        nll: float(|r| r.nll)?,
        lse: float(|r| r.lse)?,
        entropy: float(|r| r.entropy)?,
        max_prob: float(|r| r.max_prob)?,
        grad_norm_sq: float(|r| r.grad_norm_sq)?,
        predicted: Tensor::from_vec(
            results.iter().map(|r| r.predicted).collect::<Vec<_>>(),
            shape,
            &Device::Cpu,
        )?,
    })
}

/// Where rows start in the storage.
#[derive(Clone, Copy)]
struct Starts {
    first: usize,
    offsets: RowOffsets,
}

impl Starts {
    fn of(&self, row: usize) -> usize {
        self.first + self.offsets.offset(row)
    }
}

fn readable(layout: &Layout) -> Result<Starts> {
    match row_offsets(layout) {
        Some(offsets) => Ok(Starts {
            first: layout.start_offset(),
            offsets,
        }),
        None => bail!(
            "logits: strides {:?} cannot be read row by row",
            layout.stride()
        ),
    }
}

/// Rows of gradients, to be written from several threads.
struct GradRows<'a, T> {
    base: *mut T,
    starts: Starts,
    width: usize,
    storage: std::marker::PhantomData<&'a mut [T]>,
}

// SAFETY: threads only get at disjoint stretches, by the contract of `stretch`.
unsafe impl<T: Send> Sync for GradRows<'_, T> {}

impl<'a, T> GradRows<'a, T> {
    fn contiguous(call: &Call, grad: &'a mut [T]) -> Self {
        assert_eq!(grad.len(), call.rows * call.width);
        let mut strides = [0; MAX_ROW_DIMS];
        strides[0] = call.width as u64;
        let offsets = RowOffsets {
            dims: 1,
            sizes: [1; MAX_ROW_DIMS],
            strides,
        };
        Self {
            base: grad.as_mut_ptr(),
            starts: Starts { first: 0, offsets },
            width: call.width,
            storage: std::marker::PhantomData,
        }
    }

    fn inside(call: &Call, storage: &'a mut [T], layout: &Layout) -> Result<Self> {
        let starts = readable(layout)?;
        if !starts.offsets.disjoint(call.width) {
            bail!(
                "logits: strides {:?} overlap and cannot be overwritten",
                layout.stride()
            );
        }
        // Offsets grow with every digit of the row's number, so the last row ends last.
        assert!(call.rows == 0 || starts.of(call.rows - 1) + call.width <= storage.len());
        Ok(Self {
            base: storage.as_mut_ptr(),
            starts,
            width: call.width,
            storage: std::marker::PhantomData,
        })
    }

    /// Elements `columns` of a row.
    ///
    /// # Safety
    /// `row` is below the call's number of rows, and no other reference to these elements is in use.
    #[allow(clippy::mut_from_ref)] // what the contract is about
    unsafe fn stretch(&self, row: usize, columns: std::ops::Range<usize>) -> &mut [T] {
        assert!(columns.start <= columns.end && columns.end <= self.width);
        // SAFETY: inside the storage (checked when `self` was made), disjoint from other rows, unaliased by contract.
        unsafe {
            std::slice::from_raw_parts_mut(
                self.base.add(self.starts.of(row) + columns.start),
                columns.len(),
            )
        }
    }
}

/// Where logits are read.
#[derive(Clone, Copy)]
enum Logits<'a, T> {
    Separate(&'a [T], Starts),
    /// From the gradients' memory, before they are written.
    InPlace,
}

impl<'a, T> Logits<'a, T> {
    /// Elements `columns` of a row.
    ///
    /// # Safety
    /// As for [`GradRows::stretch`] when in place.
    unsafe fn stretch(
        &self,
        out: &'a GradRows<T>,
        row: usize,
        columns: std::ops::Range<usize>,
    ) -> &'a [T] {
        match self {
            Self::Separate(x, starts) => &x[starts.of(row)..][columns],
            // SAFETY: the caller's.
            Self::InPlace => unsafe { out.stretch(row, columns) },
        }
    }
}

/// Work for one thread, compiled for each instruction set.
trait Task {
    type Output;
    fn run<const FUSED: bool>(self) -> Self::Output;
}

struct Dispatched<K>(K);

impl<K: Task> pulp::WithSimd for Dispatched<K> {
    type Output = K::Output;

    #[inline(always)]
    fn with_simd<S: pulp::Simd>(self, _: S) -> K::Output {
        if S::IS_SCALAR {
            self.0.run::<false>()
        } else {
            self.0.run::<true>()
        }
    }
}

fn dispatch<K: Task>(task: K) -> K::Output {
    pulp::Arch::new().dispatch(Dispatched(task))
}

/// Partial results of consecutive pieces of a row, one a piece. With `KEEP`, `kept` gets the exponentials.
struct Partials<'a, T: Element, const CAP: bool, const STATS: bool, const KEEP: bool> {
    x: &'a [T],
    first_piece: usize,
    target: usize,
    transform: &'a Transform<T::Real>,
    partials: &'a mut [Partial],
    kept: &'a mut [T::Real],
}

// In `run` and below, loops and no closures: those would not be compiled for the instruction set.
impl<T: Element, const CAP: bool, const STATS: bool, const KEEP: bool> Task
    for Partials<'_, T, CAP, STATS, KEEP>
{
    type Output = ();

    #[inline(always)]
    fn run<const FUSED: bool>(self) {
        let Self {
            x,
            first_piece,
            target,
            transform,
            partials,
            kept,
        } = self;
        for (p, partial) in partials.iter_mut().enumerate() {
            let end = ((p + 1) * PIECE).min(kept.len());
            let kept = if KEEP {
                &mut kept[p * PIECE..end]
            } else {
                &mut []
            };
            *partial = row::partial::<T, CAP, STATS, KEEP, FUSED>(
                x,
                first_piece + p,
                target,
                transform,
                kept,
            );
        }
    }
}

/// Gradient of consecutive pieces of a row.
struct Gradients<'a, T: Element, const CAP: bool> {
    logits: Logits<'a, T>,
    out: &'a GradRows<'a, T>,
    row: usize,
    columns: std::ops::Range<usize>,
    target: usize,
    transform: &'a Transform<T::Real>,
    exact: &'a Transform<f64>,
    factors: &'a GradFactors<T::Real>,
}

impl<T: Element, const CAP: bool> Task for Gradients<'_, T, CAP> {
    type Output = ();

    #[inline(always)]
    fn run<const FUSED: bool>(self) {
        let mut result = [T::Real::ZERO; PIECE];
        for start in self.columns.clone().step_by(PIECE) {
            let columns = start..(start + PIECE).min(self.columns.end);
            // SAFETY: these columns of this row are this task's alone, and `x` is not used past `result`.
            let x = unsafe { self.logits.stretch(self.out, self.row, columns.clone()) };
            row::gradient::<T, CAP, FUSED>(x, &mut result, self.transform, self.factors);
            if columns.contains(&self.target) {
                let at = self.target - start;
                result[at] = row::target_gradient::<T, CAP>(x[at], self.exact, self.factors);
            }
            // SAFETY: as above.
            let grad = unsafe { self.out.stretch(self.row, columns) };
            T::narrow(&result[..grad.len()], grad);
        }
    }
}

/// Gradient of consecutive pieces of a row from kept exponentials.
struct KeptGradients<'a, T: Element> {
    kept: &'a mut [T::Real],
    partials: &'a [Partial],
    out: &'a GradRows<'a, T>,
    row: usize,
    first_column: usize,
    factors: &'a GradFactors<T::Real>,
}

impl<T: Element> Task for KeptGradients<'_, T> {
    type Output = ();

    #[inline(always)]
    fn run<const FUSED: bool>(self) {
        for (p, partial) in self.partials.iter().enumerate() {
            let end = ((p + 1) * PIECE).min(self.kept.len());
            let kept = &mut self.kept[p * PIECE..end];
            // SAFETY: these columns of this row are this task's alone.
            let grad = unsafe {
                self.out.stretch(
                    self.row,
                    self.first_column + p * PIECE..self.first_column + end,
                )
            };
            row::gradient_of_kept::<T, FUSED>(kept, grad, partial, self.factors);
        }
    }
}

/// Fewer rows than this a thread, and the pieces of a row are shared out as well.
const FEW_ROWS: usize = 4;
/// Pieces a task where they are shared out.
const PIECES_PER_TASK: usize = 8;

fn rows_are_few(call: &Call) -> bool {
    call.rows < FEW_ROWS * rayon::current_num_threads() && call.vocab > PIECE * PIECES_PER_TASK
}

/// A thread's memory, used again for each of its rows.
struct Scratch<R> {
    partials: Vec<Partial>,
    kept: Vec<R>,
}

impl<R: Real> Scratch<R> {
    fn new(call: &Call, keep: bool) -> Self {
        Self {
            partials: vec![Partial::EMPTY; call.vocab.div_ceil(PIECE)],
            kept: vec![R::ZERO; if keep { call.vocab } else { 0 }],
        }
    }
}

/// The row's pieces, evaluated into the scratch memory and merged in order, whoever evaluated them.
fn row_partial<T: Element, const CAP: bool, const STATS: bool, const KEEP: bool>(
    x: &[T],
    target: usize,
    transform: &Transform<T::Real>,
    scratch: &mut Scratch<T::Real>,
    shared: bool,
) -> Partial {
    let Scratch { partials, kept } = scratch;
    let run = |first_piece, partials: &mut [Partial], kept: &mut [T::Real]| {
        dispatch(Partials::<T, CAP, STATS, KEEP> {
            x,
            first_piece,
            target,
            transform,
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
    partials
        .iter()
        .copied()
        .fold(Partial::EMPTY, Partial::merge)
}

/// Runs `f` on every row and its result, in parallel unless rows are few, when `f` is told to share its work out.
fn for_each_row<R: Send, S>(
    call: &Call,
    results: &mut [R],
    scratch: impl Fn() -> S + Sync + Send,
    f: impl Fn(usize, &mut R, &mut S, bool) + Sync + Send,
) {
    if rows_are_few(call) {
        let mut scratch = scratch();
        results
            .iter_mut()
            .enumerate()
            .for_each(|(i, r)| f(i, r, &mut scratch, true));
    } else {
        // Few enough tasks that making their scratch memory costs nothing, enough to balance threads.
        let rows_per_task = call.rows.div_ceil(16 * rayon::current_num_threads()).max(1);
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
fn evaluate<T: Element>(
    call: &Call,
    rows: &[Option<Row>],
    x: &[T],
    layout: &Layout,
    stats: bool,
) -> Result<(Vec<RowResult>, Vec<Normaliser>)> {
    let starts = readable(layout)?;
    let (transform, exact) = (Transform::new(call), Transform::new(call));
    let mut results = vec![(RowResult::default(), Normaliser::default()); call.rows];
    let evaluate_row = match (call.softcap.is_some(), stats) {
        (true, true) => evaluate_row::<T, true, true>,
        (true, false) => evaluate_row::<T, true, false>,
        (false, true) => evaluate_row::<T, false, true>,
        (false, false) => evaluate_row::<T, false, false>,
    };
    for_each_row(
        call,
        &mut results,
        || Scratch::new(call, false),
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

fn evaluate_row<T: Element, const CAP: bool, const STATS: bool>(
    call: &Call,
    row: &Row,
    x: &[T],
    (transform, exact): (&Transform<T::Real>, &Transform<f64>),
    scratch: &mut Scratch<T::Real>,
    shared: bool,
) -> (RowResult, Normaliser) {
    let others = row_partial::<T, CAP, STATS, false>(x, row.target, transform, scratch, shared);
    row::finish::<T, CAP>(call, row, x, &others, exact)
}

/// Gradient of row `i` from its logits.
fn write_gradient<T: Element, const CAP: bool>(
    call: &Call,
    row: Option<(usize, Option<GradFactors<T::Real>>)>,
    i: usize,
    logits: Logits<T>,
    out: &GradRows<T>,
    (transform, exact): (&Transform<T::Real>, &Transform<f64>),
    shared: bool,
) {
    let Some((target, Some(factors))) = row else {
        // SAFETY: the row is this call's alone, and nothing of it is in use.
        unsafe { out.stretch(i, 0..call.width) }.fill(T::default());
        return;
    };
    // SAFETY: as above; padding is no other task's.
    unsafe { out.stretch(i, call.vocab..call.width) }.fill(T::default());
    let write = |columns| {
        dispatch(Gradients::<T, CAP> {
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
        (0..call.vocab.div_ceil(stretch))
            .into_par_iter()
            .for_each(|s| write(s * stretch..((s + 1) * stretch).min(call.vocab)));
    } else {
        write(0..call.vocab);
    }
}

/// Gradient of every row from the forward's normalisers.
fn differentiate<T: Element>(
    call: &Call,
    saved: &op::Saved,
    upstream: &Tensor,
    logits: Logits<T>,
    out: &GradRows<T>,
) -> Result<()> {
    #[allow(irrefutable_let_patterns)] // there are others with the feature `cuda`
    let op::Saved::Cpu(saved) = saved else {
        bail!("cross-entropy: forward and backward on different devices")
    };
    let upstream = upstream.to_dtype(DType::F64)?.to_vec1::<f64>()?;
    let divisor = divisor(call, &saved.rows);
    let (transform, exact) = (Transform::new(call), Transform::new(call));
    for_each_row(
        call,
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
            if call.softcap.is_some() {
                write_gradient::<T, true>(call, row, i, logits, out, (&transform, &exact), shared);
            } else {
                write_gradient::<T, false>(call, row, i, logits, out, (&transform, &exact), shared);
            }
        },
    );
    Ok(())
}

/// Loss, statistics and gradient of every row, a row at a time while it is in the cache.
fn evaluate_and_differentiate<T: Element>(
    call: &Call,
    rows: &[Option<Row>],
    logits: Logits<T>,
    out: &GradRows<T>,
) -> Vec<RowResult> {
    if call.softcap.is_some() {
        evaluate_and_differentiate_with::<T, true>(call, rows, logits, out)
    } else {
        evaluate_and_differentiate_with::<T, false>(call, rows, logits, out)
    }
}

fn evaluate_and_differentiate_with<T: Element, const CAP: bool>(
    call: &Call,
    rows: &[Option<Row>],
    logits: Logits<T>,
    out: &GradRows<T>,
) -> Vec<RowResult> {
    let scale = 1.0 / divisor(call, rows);
    let (transform, exact) = (Transform::new(call), Transform::new(call));
    let mut results = vec![RowResult::default(); call.rows];
    for_each_row(
        call,
        &mut results,
        || Scratch::new(call, !CAP),
        |i, result, scratch, shared| {
            let row = rows[i].map(|row| {
                // SAFETY: the row is this call's alone, and `x` is not used once the gradient is written.
                let x = unsafe { logits.stretch(out, i, 0..call.vocab) };
                // A softcap's slope needs the logits once more, so there is nothing to gain from keeping exponentials.
                let others = if CAP {
                    row_partial::<T, CAP, true, false>(x, row.target, &transform, scratch, shared)
                } else {
                    row_partial::<T, CAP, true, true>(x, row.target, &transform, scratch, shared)
                };
                let (row_result, normaliser) =
                    row::finish::<T, CAP>(call, &row, x, &others, &exact);
                *result = row_result;
                (
                    row.target,
                    x[row.target],
                    GradFactors::new(call, &row, &normaliser, scale),
                )
            });
            match row {
                Some((target, x_y, Some(factors))) if !CAP => {
                    write_kept_gradient(call, i, scratch, out, &factors, shared);
                    // SAFETY: as above.
                    let grad = unsafe { out.stretch(i, target..target + 1) };
                    T::narrow(
                        &[row::target_gradient::<T, CAP>(x_y, &exact, &factors)],
                        grad,
                    );
                }
                row => {
                    let row = row.map(|(target, _, factors)| (target, factors));
                    write_gradient::<T, CAP>(
                        call,
                        row,
                        i,
                        logits,
                        out,
                        (&transform, &exact),
                        shared,
                    );
                }
            }
        },
    );
    results
}

/// Gradient of row `i`, but for the target's, from the exponentials in the scratch memory.
fn write_kept_gradient<T: Element>(
    call: &Call,
    i: usize,
    scratch: &mut Scratch<T::Real>,
    out: &GradRows<T>,
    factors: &GradFactors<T::Real>,
    shared: bool,
) {
    let Scratch { partials, kept } = scratch;
    // SAFETY: the row is this call's alone, and padding no other task's.
    unsafe { out.stretch(i, call.vocab..call.width) }.fill(T::default());
    let run = |first_column, partials: &[Partial], kept: &mut [T::Real]| {
        dispatch(KeptGradients {
            kept,
            partials,
            out,
            row: i,
            first_column,
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
