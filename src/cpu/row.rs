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

/// Evaluates an expression with `$F` as the constant [`Form`] of a call.
macro_rules! with_form {
    ($call:expr, $F:ident => $body:expr) => {
        match $crate::cpu::row::form($call) {
            $crate::cpu::row::CAPPED => {
                const $F: $crate::cpu::row::Form = $crate::cpu::row::CAPPED;
                $body
            }
            $crate::cpu::row::SCALED => {
                const $F: $crate::cpu::row::Form = $crate::cpu::row::SCALED;
                $body
            }
            _ => {
                const $F: $crate::cpu::row::Form = $crate::cpu::row::PLAIN;
                $body
            }
        }
    };
}
pub(super) use with_form;

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
    fn relative_to<const FORM: Form, const FUSED: bool>(&self, logit: R) -> Reference<R> {
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
    fn difference<const FORM: Form, const FUSED: bool>(&self, x: R, from: &Reference<R>) -> (R, R) {
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
    /// Σ exp d.
    exp: f64,
    /// Σ d.
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
        Self {
            exp: self.exp * factor,
            linear: self.linear + self.classes as f64 * by,
            // Infinitely far is 0, not NaN.
            weighted: if factor == 0.0 {
                0.0
            } else {
                (self.weighted + by * self.exp) * factor
            },
            squares: self.squares * factor * factor,
            ..self
        }
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
    /// p_y, and p_y − 1: each keeps its digits.
    target_p: f64,
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
    const FORM: Form,
    const STATS: bool,
    const KEEP: bool,
    const FUSED: bool,
    S: pulp::Simd,
>(
    simd: S,
    x: &[T],
    index: usize,
    target: usize,
    (transform, exact): (&Transform<T::Real>, &Transform<f64>),
    kept: &mut [T::Real],
    buffer: &mut [T::Real; PIECE],
) -> Partial {
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
        sum::<T, FORM, STATS, KEEP, false, FUSED>(reals, transform, &reference, kept, next)
    } else {
        sum::<T, FORM, STATS, KEEP, true, FUSED>(reals, transform, &reference, kept, next)
    };
    let partial = Partial {
        largest: largest.f64(),
        piece: index,
        ..sums
    };
    // Logits near the type's limits, such as its smallest value for a mask: their differences may be beyond it.
    if partial.exp.is_finite() && !(partial.linear.is_finite() && partial.weighted.is_finite()) {
        return partial.resummed::<T::Real, FORM>(reals, exact);
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
    const FORM: Form,
    const STATS: bool,
    const KEEP: bool,
    const WIDE: bool,
    const FUSED: bool,
>(
    x: &[T::Real],
    transform: &Transform<T::Real>,
    reference: &Reference<T::Real>,
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
            let d = transform.difference::<FORM, FUSED>(chunk[l], reference).0;
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

/// Loss, statistics and normaliser of a row whose pieces merge to `others`, from the target's logit `x_y` and the
/// column of the largest. The target's own part, on which the loss rests, is computed in f64.
pub(super) fn finish<const FORM: Form>(
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
    let reference = transform.relative_to::<FORM, true>(others.largest);
    let d_y = if target_masked {
        f64::NEG_INFINITY
    } else {
        transform.difference::<FORM, true>(x_y, &reference).0
    };
    let e_y = d_y.exp();
    let sum = others.exp + e_y;
    if sum.is_nan() {
        let nan = f64::NAN;
        let normaliser = Normaliser {
            largest: nan,
            log_sum: nan,
            lse: nan,
            target_p: nan,
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
    let lse = transform.z::<FORM>(others.largest) + log_sum;
    let nll = if target_is_largest {
        (others.exp / e_y).ln_1p()
    } else {
        log_sum - d_y
    };
    let p_y = e_y / sum;
    let target_p_minus_1 = -others.exp / sum;
    let k = classes as f64;
    let linear = others.linear + if target_masked { 0.0 } else { d_y };
    let weighted_sum = others.weighted + if e_y == 0.0 { 0.0 } else { d_y * e_y };
    let lambda = f64::from(call.z_loss);
    let loss = if target_masked {
        f64::INFINITY
    } else {
        let smooth = if eps == 0.0 {
            0.0
        } else {
            eps * (log_sum - linear / k)
        };
        let z_loss = if lambda == 0.0 {
            0.0
        } else {
            lambda * lse * lse
        };
        let nll = if eps == 1.0 { 0.0 } else { (1.0 - eps) * nll };
        nll + smooth + z_loss
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
            largest: others.largest,
            log_sum,
            lse,
            target_p: p_y,
            target_p_minus_1,
            classes,
        },
    )
}

/// Factors of a row's gradient: dx_k = (exponential·e_k − share)·slope_k, and the target's own.
pub(super) struct GradFactors<R> {
    /// The largest logit.
    largest: R,
    exponential: R,
    share: R,
    /// The same two, and whether what they make is in R's range.
    exact: [f64; 2],
    pub in_range: bool,
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
        let lambda = f64::from(call.z_loss);
        let lse_slope = if lambda == 0.0 {
            0.0
        } else {
            2.0 * lambda * n.lse
        };
        let share = row.smoothing / n.classes as f64;
        let scale = scale * f64::from(call.logit_scale);
        let exact = [
            scale * (1.0 + lse_slope) * (-n.log_sum).exp(),
            scale * share,
        ];
        let [exponential, scaled_share] = exact.map(R::of);
        Some(Self {
            largest: R::of(n.largest),
            exponential,
            share: scaled_share,
            exact,
            // With room for their sum.
            in_range: exact
                .iter()
                .all(|&x| !(R::of(2.0 * x).f64().is_infinite() && x.is_finite())),
            any_masked: n.classes != call.vocab,
            masked: R::of(if n.log_sum.is_nan() { n.log_sum } else { 0.0 }),
            target: scale * (n.target_p_minus_1 + row.smoothing - share + lse_slope * n.target_p),
        })
    }
}

/// Gradient of the logits `x` of a piece, in the order of [`Element::widen`]; wrong for the target's. `buffer` is
/// scratch memory.
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
        return gradient_in_f64::<T::Real, FORM>(reals, result, exact, factors);
    }
    let reference = transform.relative_to::<FORM, FUSED>(factors.largest);
    for (g, &x) in result.iter_mut().zip(reals) {
        let (d, slope) = transform.difference::<FORM, FUSED>(x, &reference);
        let dz = d
            .exp::<FUSED>()
            .fma::<FUSED>(factors.exponential, -factors.share);
        let dx = if FORM == CAPPED { dz * slope } else { dz };
        *g = if x == T::Real::NEG_INFINITY {
            factors.masked
        } else {
            dx
        };
    }
}

/// [`gradient`] where a factor is beyond the type, of a product that need not be.
#[cold]
fn gradient_in_f64<R: Real, const FORM: Form>(
    x: &[R],
    result: &mut [R; PIECE],
    transform: &Transform<f64>,
    factors: &GradFactors<R>,
) {
    let reference = transform.relative_to::<FORM, true>(factors.largest.f64());
    let [exponential, share] = factors.exact;
    for (g, &x) in result.iter_mut().zip(x) {
        let (d, slope) = transform.difference::<FORM, true>(x.f64(), &reference);
        *g = if x == R::NEG_INFINITY {
            factors.masked
        } else {
            R::of((d.exp() * exponential - share) * slope)
        };
    }
}

/// Gradient of a piece from the exponentials that [`partial`] kept, which it may overwrite; wrong for the target's.
/// Without a softcap.
#[inline(always)]
pub(super) fn gradient_of_kept<T: Element, const FORM: Form, const FUSED: bool>(
    kept: &mut [T::Real],
    grad: &mut [T],
    partial: &Partial,
    factors: &GradFactors<T::Real>,
    transform: &Transform<f64>,
) {
    let reference = transform.relative_to::<FORM, true>(factors.largest.f64());
    let (by, _) = transform.difference::<FORM, true>(partial.largest, &reference);
    let exponential = T::Real::of(factors.exponential.f64() * by.exp());
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
pub(super) fn target_gradient<T: Element, const FORM: Form>(
    x: T,
    transform: &Transform<f64>,
    factors: &GradFactors<T::Real>,
) -> T::Real {
    let x = one(x);
    let slope = if FORM == CAPPED {
        transform.tanh::<true>(x.f64()).slope
    } else {
        1.0
    };
    if x == T::Real::NEG_INFINITY {
        factors.masked
    } else {
        T::Real::of(factors.target * slope)
    }
}
