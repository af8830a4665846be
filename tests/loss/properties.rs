//! Laws of the loss on random inputs, on the fast path.

use crate::{
    accuracy::{relative_error, ulp},
    common::*,
};
use candle_core::{DType, Tensor};
use candle_cross_entropy::{CrossEntropy, LossAndGrad, Reduction};
use rand::{Rng, rngs::StdRng};

/// Logits of one row as multiples of 1/8, to which adding another is exact, and a target.
fn row(rng: &mut StdRng) -> (Vec<f64>, usize) {
    let width = match rng.random_range(0..4) {
        0..3 => rng.random_range(2..40),
        _ => rng.random_range(40..700),
    };
    let x = (0..width).map(|_| f64::from(rng.random_range(-160..160i32)) / 8.0);
    (x.collect(), rng.random_range(0..width))
}

fn dtype(rng: &mut StdRng) -> DType {
    [DType::F32, DType::F64][rng.random_range(0..2)]
}

fn tolerance(dtype: DType) -> f64 {
    if dtype == DType::F64 { 1e-12 } else { 4e-6 }
}

fn eps(rng: &mut StdRng) -> f32 {
    match rng.random_range(0..3) {
        0 => 0.0,
        1 => 1.0,
        _ => uniform(rng, 0.0..1.0),
    }
}

/// One row's results.
fn run(loss: &CrossEntropy, x: &[f64], y: usize, dtype: DType) -> LossAndGrad {
    let logits = tensor(x.to_vec(), &[1, x.len()], dtype);
    let loss = loss.clone().reduction(Reduction::None);
    let result = loss
        .loss_and_grad(&logits, targets(vec![y as i64], &[1], DType::U32))
        .unwrap();
    let forward = loss
        .forward(&logits, targets(vec![y as i64], &[1], DType::U32))
        .unwrap();
    assert_close(
        values(&forward)[0],
        values(&result.loss)[0],
        tolerance(dtype),
    );
    result
}

fn one(tensor: &Tensor) -> f64 {
    values(tensor)[0]
}

#[test]
fn shift_invariance() {
    cases(|rng| {
        let (x, y) = row(rng);
        let (eps, dtype) = (eps(rng), dtype(rng));
        let shift = f64::from(rng.random_range(-800..800i32)) / 8.0;
        let shifted: Vec<f64> = x.iter().map(|v| v + shift).collect();
        let loss = CrossEntropy::new().smoothing(eps);
        let (a, b) = (run(&loss, &x, y, dtype), run(&loss, &shifted, y, dtype));
        assert_eq!(bits(&a.loss), bits(&b.loss));
        assert_eq!(bits(&a.grad), bits(&b.grad));
        assert_eq!(bits(&a.stats.entropy), bits(&b.stats.entropy));
        assert_close(
            one(&a.stats.lse) + shift,
            one(&b.stats.lse),
            tolerance(dtype),
        );
    });
}

#[test]
fn permutation_equivariance() {
    cases(|rng| {
        let (x, y) = row(rng);
        let (eps, dtype) = (eps(rng), dtype(rng));
        let width = x.len();
        let turn = rng.random_range(0..width);
        // Reversed and rotated.
        let to = |k: usize| (2 * width - 1 - k + turn) % width;
        let mut permuted = vec![0.0; width];
        x.iter().enumerate().for_each(|(k, &v)| permuted[to(k)] = v);
        let loss = CrossEntropy::new().smoothing(eps).z_loss(1e-3);
        let (a, b) = (
            run(&loss, &x, y, dtype),
            run(&loss, &permuted, to(y), dtype),
        );
        assert_close(one(&a.loss), one(&b.loss), tolerance(dtype));
        for (name, a, b) in [
            ("nll", &a.stats.nll, &b.stats.nll),
            ("lse", &a.stats.lse, &b.stats.lse),
            ("entropy", &a.stats.entropy, &b.stats.entropy),
            ("max_prob", &a.stats.max_prob, &b.stats.max_prob),
            ("grad_norm_sq", &a.stats.grad_norm_sq, &b.stats.grad_norm_sq),
        ] {
            assert!(
                (one(a) - one(b)).abs() <= tolerance(dtype) * one(a).abs().max(1.0),
                "{name} {a:?} {b:?}"
            );
        }
        let (a, b) = (values(&a.grad), values(&b.grad));
        for k in 0..width {
            assert_close(a[k], b[to(k)], tolerance(dtype));
        }
    });
}

/// Σ p = Σ q = 1: without z-loss a row's gradient sums to 0; with it, to 2λ·lse.
#[test]
fn gradient_sum() {
    cases(|rng| {
        let (x, y) = row(rng);
        let (eps, dtype) = (eps(rng), dtype(rng));
        let z_loss = if rng.random() {
            0.0
        } else {
            uniform(rng, 0.0..0.1)
        };
        let loss = CrossEntropy::new().smoothing(eps).z_loss(z_loss);
        let result = run(&loss, &x, y, dtype);
        let sum: f64 = values(&result.grad).iter().sum();
        let expected = 2.0 * f64::from(z_loss) * one(&result.stats.lse);
        assert!(
            (sum - expected).abs() <= 2.0 * tolerance(dtype) * (1.0 + expected.abs()),
            "{sum} {expected}"
        );
    });
}

/// loss(ε) = (1 − ε)·loss(0) + ε·loss(1), and the gradients likewise.
#[test]
fn linear_in_smoothing() {
    cases(|rng| {
        let (x, y) = row(rng);
        let (eps, dtype) = (uniform(rng, 0.0..1.0), dtype(rng));
        let at = |eps: f32| run(&CrossEntropy::new().smoothing(eps), &x, y, dtype);
        let (zero, one_, middle, e) = (at(0.0), at(1.0), at(eps), f64::from(eps));
        assert_close(
            one(&middle.loss),
            (1.0 - e) * one(&zero.loss) + e * one(&one_.loss),
            tolerance(dtype),
        );
        for ((a, b), m) in values(&zero.grad)
            .into_iter()
            .zip(values(&one_.grad))
            .zip(values(&middle.grad))
        {
            assert_close(m, (1.0 - e) * a + e * b, tolerance(dtype));
        }
        // Statistics other than the gradient's norm are not a matter of the smoothing.
        assert_eq!(bits(&zero.stats.nll), bits(&middle.stats.nll));
        assert_eq!(bits(&zero.stats.entropy), bits(&middle.stats.entropy));
    });
}

#[test]
fn linear_in_weights() {
    cases(|rng| {
        let (x, y) = row(rng);
        let (eps, dtype) = (eps(rng), dtype(rng));
        let weight = uniform(rng, 0.0..8.0);
        let loss = CrossEntropy::new().smoothing(eps).z_loss(1e-2);
        let weights = Tensor::new(&[weight], CPU).unwrap();
        let (plain, weighted) = (
            run(&loss, &x, y, dtype),
            run(&loss.clone().row_weights(&weights), &x, y, dtype),
        );
        assert_close(
            one(&weighted.loss),
            f64::from(weight) * one(&plain.loss),
            tolerance(dtype),
        );
        for (w, p) in values(&weighted.grad).into_iter().zip(values(&plain.grad)) {
            assert_close(w, f64::from(weight) * p, tolerance(dtype));
        }
        assert_eq!(stats_bits(&plain.stats), stats_bits(&weighted.stats));
    });
}

#[test]
fn bounds() {
    cases(|rng| {
        let (x, y) = row(rng);
        let (eps, dtype) = (eps(rng), FLOATS[rng.random_range(0..FLOATS.len())]);
        let x = values(&tensor(x.clone(), &[x.len()], dtype));
        let result = run(&CrossEntropy::new().smoothing(eps), &x, y, dtype);
        let stats = &result.stats;
        let top = x.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let first = x.iter().position(|&v| v == top).unwrap();
        assert_eq!(bits(&stats.predicted)[0] as usize, first);
        let slack = 1.0 + 1e-5;
        let classes = x.len() as f64;
        let [entropy, max_prob, nll, lse, norm] = [
            &stats.entropy,
            &stats.max_prob,
            &stats.nll,
            &stats.lse,
            &stats.grad_norm_sq,
        ]
        .map(one);
        assert!(
            (0.0..=classes.ln() * slack).contains(&entropy),
            "entropy {entropy}"
        );
        assert!(
            max_prob * slack >= 1.0 / classes && max_prob <= 1.0,
            "max_prob {max_prob}"
        );
        assert!(
            nll >= 0.0 && nll >= -max_prob.ln() / slack - 1e-6,
            "nll {nll}"
        );
        assert!(
            lse >= top - 1e-5 * top.abs() && lse <= (top + classes.ln()) + 1e-5 * lse.abs(),
            "lse {lse}"
        );
        assert!((0.0..=2.0 * slack).contains(&norm), "grad_norm_sq {norm}");
        assert!(one(&result.loss) >= 0.0);
        // −log of the largest probability is at most the entropy.
        assert!(
            -max_prob.ln() <= entropy * slack + 1e-6,
            "{max_prob} {entropy}"
        );
        if y == first {
            assert_close((-nll).exp(), max_prob, 1e-5);
        }
    });
}

/// grad_norm_sq is the squared length of the gradient of that row, w = 1 and no z-loss.
#[test]
fn gradient_norm() {
    cases(|rng| {
        let (x, y) = row(rng);
        let (eps, dtype) = (eps(rng), dtype(rng));
        let result = run(&CrossEntropy::new().smoothing(eps), &x, y, dtype);
        let norm: f64 = values(&result.grad).iter().map(|g| g * g).sum();
        assert!(
            (one(&result.stats.grad_norm_sq) - norm).abs() <= tolerance(dtype) * norm.max(0.25),
            "{norm}"
        );
    });
}

/// A logit scale is a multiplication before the loss.
#[test]
fn scale_is_a_multiplication() {
    cases(|rng| {
        let (x, y) = row(rng);
        let (eps, dtype) = (eps(rng), dtype(rng));
        let scale = 2f64.powi(rng.random_range(-2..3));
        let loss = CrossEntropy::new().smoothing(eps);
        let scaled = run(&loss.clone().logit_scale(scale as f32), &x, y, dtype);
        let product = run(
            &loss,
            &x.iter().map(|v| v * scale).collect::<Vec<_>>(),
            y,
            dtype,
        );
        assert_close(one(&scaled.loss), one(&product.loss), tolerance(dtype));
        for (s, p) in values(&scaled.grad).into_iter().zip(values(&product.grad)) {
            assert_close(s, p * scale, tolerance(dtype) * scale);
        }
    });
}

/// Arbitrary bit patterns: whatever the floats are, the paths agree on what is a number.
#[test]
fn arbitrary_bits() {
    cases(|rng| {
        let raw: Vec<u16> = (0..rng.random_range(1..70)).map(|_| rng.random()).collect();
        let y = rng.random_range(0..raw.len());
        let (eps, narrow) = (eps(rng), [DType::F16, DType::BF16][rng.random_range(0..2)]);
        let logits = match narrow {
            DType::F16 => Tensor::from_vec(
                raw.iter()
                    .map(|&b| half::f16::from_bits(b))
                    .collect::<Vec<_>>(),
                (1, raw.len()),
                CPU,
            ),
            _ => Tensor::from_vec(
                raw.iter()
                    .map(|&b| half::bf16::from_bits(b))
                    .collect::<Vec<_>>(),
                (1, raw.len()),
                CPU,
            ),
        }
        .unwrap();
        let y = targets(vec![y as i64], &[1], DType::I64);
        let loss = CrossEntropy::new()
            .smoothing(eps)
            .reduction(Reduction::None);
        let (got, want) = (
            loss.loss_and_grad(&logits, &y).unwrap(),
            loss.reference(&logits, &y).unwrap(),
        );
        // Beyond f32's range the loss is infinite.
        let limit = |v: f64| {
            if v.abs() > f64::from(f32::MAX) {
                f64::INFINITY
            } else {
                v
            }
        };
        let (a, e) = (one(&got.loss), limit(one(&want.loss)));
        assert!(
            relative_error(a, e) < 1e-5 || (e > 3e38 && a > 3e38),
            "{a} {e}"
        );
        for (a, e) in values(&got.grad).into_iter().zip(values(&want.grad)) {
            assert!(
                (a.is_nan() && e.is_nan()) || (a - e).abs() <= 1e-7 + ulp(e, narrow),
                "{a} {e}"
            );
        }
        assert_eq!(bits(&got.stats.predicted), bits(&want.stats.predicted));
    });
}
