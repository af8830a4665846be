//! Masked classes, NaN and infinities, ignored and weightless rows: what each does to its row, and nothing to others.

use crate::{
    accuracy::{Accuracy, relative_error, ulp},
    common::*,
};
use candle_core::{DType, IndexOp, Tensor, Var};
use candle_cross_entropy::{CrossEntropy, LossAndGrad, Reduction};

const INF: f64 = f64::INFINITY;
/// Below, around and above vectors and blocks.
const WIDTHS: [usize; 6] = [5, 16, 37, 300, 2049, 9000];

/// The results of every entry point: (name, row losses, gradient) of `Reduction::None`.
fn results(
    loss: &CrossEntropy,
    logits: &Tensor,
    targets: &Tensor,
) -> Vec<(&'static str, LossAndGrad)> {
    let loss = loss.clone().reduction(Reduction::None);
    let var = Var::from_tensor(logits).unwrap();
    let (forward, stats) = loss.forward_with_stats(&var, targets).unwrap();
    let gradients = forward.sum_all().unwrap().backward().unwrap();
    let grad = gradients.get(&var).unwrap().clone();
    vec![
        ("reference", loss.reference(logits, targets).unwrap()),
        (
            "loss_and_grad",
            loss.loss_and_grad(logits, targets).unwrap(),
        ),
        (
            "loss_and_grad_inplace",
            loss.loss_and_grad_inplace(logits.copy().unwrap(), targets)
                .unwrap(),
        ),
        (
            "forward and backward",
            LossAndGrad {
                loss: forward,
                grad,
                stats,
            },
        ),
    ]
}

/// Row `row` of every statistic, `predicted` last.
fn stats_of(result: &LossAndGrad, row: usize) -> [f64; 6] {
    let s = &result.stats;
    [
        &s.nll,
        &s.lse,
        &s.entropy,
        &s.max_prob,
        &s.grad_norm_sq,
        &s.predicted,
    ]
    .map(|t| values(t)[row])
}

fn grad_of(result: &LossAndGrad, row: usize) -> Vec<f64> {
    values(&result.grad.i(row).unwrap())
}

/// Three random rows of which the test spoils the middle one.
fn three_rows(width: usize, dtype: DType, spoil: impl Fn(&mut [f64])) -> (Tensor, Tensor) {
    let mut x = values(&Problem::random(width as u64, &[3, width], dtype, Setup::default()).logits);
    spoil(&mut x[width..2 * width]);
    (
        tensor(x, &[3, width], dtype),
        targets(vec![0, 2, width as i64 - 1], &[3], DType::I64),
    )
}

/// Rows 0 and 2 have the very bits they have beside a harmless row.
fn neighbours_unaffected(loss: &CrossEntropy, logits: &Tensor, targets: &Tensor) {
    let mut x = values(logits);
    let width = logits.dim(1).unwrap();
    x[width..2 * width].fill(0.5);
    let harmless = tensor(x, logits.dims(), logits.dtype());
    for ((name, got), (_, want)) in results(loss, logits, targets)
        .iter()
        .zip(results(loss, &harmless, targets))
    {
        for row in [0, 2] {
            assert_eq!(bits(&got.loss)[row], bits(&want.loss)[row], "{name}");
            assert_eq!(
                bits(&got.grad.i(row).unwrap()),
                bits(&want.grad.i(row).unwrap()),
                "{name}"
            );
            let (a, b) = (stats_bits(&got.stats), stats_bits(&want.stats));
            assert!(a.iter().zip(&b).all(|(a, b)| a[row] == b[row]), "{name}");
        }
    }
}

fn setups() -> Vec<CrossEntropy> {
    vec![
        CrossEntropy::new(),
        CrossEntropy::new().smoothing(0.25),
        CrossEntropy::new().smoothing(1.0),
        CrossEntropy::new().smoothing(0.25).z_loss(0.01),
        CrossEntropy::new()
            .smoothing(0.25)
            .softcap(20.0)
            .logit_scale(1.5),
        CrossEntropy::new().softcap(20.0),
    ]
}

fn for_each(test: impl Fn(usize, DType, &CrossEntropy)) {
    for dtype in FLOATS {
        for width in WIDTHS {
            setups().iter().for_each(|loss| test(width, dtype, loss));
        }
    }
}

/// A row with masked classes is the row without those columns.
#[test]
fn masked_classes_are_absent_classes() {
    for_each(|width, dtype, loss| {
        let masked = |k: usize| k != 2 && (k == 0 || k == width - 1 || k % 3 == 1);
        let (logits, y) = three_rows(width, dtype, |row| {
            (0..width)
                .filter(|&k| masked(k))
                .for_each(|k| row[k] = -INF);
        });
        neighbours_unaffected(loss, &logits, &y);
        let row = values(&logits.i(1).unwrap());
        let kept: Vec<usize> = (0..width).filter(|&k| !masked(k)).collect();
        let short = tensor(
            kept.iter().map(|&k| row[k]).collect(),
            &[1, kept.len()],
            dtype,
        );
        let place = kept.iter().position(|&k| k == 2).unwrap() as i64;
        let none = loss.clone().reduction(Reduction::None);
        let want = none
            .reference(&short, targets(vec![place], &[1], DType::I64))
            .unwrap();
        let want_grad = grad_of(&want, 0);
        let problem_setup = Setup {
            reduction: Reduction::None,
            scale: 1.5,
            ..Setup::default()
        };
        for (name, got) in results(loss, &logits, &y) {
            let context = || format!("{name} {dtype:?} {width} {loss:?}");
            assert!(
                relative_error(values(&got.loss)[1], values(&want.loss)[0]) < 1e-5,
                "{}",
                context()
            );
            let grad = grad_of(&got, 1);
            assert!(
                (0..width).filter(|&k| masked(k)).all(|k| grad[k] == 0.0),
                "{}",
                context()
            );
            let compact = tensor(
                kept.iter().map(|&k| grad[k]).collect(),
                &[1, kept.len()],
                got.grad.dtype(),
            );
            let problem = Problem {
                setup: problem_setup.clone(),
                logits: short.clone(),
                targets: want.stats.predicted.clone(),
                distribution: None,
            };
            Accuracy::new(got.grad.dtype()).grad(
                &problem,
                &compact,
                &tensor(want_grad.clone(), &[1, kept.len()], DType::F64),
                context,
            );
            let (stats, want_stats) = (stats_of(&got, 1), stats_of(&want, 0));
            for (a, e) in stats[..5].iter().zip(&want_stats[..5]) {
                assert!(
                    (a - e).abs() <= 1e-5 * e.abs().max(0.1),
                    "{stats:?} {want_stats:?} {}",
                    context()
                );
            }
            assert_eq!(
                stats[5] as usize,
                kept[want_stats[5] as usize],
                "{}",
                context()
            );
        }
    });
}

/// A block that holds nothing but masked classes, as a vectorised or sliced pass may meet it.
#[test]
fn only_one_class_left() {
    for_each(|width, dtype, loss| {
        let (logits, y) = three_rows(width, dtype, |row| {
            let kept = row[2];
            row.fill(-INF);
            row[2] = kept;
        });
        neighbours_unaffected(loss, &logits, &y);
        for (name, got) in results(loss, &logits, &y) {
            let context = format!("{name} {dtype:?} {width} {loss:?}");
            let lse = stats_of(&got, 1)[1];
            // p = 1 and q = 1: nothing but the z-loss is left.
            let z_loss = if format!("{loss:?}").contains("z_loss: 0.01") {
                0.01f32 as f64
            } else {
                0.0
            };
            assert!(
                relative_error(values(&got.loss)[1], z_loss * lse * lse) < 1e-5,
                "{context}"
            );
            let [nll, _, entropy, max_prob, norm, predicted] = stats_of(&got, 1);
            assert_eq!(
                [nll, entropy, max_prob, norm, predicted],
                [0.0, 0.0, 1.0, 0.0, 2.0],
                "{context}"
            );
            let grad = grad_of(&got, 1);
            assert!(
                (0..width).filter(|&k| k != 2).all(|k| grad[k] == 0.0),
                "{context}"
            );
            if z_loss == 0.0 {
                assert_eq!(grad[2], 0.0, "{context}");
            }
        }
    });
}

#[test]
fn masked_target() {
    for_each(|width, dtype, loss| {
        let (logits, y) = three_rows(width, dtype, |row| row[2] = -INF);
        neighbours_unaffected(loss, &logits, &y);
        let reference = &results(loss, &logits, &y)[0].1;
        for (name, got) in &results(loss, &logits, &y) {
            let context = format!("{name} {dtype:?} {width} {loss:?}");
            assert_eq!(values(&got.loss)[1], INF, "{context}");
            let stats = stats_of(got, 1);
            assert_eq!(stats[0], INF, "{context}");
            assert!(
                stats[1..].iter().all(|s| s.is_finite()),
                "{stats:?} {context}"
            );
            let grad = grad_of(got, 1);
            assert_eq!(grad[2], 0.0, "{context}");
            for (a, e) in grad.iter().zip(grad_of(reference, 1)) {
                let slack = if matches!(dtype, DType::F32 | DType::F64) {
                    1.5e-7
                } else {
                    ulp(e, dtype).max(1.5e-7)
                };
                assert!(
                    a.is_finite() && (a - e).abs() <= slack + 4e-6 * e.abs(),
                    "{a} {e} {context}"
                );
            }
        }
    });
    // The others' gradient is p − ε/K, K the classes that are not masked.
    let logits = tensor(vec![-INF, 1.0, 0.0, 0.0, -INF], &[1, 5], DType::F64);
    let total = 1f64.exp() + 2.0;
    for (name, got) in results(
        &CrossEntropy::new().smoothing(0.75),
        &logits,
        &targets(vec![0], &[1], DType::U32),
    ) {
        let grad = grad_of(&got, 0);
        let want = [
            0.0,
            1f64.exp() / total - 0.25,
            1.0 / total - 0.25,
            1.0 / total - 0.25,
            0.0,
        ];
        for (a, e) in grad.iter().zip(want) {
            assert!((a - e).abs() < 1e-14, "{name}: {grad:?}");
        }
    }
}

#[test]
fn every_class_masked() {
    for_each(|width, dtype, loss| {
        let (logits, y) = three_rows(width, dtype, |row| row.fill(-INF));
        neighbours_unaffected(loss, &logits, &y);
        for (name, got) in results(loss, &logits, &y) {
            let context = format!("{name} {dtype:?} {width} {loss:?}");
            assert_eq!(values(&got.loss)[1], INF, "{context}");
            assert!(grad_of(&got, 1).iter().all(|&g| g == 0.0), "{context}");
            assert_eq!(
                stats_of(&got, 1),
                [INF, -INF, 0.0, 0.0, 0.0, 0.0],
                "{context}"
            );
        }
    });
}

#[test]
fn nan_or_infinity_spoils_its_row_only() {
    for bad in [f64::NAN, -f64::NAN, INF] {
        for_each(|width, dtype, loss| {
            for at in [0, 2, width / 2, width - 1] {
                let (logits, y) = three_rows(width, dtype, |row| {
                    row[1] = -INF; // a masked class hides nothing
                    row[at] = bad;
                });
                if width <= 300 {
                    neighbours_unaffected(loss, &logits, &y);
                }
                for (name, got) in results(loss, &logits, &y) {
                    let context = format!("{name} {dtype:?} {width} {bad} at {at} {loss:?}");
                    assert!(values(&got.loss)[1].is_nan(), "{context}");
                    assert!(grad_of(&got, 1).iter().all(|g| g.is_nan()), "{context}");
                    let stats = stats_of(&got, 1);
                    assert!(stats[..5].iter().all(|s| s.is_nan()), "{stats:?} {context}");
                    assert_eq!(stats[5], 0.0, "{context}");
                }
            }
        });
    }
}

#[test]
fn rows_full_of_infinities() {
    for_each(|width, dtype, loss| {
        for fill in [f64::NAN, INF] {
            let (logits, y) = three_rows(width, dtype, |row| row.fill(fill));
            for (name, got) in results(loss, &logits, &y) {
                let context = format!("{name} {dtype:?} {width} {fill} {loss:?}");
                assert!(values(&got.loss)[1].is_nan(), "{context}");
                assert!(grad_of(&got, 1).iter().all(|g| g.is_nan()), "{context}");
                assert_eq!(stats_of(&got, 1)[5], 0.0, "{context}");
            }
        }
    });
}

/// Loss and gradient of a row of weight 0 are exactly 0 whatever its logits; its statistics are as computed.
#[test]
fn weight_zero() {
    type Spoil = fn(&mut [f64]);
    let rows: [(&str, Spoil); 6] = [
        ("plain", |_| ()),
        ("NaN", |row| row[1] = f64::NAN),
        ("infinity", |row| row[1] = INF),
        ("masked target", |row| row[2] = -INF),
        ("masked class", |row| row[1] = -INF),
        ("every class masked", |row| row.fill(-INF)),
    ];
    for (what, spoil) in rows {
        for_each(|width, dtype, loss| {
            let (logits, y) = three_rows(width, dtype, spoil);
            let weights = Tensor::new(&[1f32, 0.0, 2.0], CPU).unwrap();
            let weighted = loss.clone().row_weights(&weights);
            let unweighted = results(loss, &logits, &y);
            for ((name, got), (_, plain)) in results(&weighted, &logits, &y).iter().zip(&unweighted)
            {
                let context = format!("{what} {name} {dtype:?} {width} {loss:?}");
                assert_eq!(values(&got.loss)[1], 0.0, "{context}");
                assert!(grad_of(got, 1).iter().all(|&g| g == 0.0), "{context}");
                for (a, b) in stats_of(got, 1).iter().zip(stats_of(plain, 1)) {
                    assert!(*a == b || (a.is_nan() && b.is_nan()), "{a} {b} {context}");
                }
            }
            for reduction in [Reduction::Sum, Reduction::Mean] {
                let reduced = weighted
                    .clone()
                    .reduction(reduction)
                    .loss_and_grad(&logits, &y)
                    .unwrap();
                assert!(scalar(&reduced.loss).is_finite(), "{what} {reduction:?}");
                assert!(
                    values(&reduced.grad).iter().all(|g| g.is_finite()),
                    "{what} {reduction:?}"
                );
            }
        });
    }
}

/// The lowest finite value, as some models mask with: finite, so it is a class like any other (K counts it), with p = 0.
/// Several of them overflow a naive Σz.
#[test]
fn lowest_finite_value_as_a_mask() {
    for (dtype, lowest) in [
        (DType::F32, f64::from(f32::MIN)),
        (DType::BF16, half::bf16::MIN.to_f64()),
        (DType::F16, half::f16::MIN.to_f64()),
    ] {
        for width in WIDTHS {
            for loss in [
                CrossEntropy::new(),
                CrossEntropy::new().z_loss(0.01),
                CrossEntropy::new().logit_scale(2.0),
            ] {
                let (logits, y) = three_rows(width, dtype, |row| {
                    (0..width)
                        .filter(|k| k % 3 != 2)
                        .for_each(|k| row[k] = lowest);
                });
                neighbours_unaffected(&loss, &logits, &y);
                let reference = &results(&loss, &logits, &y)[0].1;
                for (name, got) in &results(&loss, &logits, &y) {
                    let context = format!("{name} {dtype:?} {width} {loss:?}");
                    let (a, e) = (values(&got.loss)[1], values(&reference.loss)[1]);
                    assert!(
                        e.is_finite() && relative_error(a, e) < 1e-5,
                        "{a} {e} {context}"
                    );
                    let grad = grad_of(got, 1);
                    assert!(grad.iter().all(|g| g.is_finite()), "{context}");
                    assert!(
                        (0..width).filter(|k| k % 3 != 2).all(|k| grad[k] == 0.0),
                        "{context}"
                    );
                    assert!(
                        (grad[2] - grad_of(reference, 1)[2]).abs() < 0.005,
                        "{context}"
                    );
                    for (a, e) in stats_of(got, 1).iter().zip(stats_of(reference, 1)) {
                        assert!(
                            (a - e).abs() <= 1e-5 * e.abs().max(0.1),
                            "{a} {e} {context}"
                        );
                    }
                }
            }
            // With smoothing they have mass: an enormous loss, and a gradient of −ε/K.
            let eps = 0.5;
            let loss = CrossEntropy::new().smoothing(eps);
            let (logits, y) = three_rows(width, dtype, |row| {
                (0..width)
                    .filter(|k| k % 3 != 2)
                    .for_each(|k| row[k] = lowest);
            });
            let reference = &results(&loss, &logits, &y)[0].1;
            for (name, got) in &results(&loss, &logits, &y) {
                let context = format!("{name} {dtype:?} {width}");
                let (a, e) = (values(&got.loss)[1], values(&reference.loss)[1]);
                assert!(e > 1e4 && relative_error(a, e) < 1e-5, "{a} {e} {context}");
                let (a, e) = (grad_of(got, 1)[0], -f64::from(eps) / width as f64);
                assert!(
                    (a - e).abs() <= 1e-7 + ulp(e, got.grad.dtype()),
                    "{a} {e} {context}"
                );
            }
        }
    }
}

/// Huge finite logits: no overflow on the way to exact results.
#[test]
fn huge_logits() {
    for (dtype, huge) in [
        (DType::F32, 3e38),
        (DType::BF16, 3e38),
        (DType::F16, 65000.0),
        (DType::F64, 8e307),
    ] {
        for width in WIDTHS {
            let (logits, y) = three_rows(width, dtype, |row| {
                row.fill(-huge);
                row[2] = huge;
            });
            for (name, got) in results(&CrossEntropy::new(), &logits, &y) {
                let context = format!("{name} {dtype:?} {width}");
                assert_eq!(values(&got.loss)[1], 0.0, "{context}");
                assert!(grad_of(&got, 1).iter().all(|&g| g == 0.0), "{context}");
                assert_eq!(stats_of(&got, 1)[2..], [0.0, 1.0, 0.0, 2.0], "{context}");
            }
        }
    }
}

/// A softcap bounds what would overflow an exponential or hide the order of logits.
#[test]
fn softcap_saturates() {
    for dtype in FLOATS {
        for width in WIDTHS {
            let setup = Setup {
                softcap: Some(5.0),
                eps: Eps::Uniform(0.1),
                reduction: Reduction::None,
                ..Setup::default()
            };
            let mut problem = Problem::random(width as u64, &[3, width], dtype, setup);
            problem.logits = (problem.logits * 300.0).unwrap();
            problem.check();
            // Equal after the cap, not before it.
            let mut x = vec![900.0; width];
            x[width - 2] = 1000.0;
            let logits = tensor(x, &[1, width], dtype);
            for (name, got) in results(
                &problem.loss(),
                &logits,
                &targets(vec![0], &[1], DType::U32),
            )
            .iter()
            .take(3)
            {
                assert_eq!(
                    stats_of(got, 0)[5] as usize,
                    width - 2,
                    "{name} {dtype:?} {width}"
                );
            }
        }
    }
}

/// `predicted` is the lowest index among equals, wherever the equals stand.
#[test]
fn ties_go_to_the_lowest_index() {
    for dtype in FLOATS {
        for width in WIDTHS {
            for (first, others) in [
                (0, vec![1, width - 1]),
                (1, vec![2, 4]),
                (3, vec![width - 1]),
                (width - 2, vec![width - 1]),
            ] {
                for top in [3.0, 0.0, -2.0] {
                    let mut x = vec![top - 1.0; width];
                    x[first] = top;
                    others.iter().for_each(|&k| x[k] = top);
                    let logits = tensor(x, &[1, width], dtype);
                    for (name, got) in results(
                        &CrossEntropy::new(),
                        &logits,
                        &targets(vec![2], &[1], DType::U32),
                    ) {
                        assert_eq!(
                            stats_of(&got, 0)[5] as usize,
                            first,
                            "{name} {dtype:?} {width} {others:?}"
                        );
                    }
                }
            }
            // 0 and −0 are equal.
            let mut x = vec![-1.0; width];
            (x[1], x[3]) = (-0.0, 0.0);
            let logits = tensor(x, &[1, width], dtype);
            for (name, got) in results(
                &CrossEntropy::new(),
                &logits,
                &targets(vec![2], &[1], DType::U32),
            ) {
                assert_eq!(stats_of(&got, 0)[5], 1.0, "{name} {dtype:?} {width}");
            }
        }
    }
}

/// An infinite loss stays infinite through a sum or mean; NaN as well.
#[test]
fn reduced_losses_show_bad_rows() {
    for dtype in FLOATS {
        for (bad, masked) in [(f64::NAN, false), (INF, false), (-INF, true)] {
            let (logits, y) = three_rows(37, dtype, |row| row[2] = bad);
            for reduction in [Reduction::Sum, Reduction::Mean, Reduction::SumOver(2.0)] {
                let loss = CrossEntropy::new().reduction(reduction);
                for result in [
                    loss.loss_and_grad(&logits, &y).unwrap(),
                    loss.reference(&logits, &y).unwrap(),
                ] {
                    let value = scalar(&result.loss);
                    assert!(
                        if masked { value == INF } else { value.is_nan() },
                        "{value}"
                    );
                    assert!(grad_of(&result, 0).iter().all(|g| g.is_finite()));
                    assert!(grad_of(&result, 2).iter().all(|g| g.is_finite()));
                }
                assert_eq!(
                    scalar(&loss.forward(&logits, &y).unwrap()).is_nan(),
                    !masked
                );
            }
        }
    }
}
