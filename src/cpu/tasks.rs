//! Work for one thread: consecutive pieces of a row, compiled for each instruction set.

use super::{
    element::Element,
    memory::{GradRows, Logits},
    real::Real,
    row::{self, Form, GradFactors, PIECE, Partial, Transform},
};

/// Work for one thread, compiled for each instruction set.
pub(super) trait Task {
    fn run<const FUSED: bool, S: pulp::Simd>(self, simd: S);
}

struct Dispatched<K>(K);

impl<K: Task> pulp::WithSimd for Dispatched<K> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: pulp::Simd>(self, simd: S) {
        if S::IS_SCALAR {
            self.0.run::<false, S>(simd)
        } else {
            self.0.run::<true, S>(simd)
        }
    }
}

pub(super) fn dispatch<K: Task>(task: K) {
    pulp::Arch::new().dispatch(Dispatched(task))
}

/// Partial results of consecutive pieces of a row, one a piece. With `KEEP`, `kept` gets the exponentials.
pub(super) struct Partials<'a, T: Element, const FORM: Form, const STATS: bool, const KEEP: bool> {
    pub x: &'a [T],
    pub first_piece: usize,
    pub target: usize,
    pub transforms: (&'a Transform<T::Real>, &'a Transform<f64>),
    pub partials: &'a mut [Partial],
    pub kept: &'a mut [T::Real],
}

// In `run` and below, loops and no closures: those would not be compiled for the instruction set.
impl<T: Element, const FORM: Form, const STATS: bool, const KEEP: bool> Task
    for Partials<'_, T, FORM, STATS, KEEP>
{
    #[inline(always)]
    fn run<const FUSED: bool, S: pulp::Simd>(self, simd: S) {
        let Self {
            x,
            first_piece,
            target,
            transforms,
            partials,
            kept,
        } = self;
        let mut buffer = [T::Real::ZERO; PIECE];
        for (p, partial) in partials.iter_mut().enumerate() {
            let end = ((p + 1) * PIECE).min(kept.len());
            let kept = if KEEP {
                &mut kept[p * PIECE..end]
            } else {
                &mut []
            };
            *partial = row::partial::<T, FORM, STATS, KEEP, FUSED, S>(
                simd,
                x,
                first_piece + p,
                target,
                transforms,
                kept,
                &mut buffer,
            );
        }
    }
}

/// Gradient of consecutive pieces of a row.
pub(super) struct Gradients<'a, T: Element, const FORM: Form> {
    pub logits: Logits<'a, T>,
    pub out: &'a GradRows<'a, T>,
    pub row: usize,
    pub columns: std::ops::Range<usize>,
    pub target: usize,
    pub transform: &'a Transform<T::Real>,
    pub exact: &'a Transform<f64>,
    pub factors: &'a GradFactors<T::Real>,
}

impl<T: Element, const FORM: Form> Task for Gradients<'_, T, FORM> {
    #[inline(always)]
    fn run<const FUSED: bool, S: pulp::Simd>(self, _: S) {
        let (mut result, mut buffer) = ([T::Real::ZERO; PIECE], [T::Real::ZERO; PIECE]);
        for start in self.columns.clone().step_by(PIECE) {
            let columns = start..(start + PIECE).min(self.columns.end);
            // SAFETY: these columns of this row are this task's alone, and `x` is not used past `result`.
            let x = unsafe { self.logits.stretch(self.out, self.row, columns.clone()) };
            row::gradient::<T, FORM, FUSED>(
                x,
                &mut result,
                self.transform,
                self.factors,
                self.exact,
                &mut buffer,
            );
            if columns.contains(&self.target) {
                let at = self.target - start;
                result[T::position(at, x.len())] =
                    row::target_gradient::<T, FORM>(x[at], self.exact, self.factors);
            }
            // SAFETY: as above.
            let grad = unsafe { self.out.stretch(self.row, columns) };
            T::narrow(&result[..grad.len()], grad);
        }
    }
}

/// Gradient of consecutive pieces of a row from kept exponentials.
pub(super) struct KeptGradients<'a, T: Element, const FORM: Form> {
    pub kept: &'a mut [T::Real],
    pub partials: &'a [Partial],
    pub out: &'a GradRows<'a, T>,
    pub row: usize,
    pub first_column: usize,
    pub exact: &'a Transform<f64>,
    pub factors: &'a GradFactors<T::Real>,
}

impl<T: Element, const FORM: Form> Task for KeptGradients<'_, T, FORM> {
    #[inline(always)]
    fn run<const FUSED: bool, S: pulp::Simd>(self, _: S) {
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
            let (factors, exact) = (self.factors, self.exact);
            row::gradient_of_kept::<T, FORM, FUSED>(kept, grad, partial, factors, exact);
        }
    }
}
