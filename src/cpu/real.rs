//! Arithmetic of the CPU path: elementary functions written without branches, so that loops over them vectorise
//! under whatever instruction set the caller was compiled for.

use std::ops::{Add, Div, Mul, Neg, Sub};

/// f32 or f64: the type a row is computed in. `FUSED` says whether the instruction set has a fused multiply-add;
/// without one, `mul_add` would be a library call.
pub(super) trait Real:
    Copy
    + Default
    + PartialOrd
    + Send
    + Sync
    + Add<Output = Self>
    + Sub<Output = Self>
    + Mul<Output = Self>
    + Div<Output = Self>
    + Neg<Output = Self>
    + 'static
{
    const NEG_INFINITY: Self;
    const ZERO: Self;
    const ONE: Self;

    fn of(x: f64) -> Self;
    fn f64(self) -> f64;
    fn abs(self) -> Self;
    /// The same values, if that is the type.
    fn same_f32(values: &[f32]) -> Option<&[Self]>;
    fn same_f64(values: &[f64]) -> Option<&[Self]>;
    /// Whether the sign bit is set.
    fn is_negative(self) -> bool;
    fn fma<const FUSED: bool>(self, a: Self, b: Self) -> Self;
    /// Below this, e^x would be subnormal.
    const LEAST: Self;

    /// e^r and `round` + n, where e^self = 2^n·e^r.
    fn exp_parts<const FUSED: bool>(self, round: Self) -> (Self, Self);
    /// e^self for [`Self::LEAST`] ≤ self ≤ 0 (a little above is fine), NaN for NaN.
    fn exp_in_range<const FUSED: bool>(self) -> Self;
    /// The same bits with one product less, and anything for NaN.
    fn exp_of_number<const FUSED: bool>(self) -> Self;
    /// (e^self − 1)/self for −[`SERIES`] ≤ self ≤ 0 (a little above is fine).
    fn exp_minus_1_series<const FUSED: bool>(self) -> Self;

    /// e^self for self ≤ 0 (a little above is fine): 0 where it would be subnormal, NaN for NaN.
    #[inline(always)]
    fn exp<const FUSED: bool>(self) -> Self {
        let result = self.exp_in_range::<FUSED>();
        if self < Self::LEAST {
            Self::ZERO
        } else {
            result
        }
    }

    /// The larger; `self` where the other is NaN. One instruction, unlike `f32::max`.
    #[inline(always)]
    fn largest(self, other: Self) -> Self {
        if other > self { other } else { self }
    }

    /// (largest, smallest) of `x`, with NaN or without. Vectorised by hand: compilers keep the running values in memory.
    fn extremes<S: pulp::Simd>(simd: S, x: &[Self]) -> (Self, Self);

    /// e^self − 1 for self ≤ 0 (a little above is fine), without the cancellation near 0. NaN for NaN.
    #[inline(always)]
    fn exp_minus_1<const FUSED: bool>(self) -> Self {
        let by_series = self * self.exp_minus_1_series::<FUSED>();
        let by_exp = self.exp::<FUSED>() - Self::ONE;
        if self > Self::of(-SERIES) {
            by_series
        } else {
            by_exp
        }
    }
}

/// Up to this, e^y − 1 is a series; beyond, the difference has lost few enough digits.
const SERIES: f64 = 0.35;

/// Horner's rule, highest coefficient first.
#[inline(always)]
fn horner<R: Real, const FUSED: bool>(x: R, coefficients: &[f64]) -> R {
    let mut sum = R::of(coefficients[0]);
    for &c in &coefficients[1..] {
        sum = sum.fma::<FUSED>(x, R::of(c));
    }
    sum
}

/// e^r for |r| ≤ ln 2 / 2 to 5e-9: 1 + r·g(r), g interpolating (e^r − 1)/r at the Chebyshev points. By Estrin's scheme:
/// short chains of dependent operations are what keeps a processor busy here.
#[inline(always)]
fn exp_f32<const FUSED: bool>(r: f32) -> f32 {
    let square = r * r;
    let low = r + 1.0;
    let middle = r.fma::<FUSED>(0.166_665_05, 0.5);
    let high = r.fma::<FUSED>(0.008_369_156, 0.041_666_464);
    square
        .fma::<FUSED>(0.001_393_365, high)
        .fma::<FUSED>(square, middle)
        .fma::<FUSED>(square, low)
}

/// e^r for |r| ≤ ln 2 / 2: Taylor's series, 1/k! from the highest k down.
#[inline(always)]
fn exp_f64<const FUSED: bool>(r: f64) -> f64 {
    const SERIES: [f64; 14] = [
        1.0 / 6227020800.0,
        1.0 / 479001600.0,
        1.0 / 39916800.0,
        1.0 / 3628800.0,
        1.0 / 362880.0,
        1.0 / 40320.0,
        1.0 / 5040.0,
        1.0 / 720.0,
        1.0 / 120.0,
        1.0 / 24.0,
        1.0 / 6.0,
        0.5,
        1.0,
        1.0,
    ];
    horner::<f64, FUSED>(r, &SERIES)
}

/// Taylor's series of (e^y − 1)/y, 1/(k + 1)! from the highest k down.
const EXP_MINUS_1: [f64; 13] = [
    1.0 / 6227020800.0,
    1.0 / 479001600.0,
    1.0 / 39916800.0,
    1.0 / 3628800.0,
    1.0 / 362880.0,
    1.0 / 40320.0,
    1.0 / 5040.0,
    1.0 / 720.0,
    1.0 / 120.0,
    1.0 / 24.0,
    1.0 / 6.0,
    0.5,
    1.0,
];

// e^x = 2^n·e^r with n = round(x·log2 e), r = x − n·ln 2, ln 2 in two parts (Cody and Waite, "Software Manual for the
// Elementary Functions", 1980, chapter 6). Adding `round` puts n into the low bits, biased as an exponent is if it has the bias.
macro_rules! real {
    ($float:ident, $mantissa:literal, $round:expr, $bias:expr, $ln2_high:expr, $ln2_low:expr, $least:literal, $exp:ident, $exp_minus_1:expr,
     $as_simd:ident, $splat:ident, $max:ident, $min:ident, $reduce_max:ident, $reduce_min:ident) => {
        impl Real for $float {
            const NEG_INFINITY: Self = $float::NEG_INFINITY;
            const ZERO: Self = 0.0;
            const ONE: Self = 1.0;
            const LEAST: Self = $least;

            #[inline(always)]
            fn of(x: f64) -> Self {
                x as $float
            }
            #[inline(always)]
            fn f64(self) -> f64 {
                self.into()
            }
            #[inline(always)]
            fn abs(self) -> Self {
                self.abs()
            }
            #[inline(always)]
            fn same_f32(values: &[f32]) -> Option<&[Self]> {
                bytemuck::try_cast_slice(values)
                    .ok()
                    .filter(|_| $mantissa == 23)
            }
            #[inline(always)]
            fn same_f64(values: &[f64]) -> Option<&[Self]> {
                bytemuck::try_cast_slice(values)
                    .ok()
                    .filter(|_| $mantissa == 52)
            }
            #[inline(always)]
            fn is_negative(self) -> bool {
                self.is_sign_negative()
            }
            #[inline(always)]
            fn fma<const FUSED: bool>(self, a: Self, b: Self) -> Self {
                if FUSED {
                    self.mul_add(a, b)
                } else {
                    self * a + b
                }
            }
            #[inline(always)]
            fn exp_parts<const FUSED: bool>(self, round: Self) -> (Self, Self) {
                let rounded = self.fma::<FUSED>(std::$float::consts::LOG2_E, round);
                let n = rounded - round;
                // ln 2 happens to be so near an f32 that a fused multiply-add needs no second part.
                let r = if FUSED && $mantissa == 23 {
                    n.fma::<FUSED>(-std::$float::consts::LN_2, self)
                } else {
                    n.fma::<FUSED>(-$ln2_low, n.fma::<FUSED>(-$ln2_high, self))
                };
                ($exp::<FUSED>(r), rounded)
            }
            #[inline(always)]
            fn exp_in_range<const FUSED: bool>(self) -> Self {
                let (power, biased) = self.exp_parts::<FUSED>($round + $bias);
                power * $float::from_bits(biased.to_bits() << $mantissa)
            }
            #[inline(always)]
            fn exp_of_number<const FUSED: bool>(self) -> Self {
                // Products are what there is most of where exponentials are summed, so n is added to the exponent.
                let (power, n) = self.exp_parts::<FUSED>($round);
                $float::from_bits(power.to_bits().wrapping_add(n.to_bits() << $mantissa))
            }
            #[inline(always)]
            fn exp_minus_1_series<const FUSED: bool>(self) -> Self {
                horner::<Self, FUSED>(self, $exp_minus_1)
            }
            #[inline(always)]
            fn extremes<S: pulp::Simd>(simd: S, x: &[Self]) -> (Self, Self) {
                let (vectors, rest) = S::$as_simd(x);
                let (quads, vectors) = pulp::as_arrays::<4, _>(vectors);
                let (high, low) = (
                    simd.$splat(-$float::INFINITY),
                    simd.$splat($float::INFINITY),
                );
                // Several chains, to hide the latency.
                let (mut high, mut low) = ([high; 4], [low; 4]);
                for quad in quads {
                    for k in 0..4 {
                        high[k] = simd.$max(high[k], quad[k]);
                        low[k] = simd.$min(low[k], quad[k]);
                    }
                }
                for &vector in vectors {
                    high[0] = simd.$max(high[0], vector);
                    low[0] = simd.$min(low[0], vector);
                }
                let [a, b, c, d] = high;
                let mut largest = simd.$reduce_max(simd.$max(simd.$max(a, b), simd.$max(c, d)));
                let [a, b, c, d] = low;
                let mut smallest = simd.$reduce_min(simd.$min(simd.$min(a, b), simd.$min(c, d)));
                for &x in rest {
                    largest = largest.max(x);
                    smallest = smallest.min(x);
                }
                (largest, smallest)
            }
        }
    };
}
real!(
    f32,
    23,
    12582912.0,
    127.0,
    0.693_359_4,
    -2.121_944_4e-4,
    -87.0,
    exp_f32,
    EXP_MINUS_1.split_at(6).1,
    as_simd_f32s,
    splat_f32s,
    max_f32s,
    min_f32s,
    reduce_max_f32s,
    reduce_min_f32s
);
real!(
    f64,
    52,
    6755399441055744.0,
    1023.0,
    0.693_147_180_369_123_8,
    1.908_214_929_270_587_7e-10,
    -708.0,
    exp_f64,
    &EXP_MINUS_1,
    as_simd_f64s,
    splat_f64s,
    max_f64s,
    min_f64s,
    reduce_max_f64s,
    reduce_min_f64s
);

#[cfg(test)]
mod tests {
    use super::*;

    /// Worst error against f64 (the library's own for f64) in units of `epsilon`.
    fn worst<R: Real>(
        epsilon: f64,
        ours: impl Fn(R) -> R,
        theirs: impl Fn(f64) -> f64,
        points: &[f64],
    ) -> f64 {
        let error = |&x: &f64| {
            let x = R::of(x);
            let exact = theirs(x.f64());
            (ours(x).f64() - exact).abs() / (exact.abs() * epsilon)
        };
        points.iter().map(error).fold(0.0, f64::max)
    }

    #[test]
    fn exp_is_within_a_few_units_in_the_last_place() {
        let points = |least: f64| -> Vec<f64> {
            (0..200_000)
                .map(|i| least * f64::from(i) / 200_000.0)
                .collect()
        };
        fn error<R: Real, const FUSED: bool>(epsilon: f64, points: &[f64]) -> f64 {
            worst::<R>(epsilon, |x| x.exp::<FUSED>(), f64::exp, points)
        }
        let (near, far) = (points(-20.0), points(-86.9));
        assert!(error::<f32, true>(f32::EPSILON.into(), &near) < 1.0);
        assert!(error::<f32, true>(f32::EPSILON.into(), &far) < 3.0);
        assert!(error::<f32, false>(f32::EPSILON.into(), &far) < 2.0);
        assert!(error::<f64, true>(f64::EPSILON, &far) < 2.0);
        assert!(error::<f64, false>(f64::EPSILON, &far) < 2.0);
    }

    #[test]
    fn exp_of_numbers_has_the_same_bits() {
        fn check<R: Real, const FUSED: bool>() {
            for i in 0..=200_000 {
                let x = R::of(R::LEAST.f64() * f64::from(i) / 200_000.0);
                let (a, b) = (x.exp_in_range::<FUSED>(), x.exp_of_number::<FUSED>());
                assert!(a == b && a > R::ZERO, "{}", x.f64());
            }
        }
        check::<f32, true>();
        check::<f32, false>();
        check::<f64, true>();
        check::<f64, false>();
    }

    #[test]
    fn exp_of_special_values() {
        fn check<R: Real>() {
            let exp = |x: f64| R::of(x).exp::<true>().f64();
            assert_eq!(exp(0.0), 1.0);
            assert_eq!(exp(f64::NEG_INFINITY), 0.0);
            assert_eq!(exp(-1e30), 0.0);
            assert!(exp(f64::NAN).is_nan());
        }
        check::<f32>();
        check::<f64>();
    }

    #[test]
    fn exp_minus_1_keeps_its_digits_near_0() {
        let near = (1..100_000).map(|i| -f64::from(i) / 100_000.0);
        let far = (0..100).map(|i| -f64::from(i));
        let tiny = (0..30).map(|i| -(0.1f64.powi(i)));
        let points: Vec<f64> = near.chain(far).chain(tiny).collect();
        fn error<R: Real, const FUSED: bool>(epsilon: f64, points: &[f64]) -> f64 {
            let points: Vec<f64> = points.iter().copied().filter(|&x| x != 0.0).collect();
            worst::<R>(epsilon, |x| x.exp_minus_1::<FUSED>(), f64::exp_m1, &points)
        }
        assert!(error::<f32, true>(f32::EPSILON.into(), &points) < 3.0);
        assert!(error::<f32, false>(f32::EPSILON.into(), &points) < 3.0);
        assert!(error::<f64, true>(f64::EPSILON, &points) < 4.0);
        assert!(error::<f64, false>(f64::EPSILON, &points) < 4.0);
        assert_eq!(0f32.exp_minus_1::<true>(), 0.0);
        assert_eq!(f32::NEG_INFINITY.exp_minus_1::<true>(), -1.0);
        assert!(f32::NAN.exp_minus_1::<true>().is_nan());
    }
}
