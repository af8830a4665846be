//! The reference's gradient is the derivative of its loss: central differences in f64, over the options.

use crate::common::*;
use candle_core::DType;
use candle_cross_entropy::Reduction;

/// Compares every element of the gradient with a central difference of the reduced loss. With no reduction the sum
/// over rows is differenced: the gradient is each row's own.
fn check(problem: &Problem) {
    let loss = problem.loss();
    let grad = values(&problem.reference().grad);
    let x = values(&problem.logits);
    let at = |x: Vec<f64>| {
        let logits = tensor(x, problem.logits.dims(), DType::F64);
        values(&loss.reference(&logits, problem.given()).unwrap().loss)
            .into_iter()
            .sum::<f64>()
    };
    let step = 1e-5;
    for (i, &g) in grad.iter().enumerate() {
        let moved = |by: f64| {
            let mut x = x.clone();
            x[i] += by;
            at(x)
        };
        let difference = (moved(step) - moved(-step)) / (2.0 * step);
        let error = (difference - g).abs();
        assert!(
            error < 2e-9 * g.abs().max(1.0),
            "element {i}: {g}, difference {difference}, {:?}",
            problem.setup
        );
    }
}

fn problem(setup: Setup) -> Problem {
    Problem::random(1, &[3, 7], DType::F64, setup)
}

#[test]
fn of_each_option() {
    check(&problem(Setup::default()));
    check(&problem(Setup {
        eps: Eps::Uniform(0.25),
        ..Setup::default()
    }));
    check(&problem(Setup {
        eps: Eps::Uniform(1.0),
        ..Setup::default()
    }));
    check(&problem(Setup {
        eps: Eps::PerRow(vec![0.0, 0.3, 1.0]),
        ..Setup::default()
    }));
    check(&problem(Setup {
        weights: Some(vec![0.5, 0.0, 3.0]),
        ..Setup::default()
    }));
    check(&problem(Setup {
        z_loss: 0.1,
        ..Setup::default()
    }));
    check(&problem(Setup {
        softcap: Some(4.0),
        ..Setup::default()
    }));
    check(&problem(Setup {
        scale: 1.75,
        ..Setup::default()
    }));
    check(&problem(Setup {
        scale: 0.6,
        softcap: Some(5.0),
        ..Setup::default()
    }));
    check(&problem(Setup {
        vocab: Some(5),
        eps: Eps::Uniform(0.5),
        ..Setup::default()
    }));
}

/// With a target of each kind; the loss is linear in t, c, u and β, so one set of values shows every term.
#[test]
fn of_each_kind_of_target() {
    let kinds = [
        None,
        Some(Kind::Probabilities(DType::F64)),
        Some(Kind::TopK(4)),
    ];
    for kind in kinds {
        let with = |setup: Setup| {
            let problem = problem(setup);
            let problem = match kind {
                None => problem,
                Some(kind) => problem.with(kind, 1),
            };
            check(&problem);
            problem
        };
        with(Setup::default());
        let values = |start: f32| Some((0..7).map(|k| start + 0.3 * k as f32).collect());
        for eps in [0.0, 0.3, 1.0] {
            let smoothed = || Setup {
                eps: Eps::Uniform(eps),
                ..Setup::default()
            };
            with(smoothed());
            with(Setup {
                class_weights: values(0.0),
                ..smoothed()
            });
            with(Setup {
                prior: values(0.1),
                ..smoothed()
            });
            for entropy in [0.4, -1.5] {
                with(Setup {
                    entropy: Eps::Uniform(entropy),
                    ..smoothed()
                });
            }
            let problem = with(Setup {
                z_loss: 0.05,
                softcap: Some(5.0),
                scale: 0.9,
                vocab: Some(6),
                class_weights: Some(vec![0.5, 0.0, 1.0, 2.0, 0.25, 3.0]),
                prior: Some(vec![0.5, 1.0, 0.0, 2.0, 0.25, 3.0]),
                entropy: Eps::PerRow(vec![0.5, -0.25, 0.0]),
                weights: Some(vec![0.5, 2.0, 3.0]),
                reduction: Reduction::Sum,
                ..smoothed()
            });
            // With masked classes, to which no part of the prior goes.
            let mut x = self::values(&problem.logits);
            let y = self::values(&problem.targets);
            for (i, row) in x.chunks_mut(7).enumerate() {
                let k = (i + 2) % 6;
                if kind.is_none() && k != y[i] as usize {
                    row[k] = f64::NEG_INFINITY;
                }
            }
            let logits = tensor(x, &[3, 7], DType::F64);
            check(&Problem { logits, ..problem });
        }
    }
}

#[test]
fn of_each_reduction() {
    for reduction in [
        Reduction::None,
        Reduction::Sum,
        Reduction::Mean,
        Reduction::SumOver(2.5),
    ] {
        check(&problem(Setup {
            weights: Some(vec![0.5, 2.0, 3.0]),
            reduction,
            ..Setup::default()
        }));
        check(&Problem::everything(2, &[6, 9], DType::F64, reduction));
    }
}

#[test]
fn with_masked_classes() {
    let mut problem = problem(Setup {
        eps: Eps::PerRow(vec![0.0, 0.3, 1.0]),
        z_loss: 0.05,
        softcap: Some(5.0),
        scale: 0.9,
        reduction: Reduction::Sum,
        ..Setup::default()
    });
    let y = values(&problem.targets);
    let mut x = values(&problem.logits);
    for (i, row) in x.chunks_mut(7).enumerate() {
        for k in [i, i + 3] {
            if k != y[i] as usize {
                row[k] = f64::NEG_INFINITY;
            }
        }
    }
    problem.logits = tensor(x, &[3, 7], DType::F64);
    check(&problem);
}

/// With a tight bound: the two formulas for the target's gradient, p − 1 and −(others' p), agree.
#[test]
fn sure_of_the_target() {
    let x: Vec<f64> = vec![30.0, 0.0, 1.0, -2.0];
    let logits = tensor(x.clone(), &[4], DType::F64);
    let grad = values(
        &Setup::default()
            .build(&[])
            .reference(&logits, targets(vec![0], &[], DType::I64))
            .unwrap()
            .grad,
    );
    let others: f64 = x[1..].iter().map(|v| (v - 30.0).exp()).sum();
    assert!((grad[0] + others / (1.0 + others)).abs() < 1e-14 * others);
}
