//! How logits become exponents: scale and softcap.

use super::real::Real;
use crate::call::Call;

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
        const $F: $crate::cpu::transform::Form = $crate::cpu::transform::$form;
        #[allow(dead_code)] // not every body needs both
        const $G: bool = $is;
        $body
    }};
    ($T:ty, $call:expr, $general:expr, $F:ident, $G:ident => $body:expr) => {{
        use $crate::cpu::{element::Element, transform::{CAPPED, SCALED, form, with_path}};
        let (form, general) = (form($call), $general);
        if <$T as Element>::CAPPED && form == CAPPED {
            if general {
                with_path!(@ CAPPED, true, $F, $G => $body)
            } else {
                with_path!(@ CAPPED, false, $F, $G => $body)
            }
        } else if <$T as Element>::GENERAL && general && form == SCALED {
            with_path!(@ SCALED, true, $F, $G => $body)
        } else if <$T as Element>::GENERAL && general {
            with_path!(@ PLAIN, true, $F, $G => $body)
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
    pub fn tanh<const FUSED: bool>(&self, x: R) -> Tanh<R> {
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
pub(super) struct Tanh<R> {
    /// σ(−2y) = 1/(1 + e^2y).
    down: R,
    /// 1 − tanh² y.
    pub slope: R,
}

impl Transform<f64> {
    /// z of a logit that is not masked.
    pub fn z<const FORM: Form>(&self, x: f64) -> f64 {
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
