//! A vocabulary in slices gives what the whole does, with the same bits on every rank; rows on several ranks add up to all of
//! them.

use std::ops::Range;

use candle_core::{D, DType, Result, Tensor, Var};
use candle_cross_entropy::{
    CrossEntropy, LossAndGrad, Reduction, RowStats, Targets, parallel::threads,
};

use crate::{
    accuracy::Accuracy,
    common::*,
    linear::{Linear, Results},
    ranks::ranks,
};

/// Classes between cuts, and the last ones.
fn slices(cuts: &[usize], vocab: usize) -> Vec<Range<usize>> {
    let starts = [&[0], cuts].concat();
    let ends = [cuts, &[vocab]].concat();
    starts.into_iter().zip(ends).map(|(a, b)| a..b).collect()
}

fn narrow(targets: &Targets, classes: &Range<usize>) -> Targets {
    match targets {
        Targets::Probabilities(t) => {
            Targets::Probabilities(t.narrow(D::Minus1, classes.start, classes.len()).unwrap())
        }
        targets => targets.clone(),
    }
}

/// What a rank gives; bits that all ranks must share first.
struct Slice {
    forward: Tensor,
    stats: RowStats,
    fused: LossAndGrad,
    without_stats: (Tensor, Tensor),
    in_place: LossAndGrad,
    backward: Tensor,
    backward_in_place: Tensor,
}

/// Every entry point of each rank against the reference of the whole. Every second rank has padding.
fn check(problem: &Problem, cuts: &[usize], reversed: bool) {
    let width = problem.logits.dims().last().copied().unwrap();
    let vocab = problem.setup.vocab.unwrap_or(width);
    let mut of_ranks = slices(cuts, vocab);
    if reversed {
        of_ranks.reverse();
    }
    let whole = Setup {
        vocab: None,
        ..problem.setup.clone()
    };
    let results = ranks(of_ranks.len(), |comm| {
        let classes = &of_ranks[comm.rank()];
        let mut logits = match problem.targets.elem_count() {
            0 => Tensor::zeros((0, classes.len()), problem.logits.dtype(), CPU).unwrap(),
            _ => problem
                .logits
                .narrow(D::Minus1, classes.start, classes.len())
                .unwrap(),
        };
        let mut loss =
            whole
                .build(problem.targets.dims())
                .vocab_shard(comm.clone(), classes.start, vocab);
        if comm.rank() % 2 == 1 {
            let padding = (Tensor::ones_like(&logits).unwrap() * f64::NAN).unwrap();
            logits = Tensor::cat(&[&logits, &padding], D::Minus1).unwrap();
            loss = loss.vocab_size(classes.len());
        }
        let targets = narrow(&problem.given(), classes);
        let (forward, stats) = loss.forward_with_stats(&logits, &targets).unwrap();
        let without = loss.forward(&logits, &targets).unwrap();
        assert_eq!(bits(&forward), bits(&without));
        let backward = |loss: CrossEntropy| {
            let parameter = Var::from_tensor(&logits).unwrap();
            let x = parameter.affine(1.0, 0.0).unwrap(); // which may be overwritten
            let loss = loss.forward(&x, &targets).unwrap();
            let gradients = loss.sum_all().unwrap().backward().unwrap();
            gradients.get(&parameter).unwrap().clone()
        };
        Slice {
            fused: loss.loss_and_grad(&logits, &targets).unwrap(),
            without_stats: loss.loss_and_grad_without_stats(&logits, &targets).unwrap(),
            in_place: loss
                .loss_and_grad_inplace(logits.copy().unwrap(), &targets)
                .unwrap(),
            backward: backward(loss.clone()),
            backward_in_place: backward(loss.clone().inplace_backward(true)),
            forward,
            stats,
        }
    });
    let same = |a: &Tensor, b: &Tensor| assert!(bits(a) == bits(b), "bits differ, {cuts:?}");
    for slice in &results {
        for loss in [
            &slice.forward,
            &slice.fused.loss,
            &slice.without_stats.0,
            &slice.in_place.loss,
        ] {
            same(loss, &results[0].forward);
        }
        for stats in [&slice.stats, &slice.fused.stats, &slice.in_place.stats] {
            assert_eq!(stats_bits(stats), stats_bits(&results[0].stats), "{cuts:?}");
        }
        same(&slice.without_stats.1, &slice.fused.grad);
        same(&slice.in_place.grad, &slice.fused.grad);
        for grad in [&slice.backward, &slice.backward_in_place] {
            // candle adds 0 to them, which −0 does not survive.
            let equal = |(a, b): (&f64, &f64)| a == b || a.is_nan() && b.is_nan();
            let (a, b) = (values(grad), values(&slice.fused.grad));
            assert!(a.iter().zip(&b).all(equal), "{cuts:?}");
        }
    }
    // The whole gradient, padding's zeros among it, of the ranks' parts.
    let mut parts: Vec<(usize, Tensor)> = Vec::new();
    for (classes, slice) in of_ranks.iter().zip(&results) {
        let grad = &slice.fused.grad;
        let count = grad.dims().last().unwrap() - classes.len();
        if count > 0 && grad.elem_count() > 0 {
            let padding = grad.narrow(D::Minus1, classes.len(), count).unwrap();
            assert!(
                values(&padding).iter().all(|g| *g == 0.0),
                "padding's gradient"
            );
        }
        parts.push((
            classes.start,
            grad.narrow(D::Minus1, 0, classes.len()).unwrap(),
        ));
    }
    parts.sort_by_key(|(start, _)| *start);
    let mut grads: Vec<Tensor> = parts.into_iter().map(|(_, grad)| grad).collect();
    if width > vocab {
        let padding = problem
            .logits
            .narrow(D::Minus1, vocab, width - vocab)
            .unwrap();
        grads.push(padding.zeros_like().unwrap());
    }
    let whole = LossAndGrad {
        loss: results[0].forward.clone(),
        grad: Tensor::cat(&grads, D::Minus1).unwrap(),
        stats: results[0].stats.clone(),
    };
    let mut accuracy = Accuracy::new(problem.logits.dtype());
    accuracy.all(problem, &whole, &problem.reference(), || {
        format!("slices at {cuts:?} of {:?}", problem.setup)
    });
}

const REDUCTIONS: [Reduction; 4] = [
    Reduction::Mean,
    Reduction::None,
    Reduction::Sum,
    Reduction::SumOver(3.5),
];

/// Cuts that leave one class, all but one, and pieces of a row that do not fall together with the slices.
fn cuts(vocab: usize) -> Vec<Vec<usize>> {
    let all = [
        vec![],
        vec![1],
        vec![vocab - 1],
        vec![vocab / 3, vocab / 3 + 1],
        vec![1, 2, vocab / 2],
    ];
    all.into_iter()
        .filter(|cuts| slices(cuts, vocab).iter().all(|slice| !slice.is_empty()))
        .collect()
}

#[test]
fn slices_give_what_the_whole_does() {
    for (s, shape) in [[4, 17], [7, 33], [3, 2100]].iter().enumerate() {
        for dtype in FLOATS {
            for (r, reduction) in REDUCTIONS.into_iter().enumerate() {
                let seed = (10 * s + r) as u64;
                let problem = Problem::everything(seed, shape, dtype, reduction);
                let vocab = problem.setup.vocab.unwrap();
                let t = if dtype == DType::BF16 {
                    DType::F16
                } else {
                    DType::F32
                };
                let problems = [
                    problem.clone(),
                    problem.clone().general(seed),
                    problem.clone().with(Kind::TopK(6), seed),
                    problem.clone().general(seed).with(Kind::TopK(3), seed),
                    problem.clone().with(Kind::Probabilities(t), seed),
                    problem.general(seed).with(Kind::Probabilities(t), seed),
                ];
                for (p, problem) in problems.iter().enumerate() {
                    let cuts = cuts(vocab);
                    // All of them, a few a problem.
                    for (c, cuts) in cuts
                        .iter()
                        .enumerate()
                        .filter(|(c, _)| (c + p + r) % 3 == 0)
                    {
                        check(problem, cuts, c % 2 == 1);
                    }
                }
            }
        }
    }
}

#[test]
fn plain_slices_give_what_the_whole_does() {
    for dtype in FLOATS {
        for vocab in [2, 31, 33, 4099] {
            let setup = Setup {
                eps: Eps::Uniform(0.1),
                ..Setup::default()
            };
            let problem = Problem::random(5, &[2, 3, vocab], dtype, setup);
            for cuts in cuts(vocab) {
                check(&problem, &cuts, false);
            }
        }
    }
}

/// A slice that is masked altogether, a masked target, a row that is, NaN and infinity in one slice, and no rows.
#[test]
fn special_values_in_slices() {
    for dtype in FLOATS {
        for softcap in [None, Some(20.0)] {
            for eps in [0.0, 0.1] {
                let setup = Setup {
                    eps: Eps::Uniform(eps),
                    reduction: Reduction::None,
                    softcap,
                    ..Setup::default()
                };
                let mut problem = Problem::random(3, &[6, 12], dtype, setup.clone());
                let mut x = values(&problem.logits);
                x[..4].fill(f64::NEG_INFINITY);
                x[12..24].fill(f64::NEG_INFINITY);
                x[2 * 12 + 9] = f64::NAN;
                x[3 * 12 + 1] = f64::INFINITY;
                x[4 * 12 + 5] = f64::NEG_INFINITY;
                problem.targets = targets(vec![5, 3, 1, 2, 5, 11], &[6], DType::I64);
                problem.logits = tensor(x, &[6, 12], dtype);
                for problem in [
                    problem.clone(),
                    problem.clone().general(1),
                    problem.clone().with(Kind::TopK(3), 1),
                    problem.with(Kind::Probabilities(DType::F32), 1),
                ] {
                    for cuts in [&[4][..], &[4, 8], &[1, 5, 6]] {
                        check(&problem, cuts, false);
                    }
                }
                check(&Problem::random(3, &[0, 12], dtype, setup), &[5], false);
            }
        }
    }
}

/// Of equal logits the first class wins, whichever rank has it and whichever order they come in.
#[test]
fn the_first_of_equals_is_predicted() {
    let problem = Problem {
        logits: tensor(vec![1.0; 12], &[2, 6], DType::F32),
        ..Problem::random(1, &[2, 6], DType::F32, Setup::default())
    };
    check(&problem, &[2, 4], false);
    check(&problem, &[2, 4], true);
}

/// A target near 1 keeps its digits in whichever slice it is.
#[test]
fn a_target_near_1() {
    for dtype in [DType::F32, DType::F64] {
        for target in [0, 5, 9] {
            let mut x = vec![0.0; 10];
            x[target] = 30.0;
            let problem = Problem {
                logits: tensor(x, &[1, 10], dtype),
                targets: targets(vec![target as i64], &[1], DType::I64),
                ..Problem::random(1, &[1, 10], dtype, Setup::default())
            };
            for cuts in [&[5][..], &[1, 9], &[6]] {
                check(&problem, cuts, false);
            }
        }
    }
}

fn check_linear(linear: &Linear, cuts: &[usize], tile: Option<usize>, budget: usize) {
    let width = linear.weight.dims()[0];
    let vocab = linear.setup.vocab.unwrap_or(width);
    let of_ranks = slices(cuts, vocab);
    let parts = ranks(of_ranks.len(), |comm| {
        let classes = &of_ranks[comm.rank()];
        let part = |values: &Tensor| values.narrow(0, classes.start, classes.len()).unwrap();
        let mut mine = linear.clone();
        mine.setup.vocab = None;
        mine.weight = part(&linear.weight);
        mine.bias = linear.bias.as_ref().map(part);
        mine.distribution = linear.distribution.as_ref().map(|t| narrow(t, classes));
        let mut loss =
            mine.loss()
                .memory_budget(budget)
                .vocab_shard(comm.clone(), classes.start, vocab);
        if let Some(bytes) = tile {
            loss = loss.tile_bytes(bytes);
        }
        mine.run(&loss)
    });
    for part in &parts {
        assert_eq!(bits(&part.loss), bits(&parts[0].loss));
        assert_eq!(stats_bits(&part.stats), stats_bits(&parts[0].stats));
        assert_eq!(bits(&part.gradients[0]), bits(&parts[0].gradients[0]));
    }
    let mut gradients = vec![parts[0].gradients[0].clone()];
    for n in 1..parts[0].gradients.len() {
        let mut of_ranks: Vec<Tensor> = parts.iter().map(|p| p.gradients[n].clone()).collect();
        if width > vocab {
            let all = [Some(&linear.weight), linear.bias.as_ref()][n - 1].unwrap();
            let padding = all.narrow(0, vocab, width - vocab).unwrap();
            of_ranks.push(padding.zeros_like().unwrap());
        }
        gradients.push(Tensor::cat(&of_ranks, 0).unwrap());
    }
    let all = Results {
        loss: parts[0].loss.clone(),
        stats: parts[0].stats.clone(),
        gradients,
    };
    linear.check(&all, &linear.exact(), &format!("slices at {cuts:?}"));
}

#[test]
fn slices_of_the_projection_give_what_the_whole_does() {
    for dtype in FLOATS {
        for (r, reduction) in REDUCTIONS.into_iter().enumerate() {
            for rows in [5, 60] {
                let seed = r as u64;
                let problem = Problem::everything(seed, &[rows, 48], dtype, reduction);
                for problem in [
                    problem.clone(),
                    problem.clone().general(seed),
                    problem.clone().with(Kind::TopK(5), seed),
                    problem.with(Kind::Probabilities(DType::F32), seed),
                ] {
                    let linear = Linear::new(problem, 24, r % 2 == 0, seed);
                    check_linear(&linear, &[13], None, usize::MAX);
                    check_linear(&linear, &[1, 20], Some(200), 0);
                }
            }
        }
    }
}

/// Without a softcap, which has logits of another type, and more than a piece of a row in a slice.
#[test]
fn plain_slices_of_the_projection_and_long_rows() {
    for dtype in FLOATS {
        let setup = Setup {
            eps: Eps::Uniform(0.1),
            z_loss: 1e-3,
            ..Setup::default()
        };
        let short = Problem::random(4, &[6, 40], dtype, setup.clone());
        let long = Problem::random(4, &[3, 5000], dtype, setup);
        for kind in [
            None,
            Some(Kind::TopK(4)),
            Some(Kind::Probabilities(DType::F32)),
        ] {
            for general in [false, true] {
                let with = |problem: &Problem| {
                    let problem = match general {
                        true => problem.clone().general(4),
                        false => problem.clone(),
                    };
                    match kind {
                        Some(kind) => problem.with(kind, 4),
                        None => problem,
                    }
                };
                check(&with(&long), &[2500], false);
                let linear = Linear::new(with(&short), 24, true, 4);
                check_linear(&linear, &[1, 17], Some(300), usize::MAX);
            }
        }
    }
}

/// A second backward, for which no tile is kept any more.
#[test]
fn a_second_backward_is_as_the_first() {
    let same = ranks(2, |comm| {
        let hidden = Var::from_tensor(&tensor(normal(&mut rng(1), 15, 1.0), &[5, 3], DType::F32))?;
        let weight = Var::from_tensor(&tensor(normal(&mut rng(2), 24, 1.0), &[8, 3], DType::F32))?;
        let first = 8 * comm.rank();
        let targets = Tensor::new(&[0u32, 15, 8, 7, 3], CPU)?;
        let loss = CrossEntropy::new().vocab_shard(comm, first, 16);
        let loss = loss.forward_linear(&hidden, &weight, None, &targets)?;
        let [a, b] = [loss.backward()?, loss.backward()?];
        let equal = |var: &Var| bits(a.get(var).unwrap()) == bits(b.get(var).unwrap());
        Result::Ok(equal(&hidden) && equal(&weight))
    });
    assert!(same.into_iter().all(|same| same.unwrap()));
}

/// Rows in parts that are anything but equal: losses and gradients of the ranks add up to those of all rows.
#[test]
fn rows_of_all_ranks_share_a_mean() {
    for dtype in [DType::F32, DType::F64] {
        let whole = Problem::everything(2, &[9, 40], dtype, Reduction::Mean);
        for whole in [
            whole.clone(),
            whole.clone().general(2),
            whole.with(Kind::TopK(4), 2),
        ] {
            let expected = whole
                .loss()
                .loss_and_grad(&whole.logits, whole.given())
                .unwrap();
            // The first has ignored rows only, one has none.
            let of_ranks = [0..1, 1..7, 7..7, 7..9];
            let parts = ranks(of_ranks.len(), |comm| {
                let rows = &of_ranks[comm.rank()];
                let part = |t: &Tensor| t.narrow(0, rows.start, rows.len()).unwrap();
                let mut setup = whole.setup.clone();
                let of_rows = |values: &[f32]| values[rows.clone()].to_vec();
                for eps in [&mut setup.eps, &mut setup.entropy] {
                    if let Eps::PerRow(values) = eps {
                        *values = of_rows(values);
                    }
                }
                setup.weights = setup.weights.as_deref().map(of_rows);
                let targets = match whole.given() {
                    Targets::TopK {
                        classes,
                        probabilities,
                    } => Targets::top_k(&part(&classes), &part(&probabilities)),
                    _ => Targets::Classes(part(&whole.targets)),
                };
                let loss = setup.build(&[rows.len()]).data_parallel(comm.clone());
                let x = Var::from_tensor(&part(&whole.logits)).unwrap();
                let forward = loss.forward(&x, &targets).unwrap();
                let backward = forward.backward().unwrap().get(&x).unwrap().clone();
                let fused = loss.loss_and_grad(&x, &targets).unwrap();
                assert_eq!(bits(&forward), bits(&fused.loss));
                // The same by a product with a projection that changes nothing.
                let vocab = setup.vocab.unwrap();
                let identity = Tensor::eye(vocab, dtype, CPU).unwrap();
                let hidden = x.narrow(1, 0, vocab).unwrap();
                let linear = setup.clone();
                let linear = Setup {
                    vocab: None,
                    ..linear
                }
                .build(&[rows.len()]);
                let linear = linear.data_parallel(comm.clone());
                let linear = linear.forward_linear(&hidden, &identity, None, &targets);
                if rows.is_empty()
                    || scalar(&forward).is_finite() && values(&hidden).iter().all(|h| h.is_finite())
                {
                    assert_close(scalar(&linear.unwrap()), scalar(&forward), 1e-6);
                }
                assert_all_close(&backward, &fused.grad, 1e-6);
                fused
            });
            let sum: f64 = parts.iter().map(|part| scalar(&part.loss)).sum();
            assert_close(sum, scalar(&expected.loss), 1e-6);
            let grads: Vec<_> = parts.iter().map(|part| part.grad.clone()).collect();
            let grads = Tensor::cat(&grads, 0).unwrap();
            assert_all_close(&grads, &expected.grad, 1e-7);
        }
    }
}

/// Four ranks, two by two: rows on two of them, each row's classes on two.
#[test]
fn both_at_once() {
    let problem = Problem::random(8, &[5, 20], DType::F32, Setup::default());
    let expected = problem.reference();
    let vocabulary = [threads(2), threads(2)];
    let data = [threads(2), threads(2)];
    let parts = ranks(4, |comm| {
        let (row_group, column) = (comm.rank() / 2, comm.rank() % 2);
        let rows = [0..2, 2..5][row_group].clone();
        let classes = [0..7, 7..20][column].clone();
        let loss = CrossEntropy::new()
            .vocab_shard(vocabulary[row_group][column].clone(), classes.start, 20)
            .data_parallel(data[column][row_group].clone());
        let part = |t: &Tensor| t.narrow(0, rows.start, rows.len()).unwrap();
        let logits = part(&problem.logits);
        let logits = logits.narrow(1, classes.start, classes.len()).unwrap();
        let result = loss.loss_and_grad(&logits, part(&problem.targets)).unwrap();
        let wanted = part(&expected.grad);
        let wanted = wanted.narrow(1, classes.start, classes.len()).unwrap();
        assert_all_close(&result.grad, &wanted, 1e-7);
        scalar(&result.loss)
    });
    assert_eq!((parts[0], parts[2]), (parts[1], parts[3]));
    assert_close(parts[0] + parts[2], scalar(&expected.loss), 1e-6);
}
