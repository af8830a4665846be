//! Reductions, upstream gradients, and the identities between them.

use crate::common::*;
use candle_core::{DType, Tensor, Var};
use candle_cross_entropy::{CrossEntropy, LossAndGrad, Reduction};

/// f64 logits leave only the rules to be compared; f32 runs the paths that training runs.
const TYPES: [(DType, f64); 2] = [(DType::F64, 1e-13), (DType::F32, 1e-6)];

fn problem(dtype: DType) -> Problem {
    let weights = Some(vec![1.0, 0.5, 0.0, 2.0, 4.0, 0.25]);
    let eps = Eps::PerRow(vec![0.0, 0.1, 0.5, 1.0, 0.25, 0.125]);
    let mut problem = Problem::random(
        1,
        &[2, 3, 19],
        dtype,
        Setup {
            eps,
            weights,
            ..Setup::default()
        },
    );
    problem.ignore(|i| i == 4);
    problem
}

/// From forward and backward, from loss_and_grad and from the reference.
fn each(loss: &CrossEntropy, logits: &Tensor, y: &Tensor) -> [(Tensor, Tensor); 3] {
    let var = Var::from_tensor(logits).unwrap();
    let forward = loss.forward(&var, y).unwrap();
    let grad = forward
        .sum_all()
        .unwrap()
        .backward()
        .unwrap()
        .get(&var)
        .unwrap()
        .clone();
    let of = |LossAndGrad { loss, grad, .. }| (loss, grad);
    [
        (forward, grad),
        of(loss.loss_and_grad(logits, y).unwrap()),
        of(loss.reference(logits, y).unwrap()),
    ]
}

/// Σ w over rows that are not ignored: the ignored row's weight of 4 does not count.
const TOTAL_WEIGHT: f64 = 3.75;

#[test]
fn sum_and_mean_of_row_losses() {
    for (dtype, tolerance) in TYPES {
        let Problem {
            setup,
            logits,
            targets,
            ..
        } = problem(dtype);
        let with = |reduction| {
            each(
                &Setup {
                    reduction,
                    ..setup.clone()
                }
                .build(&[2, 3]),
                &logits,
                &targets,
            )
        };
        let none = with(Reduction::None);
        let cases = [
            (Reduction::Sum, 1.0),
            (Reduction::Mean, TOTAL_WEIGHT),
            (Reduction::SumOver(17.0), 17.0),
            (Reduction::SumOver(0.5), 0.5),
        ];
        for (reduction, divisor) in cases {
            for ((loss, grad), (row_losses, row_grads)) in with(reduction).iter().zip(&none) {
                let sum: f64 = values(row_losses).iter().sum();
                assert_close(scalar(loss), sum / divisor, tolerance);
                for (a, e) in values(grad).into_iter().zip(values(row_grads)) {
                    assert!(
                        (a - e / divisor).abs() <= tolerance * 4.0 / divisor.min(1.0),
                        "{reduction:?} {a} {e}"
                    );
                }
            }
        }
    }
}

#[test]
fn losses_have_the_targets_shape_or_none() {
    for dtype in FLOATS {
        let Problem {
            setup,
            logits,
            targets,
            ..
        } = problem(dtype);
        for (reduction, shape) in [
            (Reduction::None, &[2usize, 3][..]),
            (Reduction::Sum, &[]),
            (Reduction::Mean, &[]),
        ] {
            let loss = Setup {
                reduction,
                ..setup.clone()
            }
            .build(&[2, 3]);
            for (value, grad) in &each(&loss, &logits, &targets)[..2] {
                assert_eq!(value.dims(), shape);
                assert_eq!(value.dtype(), loss_dtype(dtype));
                assert_eq!((grad.dims(), grad.dtype()), (&[2usize, 3, 19][..], dtype));
            }
        }
    }
}

/// A gradient from above scales the rows' own: a factor on a reduced loss, a factor for every row on row losses.
#[test]
fn upstream_gradients() {
    for (dtype, tolerance) in TYPES {
        let Problem {
            setup,
            logits,
            targets,
            ..
        } = problem(dtype);
        let var = Var::from_tensor(&logits).unwrap();
        for reduction in [Reduction::Sum, Reduction::Mean, Reduction::SumOver(9.0)] {
            let loss = Setup {
                reduction,
                ..setup.clone()
            }
            .build(&[2, 3]);
            let own = values(&loss.reference(&logits, &targets).unwrap().grad);
            for factor in [3.0, -0.5, 1e-3] {
                let scaled = (loss.forward(&var, &targets).unwrap() * factor).unwrap();
                let grad = values(scaled.backward().unwrap().get(&var).unwrap());
                for (a, e) in grad.iter().zip(&own) {
                    assert!(
                        (a - e * factor).abs() <= tolerance * 4.0,
                        "{reduction:?} {factor}: {a} {e}"
                    );
                }
            }
        }
        let loss = Setup {
            reduction: Reduction::None,
            ..setup.clone()
        }
        .build(&[2, 3]);
        let own = values(&loss.reference(&logits, &targets).unwrap().grad);
        let factors = [1.0, -2.0, 3.0, 0.0, 5.0, 0.125];
        for transposed in [false, true] {
            let row_losses = loss.forward(&var, &targets).unwrap();
            // The transposed sum sends a gradient back whose elements are not in the rows' order in memory.
            let weighted = if transposed {
                let factors = tensor(
                    [
                        factors[0], factors[3], factors[1], factors[4], factors[2], factors[5],
                    ]
                    .to_vec(),
                    &[3, 2],
                    loss_dtype(dtype),
                );
                (row_losses.t().unwrap() * factors).unwrap()
            } else {
                (row_losses * tensor(factors.to_vec(), &[2, 3], loss_dtype(dtype))).unwrap()
            };
            let grad = values(
                weighted
                    .sum_all()
                    .unwrap()
                    .backward()
                    .unwrap()
                    .get(&var)
                    .unwrap(),
            );
            for (i, (a, e)) in grad.iter().zip(&own).enumerate() {
                let e = e * factors[i / 19];
                assert!((a - e).abs() <= tolerance * 10.0, "element {i}: {a} {e}");
            }
        }
        // A function of the row losses, as in robust reweighting: d(loss²) = 2·loss·d(loss).
        let row_losses = loss.forward(&var, &targets).unwrap();
        let squares = row_losses.sqr().unwrap().sum_all().unwrap();
        let grad = values(squares.backward().unwrap().get(&var).unwrap());
        let row_losses = values(&row_losses);
        for (i, (a, e)) in grad.iter().zip(&own).enumerate() {
            let e = 2.0 * row_losses[i / 19] * e;
            assert!(
                (a - e).abs() <= tolerance * 20.0 * e.abs().max(1.0),
                "element {i}: {a} {e}"
            );
        }
    }
}

#[test]
fn no_rows_and_none_that_counts() {
    for dtype in FLOATS {
        for reduction in [
            Reduction::None,
            Reduction::Sum,
            Reduction::Mean,
            Reduction::SumOver(2.0),
        ] {
            let loss = CrossEntropy::new().smoothing(0.1).reduction(reduction);
            let empty = Tensor::zeros((0, 19), dtype, CPU).unwrap();
            let no_targets = Tensor::zeros(0, DType::U32, CPU).unwrap();
            let ignored = tensor(vec![f64::NAN; 3 * 19], &[3, 19], dtype);
            let minus_100 = targets(vec![-100; 3], &[3], DType::I64);
            let weightless = loss
                .clone()
                .row_weights(&Tensor::zeros(3, DType::F32, CPU).unwrap());
            let zeros = Tensor::zeros(3, DType::U32, CPU).unwrap();
            let plain = tensor(normal(&mut rng(1), 3 * 19, 4.0), &[3, 19], dtype);
            for (loss, logits, y) in [
                (&loss, &empty, &no_targets),
                (&loss, &ignored, &minus_100),
                (&weightless, &plain, &zeros),
            ] {
                for (value, grad) in each(loss, logits, y) {
                    assert!(
                        values(&value).iter().all(|&l| l == 0.0),
                        "{reduction:?} {value:?}"
                    );
                    assert!(values(&grad).iter().all(|&g| g == 0.0), "{reduction:?}");
                    assert_eq!(grad.dims(), logits.dims());
                }
                let inplace = loss
                    .loss_and_grad_inplace(logits.copy().unwrap(), y)
                    .unwrap();
                assert!(values(&inplace.grad).iter().all(|&g| g == 0.0));
                assert_eq!(inplace.stats.predicted.dims(), y.dims());
            }
        }
    }
}

/// Parts with `SumOver` of the whole's row count add up to the whole's mean: gradient accumulation.
#[test]
fn accumulation_over_parts() {
    for (dtype, tolerance) in TYPES {
        let mut whole = Problem::random(
            2,
            &[10, 19],
            dtype,
            Setup {
                eps: Eps::Uniform(0.1),
                ..Setup::default()
            },
        );
        whole.ignore(|i| i % 4 == 1);
        let counted = 7.0;
        let mean = CrossEntropy::new().smoothing(0.1);
        let part = mean.clone().reduction(Reduction::SumOver(counted));
        let want = mean.loss_and_grad(&whole.logits, &whole.targets).unwrap();
        let (mut loss, mut grads) = (0.0, Vec::new());
        for (start, rows) in [(0, 3), (3, 1), (4, 6)] {
            let cut = |t: &Tensor| t.narrow(0, start, rows).unwrap();
            let got = part
                .loss_and_grad(&cut(&whole.logits), cut(&whole.targets))
                .unwrap();
            loss += scalar(&got.loss);
            grads.push(got.grad);
        }
        assert_close(loss, scalar(&want.loss), tolerance);
        assert_eq!(bits(&Tensor::cat(&grads, 0).unwrap()), bits(&want.grad));
    }
}

/// Many equal losses: a sum in f32 one by one would be off by far more than this.
#[test]
fn long_sums_keep_their_digits() {
    for dtype in [DType::F32, DType::BF16] {
        let rows = 300_000;
        let logits = Tensor::zeros((rows, 3), dtype, CPU).unwrap();
        let y = Tensor::zeros(rows, DType::U32, CPU).unwrap();
        for (reduction, expected) in [
            (Reduction::Sum, rows as f64 * 3f64.ln()),
            (Reduction::Mean, 3f64.ln()),
        ] {
            let loss = CrossEntropy::new().reduction(reduction);
            for got in [
                loss.forward(&logits, &y).unwrap(),
                loss.loss_and_grad(&logits, &y).unwrap().loss,
            ] {
                assert!(
                    (scalar(&got) / expected - 1.0).abs() < 5e-7,
                    "{reduction:?}: {got:?}, must be {expected}"
                );
            }
        }
    }
}
