//! Gradient of a piece of a row.

use super::{
    element::Element,
    finish::{Named, Normaliser, smoothed_part},
    general::{Beside, for_each_class},
    real::Real,
    row::{PIECE, Partial},
    transform::{CAPPED, Form, Transform},
};
use crate::call::{Call, ClassValues, Row};

/// Factors of a row's gradient: dx_k = (exponential·e_k − entropy·e_k·d_k − share·c_k·u_k − target·c_k·t_k)·outer·slope_k, where
/// t is the target's probabilities if it has one for each class; classes that it names are put right afterwards.
pub(super) struct GradFactors<R> {
    /// The largest logit.
    largest: R,
    exponential: R,
    share: R,
    entropy: R,
    target: R,
    /// Multiplies all of it where probabilities or the entropy may cancel p: nothing's rounding may be more than its own.
    /// 1 elsewhere, where the factors have it.
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
    smoothed_part: f64,
    inverse_sum: f64,
    lse_slope: f64,
    entropy_weight: f64,
    normaliser: Normaliser,
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
        let beta = row.entropy_weight;
        let share = smoothed_part(row.smoothing, n.prior_mass);
        let scale = scale * f64::from(call.logit_scale);
        let inverse_sum = (-n.log_sum).exp();
        let cancels = call.probabilities().is_some() || call.weighs_entropy();
        let (inner, outer) = if cancels { (1.0, scale) } else { (scale, 1.0) };
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
            smoothed_part: share,
            inverse_sum,
            lse_slope,
            entropy_weight: beta,
            normaliser: *n,
        })
    }

    /// Whether a class was left out of the forward's sums.
    pub fn has_left_out(&self) -> bool {
        self.normaliser.has_left_out
    }

    /// The largest logit of the row.
    pub fn largest(&self) -> f64 {
        self.normaliser.largest
    }

    /// Gradient of a class that the target names, but for the slope of the softcap.
    fn named(&self, values: &ClassValues, named: &Named) -> f64 {
        let n = &self.normaliser;
        let (p, p_minus_1) = if named.left_out {
            (n.target_p, n.target_p_minus_1)
        } else {
            let p = named.e * self.inverse_sum;
            let p_minus_1 = if named.d == 0.0 {
                n.largest_p_minus_1
            } else {
                p - 1.0
            };
            (p, p_minus_1)
        };
        let u = self.smoothed_part * values.prior(named.class);
        let q = values.weight(named.class) * ((1.0 - self.smoothing) * named.t + u);
        let entropy = if self.entropy_weight == 0.0 || p == 0.0 {
            0.0
        } else {
            self.entropy_weight * p * (named.d - n.mean)
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
        if beside.target.is_none() {
            for_each_class!(beside, both, grad.iter_mut().zip(kept), (g, e), subtracted => {
                *g = T::narrow_one(e.fma::<FUSED>(exponential, -subtracted));
            });
            return;
        }
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

/// Gradient of a class that the target names.
pub(super) fn named_gradient<R: Real, const FORM: Form>(
    named: &Named,
    values: &ClassValues,
    transform: &Transform<f64>,
    factors: &GradFactors<R>,
) -> R {
    if named.logit == f64::NEG_INFINITY {
        return factors.masked;
    }
    let slope = if FORM == CAPPED {
        transform.tanh::<true>(named.logit).slope
    } else {
        1.0
    };
    R::of(factors.named(values, named) * slope)
}
