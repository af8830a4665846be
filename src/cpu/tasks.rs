//! Work for one thread: consecutive pieces of a row, compiled for each instruction set.

use std::slice;

use super::{
    dispatch::Task,
    dots::{self, Dots},
    element::Element,
    finish::{Named, set_exponents},
    general::General,
    gradient::{self, GradFactors},
    memory::{GradRows, Logits},
    real::Real,
    row::{self, APART, Extra, PIECE, PRIOR, Partial, USUAL, VALUES},
    transform::{Form, Transform},
};
use crate::call::ClassValues;

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
            let mut extra = Extra::default();
            if KEEP {
                extra.kept = &mut kept[p * PIECE..end];
            }
            (*partial, _) = row::partial::<T, FORM, STATS, KEEP, USUAL, FUSED, S>(
                simd,
                x,
                first_piece + p,
                target,
                transforms,
                &mut extra,
                &mut buffer,
            );
        }
    }
}

/// Scratch memory of rows of the general kind, none for others.
pub(super) type Buffers<R> = Vec<[R; PIECE]>;

pub(super) fn buffers<R: Real>(general: bool) -> Buffers<R> {
    vec![[R::ZERO; PIECE]; if general { 5 } else { 0 }]
}

/// [`Partials`] of a row of the general kind, with statistics.
pub(super) struct GeneralPartials<'a, T: Element, const FORM: Form> {
    pub x: &'a [T],
    pub row: usize,
    pub first_piece: usize,
    pub target: usize,
    /// Whether a class that the target names is left out.
    pub leaves_out: bool,
    pub transforms: (&'a Transform<T::Real>, &'a Transform<f64>),
    pub general: &'a General<'a, T::Real>,
    pub partials: &'a mut [Partial],
    pub dots: &'a mut [Dots],
    /// Of as many logits as the pieces have, or empty.
    pub kept: &'a mut [T::Real],
    pub buffers: &'a mut Buffers<T::Real>,
}

impl<T: Element, const FORM: Form> Task for GeneralPartials<'_, T, FORM> {
    #[inline(always)]
    fn run<const FUSED: bool, S: pulp::Simd>(self, simd: S) {
        let [buffer, differences, powers, target, products] = &mut self.buffers[..] else {
            unreachable!("rows of the general kind have them");
        };
        for (p, (partial, dots)) in self.partials.iter_mut().zip(self.dots).enumerate() {
            let index = self.first_piece + p;
            let columns = index * PIECE..((index + 1) * PIECE).min(self.x.len());
            let len = columns.len();
            let kept = if self.kept.is_empty() {
                &mut powers[..len]
            } else {
                &mut self.kept[p * PIECE..][..len]
            };
            let beside = self.general.piece(self.row, &columns, target);
            let mut extra = Extra {
                kept,
                ..Extra::default()
            };
            // Returns the piece's partial result and logits.
            macro_rules! partial {
                ($kind:ident) => {
                    row::partial::<T, FORM, true, true, $kind, FUSED, S>(
                        simd,
                        self.x,
                        index,
                        self.target,
                        self.transforms,
                        &mut extra,
                        buffer,
                    )
                };
            }
            let x;
            if self.leaves_out {
                extra.values = self.general.values(&beside, len);
                (*partial, x) = match beside.prior {
                    Some(prior) => {
                        extra.prior = prior;
                        partial!(PRIOR)
                    }
                    None => partial!(VALUES),
                };
                *dots = dots::dots_of_values(&beside, &extra);
            } else {
                extra.differences = &mut differences[..len];
                extra.next = self.general.target_at(self.row, columns.end);
                (*partial, x) = partial!(APART);
                let (d, e) = (&*extra.differences, &*extra.kept);
                let masked = partial.has_masked(len);
                let piece = dots::Piece { x, d, e, masked };
                *dots = dots::dots(&beside, piece, products);
            }
            if !dots.is_finite() && !dots.bad {
                dots::resum::<_, FORM>(dots, &beside, x, self.transforms.1, partial.largest);
            }
        }
    }
}

/// Gradient of consecutive pieces of a row.
pub(super) struct Gradients<'a, T: Element, const FORM: Form> {
    pub logits: Logits<'a, T>,
    pub out: &'a GradRows<'a, T>,
    pub row: usize,
    pub columns: std::ops::Range<usize>,
    /// The class that was left out of the sums; none where classes are put right afterwards.
    pub target: usize,
    pub values: &'a ClassValues,
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
            gradient::gradient::<T, FORM, FUSED>(
                x,
                &mut result,
                self.transform,
                self.factors,
                self.exact,
                &mut buffer,
            );
            if columns.contains(&self.target) {
                let (at, values) = (self.target - start, self.values);
                let (exact, factors) = (self.exact, self.factors);
                let mut named = Named::new(self.target, 1.0, row::one(x[at]).f64(), true);
                set_exponents::<FORM>(slice::from_mut(&mut named), factors.largest(), exact);
                result[T::position(at, x.len())] =
                    gradient::named_gradient::<_, FORM>(&named, values, exact, factors);
            }
            // SAFETY: as above.
            let grad = unsafe { self.out.stretch(self.row, columns) };
            T::narrow(&result[..grad.len()], grad);
        }
    }
}

/// Gradient of consecutive pieces of a row of the general kind; wrong for classes that the target names.
pub(super) struct GeneralGradients<'a, T: Element, const FORM: Form> {
    pub logits: Logits<'a, T>,
    pub out: &'a GradRows<'a, T>,
    pub row: usize,
    pub columns: std::ops::Range<usize>,
    pub general: &'a General<'a, T::Real>,
    pub transform: &'a Transform<T::Real>,
    pub exact: &'a Transform<f64>,
    pub factors: &'a GradFactors<T::Real>,
}

impl<T: Element, const FORM: Form> Task for GeneralGradients<'_, T, FORM> {
    #[inline(always)]
    fn run<const FUSED: bool, S: pulp::Simd>(self, _: S) {
        let zeros = [T::Real::ZERO; PIECE];
        let (mut result, mut buffer, mut target) = (zeros, zeros, zeros);
        for start in self.columns.clone().step_by(PIECE) {
            let columns = start..(start + PIECE).min(self.columns.end);
            let beside = self.general.piece(self.row, &columns, &mut target);
            // SAFETY: these columns of this row are this task's alone, and `x` is not used past `result`.
            let x = unsafe { self.logits.stretch(self.out, self.row, columns.clone()) };
            gradient::general_gradient::<T, FORM, FUSED>(
                x,
                &beside,
                &mut result,
                self.transform,
                self.factors,
                self.exact,
                &mut buffer,
            );
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
            gradient::gradient_of_kept::<T, FORM, FUSED>(kept, grad, partial, factors, exact);
        }
    }
}

/// [`KeptGradients`] of a row of the general kind.
pub(super) struct KeptGeneralGradients<'a, T: Element, const FORM: Form> {
    pub of: KeptGradients<'a, T, FORM>,
    pub general: &'a General<'a, T::Real>,
    pub buffers: &'a mut Buffers<T::Real>,
}

impl<T: Element, const FORM: Form> Task for KeptGeneralGradients<'_, T, FORM> {
    #[inline(always)]
    fn run<const FUSED: bool, S: pulp::Simd>(self, _: S) {
        let Self {
            of,
            general,
            buffers,
        } = self;
        let [buffer, target, ..] = &mut buffers[..] else {
            unreachable!("rows of the general kind have them");
        };
        for (p, partial) in of.partials.iter().enumerate() {
            let end = ((p + 1) * PIECE).min(of.kept.len());
            let kept = &of.kept[p * PIECE..end];
            let columns = of.first_column + p * PIECE..of.first_column + end;
            let beside = general.piece(of.row, &columns, target);
            // SAFETY: these columns of this row are this task's alone.
            let grad = unsafe { of.out.stretch(of.row, columns) };
            gradient::general_gradient_of_kept::<T, FORM, FUSED>(
                kept, &beside, grad, partial, of.factors, of.exact, buffer,
            );
        }
    }
}
