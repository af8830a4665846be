//! One row: partial results of its pieces, their merge, and the gradient of a piece.
//!
//! A row is cut into pieces of [`PIECE`] logits, which fit in the first-level cache, whatever its length, its address
//! and the number of threads. Pieces are merged in order, in f64. So a row's bits depend on nothing but the row.

use super::{
    element::Element,
    general::{Beside, Dots, Sum, for_each_class},
    real::Real,
};
use crate::call::{Call, ClassValues, Row, RowTarget};

/// Logits a piece.
pub(super) const PIECE: usize = 2048;
/// Independent sums, one a SIMD lane: a fixed number, so that results do not depend on the instruction set's width.
pub(super) const LANES: usize = 16;

/// How logits become z, a constant where it is compiled: [`PLAIN`], [`SCALED`] or [`CAPPED`].
pub(super) type Form = u8;
/// z = x.
pub(super) const PLAIN: Form = 0;
/// z = s·x.
pub(super) const SCALED: Form = 1;
/// z = c·tanh(s·x/c).
pub(super) const CAPPED: Form = 2;

pub(super) fn form(call: &Call) -> Form {
    match (call.softcap, call.logit_scale) {
        (Some(_), _) => CAPPED,
        (None, 1.0) => PLAIN,
        (None, _) => SCALED,
    }
}

/// Evaluates an expression with `$F` as the constant [`Form`] of a call and `$G` as the constant `$general`, compiled for
/// those that rows of type `$T` have.
macro_rules! with_path {
    (@ $form:ident, $is:literal, $F:ident, $G:ident => $body:expr) => {{
        const $F: $crate::cpu::row::Form = $crate::cpu::row::$form;
        #[allow(dead_code)] // not every body needs both
        const $G: bool = $is;
        $body
    }};
    ($T:ty, $call:expr, $general:expr, $F:ident, $G:ident => $body:expr) => {{
        use $crate::cpu::{element::Element, row::{CAPPED, SCALED, form, with_path}};
        let (form, general) = (form($call), $general);
        if <$T as Element>::CAPPED && form == CAPPED {
            if general {
                with_path!(@ CAPPED, true, $F, $G => $body)
            } else {
                with_path!(@ CAPPED, false, $F, $G => $body)
            }
        } else if <$T as Element>::GENERAL && general {
            with_path!(@ SCALED, true, $F, $G => $body) // a plain row is one with a scale of 1
        } else if <$T as Element>::USUAL && form == SCALED {
            with_path!(@ SCALED, false, $F, $G => $body)
        } else if <$T as Element>::USUAL {
            with_path!(@ PLAIN, false, $F, $G => $body)
        } else {
            unreachable!("rows of another type have these options")
        }
    }};
}
pub(super) use with_path;

/// Scale and softcap of the logits.
///
/// Exponents are differences z − z' of two logits, and formed from x − x': the rounding error of a single z may be
/// larger than any exponent.
#[derive(Clone, Copy)]
pub(super) struct Transform<R> {
    /// What logits are multiplied by before one is subtracted from the other: ½ where a scale could bring back what has
    /// overflowed.
    unit: R,
    /// scale / unit.
    scale: R,
    cap: R,
    /// 2·scale / cap, as two factors that are in range whatever the two are.
    inner: [R; 2],
}

/// The logit x' that others are relative to.
#[derive(Clone, Copy)]
pub(super) struct Reference<R> {
    /// Times the transform's unit.
    logit: R,
    /// With a softcap: c·σ(2s·x'/c).
    factor: R,
}

impl<R: Real> Transform<R> {
    pub fn new(call: &Call) -> Self {
        let scale = f64::from(call.logit_scale);
        let cap = call.softcap.map_or(1.0, f64::from);
        let unit = if call.softcap.is_some() || scale < 1.0 {
            0.5
        } else {
            1.0
        };
        // Where the product is in range, the second is 1, and rounds nothing.
        let inner = 2.0 * scale / cap;
        let first = match (1e-30..1e30).contains(&inner) {
            true => inner,
            false => inner.sqrt().clamp(1e-38, 1e38),
        };
        let first = R::of(first);
        Self {
            unit: R::of(unit),
            scale: R::of(scale / unit),
            cap: R::of(cap),
            inner: [first, R::of((inner / first.f64()).min(1e38))],
        }
    }

    /// Relative to `logit`; to 0 for a masked one, of which there is no other in its stretch.
    #[inline(always)]
    pub fn relative_to<const FORM: Form, const FUSED: bool>(&self, logit: R) -> Reference<R> {
        let logit = if logit == R::NEG_INFINITY {
            R::ZERO
        } else {
            logit
        };
        let mut factor = R::ZERO;
        if FORM == CAPPED {
            let Tanh { down, .. } = self.tanh::<FUSED>(-logit);
            factor = self.cap * down;
        }
        Reference {
            logit: logit * self.unit,
            factor,
        }
    }

    /// tanh(s·x/c), by what it is made of.
    #[inline(always)]
    fn tanh<const FUSED: bool>(&self, x: R) -> Tanh<R> {
        let y = x * self.inner[0] * self.inner[1];
        let e = (-y.abs()).exp::<FUSED>();
        let inverse = R::ONE / (R::ONE + e);
        let small = e * inverse;
        Tanh {
            down: if y > R::ZERO { small } else { inverse },
            slope: R::of(4.0) * small * inverse,
        }
    }

    /// z − z' for the reference's z', and dz/dx up to the scale, of a logit that is not masked. NaN where one of them is
    /// +inf.
    #[inline(always)]
    pub fn difference<const FORM: Form, const FUSED: bool>(
        &self,
        x: R,
        from: &Reference<R>,
    ) -> (R, R) {
        match FORM {
            PLAIN => (x - from.logit, R::ONE),
            SCALED => (x.fma::<FUSED>(self.unit, -from.logit) * self.scale, R::ONE),
            _ => {
                // tanh a − tanh b = 2·(e^(2a−2b) − 1)·σ(−2a)·σ(2b): no difference of numbers that are nearly equal.
                let Tanh { down, slope } = self.tanh::<FUSED>(x);
                let twice = x.fma::<FUSED>(self.unit, -from.logit)
                    * (self.inner[0] + self.inner[0])
                    * self.inner[1];
                let d = from.factor * (twice.exp_minus_1::<FUSED>() * (down + down));
                (d, slope)
            }
        }
    }
}

/// What tanh y is made of.
struct Tanh<R> {
    /// σ(−2y) = 1/(1 + e^2y).
    down: R,
    /// 1 − tanh² y.
    slope: R,
}

impl Transform<f64> {
    /// z of a logit that is not masked.
    fn z<const FORM: Form>(&self, x: f64) -> f64 {
        match FORM {
            PLAIN => x,
            SCALED => x * self.unit * self.scale,
            _ => {
                // tanh y = y for small y, where the sigmoids' difference would cancel.
                let [first, second] = self.inner;
                let y = x * first * (0.5 * second);
                self.cap * y.tanh()
            }
        }
    }
}

/// Sums over the classes of a stretch of a row, without masked ones and without the target, of exponents d = z − z' where z'
/// is that of the largest logit.
///
/// The target is left out so that probabilities near 1 keep their digits: 1 − p_y is then a sum, not a difference.
#[derive(Clone, Copy, Debug)]
pub(super) struct Partial {
    /// Largest logit (before scale and softcap), the target among them.
    pub largest: f64,
    /// The piece that has it first.
    piece: usize,
    /// Σ exp d, in rows of the general kind without the classes that have the largest logit.
    exp: f64,
    /// How many these are, so that 1 − p of such a class is a sum too.
    largest_classes: usize,
    /// Σ d; of no meaning where classes have values.
    linear: f64,
    /// Σ d·exp d.
    weighted: f64,
    /// Σ (exp d)².
    squares: f64,
    classes: usize,
}

impl Partial {
    pub const EMPTY: Self = Self {
        largest: f64::NEG_INFINITY,
        piece: 0,
        exp: 0.0,
        largest_classes: 0,
        linear: 0.0,
        weighted: 0.0,
        squares: 0.0,
        classes: 0,
    };

    /// The same sums relative to a logit that is no smaller.
    fn relative_to<const FORM: Form>(self, largest: f64, transform: &Transform<f64>) -> Self {
        // Of no classes, every sum is 0 whatever they are relative to.
        if self.classes == 0 || self.largest == largest {
            return self;
        }
        let reference = transform.relative_to::<FORM, true>(largest);
        let (by, _) = transform.difference::<FORM, true>(self.largest, &reference);
        let factor = by.exp();
        let exp = self.all_exp();
        Self {
            exp: exp * factor,
            largest_classes: 0,
            linear: self.linear + self.classes as f64 * by,
            // Infinitely far is 0, not NaN.
            weighted: if factor == 0.0 {
                0.0
            } else {
                (self.weighted + by * exp) * factor
            },
            squares: self.squares * factor * factor,
            ..self
        }
    }

    /// Whether any of the stretch's `len` classes is masked or left out.
    pub fn has_masked(&self, len: usize) -> bool {
        self.classes != len
    }

    /// Σ exp d over all classes.
    fn all_exp(&self) -> f64 {
        self.exp + self.largest_classes as f64
    }

    /// Sums of this stretch relative to the largest logit of `all`, of which it is a part.
    pub fn relate<const FORM: Form>(
        &self,
        dots: Dots,
        all: &Self,
        transform: &Transform<f64>,
    ) -> Dots {
        if self.classes == 0 {
            return dots;
        }
        let reference = transform.relative_to::<FORM, true>(all.largest);
        let (by, _) = transform.difference::<FORM, true>(self.largest, &reference);
        dots.relative(by)
    }

    /// This stretch followed by `other`.
    pub fn merge<const FORM: Form>(self, other: Self, transform: &Transform<f64>) -> Self {
        let first = self.largest >= other.largest;
        let (largest, piece) = if first {
            (self.largest, self.piece)
        } else {
            (other.largest, other.piece)
        };
        let a = self.relative_to::<FORM>(largest, transform);
        let b = other.relative_to::<FORM>(largest, transform);
        Self {
            largest,
            piece,
            exp: a.exp + b.exp,
            largest_classes: a.largest_classes + b.largest_classes,
            linear: a.linear + b.linear,
            weighted: a.weighted + b.weighted,
            squares: a.squares + b.squares,
            classes: a.classes + b.classes,
        }
    }
}

/// What the gradient of a row needs besides its logits.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Normaliser {
    /// The largest logit, 0 where all are masked.
    largest: f64,
    /// log Σ exp(z − z'), over all classes, z' that of the largest.
    log_sum: f64,
    /// z' + log_sum.
    lse: f64,
    /// Whether a class was left out of the sums, and its p and p − 1: each keeps its digits.
    has_left_out: bool,
    target_p: f64,
    target_p_minus_1: f64,
    /// p − 1 of a class with the largest logit.
    largest_p_minus_1: f64,
    classes: usize,
    /// C = Σ c·q.
    mass: f64,
    /// Σ u over the classes that are not masked.
    prior_mass: f64,
    /// Σ p·d.
    mean: f64,
}

/// Loss and statistics of a row; all zero for an ignored one.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct RowResult {
    pub loss: f64,
    pub nll: f64,
    pub lse: f64,
    pub entropy: f64,
    pub max_prob: f64,
    pub grad_norm_sq: f64,
    pub predicted: u32,
    /// Whether a probability of its target is negative or not finite.
    pub bad: bool,
}

/// The logits of piece `index` as reals, with the target's, if it is there, replaced by a masked class.
#[inline(always)]
fn without_target<'a, T: Element>(
    x: &'a [T],
    index: usize,
    target: usize,
    buffer: &'a mut [T::Real; PIECE],
) -> &'a [T::Real] {
    let start = index * PIECE;
    let x = &x[start..(start + PIECE).min(x.len())];
    if !(start..start + x.len()).contains(&target) {
        return T::widen(x, buffer);
    }
    let buffer = &mut buffer[..x.len()];
    T::widen_into(x, buffer);
    buffer[T::position(target - start, x.len())] = T::Real::NEG_INFINITY;
    buffer
}

/// Asks for the cache line at `at`, which need not be valid: nothing is read.
#[inline(always)]
pub(super) fn prefetch<T>(at: *const T) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: a prefetch has no effect but on the caches, whatever the address; SSE is part of x86-64.
    unsafe {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        _mm_prefetch::<_MM_HINT_T0>(at.cast());
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = at;
}

#[inline(always)]
pub(super) fn one<T: Element>(x: T) -> T::Real {
    T::widen(&[x], &mut [T::Real::ZERO])[0]
}

/// What is summed, a constant where it is compiled: [`USUAL`], [`VALUES`] or [`APART`].
pub(super) type Kind = u8;
/// A class a row, or a few, smoothed evenly.
pub(super) const USUAL: Kind = 0;
/// The same with values v of the classes.
pub(super) const VALUES: Kind = 1;
/// No class is left out, so the largest is counted apart; exponents are kept for what else is summed.
pub(super) const APART: Kind = 2;

/// What a piece's sums read and write besides.
pub(super) struct Extra<'a, R> {
    /// With `KEEP`: exponentials, −0 for masked classes and the target.
    pub kept: &'a mut [R],
    /// Of [`VALUES`].
    pub values: &'a [R],
    /// Of [`APART`]: exponents, 0 for masked classes.
    pub differences: &'a mut [R],
    /// Of [`VALUES`]: Σ v·d, Σ v·exp d, and Σ v over the classes that are not masked, if there are masked ones.
    pub linear: f64,
    pub with_exp: f64,
    pub visible: Option<f64>,
}

impl<R> Default for Extra<'_, R> {
    #[inline(always)]
    fn default() -> Self {
        Self {
            kept: &mut [],
            values: &[],
            differences: &mut [],
            linear: 0.0,
            with_exp: 0.0,
            visible: None,
        }
    }
}

/// Partial result of piece `index` of the row `x`, and the piece without the target. `buffer` is scratch memory.
#[inline(always)]
pub(super) fn partial<
    'a,
    T: Element,
    const FORM: Form,
    const STATS: bool,
    const KEEP: bool,
    const KIND: Kind,
    const FUSED: bool,
    S: pulp::Simd,
>(
    simd: S,
    x: &'a [T],
    index: usize,
    target: usize,
    (transform, exact): (&Transform<T::Real>, &Transform<f64>),
    extra: &mut Extra<T::Real>,
    buffer: &'a mut [T::Real; PIECE],
) -> (Partial, &'a [T::Real]) {
    // A copy, as what the loops write might be behind the reference.
    let transform = &{ *transform };
    let reals = without_target(x, index, target, buffer);
    let (mut largest, smallest) = T::Real::extremes(simd, reals);
    if target / PIECE == index {
        largest = largest.largest(one(x[target]));
    }
    let reference = transform.relative_to::<FORM, FUSED>(largest);
    // Masked classes, and exponentials that would be subnormal, cost more; most pieces have neither. The last piece of
    // a row may be filled up with masked classes.
    let least = transform.difference::<FORM, FUSED>(smallest, &reference).0;
    let narrow = smallest != T::Real::NEG_INFINITY && least >= T::Real::LEAST;
    let next = x.as_ptr().wrapping_add((index + 1) * PIECE);
    let sums = if narrow && reals.len().is_multiple_of(LANES) {
        sum::<T, FORM, STATS, KEEP, KIND, false, FUSED>(
            reals, largest, transform, &reference, extra, next,
        )
    } else {
        sum::<T, FORM, STATS, KEEP, KIND, true, FUSED>(
            reals, largest, transform, &reference, extra, next,
        )
    };
    let partial = Partial {
        largest: largest.f64(),
        piece: index,
        ..sums
    };
    // Logits near the type's limits, such as its smallest value for a mask: their differences may be beyond it.
    if partial.exp.is_finite() && !(partial.linear.is_finite() && partial.weighted.is_finite()) {
        return (partial.resummed::<T::Real, FORM>(reals, exact), reals);
    }
    (partial, reals)
}

/// The sums of a [`Partial`]. `WIDE` says that there may be masked classes, and others far below the largest.
///
/// Prefetches the elements from `next` on: finding a piece's extremes first would wait for memory otherwise, while the
/// arithmetic here leaves it idle.
#[inline(always)]
fn sum<
    T: Element,
    const FORM: Form,
    const STATS: bool,
    const KEEP: bool,
    const KIND: Kind,
    const WIDE: bool,
    const FUSED: bool,
>(
    x: &[T::Real],
    largest: T::Real,
    transform: &Transform<T::Real>,
    reference: &Reference<T::Real>,
    extra: &mut Extra<T::Real>,
    next: *const T,
) -> Partial {
    let [zero, one] = [T::Real::ZERO, T::Real::ONE];
    let mut exp = [zero; LANES];
    let mut linear = [zero; LANES];
    let mut weighted = [zero; LANES];
    let mut squares = [zero; LANES];
    let mut masked = [zero; LANES];
    let mut largest_classes = [zero; LANES];
    let (chunks, rest) = x.as_chunks::<LANES>();
    let (kept_chunks, kept_rest) = extra.kept.as_chunks_mut::<LANES>();
    let (mut with_exp, mut visible) = ([zero; LANES], [zero; LANES]);
    let (difference_chunks, differences_rest) = extra.differences.as_chunks_mut::<LANES>();
    let (value_chunks, values_rest) = extra.values.as_chunks::<LANES>();
    let mut padded_values = [zero; LANES];
    padded_values[..values_rest.len()].copy_from_slice(values_rest);
    let mut padded = [T::Real::NEG_INFINITY; LANES];
    padded[..rest.len()].copy_from_slice(rest);
    for c in 0..x.len().div_ceil(LANES) {
        // By value: the compiler would check in every round whether they overlap with what is written.
        let chunk = if c < chunks.len() { chunks[c] } else { padded };
        prefetch(next.wrapping_add(c * LANES));
        let mut powers = [zero; LANES];
        let mut exponents = [zero; LANES];
        let values = match KIND {
            VALUES if c < value_chunks.len() => value_chunks[c],
            _ => padded_values,
        };
        for l in 0..LANES {
            let hidden = WIDE && chunk[l] == T::Real::NEG_INFINITY;
            let d = transform.difference::<FORM, FUSED>(chunk[l], reference).0;
            let d = if hidden { zero } else { d };
            let power = if WIDE {
                d.exp::<FUSED>()
            } else {
                d.exp_in_range::<FUSED>()
            };
            let power = if hidden { zero } else { power };
            if KIND == APART {
                let is_largest = chunk[l] == largest;
                exp[l] = exp[l] + if is_largest { zero } else { power };
                largest_classes[l] = largest_classes[l] + if is_largest { one } else { zero };
                exponents[l] = d;
            } else {
                exp[l] = exp[l] + power;
            }
            if KIND == VALUES {
                linear[l] = values[l].fma::<FUSED>(d, linear[l]);
                with_exp[l] = values[l].fma::<FUSED>(power, with_exp[l]);
                if WIDE {
                    visible[l] = visible[l] + if hidden { zero } else { values[l] };
                }
            } else {
                linear[l] = linear[l] + d;
            }
            if WIDE {
                masked[l] = masked[l] + if hidden { one } else { zero };
            }
            if STATS {
                weighted[l] = d.fma::<FUSED>(power, weighted[l]);
                squares[l] = power.fma::<FUSED>(power, squares[l]);
            }
            powers[l] = if hidden { -zero } else { power };
        }
        if KEEP {
            if c < kept_chunks.len() {
                kept_chunks[c] = powers;
            } else {
                kept_rest.copy_from_slice(&powers[..rest.len()]);
            }
        }
        if KIND == APART {
            if c < difference_chunks.len() {
                difference_chunks[c] = exponents;
            } else {
                differences_rest.copy_from_slice(&exponents[..rest.len()]);
            }
        }
    }
    if KIND == VALUES {
        extra.linear = total(&linear);
        extra.with_exp = total(&with_exp);
        extra.visible = WIDE.then(|| total(&visible));
    }
    let counted = x.len().next_multiple_of(LANES) - total(&masked) as usize;
    Partial {
        exp: total(&exp),
        // Of masked classes alone, the largest is masked too.
        largest_classes: if counted == 0 {
            0
        } else {
            total(&largest_classes) as usize
        },
        linear: total(&linear),
        weighted: total(&weighted),
        squares: total(&squares),
        classes: counted,
        ..Partial::EMPTY
    }
}

#[inline(always)]
pub(super) fn total<R: Real>(lanes: &[R; LANES]) -> f64 {
    let mut sums = [0.0; LANES];
    for l in 0..LANES {
        sums[l] = lanes[l].f64();
    }
    let mut half = LANES / 2;
    while half > 0 {
        for l in 0..half {
            sums[l] += sums[l + half];
        }
        half /= 2;
    }
    sums[0]
}

impl Partial {
    /// With the sums of d over the classes `x` taken in f64.
    #[cold]
    fn resummed<R: Real, const FORM: Form>(self, x: &[R], transform: &Transform<f64>) -> Self {
        let reference = transform.relative_to::<FORM, true>(self.largest);
        let mut sums = Self {
            linear: 0.0,
            weighted: 0.0,
            ..self
        };
        for x in x.iter().filter(|&&x| x != R::NEG_INFINITY) {
            let (d, _) = transform.difference::<FORM, true>(x.f64(), &reference);
            let power = d.exp();
            sums.linear += d;
            sums.weighted += if power == 0.0 { 0.0 } else { d * power };
        }
        sums
    }
}

/// Index of the first element of `x` that is `value`, 0 if none is.
fn first_of<T: Element>(x: &[T], value: T::Real) -> usize {
    const CHUNK: usize = 64;
    let mut buffer = [T::Real::ZERO; CHUNK];
    for (c, chunk) in x.chunks(CHUNK).enumerate() {
        // Without a way out of the loop, so that it vectorises.
        let mut found = false;
        for &x in T::widen(chunk, &mut buffer) {
            found |= x == value;
        }
        if found {
            let at = chunk.iter().position(|&x| one(x) == value);
            return c * CHUNK + at.unwrap_or(0);
        }
    }
    0
}

/// Column of the largest logit of the row `x`, whose pieces merge to `all`: the first of equals.
pub(super) fn largest_column<T: Element>(x: &[T], all: &Partial) -> u32 {
    let piece = all.piece * PIECE;
    let largest = T::Real::of(all.largest);
    (piece + first_of(&x[piece..(piece + PIECE).min(x.len())], largest)) as u32
}

/// What is known of a row once its pieces are merged.
pub(super) struct Sums<'a> {
    pub others: &'a Partial,
    /// Of rows of the general kind.
    pub dots: &'a Dots,
    /// Classes that the target names, with their probabilities and logits.
    pub named: &'a [(usize, f64, f64)],
    /// Which of these was left out of the sums.
    pub left_out: Option<usize>,
    /// The column of the largest.
    pub predicted: u32,
}

/// Loss, statistics and normaliser of a row. What classes that the target names contribute, on which the loss rests, is
/// computed in f64.
pub(super) fn finish<const FORM: Form>(
    call: &Call,
    values: &ClassValues,
    row: &Row,
    sums: &Sums,
    transform: &Transform<f64>,
) -> (RowResult, Normaliser) {
    let &Sums {
        others,
        dots,
        named,
        left_out,
        predicted,
    } = sums;
    let eps = row.smoothing;
    let weighted = |loss: f64| {
        if row.weight == 0.0 {
            0.0
        } else {
            row.weight * loss
        }
    };
    let reference = transform.relative_to::<FORM, true>(others.largest);
    let exponent = |x: f64| match x == f64::NEG_INFINITY {
        true => x,
        false => transform.difference::<FORM, true>(x, &reference).0,
    };
    let (y, x_y) = left_out.map_or((0, f64::NEG_INFINITY), |i| (named[i].0, named[i].2));
    let target_counts = x_y != f64::NEG_INFINITY;
    let classes = others.classes + usize::from(target_counts);
    let d_y = exponent(x_y);
    let e_y = d_y.exp();
    let others_exp = others.all_exp();
    let sum = others_exp + e_y;
    if sum.is_nan() {
        let nan = f64::NAN;
        let normaliser = Normaliser {
            largest: nan,
            log_sum: nan,
            lse: nan,
            has_left_out: left_out.is_some(),
            target_p: nan,
            target_p_minus_1: nan,
            largest_p_minus_1: nan,
            classes,
            mass: nan,
            prior_mass: nan,
            mean: nan,
        };
        let result = RowResult {
            loss: weighted(nan),
            nll: nan,
            lse: nan,
            entropy: nan,
            max_prob: nan,
            grad_norm_sq: nan,
            predicted: 0,
            bad: dots.bad,
        };
        return (result, normaliser);
    }
    if classes == 0 {
        let inf = f64::INFINITY;
        return (
            RowResult {
                loss: weighted(inf),
                nll: inf,
                lse: -inf,
                bad: dots.bad,
                ..Default::default()
            },
            Normaliser::default(),
        );
    }

    // Where one class with the largest logit is not in the sum, that is 1 and a little: log1p keeps the little.
    let target_is_largest = target_counts && x_y == others.largest;
    let rest = if target_is_largest {
        Some(others_exp / e_y)
    } else {
        let more = others.largest_classes.checked_sub(1);
        more.map(|more| others.exp + more as f64 + e_y)
    };
    let log_sum = match rest {
        Some(rest) if target_is_largest => d_y + rest.ln_1p(),
        Some(rest) => rest.ln_1p(),
        None => sum.ln(),
    };
    let lse = transform.z::<FORM>(others.largest) + log_sum;
    let k = classes as f64;

    // Of all classes that are not masked, now with the one that was left out: Σ c·u, Σ c·u·d, Σ u.
    let left_out_term = |value: f64| if target_counts { value } else { 0.0 };
    let has_values = values.weights.is_some() || values.prior.is_some();
    let shares = match has_values {
        true => {
            let v = left_out_term(values.weight(y) * values.prior(y));
            Sum {
                mass: dots.shares.mass + v,
                linear: dots.shares.linear + if v == 0.0 { 0.0 } else { v * d_y },
            }
        }
        false => Sum {
            mass: k,
            linear: others.linear + if target_counts { d_y } else { 0.0 },
        },
    };
    let prior_mass = match values.prior {
        Some(_) => dots.prior[0] + left_out_term(values.prior(y)),
        None => k,
    };
    // Σ t, Σ c·t, and their sums with −log p.
    let is_probabilities = matches!(row.target, RowTarget::Probabilities);
    let (target_mass, weighted_mass, nll, weighted_nll, out_of_reach) = if is_probabilities {
        let surprisal = |sum: Sum| sum.mass * log_sum - sum.linear;
        let (target, weighted) = (dots.target, dots.weighted_target);
        (
            target.mass,
            weighted.mass,
            surprisal(target),
            surprisal(weighted),
            dots.out_of_reach,
        )
    } else {
        let mut sums = (0.0, 0.0, 0.0, 0.0, false);
        for &(class, t, x) in named.iter().filter(|(_, t, _)| *t > 0.0) {
            let (c, surprisal) = (values.weight(class), log_sum - exponent(x));
            sums.0 += t;
            sums.1 += c * t;
            sums.2 += t * surprisal;
            sums.3 += if c == 0.0 { 0.0 } else { c * t * surprisal };
            sums.4 |= x == f64::NEG_INFINITY;
        }
        sums
    };
    let smoothed_part = if prior_mass == 0.0 {
        0.0
    } else {
        eps / prior_mass
    };
    let mass = (1.0 - eps) * weighted_mass + smoothed_part * shares.mass;

    let mean = (others.weighted + if e_y == 0.0 { 0.0 } else { d_y * e_y }) / sum;
    let entropy = (log_sum - mean).max(0.0);
    let lambda = f64::from(call.z_loss);
    let part = |weight: f64, value: f64| if weight == 0.0 { 0.0 } else { weight * value };
    let loss = if out_of_reach {
        f64::INFINITY
    } else {
        part(1.0 - eps, weighted_nll)
            + part(smoothed_part, shares.mass * log_sum - shares.linear)
            + part(lambda, lse * lse)
            + part(row.entropy_weight, entropy)
    };

    let p_y = e_y / sum;
    let target_p_minus_1 = -others_exp / sum;
    let largest_p_minus_1 = match rest {
        Some(_) if target_is_largest => target_p_minus_1,
        Some(rest) => -rest / sum,
        None => 1.0 / sum - 1.0,
    };
    // Σ (total·p − q)², expanded, without class weights; of the class that was left out by itself.
    let u = |class: usize| smoothed_part * values.prior(class);
    let total = (1.0 - eps) * target_mass + smoothed_part * prior_mass;
    let (u_exp, u_squares) = match values.prior {
        Some(_) => (dots.prior[1], dots.prior[2]),
        None => (others_exp, others.classes as f64),
    };
    let mut norm = total * total * others.squares / (sum * sum)
        - 2.0 * total * smoothed_part * u_exp / sum
        + smoothed_part * smoothed_part * u_squares;
    if is_probabilities {
        let [t_exp, t_squares, t_u] = dots.target_products;
        norm += (1.0 - eps)
            * ((1.0 - eps) * t_squares + 2.0 * smoothed_part * t_u - 2.0 * total * t_exp / sum);
    }
    let mut left_out_norm = 0.0;
    for (i, &(class, t, x)) in named.iter().enumerate() {
        let t = (1.0 - eps) * t;
        if x == f64::NEG_INFINITY {
            continue;
        }
        if left_out == Some(i) {
            left_out_norm = (total * target_p_minus_1 + (total - t - u(class))).powi(2);
        } else {
            norm += t * (t - 2.0 * (total * (exponent(x).exp() / sum) - u(class)));
        }
    }
    let result = RowResult {
        loss: weighted(loss),
        nll: if out_of_reach { f64::INFINITY } else { nll },
        lse,
        entropy,
        max_prob: if target_is_largest { p_y } else { 1.0 / sum },
        grad_norm_sq: norm.max(0.0) + left_out_norm,
        predicted,
        bad: dots.bad,
    };
    (
        result,
        Normaliser {
            largest: others.largest,
            log_sum,
            lse,
            has_left_out: left_out.is_some(),
            target_p: p_y,
            target_p_minus_1,
            largest_p_minus_1,
            classes,
            mass,
            prior_mass,
            mean,
        },
    )
}

/// Factors of a row's gradient: dx_k = (exponential·e_k − entropy·e_k·d_k − share·c_k·u_k − target·c_k·t_k)·outer·slope_k, where
/// t is the target's probabilities if it has one for each class; classes that it names are put right afterwards.
pub(super) struct GradFactors<R> {
    /// The largest logit.
    largest: R,
    exponential: R,
    share: R,
    entropy: R,
    target: R,
    /// Multiplies all of it in rows of the general kind, where p and q may cancel: neither's rounding may be more than its
    /// own. 1 in others, whose factors have it.
    outer: R,
    /// The same five, and whether what they make is in R's range.
    exact: [f64; 5],
    pub in_range: bool,
    any_masked: bool,
    /// Gradient of a masked class: 0, but NaN in a row that is NaN.
    masked: R,
    /// For the named ones: what multiplies dz, and of the row what dz takes.
    scale: f64,
    smoothing: f64,
    lse_slope: f64,
    entropy_weight: f64,
    normaliser: Normaliser,
}

impl<R: Real> GradFactors<R> {
    /// `scale` is everything that multiplies dz but the row's weight; `None` where the whole row's gradient is 0.
    pub fn new(call: &Call, row: &Row, n: &Normaliser, scale: f64, general: bool) -> Option<Self> {
        let scale = scale * row.weight;
        if row.weight == 0.0 || n.classes == 0 {
            return None;
        }
        let lambda = f64::from(call.z_loss);
        let lse_slope = if lambda == 0.0 {
            0.0
        } else {
            2.0 * lambda * n.lse
        };
        let beta = row.entropy_weight;
        let share = if n.prior_mass == 0.0 {
            0.0
        } else {
            row.smoothing / n.prior_mass
        };
        let scale = scale * f64::from(call.logit_scale);
        let inverse_sum = (-n.log_sum).exp();
        let (inner, outer) = if general { (1.0, scale) } else { (scale, 1.0) };
        let exact = [
            inner * (n.mass + lse_slope + beta * n.mean) * inverse_sum,
            inner * share,
            inner * beta * inverse_sum,
            inner * (1.0 - row.smoothing),
            outer,
        ];
        let [exponential, scaled_share, entropy, target, outer] = exact.map(R::of);
        Some(Self {
            largest: R::of(n.largest),
            exponential,
            share: scaled_share,
            entropy,
            target,
            outer,
            exact,
            // With room for their sum, and the exponent that multiplies the third.
            in_range: exact
                .iter()
                .zip([4.0, 4.0, 1e4, 4.0, 1.0])
                .all(|(&x, room)| !(R::of(room * x).f64().is_infinite() && x.is_finite())),
            any_masked: n.classes != call.vocab,
            masked: R::of(if n.log_sum.is_nan() { n.log_sum } else { 0.0 }),
            scale,
            smoothing: row.smoothing,
            lse_slope,
            entropy_weight: beta,
            normaliser: *n,
        })
    }

    /// Whether a class was left out of the forward's sums.
    pub fn has_left_out(&self) -> bool {
        self.normaliser.has_left_out
    }

    /// Gradient of a class with probability `t` in the target and exponent `d`, but for the slope of the softcap.
    fn named(&self, values: &ClassValues, class: usize, t: f64, d: f64, left_out: bool) -> f64 {
        let n = &self.normaliser;
        let (p, p_minus_1) = if left_out {
            (n.target_p, n.target_p_minus_1)
        } else {
            let p = (d - n.log_sum).exp();
            let p_minus_1 = if d == 0.0 {
                n.largest_p_minus_1
            } else {
                p - 1.0
            };
            (p, p_minus_1)
        };
        let share = if n.prior_mass == 0.0 {
            0.0
        } else {
            self.smoothing / n.prior_mass
        };
        let q = values.weight(class) * ((1.0 - self.smoothing) * t + share * values.prior(class));
        let entropy = if self.entropy_weight == 0.0 || p == 0.0 {
            0.0
        } else {
            self.entropy_weight * p * (d - n.mean)
        };
        self.scale * (n.mass * p_minus_1 + (n.mass - q) + self.lse_slope * p - entropy)
    }
}

/// Gradient of the logits `x` of a piece, in the order of [`Element::widen`]; wrong for classes that the target names.
/// `buffer` is scratch memory.
#[inline(always)]
pub(super) fn gradient<T: Element, const FORM: Form, const FUSED: bool>(
    x: &[T],
    result: &mut [T::Real; PIECE],
    transform: &Transform<T::Real>,
    factors: &GradFactors<T::Real>,
    exact: &Transform<f64>,
    buffer: &mut [T::Real; PIECE],
) {
    let reals = T::widen(x, buffer);
    if !factors.in_range {
        return gradient_in_f64::<T::Real, FORM>(reals, result, exact, factors, &Beside::NOTHING);
    }
    // Copies, as what the loop writes might be behind the references.
    let transform = &{ *transform };
    let (exponential, share, masked) = (factors.exponential, factors.share, factors.masked);
    let reference = transform.relative_to::<FORM, FUSED>(factors.largest);
    for (g, &x) in result.iter_mut().zip(reals) {
        let (d, slope) = transform.difference::<FORM, FUSED>(x, &reference);
        let dz = d.exp::<FUSED>().fma::<FUSED>(exponential, -share);
        let dx = if FORM == CAPPED { dz * slope } else { dz };
        *g = if x == T::Real::NEG_INFINITY {
            masked
        } else {
            dx
        };
    }
}

/// [`gradient`] of a row of the general kind.
#[inline(always)]
pub(super) fn general_gradient<T: Element, const FORM: Form, const FUSED: bool>(
    x: &[T],
    beside: &Beside<T::Real>,
    result: &mut [T::Real; PIECE],
    transform: &Transform<T::Real>,
    factors: &GradFactors<T::Real>,
    exact: &Transform<f64>,
    buffer: &mut [T::Real; PIECE],
) {
    let reals = T::widen(x, buffer);
    if !factors.in_range {
        return gradient_in_f64::<T::Real, FORM>(reals, result, exact, factors, beside);
    }
    // Copies, as above.
    let transform = &{ *transform };
    let GradFactors {
        exponential,
        entropy,
        outer,
        masked,
        ..
    } = *factors;
    let reference = transform.relative_to::<FORM, FUSED>(factors.largest);
    // An exponential that is 0 whatever multiplies it.
    let far = T::Real::LEAST + T::Real::LEAST;
    let both = [factors.share, factors.target];
    for_each_class!(beside, both, result.iter_mut(), g, subtracted => *g = subtracted);
    for (g, &x) in result.iter_mut().zip(reals) {
        let (d, slope) = transform.difference::<FORM, FUSED>(x, &reference);
        let factor = far.largest(d).fma::<FUSED>(-entropy, exponential);
        let dz = d.exp::<FUSED>().fma::<FUSED>(factor, -*g) * outer;
        *g = if FORM == CAPPED { dz * slope } else { dz };
    }
    // By itself: a choice above would be a branch, and the loop no vectors.
    if factors.any_masked {
        for (g, &x) in result.iter_mut().zip(reals) {
            *g = if x == T::Real::NEG_INFINITY {
                masked
            } else {
                *g
            };
        }
    }
}

/// [`gradient`] and [`general_gradient`] where a factor is beyond the type, of a product that need not be.
#[cold]
fn gradient_in_f64<R: Real, const FORM: Form>(
    x: &[R],
    result: &mut [R; PIECE],
    transform: &Transform<f64>,
    factors: &GradFactors<R>,
    beside: &Beside<R>,
) {
    let reference = transform.relative_to::<FORM, true>(factors.largest.f64());
    let [exponential, share, entropy, target, outer] = factors.exact;
    for (k, (g, &x)) in result.iter_mut().zip(x).enumerate() {
        let (d, slope) = transform.difference::<FORM, true>(x.f64(), &reference);
        let e = d.exp();
        let factor = exponential - if e == 0.0 { 0.0 } else { entropy * d };
        *g = if x == R::NEG_INFINITY {
            factors.masked
        } else {
            R::of((e * factor - beside.subtrahend(k, share, target)) * outer * slope)
        };
    }
}

/// Gradient of a piece from the exponentials that [`partial`] kept, which it may overwrite; wrong for classes that the
/// target names. Without a softcap.
#[inline(always)]
pub(super) fn gradient_of_kept<T: Element, const FORM: Form, const FUSED: bool>(
    kept: &mut [T::Real],
    grad: &mut [T],
    partial: &Partial,
    factors: &GradFactors<T::Real>,
    transform: &Transform<f64>,
) {
    let exponential = kept_factor::<T::Real, FORM>(partial, factors, transform);
    if !factors.any_masked && T::NARROWS_ONE {
        for (grad, e) in grad.iter_mut().zip(kept) {
            *grad = T::narrow_one(e.fma::<FUSED>(exponential, -factors.share));
        }
        return;
    }
    for e in kept.iter_mut() {
        let dz = e.fma::<FUSED>(exponential, -factors.share);
        *e = if e.is_negative() { factors.masked } else { dz };
    }
    T::narrow(kept, grad);
}

/// [`gradient_of_kept`] of a row of the general kind without a weight of the entropy. `buffer` is scratch memory.
#[inline(always)]
pub(super) fn general_gradient_of_kept<T: Element, const FORM: Form, const FUSED: bool>(
    kept: &[T::Real],
    beside: &Beside<T::Real>,
    grad: &mut [T],
    partial: &Partial,
    factors: &GradFactors<T::Real>,
    transform: &Transform<f64>,
    buffer: &mut [T::Real; PIECE],
) {
    let exponential = kept_factor::<T::Real, FORM>(partial, factors, transform);
    let (outer, masked) = (factors.outer, factors.masked);
    if !factors.any_masked && T::NARROWS_ONE {
        let both = [factors.share, factors.target];
        for_each_class!(beside, both, grad.iter_mut().zip(kept), (g, e), subtracted => {
            *g = T::narrow_one(e.fma::<FUSED>(exponential, -subtracted) * outer);
        });
        return;
    }
    let wide = &mut buffer[..kept.len()];
    let both = [factors.share, factors.target];
    for_each_class!(beside, both, wide.iter_mut(), g, subtracted => *g = subtracted);
    for (g, &e) in wide.iter_mut().zip(kept) {
        let dz = e.fma::<FUSED>(exponential, -*g) * outer;
        *g = if e.is_negative() { masked } else { dz };
    }
    T::narrow(wide, grad);
}

/// What a piece's exponentials, relative to its own largest logit, are multiplied by.
#[inline(always)]
fn kept_factor<R: Real, const FORM: Form>(
    partial: &Partial,
    factors: &GradFactors<R>,
    transform: &Transform<f64>,
) -> R {
    let reference = transform.relative_to::<FORM, true>(factors.largest.f64());
    let (by, _) = transform.difference::<FORM, true>(partial.largest, &reference);
    R::of(factors.exponential.f64() * by.exp())
}

/// Gradient of the logit `x` of a class that has probability `t` in the target.
pub(super) fn named_gradient<T: Element, const FORM: Form>(
    x: T,
    (class, t, left_out): (usize, f64, bool),
    values: &ClassValues,
    transform: &Transform<f64>,
    factors: &GradFactors<T::Real>,
) -> T::Real {
    let x = one(x);
    if x == T::Real::NEG_INFINITY {
        return factors.masked;
    }
    let reference = transform.relative_to::<FORM, true>(factors.normaliser.largest);
    let (d, _) = transform.difference::<FORM, true>(x.f64(), &reference);
    let slope = if FORM == CAPPED {
        transform.tanh::<true>(x.f64()).slope
    } else {
        1.0
    };
    T::Real::of(factors.named(values, class, t, d, left_out) * slope)
}
