//! Target distributions, class weights, a smoothing prior and a weight of the entropy, against the reference and against
//! what they must equal.

use crate::common::*;
use candle_core::{DType, Tensor, Var};
use candle_cross_entropy::{CrossEntropy, LossAndGrad, Reduction, Targets};

const REDUCTIONS: [Reduction; 4] = [
    Reduction::Mean,
    Reduction::None,
    Reduction::Sum,
    Reduction::SumOver(3.5),
];

fn kinds(dtype: DType, vocab: usize) -> Vec<Option<Kind>> {
    vec![
        None,
        Some(Kind::Probabilities(DType::F32)),
        Some(Kind::Probabilities(dtype)),
        Some(Kind::TopK(1)),
        Some(Kind::TopK(vocab.min(40))),
    ]
}

fn of_kind(problem: Problem, kind: Option<Kind>, seed: u64) -> Problem {
    match kind {
        Some(kind) => problem.with(kind, seed),
        None => problem,
    }
}

/// Rows of one class, of less than a vector, of vectors and pieces and one more or less, and of a real vocabulary.
const WIDTHS: [usize; 12] = [1, 2, 7, 16, 31, 33, 257, 2047, 2048, 2049, 4100, 50257];

#[test]
fn every_kind_with_every_option() {
    for dtype in FLOATS {
        for (seed, width) in (0..).zip(WIDTHS) {
            for (reduction, kind) in REDUCTIONS
                .into_iter()
                .cycle()
                .zip(kinds(dtype, width - width / 8))
            {
                let problem = Problem::everything(seed, &[6, width], dtype, reduction);
                of_kind(problem.general(seed), kind, seed).check();
            }
        }
    }
}

/// Each option by itself and on rows that are shared out among threads, so that none hides behind another.
#[test]
fn each_option_alone() {
    for dtype in FLOATS {
        for (seed, shape) in [(1, vec![3, 300]), (2, vec![2, 3, 70]), (3, vec![1, 40000])] {
            let width = shape[shape.len() - 1];
            for kind in kinds(dtype, width) {
                let all = Problem::random(seed, &shape, dtype, Setup::default()).general(seed);
                let Setup {
                    class_weights,
                    prior,
                    entropy,
                    ..
                } = all.setup;
                let smoothed = || Setup {
                    eps: Eps::Uniform(0.25),
                    ..Setup::default()
                };
                let setups = [
                    Setup::default(),
                    smoothed(),
                    Setup {
                        class_weights: class_weights.clone(),
                        ..Setup::default()
                    },
                    Setup {
                        class_weights,
                        ..smoothed()
                    },
                    Setup {
                        prior,
                        ..smoothed()
                    },
                    Setup {
                        entropy,
                        ..Setup::default()
                    },
                    Setup {
                        entropy: Eps::Uniform(-0.5),
                        scale: 0.5,
                        reduction: Reduction::Sum,
                        ..smoothed()
                    },
                ];
                for setup in setups {
                    let problem = Problem::random(seed, &shape, dtype, setup);
                    of_kind(problem, kind, seed).check();
                }
            }
        }
    }
}

fn run(problem: &Problem) -> LossAndGrad {
    problem
        .loss()
        .loss_and_grad(&problem.logits, problem.given())
        .unwrap()
}

/// Loss, gradient and statistics within the rounding of two computations in f32.
fn assert_same(a: &LossAndGrad, b: &LossAndGrad) {
    assert_all_close(&a.loss, &b.loss, 1e-6);
    assert_all_close(&a.grad, &b.grad, 2e-7);
    let stats = |r: &LossAndGrad| {
        let s = r.stats.clone();
        [s.nll, s.lse, s.entropy, s.max_prob, s.grad_norm_sq]
    };
    for (a, b) in stats(a).iter().zip(&stats(b)) {
        assert_all_close(a, b, 2e-6);
    }
    assert_eq!(bits(&a.stats.predicted), bits(&b.stats.predicted));
}

#[test]
fn the_same_distribution_in_every_form() {
    let (rows, vocab) = (5, 70);
    let setup = Setup {
        eps: Eps::Uniform(0.2),
        z_loss: 0.01,
        ..Setup::default()
    };
    let problem = Problem::random(4, &[rows, vocab], DType::F32, setup);
    let expected = run(&problem);
    let y: Vec<u32> = values(&problem.targets).iter().map(|&y| y as u32).collect();
    let ones = |k| Tensor::ones((rows, k), DType::F32, CPU).unwrap();
    let classes = Tensor::from_vec(y.clone(), (rows, 1), CPU).unwrap();
    let mut one_hot = vec![0f32; rows * vocab];
    y.iter()
        .enumerate()
        .for_each(|(i, &y)| one_hot[i * vocab + y as usize] = 1.0);
    let one_hot = Tensor::from_vec(one_hot, (rows, vocab), CPU).unwrap();
    let all = Tensor::arange(0u32, vocab as u32, CPU).unwrap();
    let all = all.broadcast_as((rows, vocab)).unwrap();
    let halves = Tensor::cat(&[&classes, &classes], 1).unwrap();
    for targets in [
        Targets::top_k(&classes, &ones(1)),
        Targets::top_k(&halves, &(ones(2) * 0.5).unwrap()),
        Targets::top_k(&all, &one_hot),
        one_hot.clone().into(),
        Targets::Probabilities(one_hot.to_dtype(DType::BF16).unwrap()),
    ] {
        let mut same = problem.clone();
        same.distribution = Some(targets);
        assert_same(&run(&same), &expected);
    }
    // Values that change nothing, and ratios of a prior, which are all that counts.
    let mut same = problem.clone();
    same.setup.class_weights = Some(vec![1.0; vocab]);
    assert_same(&run(&same), &expected);
    for u in [1.0, 1e-30, 1e30] {
        let mut same = problem.clone();
        same.setup.prior = Some(vec![u; vocab]);
        assert_same(&run(&same), &expected);
    }
}

/// By candle's operations, whose gradient is automatic: the terms of the formula one by one.
#[test]
fn against_candle() {
    let (rows, vocab) = (4, 30);
    let problem = Problem::random(7, &[rows, vocab], DType::F64, Setup::default());
    let problem = problem.general(7).with(Kind::Probabilities(DType::F64), 7);
    let Setup {
        class_weights: Some(c),
        prior: Some(u),
        ..
    } = &problem.setup
    else {
        panic!("general sets them")
    };
    let row = |v: &[f32]| {
        tensor(
            v.iter().map(|&v| v.into()).collect(),
            &[1, vocab],
            DType::F64,
        )
    };
    let (c, u) = (row(c), row(u));
    let u = u.broadcast_div(&u.sum_keepdim(1).unwrap()).unwrap();
    let Some(Targets::Probabilities(t)) = &problem.distribution else {
        panic!("made so")
    };
    let (eps, beta) = (0.3, 0.7);
    let x = Var::from_tensor(&problem.logits).unwrap();
    let log_p = candle_nn::ops::log_softmax(&x, 1).unwrap();
    let q = ((t * (1.0 - eps)).unwrap())
        .broadcast_add(&(u * eps).unwrap())
        .unwrap();
    let losses = q
        .broadcast_mul(&c)
        .unwrap()
        .mul(&log_p)
        .unwrap()
        .sum(1)
        .unwrap()
        .neg()
        .unwrap();
    let entropy = log_p
        .exp()
        .unwrap()
        .mul(&log_p)
        .unwrap()
        .sum(1)
        .unwrap()
        .neg()
        .unwrap();
    let expected = (losses + (entropy * beta).unwrap())
        .unwrap()
        .mean_all()
        .unwrap();
    let expected_grad = expected.backward().unwrap().get(&x).unwrap().clone();

    let eps = tensor(vec![eps], &[1], DType::F64);
    let loss = problem.setup.build(&[rows]).smoothing(&eps);
    let loss = loss.entropy_weight(tensor(vec![beta], &[1], DType::F64));
    for actual in [
        loss.reference(&problem.logits, t).unwrap(),
        loss.loss_and_grad(&problem.logits, t).unwrap(),
    ] {
        assert_close(scalar(&actual.loss), scalar(&expected), 1e-13);
        assert_all_close(&actual.grad, &expected_grad, 1e-14);
    }
}

/// A teacher that the student agrees with: where the loss is all but 0, it keeps its digits.
#[test]
fn sure_and_right() {
    for dtype in [DType::F32, DType::F64] {
        for gap in [5.0, 12.0, 17.0, 25.0, 40.0, 80.0] {
            let width = 2100;
            let mut x: Vec<f64> = (0..2 * width).map(|k| 0.1 * (k % 13) as f64).collect();
            let mut t = vec![0.0; 2 * width];
            for row in [0, 1] {
                x[row * width + 300] = gap + 1.2;
                t[row * width + 300] = [1.0, 0.5][row];
            }
            let setup = Setup {
                reduction: Reduction::None,
                ..Setup::default()
            };
            let mut problem = Problem::random(1, &[2, width], dtype, setup);
            problem.logits = tensor(x, &[2, width], dtype);
            problem.distribution = Some(Targets::Probabilities(tensor(t, &[2, width], dtype)));
            problem.check();
            let classes = Tensor::new(&[[7u32, 300], [300, 7]], CPU).unwrap();
            let t = Tensor::new(&[[0f32, 1.0], [0.5, 0.0]], CPU).unwrap();
            problem.distribution = Some(Targets::top_k(&classes, &t));
            problem.check();
            problem.setup.class_weights = Some(vec![0.5; width]);
            problem.check();
        }
    }
}

/// t > 0 on a masked class makes the loss infinite, t = 0 does not; a prior gives its mass to the others.
#[test]
fn masked_classes() {
    let inf = f64::NEG_INFINITY;
    for dtype in FLOATS {
        for width in [5, 40, 2050] {
            let mut x: Vec<f64> = (0..4 * width).map(|k| 0.25 * (k % 9) as f64).collect();
            for row in 0..4 {
                x[row * width + 1] = inf;
                x[row * width + width - 1] = inf;
            }
            x[3 * width..].fill(inf);
            let logits = tensor(x, &[4, width], dtype);
            let mut t = vec![0.0; 4 * width];
            for (row, class) in [(0, 0), (1, 1), (2, 2), (3, 0)] {
                t[row * width + class] = 0.75;
            }
            let dense = Targets::Probabilities(tensor(t, &[4, width], DType::F32));
            let classes = Tensor::new(&[[0u32, 1], [1, 2], [2, 0], [0, 2]], CPU).unwrap();
            let t = Tensor::new(&[[0.5f32, 0.0], [0.5, 0.5], [0.5, 0.25], [1.0, 1.0]], CPU);
            let few = Targets::top_k(&classes, &t.unwrap());
            for distribution in [dense, few] {
                for eps in [0.0, 0.4, 1.0] {
                    let setup = Setup {
                        eps: Eps::Uniform(eps),
                        reduction: Reduction::None,
                        ..Setup::default()
                    };
                    let mut problem = Problem::random(1, &[4, width], dtype, setup);
                    problem.logits = logits.clone();
                    problem.distribution = Some(distribution.clone());
                    problem.check();
                    problem = problem.general(3);
                    problem.check();
                    let losses = values(&run(&problem).loss);
                    let finite: Vec<bool> = losses.iter().map(|l| l.is_finite()).collect();
                    assert_eq!(finite, [true, false, true, false]);
                    assert!(losses[1] > 0.0 && losses[3] > 0.0);
                    // What mass there is belongs to masked classes: none is spread.
                    let mut prior = vec![0.0; width];
                    prior[1] = 2.0;
                    problem.setup.prior = Some(prior);
                    problem.check();
                }
            }
        }
    }
}

/// A row with +inf or NaN is NaN, also where that is its only class, and no other row is.
#[test]
fn rows_that_are_nan() {
    for dtype in FLOATS {
        for width in [1, 2, 17, 2050] {
            for bad in [f64::INFINITY, f64::NAN] {
                for softcap in [None, Some(30.0)] {
                    let setup = Setup {
                        reduction: Reduction::None,
                        softcap,
                        ..Setup::default()
                    };
                    let mut problem = Problem::random(1, &[3, width], dtype, setup);
                    let mut x = values(&problem.logits);
                    x[width + width / 2] = bad;
                    problem.logits = tensor(x, &[3, width], dtype);
                    let t = tensor(vec![0.5; 3 * width], &[3, width], DType::F32);
                    problem.distribution = Some(Targets::Probabilities(t));
                    problem.check();
                    let losses = values(&run(&problem).loss);
                    let nan: Vec<bool> = losses.iter().map(|l| l.is_nan()).collect();
                    assert_eq!(nan, [false, true, false]);
                }
            }
        }
    }
}

/// Whatever the bits of the NaN, which exponentials are made of, and whatever stands beside it: a value of 0 too.
#[test]
fn nan_of_any_bits() {
    let width = 2 * 2048 + 32;
    let device = &CPU;
    let v = Tensor::rand(0.5f32, 1.5, width, device).unwrap();
    let t = Tensor::rand(0f32, 1.0, (3, width), device).unwrap();
    let few = Tensor::new(&[[1u32, 5], [2, 7], [9, 4000]], device).unwrap();
    let few = Targets::top_k(&few, &Tensor::full(0.5f32, (3, 2), device).unwrap());
    let one = Targets::from(Tensor::new(&[1u32, 5, 4100], device).unwrap());
    let loss = CrossEntropy::new()
        .smoothing(0.1)
        .reduction(Reduction::None);
    for at in [0, 31, 2047, 2048, 3000, width - 1] {
        let mut zero_there = v.to_vec1::<f32>().unwrap();
        zero_there[at] = 0.0;
        let zero_there = Tensor::new(zero_there, device).unwrap();
        for bits in [
            0x7fc0_0000u32,
            0x7fc0_0001,
            0x7f80_0001,
            0xffff_ffff,
            0xff80_0100,
        ] {
            let mut x = vec![0.5f32; 3 * width];
            x[width + at] = f32::from_bits(bits);
            let x = Tensor::from_vec(x, (3, width), device).unwrap();
            for dtype in [DType::F32, DType::F64, DType::BF16, DType::F16] {
                let x = x.to_dtype(dtype).unwrap();
                for (loss, targets) in [
                    (loss.clone(), one.clone()),
                    (loss.clone().class_weights(&v), one.clone()),
                    (loss.clone().class_weights(&zero_there), one.clone()),
                    (loss.clone().smoothing_prior(&zero_there), one.clone()),
                    (loss.clone().entropy_weight(0.1), one.clone()),
                    (loss.clone().softcap(30.0), one.clone()),
                    (loss.clone(), few.clone()),
                    (loss.clone(), t.clone().into()),
                ] {
                    let result = loss.loss_and_grad(&x, targets.clone()).unwrap();
                    let losses = values(&result.loss);
                    let nan: Vec<bool> = losses.iter().map(|l| l.is_nan()).collect();
                    assert_eq!(nan, [false, true, false], "{bits:x} at {at}, {dtype:?}");
                    let gradient = values(&result.grad);
                    let nan: Vec<bool> = gradient.iter().map(|g| g.is_nan()).collect();
                    assert!(
                        nan.iter()
                            .enumerate()
                            .all(|(i, nan)| *nan == (i / width == 1))
                    );
                    let forward = values(&loss.forward(&x, targets).unwrap());
                    assert!(forward[1].is_nan() && !forward[0].is_nan());
                }
            }
        }
    }
}

/// Of the type that the loss computes in, so that no conversion copies them.
#[test]
fn values_that_are_views_of_the_logits() {
    let (rows, vocab) = (3, 7);
    let all = || {
        tensor(
            (0..6 * vocab).map(|k| 0.125 * (k % 5) as f64).collect(),
            &[6, vocab],
            DType::F64,
        )
    };
    let apart = all();
    let loss = |last: &Tensor| {
        CrossEntropy::new()
            .smoothing(0.25)
            .class_weights(&last.get(1).unwrap())
            .smoothing_prior(&last.get(2).unwrap())
    };
    let classes = Tensor::new(&[[1u32, 2], [3, 4], [0, 6]], CPU).unwrap();
    let few = |last: &Tensor| Targets::top_k(&classes, &last.narrow(1, 0, 2).unwrap());
    let views = all();
    let logits = views.narrow(0, 0, rows).unwrap();
    let last = views.narrow(0, rows, rows).unwrap();
    let expected = loss(&apart.narrow(0, rows, rows).unwrap())
        .loss_and_grad(&logits, few(&apart.narrow(0, rows, rows).unwrap()))
        .unwrap();
    let got = loss(&last)
        .loss_and_grad_inplace(logits, few(&last))
        .unwrap();
    assert_same(&got, &expected);
    assert_eq!(values(&last), values(&apart.narrow(0, rows, rows).unwrap()));
}

/// Rows without entries are ignored, whatever stands beside them: loss, gradient, statistics, the mean.
#[test]
fn rows_without_entries() {
    let logits = Tensor::new(
        &[[f32::NAN, 0.0, 1.0], [0.5, -1.0, 2.0], [1.0, 1.0, 1.0]],
        CPU,
    )
    .unwrap();
    let classes = Tensor::new(&[[-100i64, -100], [2, -100], [-100, -100]], CPU).unwrap();
    let t = Tensor::new(&[[f32::NAN, -1.0], [1.0, f32::NAN], [0.5, 0.5]], CPU).unwrap();
    let loss = CrossEntropy::new().smoothing(0.1);
    let got = loss
        .loss_and_grad(&logits, Targets::top_k(&classes, &t))
        .unwrap();
    let one = loss.forward(
        &logits.narrow(0, 1, 1).unwrap(),
        Tensor::new(&[2u32], CPU).unwrap(),
    );
    assert_close(scalar(&got.loss), scalar(&one.unwrap()), 1e-6);
    for (row, zero) in [(0, true), (1, false), (2, true)] {
        let grad = values(&got.grad.get(row).unwrap());
        assert_eq!(grad.iter().all(|&g| g == 0.0), zero);
        assert_eq!(values(&got.stats.lse)[row] == 0.0, zero);
    }
    // No entries at all, and no rows at all.
    let none = Targets::top_k(
        &Tensor::zeros((3, 0), DType::U32, CPU).unwrap(),
        &Tensor::zeros((3, 0), DType::F32, CPU).unwrap(),
    );
    let got = loss.loss_and_grad(&logits, none).unwrap();
    assert_eq!(scalar(&got.loss), 0.0);
    assert!(values(&got.grad).iter().all(|&g| g == 0.0));
    let empty = |dtype, width| Tensor::zeros((0, width), dtype, CPU).unwrap();
    for targets in [
        Targets::Probabilities(empty(DType::F32, 3)),
        Targets::top_k(&empty(DType::U32, 2), &empty(DType::F32, 2)),
    ] {
        let got = loss.loss_and_grad(&empty(DType::F32, 3), &targets).unwrap();
        assert_eq!(scalar(&got.loss), 0.0);
        assert_eq!(got.grad.dims(), [0, 3]);
        let logits = Var::from_tensor(&empty(DType::F32, 3)).unwrap();
        assert_eq!(scalar(&loss.forward(&logits, &targets).unwrap()), 0.0);
    }
}

/// PyTorch's rule for the mean, and what it makes where no class of a row weighs anything: no NaN.
#[test]
fn mean_with_class_weights() {
    let logits = Tensor::new(&[[0.5f32, -1.0, 2.0], [1.0, 0.0, -1.0]], CPU).unwrap();
    let targets = Tensor::new(&[2u32, 0], CPU).unwrap();
    let weights = |c: [f32; 3]| CrossEntropy::new().class_weights(&Tensor::new(&c, CPU).unwrap());
    let mean = weights([3.0, 1.0, 0.5]);
    let losses = values(
        &mean
            .clone()
            .reduction(Reduction::None)
            .forward(&logits, &targets)
            .unwrap(),
    );
    let expected = (losses[0] + losses[1]) / 3.5;
    assert_close(
        scalar(&mean.forward(&logits, &targets).unwrap()),
        expected,
        1e-6,
    );
    // Of probabilities, the rows count.
    let t = Tensor::new(&[[0f32, 0.0, 1.0], [1.0, 0.0, 0.0]], CPU).unwrap();
    let expected = (losses[0] + losses[1]) / 2.0;
    assert_close(scalar(&mean.forward(&logits, &t).unwrap()), expected, 1e-6);
    let nothing = weights([0.0, 1.0, 0.0]);
    let got = nothing.loss_and_grad(&logits, &targets).unwrap();
    assert_eq!(scalar(&got.loss), 0.0);
    assert!(values(&got.grad).iter().all(|&g| g == 0.0));
}

/// Rows of a batch, alone, with others around them, and by any number of threads: the same bits.
#[test]
fn bits_do_not_depend_on_the_company() {
    for dtype in FLOATS {
        for (width, rows) in [(300, 7), (20000, 9)] {
            for kind in kinds(dtype, width) {
                let setup = Setup {
                    reduction: Reduction::None,
                    ..Setup::default()
                };
                let problem = Problem::random(3, &[rows, width], dtype, setup).general(3);
                let problem = of_kind(problem, kind, 3);
                let all = run(&problem);
                let one = |t: &Tensor, i: usize| t.narrow(0, i, 1).unwrap();
                for i in [0, rows - 1] {
                    let mut alone = problem.clone();
                    alone.logits = one(&problem.logits, i);
                    alone.targets = one(&problem.targets, i);
                    if let Eps::PerRow(beta) = &problem.setup.entropy {
                        alone.setup.entropy = Eps::PerRow(vec![beta[i]]);
                    }
                    alone.distribution = problem.distribution.as_ref().map(|t| match t {
                        Targets::Classes(t) => Targets::Classes(one(t, i)),
                        Targets::Probabilities(t) => Targets::Probabilities(one(t, i)),
                        Targets::TopK {
                            classes,
                            probabilities,
                        } => Targets::top_k(&one(classes, i), &one(probabilities, i)),
                    });
                    let got = run(&alone);
                    assert_eq!(bits(&got.loss), bits(&one(&all.loss, i)), "{kind:?}");
                    assert_eq!(bits(&got.grad), bits(&one(&all.grad, i)), "{kind:?}");
                }
            }
        }
    }
}

/// Probabilities in views that are read in place, copied, of other types, or the logits' own memory.
#[test]
fn views_and_types_of_probabilities() {
    for dtype in FLOATS {
        let problem = Problem::random(5, &[4, 3, 65], dtype, Setup::default());
        let problem = problem.with(Kind::Probabilities(DType::F64), 5);
        let Some(Targets::Probabilities(t)) = &problem.distribution else {
            panic!("made so")
        };
        let pad = |dim| t.pad_with_zeros(dim, 2, 3).unwrap();
        let views = [
            pad(0).narrow(0, 2, 4).unwrap(),
            pad(1).narrow(1, 2, 3).unwrap(),
            pad(2).narrow(2, 2, 65).unwrap(),
            t.transpose(0, 1)
                .unwrap()
                .contiguous()
                .unwrap()
                .transpose(0, 1)
                .unwrap(),
            t.transpose(1, 2)
                .unwrap()
                .contiguous()
                .unwrap()
                .transpose(1, 2)
                .unwrap(),
        ];
        for kind in FLOATS {
            for view in &views {
                let mut same = problem.clone();
                let view = match kind {
                    DType::F64 => view.clone(),
                    kind => view.to_dtype(kind).unwrap(),
                };
                same.distribution = Some(Targets::Probabilities(view));
                same.check();
            }
        }
        // A model against itself, detached: entropy. In place, the targets are read before they are overwritten.
        let logits = problem.logits.abs().unwrap();
        let loss = CrossEntropy::new();
        let expected = loss.loss_and_grad(&logits, logits.copy().unwrap()).unwrap();
        let got = loss.loss_and_grad_inplace(logits.clone(), &logits).unwrap();
        assert_eq!(bits(&got.loss), bits(&expected.loss));
        assert_eq!(bits(&got.grad), bits(&expected.grad));
    }
}

/// Targets, values of classes and weights are constants; the logits' gradient takes any upstream gradient.
#[test]
fn gradients_flow_into_the_logits_alone() {
    let (rows, vocab) = (3, 20);
    let var = |shape: &[usize]| {
        Var::from_tensor(&Tensor::rand(0.1f32, 1.0, shape, CPU).unwrap()).unwrap()
    };
    let (x, t, few) = (var(&[rows, vocab]), var(&[rows, vocab]), var(&[rows, 2]));
    let (c, u, beta) = (var(&[vocab]), var(&[vocab]), var(&[rows]));
    let classes = Tensor::new(&[[0u32, 1], [5, 19], [7, 8]], CPU).unwrap();
    let loss = CrossEntropy::new()
        .smoothing(0.2)
        .class_weights(&c)
        .smoothing_prior(&u)
        .entropy_weight(beta.as_tensor())
        .reduction(Reduction::None);
    let upstream = Tensor::new(&[0.5f32, -2.0, 0.0], CPU).unwrap();
    for targets in [Targets::from(&*t), Targets::top_k(&classes, &few)] {
        let losses = loss.forward(&x, &targets).unwrap();
        let gradients = (losses * &upstream)
            .unwrap()
            .sum_all()
            .unwrap()
            .backward()
            .unwrap();
        for constant in [&t, &few, &c, &u, &beta] {
            assert!(gradients.get(constant).is_none());
        }
        let own = loss.loss_and_grad(&x, &targets).unwrap().grad;
        let expected = own
            .broadcast_mul(&upstream.reshape((rows, 1)).unwrap())
            .unwrap();
        assert_all_close(gradients.get(&x).unwrap(), &expected, 1e-7);
        // Over the logits.
        let hidden = (x.as_tensor() * 1.0).unwrap();
        let losses = loss
            .clone()
            .inplace_backward(true)
            .forward(&hidden, &targets)
            .unwrap();
        let gradients = (losses * &upstream)
            .unwrap()
            .sum_all()
            .unwrap()
            .backward()
            .unwrap();
        assert_all_close(gradients.get(&x).unwrap(), &expected, 1e-7);
    }
}

fn logits() -> Tensor {
    Tensor::zeros((4, 6), DType::F32, CPU).unwrap()
}

/// Every entry point says what is wrong.
fn refused(loss: &CrossEntropy, targets: impl Into<Targets>, parts: &[&str]) {
    let targets = targets.into();
    let x = logits();
    assert_error(loss.forward(&x, &targets), parts);
    assert_error(loss.forward_with_stats(&x, &targets), parts);
    assert_error(loss.loss_and_grad(&x, &targets), parts);
    assert_error(
        loss.loss_and_grad_inplace(x.copy().unwrap(), &targets),
        parts,
    );
    assert_error(loss.reference(&x, &targets), parts);
    let (hidden, weight) = (x, Tensor::zeros((6, 6), DType::F32, CPU).unwrap());
    assert_error(loss.forward_linear(&hidden, &weight, None, &targets), parts);
    let linear = loss.forward_linear_with_stats(&hidden, &weight, None, &targets);
    assert_error(linear, parts);
}

#[test]
fn bad_targets() {
    let loss = CrossEntropy::new();
    let zeros = |shape: &[usize], dtype| Tensor::zeros(shape, dtype, CPU).unwrap();
    for shape in [&[4][..], &[4, 5], &[4, 7], &[2, 2, 6], &[6, 4]] {
        let was = format!("of shape {shape:?}");
        let parts = [
            "targets: bf16",
            &was,
            "floats of shape [4, 6]",
            "shape [4, 6]",
        ];
        let (hidden, weight) = (logits(), zeros(&[6, 6], DType::F32));
        let targets = zeros(shape, DType::BF16);
        assert_error(loss.forward(&logits(), &targets), &parts);
        assert_error(
            loss.forward_linear(&hidden, &weight, None, &targets),
            &parts,
        );
    }
    refused(
        &loss,
        Targets::Probabilities(zeros(&[4, 6], DType::U32)),
        &["targets: u32", "must be a float type"],
    );
    refused(
        &loss,
        Targets::Classes(zeros(&[4], DType::F32)),
        &["targets: f32", "must be u8, u32 or i64"],
    );
    let top_k = |classes: &Tensor, t: &Tensor| Targets::top_k(classes, t);
    refused(
        &loss,
        top_k(&zeros(&[4], DType::U32), &zeros(&[4], DType::F32)),
        &["targets: shape [4]", "must be [4] and one dimension more"],
    );
    refused(
        &loss,
        top_k(&zeros(&[4, 2], DType::U32), &zeros(&[4, 3], DType::F32)),
        &[
            "probabilities of the targets: shape [4, 3]",
            "must be [4, 2]",
        ],
    );
    refused(
        &loss,
        top_k(&zeros(&[4, 2], DType::U32), &zeros(&[4, 2], DType::U32)),
        &["probabilities of the targets: u32", "must be a float type"],
    );
    refused(
        &loss,
        top_k(&zeros(&[4, 2], DType::F32), &zeros(&[4, 2], DType::F32)),
        &["targets: f32", "must be u8, u32 or i64"],
    );
    let outside = Tensor::new(&[[0i64, -100], [5, 0], [1, 6], [9, 9]], CPU).unwrap();
    refused(
        &loss,
        top_k(&outside, &zeros(&[4, 2], DType::F32)),
        &[
            "targets: row 2 has 6",
            "must be 0 to 5 or the ignore_index -100",
        ],
    );
    for (bad, was) in [(-0.5f32, "-0.5"), (f32::NAN, "NaN"), (f32::INFINITY, "inf")] {
        let was = format!("targets: row 1 has probability {was} for class 3");
        let parts = [&*was, "must be finite and not negative"];
        let mut t = vec![0.25f32; 24];
        (t[9], t[17]) = (bad, bad);
        let dense = Tensor::from_vec(t, (4, 6), CPU).unwrap();
        refused(&loss, &dense, &parts);
        refused(&loss, dense.to_dtype(DType::F16).unwrap(), &parts);
        // Beside a masked class, and where rows before it are left out.
        let x = Tensor::new(&[f32::NEG_INFINITY; 24], CPU)
            .unwrap()
            .reshape((4, 6))
            .unwrap();
        assert_error(loss.forward(&x, &dense), &parts);
        let weights = Tensor::new(&[0f32, 1.0, 1.0, 1.0], CPU).unwrap();
        let weighted = loss.clone().row_weights(&weights);
        refused(&weighted, &dense, &parts);
        let classes = Tensor::new(&[[0u32, 1], [2, 3], [0, 1], [0, 1]], CPU).unwrap();
        let t = Tensor::new(&[[0.5f32, 0.5], [0.5, bad], [bad, 0.5], [0.5, 0.5]], CPU).unwrap();
        refused(&loss, top_k(&classes, &t), &parts);
    }
}

/// Whatever the values themselves: the smallest that there are, and some whose squares are out of range.
#[test]
fn only_ratios_of_a_prior_count() {
    let (rows, vocab) = (3, 50);
    let x = tensor(
        normal(&mut rng(7), rows * vocab, 2.0),
        &[rows, vocab],
        DType::F32,
    );
    let y = targets(vec![0, 49, 20], &[rows], DType::U32);
    let with = |factor: f64, dtype: DType| {
        let prior = (1..=vocab).map(|u| u as f64 * factor).collect();
        let loss = CrossEntropy::new().smoothing(0.3);
        let loss = loss.smoothing_prior(&tensor(prior, &[vocab], dtype));
        loss.loss_and_grad(&x, &y).unwrap()
    };
    let expected = with(1.0, DType::F32);
    for (factor, dtype) in [
        (2f64.powi(-149), DType::F32),
        (2f64.powi(120), DType::F32),
        (f64::from_bits(1), DType::F64),
        (2f64.powi(1000), DType::F64),
    ] {
        let actual = with(factor, dtype);
        assert_all_close(&actual.loss, &expected.loss, 1e-6);
        assert_all_close(&actual.grad, &expected.grad, 1e-6);
        let norm = |of: &LossAndGrad| of.stats.grad_norm_sq.clone();
        assert_all_close(&norm(&actual), &norm(&expected), 1e-6);
    }
}

#[test]
fn bad_values_of_classes() {
    let y = Tensor::zeros(4, DType::U32, CPU).unwrap();
    let with = |name: &str, values: &Tensor| match name {
        "class_weights" => CrossEntropy::new().class_weights(values),
        _ => CrossEntropy::new().smoothing_prior(values).smoothing(0.1),
    };
    for name in ["class_weights", "smoothing_prior"] {
        for shape in [&[5][..], &[7], &[1, 6], &[]] {
            let values = Tensor::ones(shape, DType::F32, CPU).unwrap();
            let was = format!("{name}: shape {shape:?}");
            refused(
                &with(name, &values),
                &y,
                &[&was, "must be [6], a value for each class"],
            );
        }
        let integers = Tensor::ones(6, DType::U32, CPU).unwrap();
        let was = format!("{name}: u32");
        refused(&with(name, &integers), &y, &[&was, "must be a float type"]);
        for (bad, was) in [(-1.0f32, "-1"), (f32::NAN, "NaN"), (f32::INFINITY, "inf")] {
            let values = Tensor::new(&[1f32, 1.0, 0.0, bad, bad, 1.0], CPU).unwrap();
            let was = format!("{name}: class 3 has {was}");
            refused(
                &with(name, &values),
                &y,
                &[&was, "must be finite and not negative"],
            );
        }
    }
    let zeros = Tensor::zeros(6, DType::F32, CPU).unwrap();
    refused(
        &with("smoothing_prior", &zeros),
        &y,
        &[
            "smoothing_prior: 0 for every class",
            "must be positive for one",
        ],
    );
    // Those beside padding are not read.
    let mut values = vec![1f32; 6];
    values[5] = f32::NAN;
    let loss = with("class_weights", &Tensor::new(&*values, CPU).unwrap()).vocab_size(5);
    assert_close(
        scalar(&loss.forward(&logits(), &y).unwrap()),
        5f64.ln(),
        1e-6,
    );
}

#[test]
fn bad_weights_of_the_entropy() {
    let y = Tensor::zeros(4, DType::U32, CPU).unwrap();
    for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        let was = format!("entropy_weight: {bad}");
        refused(
            &CrossEntropy::new().entropy_weight(bad),
            &y,
            &[&was, "must be finite"],
        );
        let values = Tensor::new(&[1f32, -1.0, bad, bad], CPU).unwrap();
        let was = format!("entropy_weight: row 2 has {bad}");
        refused(
            &CrossEntropy::new().entropy_weight(values),
            &y,
            &[&was, "must be finite"],
        );
    }
    let values = Tensor::zeros((4, 2), DType::F32, CPU).unwrap();
    refused(
        &CrossEntropy::new().entropy_weight(&values),
        &y,
        &[
            "entropy_weight: shape [4, 2]",
            "must be broadcastable to the targets' shape [4]",
        ],
    );
    let values = Tensor::zeros(4, DType::U32, CPU).unwrap();
    refused(
        &CrossEntropy::new().entropy_weight(&values),
        &y,
        &["entropy_weight: u32", "must be a float type"],
    );
}
