//! One row: partial results of its pieces, their merge, and the gradient of a piece.
//!
//! A row is cut into pieces of [`PIECE`] logits, which fit in the first-level cache, whatever its length, its address
//! and the number of threads. Pieces are merged in order, in f64. So a row's bits depend on nothing but the row.

use super::{element::Element, real::Real};
use crate::call::{Call, Row};

/// Logits a piece.
pub(super) const PIECE: usize = 2048;
/// Independent sums, one a SIMD lane: a fixed number, so that results do not depend on the instruction set's width.
const LANES: usize = 16;

/// Scale and softcap of the logits.
#[derive(Clone, Copy)]
pub(super) struct Transform<R> {
    scale: R,
    cap: R,
    /// scale / cap.
    inner: R,
}

impl<R: Real> Transform<R> {
    pub fn new(call: &Call) -> Self {
        let scale = f64::from(call.logit_scale);
        let cap = call.softcap.map_or(1.0, f64::from);
        Self {
            scale: R::of(scale),
            cap: R::of(cap),
            inner: R::of(scale / cap),
        }
    }

    /// z − shift, and dz/dx up to the scale. NaN for x = ±inf with a softcap.
    #[inline(always)]
    fn apply<const CAP: bool, const FUSED: bool>(&self, x: R, shift: R) -> (R, R) {
        if CAP {
            let (tanh, slope) = (x * self.inner).tanh_and_slope::<FUSED>();
            // x·0 makes NaN of an infinity, which tanh would hide.
            (self.cap.fma::<FUSED>(tanh, (x * R::ZERO) - shift), slope)
        } else {
            (x.fma::<FUSED>(self.scale, -shift), R::ONE)
        }
    }

    /// z of the largest logit: what a row's exponentials are taken relative to. 0 where all are masked.
    #[inline(always)]
    fn shift<const CAP: bool, const FUSED: bool>(&self, largest: R) -> R {
        if largest == R::NEG_INFINITY {
            R::ZERO
        } else {
            self.apply::<CAP, FUSED>(largest, R::ZERO).0
        }
    }
}

/// Sums over the classes of a stretch of a row, without masked ones and without the target, relative to `shift`.
///
/// The target is left out so that probabilities near 1 keep their digits: 1 − p_y is then a sum, not a difference.
#[derive(Clone, Copy, Debug)]
pub(super) struct Partial {
    /// Largest logit (before scale and softcap), the target among them.
    pub largest: f64,
    /// The piece that has it first.
    piece: usize,
    /// z of `largest`.
    shift: f64,
    /// Σ exp(z − shift).
    exp: f64,
    /// Σ (z − shift).
    linear: f64,
    /// Σ (z − shift)·exp(z − shift).
    weighted: f64,
    /// Σ exp(z − shift)².
    squares: f64,
    classes: usize,
}

impl Partial {
    pub const EMPTY: Self = Self {
        largest: f64::NEG_INFINITY,
        piece: 0,
        shift: 0.0,
        exp: 0.0,
        linear: 0.0,
        weighted: 0.0,
        squares: 0.0,
        classes: 0,
    };

    /// The same sums relative to another shift.
    fn shifted(self, shift: f64) -> Self {
        // Of no classes, every sum is 0 whatever the shift.
        if self.classes == 0 || self.shift == shift {
            return Self { shift, ..self };
        }
        let by = self.shift - shift;
        let factor = by.exp();
        Self {
            shift,
            exp: self.exp * factor,
            linear: self.linear + self.classes as f64 * by,
            weighted: (self.weighted + by * self.exp) * factor,
            squares: self.squares * factor * factor,
            ..self
        }
    }

    /// This stretch followed by `other`.
    pub fn merge(self, other: Self) -> Self {
        let first = self.largest >= other.largest;
        let (largest, piece, shift) = if first {
            (self.largest, self.piece, self.shift)
        } else {
            (other.largest, other.piece, other.shift)
        };
        let (a, b) = (self.shifted(shift), other.shifted(shift));
        Self {
            largest,
            piece,
            shift,
            exp: a.exp + b.exp,
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
    shift: f64,
    /// log Σ exp(z − shift), over all classes.
    log_sum: f64,
    /// p_y − 1.
    target_p_minus_1: f64,
    classes: usize,
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
fn prefetch<T>(at: *const T) {
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

/// Partial result of piece `index` of the row `x`. With `KEEP`, its exponentials go to `kept`, −0 for masked classes
/// and the target. `buffer` is scratch memory.
#[inline(always)]
pub(super) fn partial<
    T: Element,
    const CAP: bool,
    const STATS: bool,
    const KEEP: bool,
    const FUSED: bool,
    S: pulp::Simd,
>(
    simd: S,
    x: &[T],
    index: usize,
    target: usize,
    transform: &Transform<T::Real>,
    kept: &mut [T::Real],
    buffer: &mut [T::Real; PIECE],
) -> Partial {
    let reals = without_target(x, index, target, buffer);
    let (mut largest, smallest) = T::Real::extremes(simd, reals);
    if target / PIECE == index {
        largest = largest.largest(one(x[target]));
    }
    let shift = transform.shift::<CAP, FUSED>(largest);
    // Masked classes, and exponentials that would be subnormal, cost more; most pieces have neither. The last piece of
    // a row may be filled up with masked classes.
    let narrow = transform.apply::<CAP, FUSED>(smallest, shift).0 >= T::Real::LEAST;
    let next = x.as_ptr().wrapping_add((index + 1) * PIECE);
    let sums = if narrow && reals.len().is_multiple_of(LANES) {
        sum::<T, CAP, STATS, KEEP, false, FUSED>(reals, transform, shift, kept, next)
    } else {
        sum::<T, CAP, STATS, KEEP, true, FUSED>(reals, transform, shift, kept, next)
    };
    let partial = Partial {
        largest: largest.f64(),
        piece: index,
        shift: shift.f64(),
        ..sums
    };
    // Logits near the type's limits, such as its smallest value for a mask: their differences may be beyond it.
    if partial.exp.is_finite() && !(partial.linear.is_finite() && partial.weighted.is_finite()) {
        return partial.resummed(reals, transform.scale.f64());
    }
    partial
}

/// The sums of a [`Partial`]. `WIDE` says that there may be masked classes, and others far below the largest.
///
/// Prefetches the elements from `next` on: finding a piece's extremes first would wait for memory otherwise, while the
/// arithmetic here leaves it idle.
#[inline(always)]
fn sum<
    T: Element,
    const CAP: bool,
    const STATS: bool,
    const KEEP: bool,
    const WIDE: bool,
    const FUSED: bool,
>(
    x: &[T::Real],
    transform: &Transform<T::Real>,
    shift: T::Real,
    kept: &mut [T::Real],
    next: *const T,
) -> Partial {
    let [zero, one] = [T::Real::ZERO, T::Real::ONE];
    let mut exp = [zero; LANES];
    let mut linear = [zero; LANES];
    let mut weighted = [zero; LANES];
    let mut squares = [zero; LANES];
    let mut masked = [zero; LANES];
    let (chunks, rest) = x.as_chunks::<LANES>();
    let (kept_chunks, kept_rest) = kept.as_chunks_mut::<LANES>();
    let mut padded = [T::Real::NEG_INFINITY; LANES];
    padded[..rest.len()].copy_from_slice(rest);
    for c in 0..x.len().div_ceil(LANES) {
        let chunk = if c < chunks.len() {
            &chunks[c]
        } else {
            &padded
        };
        prefetch(next.wrapping_add(c * LANES));
        let mut powers = [zero; LANES];
        for l in 0..LANES {
            let hidden = WIDE && chunk[l] == T::Real::NEG_INFINITY;
            let d = transform.apply::<CAP, FUSED>(chunk[l], shift).0;
            let d = if hidden { zero } else { d };
            let power = if WIDE {
                d.exp::<FUSED>()
            } else {
                d.exp_in_range::<FUSED>()
            };
            let power = if hidden { zero } else { power };
            exp[l] = exp[l] + power;
            linear[l] = linear[l] + d;
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
    }
    let counted = x.len().next_multiple_of(LANES) - total(&masked) as usize;
    Partial {
        exp: total(&exp),
        linear: total(&linear),
        weighted: total(&weighted),
        squares: total(&squares),
        classes: counted,
        ..Partial::EMPTY
    }
}

#[inline(always)]
fn total<R: Real>(lanes: &[R; LANES]) -> f64 {
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
    /// With the sums of d over the classes `x` taken in f64. Without a softcap, which leaves nothing to overflow.
    #[cold]
    fn resummed<R: Real>(self, x: &[R], scale: f64) -> Self {
        let mut sums = Self {
            linear: 0.0,
            weighted: 0.0,
            ..self
        };
        for d in x
            .iter()
            .filter(|&&x| x != R::NEG_INFINITY)
            .map(|x| x.f64() * scale - self.shift)
        {
            sums.linear += d;
            sums.weighted += d * d.exp();
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

/// Loss, statistics and normaliser of a row whose pieces merge to `others`, from the target's logit `x_y` and the
/// column of the largest. The target's own part, on which the loss rests, is computed in f64.
pub(super) fn finish<const CAP: bool>(
    call: &Call,
    row: &Row,
    x_y: f64,
    predicted: u32,
    others: &Partial,
    transform: &Transform<f64>,
) -> (RowResult, Normaliser) {
    let &Row {
        smoothing: eps,
        weight,
        ..
    } = row;
    let weighted = |loss: f64| if weight == 0.0 { 0.0 } else { weight * loss };
    let target_masked = x_y == f64::NEG_INFINITY;
    let classes = others.classes + usize::from(!target_masked);
    let d_y = if target_masked {
        f64::NEG_INFINITY
    } else {
        transform.apply::<CAP, true>(x_y, others.shift).0
    };
    let e_y = d_y.exp();
    let sum = others.exp + e_y;
    if sum.is_nan() {
        let nan = f64::NAN;
        let normaliser = Normaliser {
            shift: nan,
            log_sum: nan,
            target_p_minus_1: nan,
            classes,
        };
        let result = RowResult {
            loss: weighted(nan),
            nll: nan,
            lse: nan,
            entropy: nan,
            max_prob: nan,
            grad_norm_sq: nan,
            predicted: 0,
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
                ..Default::default()
            },
            Normaliser::default(),
        );
    }

    // log1p where the target is the largest, as there the sum is 1 and a little.
    let target_is_largest = x_y == others.largest;
    let log_sum = if target_is_largest {
        d_y + (others.exp / e_y).ln_1p()
    } else {
        sum.ln()
    };
    let lse = others.shift + log_sum;
    let nll = if target_is_largest {
        (others.exp / e_y).ln_1p()
    } else {
        log_sum - d_y
    };
    let p_y = e_y / sum;
    let target_p_minus_1 = -others.exp / sum;
    let k = classes as f64;
    let linear = others.linear + if target_masked { 0.0 } else { d_y };
    let weighted_sum = others.weighted + if target_masked { 0.0 } else { d_y * e_y };
    let lambda = f64::from(call.z_loss);
    let loss = if target_masked {
        f64::INFINITY
    } else {
        let smooth = if eps == 0.0 {
            0.0
        } else {
            eps * (log_sum - linear / k)
        };
        (1.0 - eps) * nll + smooth + lambda * lse * lse
    };
    // Σ (p − ε/K)² over the others, expanded, and the target's own term.
    let share = eps / k;
    let others_norm = others.squares / (sum * sum) - 2.0 * share * (others.exp / sum)
        + others.classes as f64 * share * share;
    let target_norm = if target_masked {
        0.0
    } else {
        (target_p_minus_1 + eps - share).powi(2)
    };
    let result = RowResult {
        loss: weighted(loss),
        nll,
        lse,
        entropy: (log_sum - weighted_sum / sum).max(0.0),
        max_prob: if target_is_largest { p_y } else { 1.0 / sum },
        grad_norm_sq: others_norm.max(0.0) + target_norm,
        predicted,
    };
    (
        result,
        Normaliser {
            shift: others.shift,
            log_sum,
            target_p_minus_1,
            classes,
        },
    )
}

/// Factors of a row's gradient: dx_k = (exponential·e_k − share)·slope_k, and the target's own.
pub(super) struct GradFactors<R> {
    shift: R,
    exponential: R,
    share: R,
    any_masked: bool,
    /// Gradient of a masked class: 0, but NaN in a row that is NaN.
    masked: R,
    /// Gradient of the target, but for the slope of the softcap.
    target: f64,
}

impl<R: Real> GradFactors<R> {
    /// `scale` is everything that multiplies dz but the row's weight; `None` where the whole row's gradient is 0.
    pub fn new(call: &Call, row: &Row, n: &Normaliser, scale: f64) -> Option<Self> {
        let scale = scale * row.weight;
        if row.weight == 0.0 || n.classes == 0 {
            return None;
        }
        let lse_slope = 2.0 * f64::from(call.z_loss) * (n.shift + n.log_sum);
        let share = row.smoothing / n.classes as f64;
        let p_y = 1.0 + n.target_p_minus_1;
        let scale = scale * f64::from(call.logit_scale);
        Some(Self {
            shift: R::of(n.shift),
            exponential: R::of(scale * (1.0 + lse_slope) * (-n.log_sum).exp()),
            share: R::of(scale * share),
            any_masked: n.classes != call.vocab,
            masked: R::of(if n.log_sum.is_nan() { n.log_sum } else { 0.0 }),
            target: scale * (n.target_p_minus_1 + row.smoothing - share + lse_slope * p_y),
        })
    }
}

/// Gradient of the logits `x` of a piece, in the order of [`Element::widen`]; wrong for the target's. `buffer` is
/// scratch memory.
#[inline(always)]
pub(super) fn gradient<T: Element, const CAP: bool, const FUSED: bool>(
    x: &[T],
    result: &mut [T::Real; PIECE],
    transform: &Transform<T::Real>,
    factors: &GradFactors<T::Real>,
    buffer: &mut [T::Real; PIECE],
) {
    let reals = T::widen(x, buffer);
    for (g, &x) in result.iter_mut().zip(reals) {
        let (d, slope) = transform.apply::<CAP, FUSED>(x, factors.shift);
        let dz = d
            .exp::<FUSED>()
            .fma::<FUSED>(factors.exponential, -factors.share);
        let dx = if CAP { dz * slope } else { dz };
        *g = if x == T::Real::NEG_INFINITY {
            factors.masked
        } else {
            dx
        };
    }
}

/// Gradient of a piece from the exponentials that [`partial`] kept, which it may overwrite; wrong for the target's.
/// Without a softcap.
#[inline(always)]
pub(super) fn gradient_of_kept<T: Element, const FUSED: bool>(
    kept: &mut [T::Real],
    grad: &mut [T],
    partial: &Partial,
    factors: &GradFactors<T::Real>,
) {
    let exponential =
        T::Real::of(factors.exponential.f64() * (partial.shift - factors.shift.f64()).exp());
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

/// Gradient of the target's logit `x`.
pub(super) fn target_gradient<T: Element, const CAP: bool>(
    x: T,
    transform: &Transform<f64>,
    factors: &GradFactors<T::Real>,
) -> T::Real {
    let x = one(x);
    let slope = if CAP {
        transform.apply::<CAP, true>(x.f64(), 0.0).1
    } else {
        1.0
    };
    if x == T::Real::NEG_INFINITY {
        factors.masked
    } else {
        T::Real::of(factors.target * slope)
    }
}
