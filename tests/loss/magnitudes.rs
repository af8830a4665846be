//! Finite logits of any magnitude, under any scale and softcap: no NaN and no wrong value, from logits and from hidden
//! states.

use candle_core::{DType, Tensor, Var};
use candle_cross_entropy::Reduction;
use rand::{Rng, rngs::StdRng};

use crate::{accuracy::Accuracy, common::*};

/// The largest value of a type that is tried, and its decimal exponent.
fn limits(dtype: DType) -> (f64, f64) {
    match dtype {
        DType::F16 => (65504.0, 4.8),
        DType::BF16 => (3.3895313892515355e38, 38.5),
        DType::F32 => (f32::MAX.into(), 38.5),
        // Squares under the largest scale are still in range.
        _ => (1e110, 110.0),
    }
}

/// A power of ten between these.
fn magnitude(rng: &mut StdRng, from: f64, to: f64) -> f64 {
    10f64.powf(rng.random_range(from..to))
}

/// Rows far from 0 whose differences are of another magnitude, with values at the type's limits and masks among them.
fn row(rng: &mut StdRng, width: usize, dtype: DType) -> Vec<f64> {
    let (limit, exponent) = limits(dtype);
    let sign = [-1.0, 0.0, 1.0][rng.random_range(0..3)];
    let offset = sign * magnitude(rng, -6.0, exponent);
    let spread = magnitude(rng, -6.0, exponent);
    let special: &[f64] = match rng.random_range(0..4) {
        0 => &[],
        1 => &[f64::NEG_INFINITY],
        2 => &[-limit],
        _ => &[limit, -limit],
    };
    let mut x = normal(rng, width, spread);
    for x in &mut x {
        *x = (offset + *x).clamp(-limit, limit);
        if let Some(&special) = special.get(rng.random_range(0..7)) {
            *x = special;
        }
    }
    x
}

fn scale(rng: &mut StdRng) -> f32 {
    match rng.random_range(0..8) {
        0..2 => 1.0,
        2..4 => rng.random_range(0.05..20.0),
        4..6 => magnitude(rng, -37.0, 38.0) as f32,
        6 => f32::MAX,
        _ => f32::MIN_POSITIVE,
    }
}

fn softcap(rng: &mut StdRng) -> Option<f32> {
    match rng.random_range(0..6) {
        0..3 => None,
        3..5 => Some(rng.random_range(0.1..100.0)),
        _ => Some(magnitude(rng, 2.0, 5.0) as f32),
    }
}

fn any_problem(rng: &mut StdRng) -> Problem {
    let dtype = FLOATS[rng.random_range(0..4)];
    let width = match rng.random_range(0..4) {
        0 => rng.random_range(2040..2100),
        _ => rng.random_range(1..40),
    };
    let rows = rng.random_range(1..4);
    let padding = rng.random_range(0..3) * rng.random_range(0..2);
    let mut x = Vec::new();
    for _ in 0..rows {
        x.extend(row(rng, width, dtype));
        x.extend(vec![f64::NAN; padding]);
    }
    let y = (0..rows).map(|_| match rng.random_range(0..9) {
        0 => -100,
        _ => rng.random_range(0..width) as i64,
    });
    let targets = targets(y.collect(), &[rows], DType::I64);
    let mut weights = vec![1.0; rows];
    weights[rows - 1] = [1.0, 0.0, 1e-3, 300.0][rng.random_range(0..4)];
    let eps = (0..rows).map(|_| [0.0, 0.1, 0.7, 1.0][rng.random_range(0..4)]);
    let eps = Eps::PerRow(eps.collect());
    let (scale, softcap) = (scale(rng), softcap(rng));
    // The gradient's errors grow with 1 + 2λ·lse.
    let finite = x.iter().filter(|x| x.is_finite());
    let largest = finite.fold(1.0, |a, x| x.abs().max(a)) * f64::from(scale);
    let largest = largest.min(softcap.map_or(f64::INFINITY, f64::from));
    let z_loss = [0.0, (0.25 / largest.max(1.0)) as f32][rng.random_range(0..2)];
    Problem {
        setup: Setup {
            eps,
            weights: Some(weights),
            z_loss,
            softcap,
            scale,
            vocab: Some(width),
            reduction: [Reduction::None, Reduction::Mean, Reduction::Sum][rng.random_range(0..3)],
            ..Setup::default()
        },
        targets,
        logits: tensor(x, &[rows, width + padding], dtype),
        distribution: None,
    }
}

#[test]
fn every_magnitude() {
    cases(|rng| {
        for _ in 0..5 {
            any_problem(rng).check();
        }
    });
}

/// With values of the classes, a weight of the entropy, and targets of every kind.
#[test]
fn every_magnitude_of_target_distributions() {
    cases(|rng| {
        let seed = rng.random();
        let mut problem = any_problem(rng);
        if rng.random() {
            problem = problem.general(seed);
            // Below 0 it cancels, in the loss too.
            let rows = problem.targets.elem_count();
            problem.setup.entropy = Eps::PerRow([0.3, 0.0, 1.0].repeat(rows)[..rows].to_vec());
        }
        match rng.random_range(0..3) {
            0 => {}
            1 => problem = problem.with(Kind::TopK(rng.random_range(1..50)), seed),
            _ => problem = problem.with(Kind::Probabilities(FLOATS[rng.random_range(0..4)]), seed),
        }
        problem.check();
    });
}

/// Row i is the i-th unit vector and the projection the logits' transpose, so the products are the logits themselves.
#[test]
fn every_magnitude_from_hidden_states() {
    cases(|rng| {
        let mut problem = any_problem(rng);
        let x = values(&problem.logits);
        let finite: Vec<f64> = x
            .iter()
            .map(|x| if x.is_finite() { *x } else { 1.0 })
            .collect();
        problem.logits = tensor(finite, problem.logits.dims(), problem.logits.dtype());
        // A gradient that overflows, times a 0 of another row, is NaN.
        problem.setup.scale = problem.setup.scale.min(1e30);
        let Problem {
            logits, targets, ..
        } = &problem;
        let expected = problem.reference();
        let hidden = Tensor::eye(logits.dims()[0], logits.dtype(), CPU).unwrap();
        let weight = Var::from_tensor(&logits.t().unwrap().contiguous().unwrap()).unwrap();
        let loss = problem
            .loss()
            .tile_bytes([1 << 8, 1 << 20][rng.random_range(0..2)]);
        let actual = loss
            .forward_linear(&hidden, &weight, None, targets)
            .unwrap();
        let gradients = actual.sum_all().unwrap().backward().unwrap();
        let grad = gradients.get(&weight).unwrap().t().unwrap();
        let mut accuracy = Accuracy::new(logits.dtype());
        accuracy.loss(&actual, &expected.loss, || format!("{problem:?}"));
        accuracy.grad(&problem, &grad, &expected.grad, || format!("{problem:?}"));
    });
}

/// The cases that were found, and their right answers.
#[test]
fn a_scale_does_not_lose_the_largest_logit() {
    let case = |x: &[f64], y: i64, scale: f32, dtype: DType, loss: f64, grad: &[f64]| {
        let problem = Problem {
            setup: Setup {
                scale,
                ..Setup::default()
            },
            logits: tensor(x.to_vec(), &[1, x.len()], dtype),
            targets: targets(vec![y], &[1], DType::I64),
            distribution: None,
        };
        problem.check();
        let actual = problem
            .loss()
            .loss_and_grad(&problem.logits, &problem.targets);
        let actual = actual.unwrap();
        assert_close(scalar(&actual.loss), loss, 1e-6);
        for (a, e) in values(&actual.grad).into_iter().zip(grad) {
            assert_close(a, *e, 2e-3); // a bf16's
        }
    };
    let ln_3 = 1.0986122886681098;
    for dtype in [DType::F32, DType::F64, DType::BF16] {
        let thirds = [-0.46667, 0.23333, 0.23333];
        case(&[-limits(DType::BF16).0; 3], 0, 0.7, dtype, ln_3, &thirds);
        case(&[1e30, 0.0], 0, 0.7, dtype, 0.0, &[0.0, 0.0]);
        case(&[1e10, 0.0], 0, 1.0, dtype, 0.0, &[0.0, 0.0]);
        case(
            &[5e9, 5e9, -5e9],
            1,
            0.7,
            dtype,
            2f64.ln(),
            &[0.35, -0.35, 0.0],
        );
    }
    case(
        &[f32::MIN.into(); 3],
        0,
        0.7,
        DType::F32,
        ln_3,
        &[-0.46667, 0.23333, 0.23333],
    );
}

/// From hidden states: a state of one element, whose products with the classes' weights are the logits.
#[test]
fn hidden_states_give_what_logits_give() {
    for dtype in [DType::F32, DType::F64, DType::BF16] {
        for (x, scale) in [
            (vec![3e38, 3e38, -3e38, 1e38], 0.7f32),
            (vec![5e9, 5e9, -5e9, 0.0], 0.7),
            (vec![1e30, 0.0, -1e30, 2e30], 0.3),
            (vec![1e10, 0.0, 1e10, -1e10], 1.0),
            (vec![1e-30, 3e-30, 0.0, 2e-30], 1e30),
        ] {
            for softcap in [None, Some(1e4f32)] {
                let setup = Setup {
                    scale,
                    softcap,
                    eps: Eps::Uniform(0.1),
                    ..Setup::default()
                };
                let logits = tensor(x.clone(), &[1, 4], dtype);
                let targets = targets(vec![1], &[1], DType::I64);
                let loss = setup.build(&[1]);
                let expected = loss.reference(&logits, &targets).unwrap();
                let hidden = Tensor::ones((1, 1), dtype, CPU).unwrap();
                let weight = Var::from_tensor(&logits.t().unwrap()).unwrap();
                // One class a tile too: the tiles' largest logits are far apart.
                for loss in [loss.clone(), loss.tile_bytes(8)] {
                    let actual = loss
                        .forward_linear(&hidden, &weight, None, &targets)
                        .unwrap();
                    let grad = actual.backward().unwrap();
                    let grad = grad.get(&weight).unwrap().t().unwrap();
                    let mut accuracy = Accuracy::new(dtype);
                    let context = || format!("{dtype:?} {x:?} {setup:?}");
                    accuracy.loss(&actual, &expected.loss, context);
                    let problem = Problem {
                        setup: setup.clone(),
                        logits: logits.clone(),
                        targets: targets.clone(),
                        distribution: None,
                    };
                    accuracy.grad(&problem, &grad, &expected.grad, context);
                }
            }
        }
    }
}
