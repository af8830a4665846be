//! One row: partial results of its pieces, and their merge.
//!
//! A row is cut into pieces of [`PIECE`] logits, which fit in the first-level cache, whatever its length, its address
//! and the number of threads. Pieces are merged in order, in f64. So a row's bits depend on nothing but the row.

use super::{
    element::Element,
    real::Real,
    transform::{Form, Reference, Transform},
};

/// Logits a piece.
pub(super) const PIECE: usize = 2048;
/// Independent sums, one a SIMD lane: a fixed number, so that results do not depend on the instruction set's width.
pub(super) const LANES: usize = 16;

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
    pub(super) exp: f64,
    /// How many these are, so that 1 − p of such a class is a sum too.
    pub(super) largest_classes: usize,
    /// Σ d; of no meaning where classes have values.
    pub(super) linear: f64,
    /// Σ d·exp d.
    pub(super) weighted: f64,
    /// Σ (exp d)².
    pub(super) squares: f64,
    pub(super) classes: usize,
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
    pub fn all_exp(&self) -> f64 {
        self.exp + self.largest_classes as f64
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

/// What is summed, a constant where it is compiled: [`USUAL`], [`VALUES`], [`PRIOR`] or [`APART`].
pub(super) type Kind = u8;
/// A class a row, or a few, smoothed evenly.
pub(super) const USUAL: Kind = 0;
/// The same with values v of the classes.
pub(super) const VALUES: Kind = 1;
/// [`VALUES`] and a prior u, whose products with exponentials the gradient's norm needs.
pub(super) const PRIOR: Kind = 2;
/// No class is left out, so the largest is counted apart; exponents are kept for what else is summed.
pub(super) const APART: Kind = 3;

/// What a piece's sums read and write besides.
pub(super) struct Extra<'a, R> {
    /// With `KEEP`: exponentials, −0 for masked classes and the target.
    pub kept: &'a mut [R],
    /// Of [`VALUES`] and [`PRIOR`].
    pub values: &'a [R],
    /// Of [`PRIOR`].
    pub prior: &'a [R],
    /// Of [`APART`]: exponents, 0 for masked classes.
    pub differences: &'a mut [R],
    /// The same: what will be read beside the next piece, and bytes of it for each class. Nothing is read.
    pub next: (*const u8, usize),
    /// Of the same: Σ v·d, Σ u·exp d, and [Σ v, Σ u, Σ u²] over the classes that are not masked, if there are masked ones.
    pub linear: f64,
    pub with_exp: f64,
    pub visible: Option<[f64; 3]>,
}

impl<R> Default for Extra<'_, R> {
    #[inline(always)]
    fn default() -> Self {
        Self {
            kept: &mut [],
            values: &[],
            prior: &[],
            differences: &mut [],
            next: (std::ptr::null(), 0),
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
    let (mut with_exp, mut visible) = ([zero; LANES], [[zero; LANES]; 3]);
    let (difference_chunks, differences_rest) = extra.differences.as_chunks_mut::<LANES>();
    let (value_chunks, values_rest) = extra.values.as_chunks::<LANES>();
    let (prior_chunks, prior_rest) = extra.prior.as_chunks::<LANES>();
    let padded_values = padded(values_rest, zero);
    let padded_prior = padded(prior_rest, zero);
    let padded = padded(rest, T::Real::NEG_INFINITY);
    for c in 0..x.len().div_ceil(LANES) {
        // By value: the compiler would check in every round whether they overlap with what is written.
        let chunk = if c < chunks.len() { chunks[c] } else { padded };
        prefetch(next.wrapping_add(c * LANES));
        if KIND == APART {
            let (next, size) = extra.next;
            prefetch(next.wrapping_add(c * LANES * size));
        }
        let mut powers = [zero; LANES];
        let mut exponents = [zero; LANES];
        let values = match KIND {
            VALUES | PRIOR if c < value_chunks.len() => value_chunks[c],
            _ => padded_values,
        };
        let prior = match KIND {
            PRIOR if c < prior_chunks.len() => prior_chunks[c],
            _ => padded_prior,
        };
        for l in 0..LANES {
            let hidden = WIDE && chunk[l] == T::Real::NEG_INFINITY;
            let d = transform.difference::<FORM, FUSED>(chunk[l], reference).0;
            let d = if hidden { zero } else { d };
            let power = if WIDE {
                d.exp::<FUSED>()
            } else {
                d.exp_of_number::<FUSED>()
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
            if KIND == VALUES || KIND == PRIOR {
                linear[l] = values[l].fma::<FUSED>(d, linear[l]);
                if KIND == PRIOR {
                    with_exp[l] = prior[l].fma::<FUSED>(power, with_exp[l]);
                }
                if WIDE {
                    visible[0][l] = visible[0][l] + if hidden { zero } else { values[l] };
                }
                if WIDE && KIND == PRIOR {
                    let u = if hidden { zero } else { prior[l] };
                    visible[1][l] = visible[1][l] + u;
                    visible[2][l] = u.fma::<FUSED>(u, visible[2][l]);
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
    let linear = total(&linear);
    if KIND == VALUES || KIND == PRIOR {
        extra.linear = linear;
        extra.with_exp = total(&with_exp);
        extra.visible = match WIDE {
            true => Some([total(&visible[0]), total(&visible[1]), total(&visible[2])]),
            false => None,
        };
    }
    let counted = x.len().next_multiple_of(LANES) - total(&masked) as usize;
    // What was not a number is not in the exponentials, but in what is linear in it. Counted apart, +inf would not be seen.
    let is_nan = !WIDE && linear.is_nan() || largest.f64() == f64::INFINITY;
    Partial {
        exp: if is_nan { f64::NAN } else { total(&exp) },
        // Of masked classes alone, the largest is masked too.
        largest_classes: if counted == 0 {
            0
        } else {
            total(&largest_classes) as usize
        },
        linear,
        weighted: total(&weighted),
        squares: total(&squares),
        classes: counted,
        ..Partial::EMPTY
    }
}

/// Fewer than [`LANES`] values, filled up.
#[inline(always)]
fn padded<R: Real>(values: &[R], with: R) -> [R; LANES] {
    let mut lanes = [with; LANES];
    lanes[..values.len()].copy_from_slice(values);
    lanes
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
