//! Ranks that are threads: a vocabulary in slices gives what the whole does, with the same bits on every rank; rows on several
//! ranks add up to all of them; whatever a rank does wrong is an error on every rank, and none waits.

use std::{
    ops::Range,
    process::abort,
    sync::{
        Arc,
        mpsc::{self, RecvTimeoutError},
    },
    thread,
    time::Duration,
};

use candle_core::{D, DType, Result, Tensor, Var};
use candle_cross_entropy::{
    CrossEntropy, LossAndGrad, Reduction, RowStats, Targets,
    parallel::{Communicator, threads},
};

use crate::{
    common::*,
    linear::{Linear, Results},
};

type Comm = Arc<dyn Communicator>;

/// What `f` gives on each of so many ranks, in rank order. A rank that waits for a minute ends the program: a test must not.
fn ranks<R: Send>(size: usize, f: impl Fn(Comm) -> R + Sync) -> Vec<R> {
    let (done, end) = mpsc::channel();
    thread::spawn(move || {
        if end.recv_timeout(Duration::from_secs(60)) == Err(RecvTimeoutError::Timeout) {
            eprintln!("a rank waits for another one");
            abort();
        }
    });
    let results = thread::scope(|scope| {
        let f = &f;
        let spawn = |comm| scope.spawn(move || f(comm));
        let handles: Vec<_> = threads(size).into_iter().map(spawn).collect();
        let join = |handle: thread::ScopedJoinHandle<R>| handle.join().expect("no panic");
        handles.into_iter().map(join).collect()
    });
    let _ = done.send(()); // whoever waits may be gone
    results
}

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

/// Each rank's error.
fn errors(size: usize, f: impl Fn(Comm) -> Result<()> + Sync) -> Vec<String> {
    let results = ranks(size, f);
    let message = |result: Result<()>| result.expect_err("an error on every rank").to_string();
    results.into_iter().map(message).collect()
}

#[track_caller]
fn assert_all_say(errors: &[String], parts: &[&str]) {
    for error in errors {
        for part in parts {
            assert!(error.contains(part), "{error:?} must say {part:?}");
        }
    }
}

/// Logits (2, `count`) of zeros, targets 0 and 1.
fn simple(count: usize) -> (Tensor, Tensor) {
    (
        Tensor::zeros((2, count), DType::F32, CPU).unwrap(),
        Tensor::new(&[0u32, 1], CPU).unwrap(),
    )
}

#[test]
fn slices_that_do_not_cover_the_vocabulary_once_are_an_error_everywhere() {
    let run = |firsts: [usize; 3], vocabulary: [usize; 3]| {
        errors(3, |comm| {
            let (logits, targets) = simple(4);
            let (first, vocabulary) = (firsts[comm.rank()], vocabulary[comm.rank()]);
            let loss = CrossEntropy::new().vocab_shard(comm, first, vocabulary);
            loss.loss_and_grad_inplace(logits, &targets).map(drop)
        })
    };
    let say = |firsts, vocabulary, parts: &[&str]| assert_all_say(&run(firsts, vocabulary), parts);
    say(
        [0, 4, 9],
        [13; 3],
        &["no rank has class 8", "rank 2 begins at 9"],
    );
    say(
        [0, 4, 8],
        [13; 3],
        &["no rank has class 12 of a vocabulary of 13"],
    );
    say(
        [1, 5, 9],
        [13; 3],
        &["no rank has class 0", "rank 0 begins at 1"],
    );
    say([0, 4, 7], [12; 3], &["ranks 1 and 2 both have class 7"]);
    say([8, 0, 0], [12; 3], &["ranks 1 and 2 both have class 0"]);
    say(
        [0, 4, 8],
        [12, 12, 13],
        &["vocabulary is 13 on rank 2, 12 on rank 0"],
    );
    // The last one's own arguments are wrong: it says how, the others that it has failed.
    let errors = run([0, 4, 9], [12; 3]);
    assert!(
        errors[2].contains("4 classes from 9 on of a vocabulary of 12"),
        "{errors:?}"
    );
    assert_all_say(&errors[..2], &["vocab_shard", "rank 2", "has failed"]);
}

#[test]
fn arguments_that_differ_are_an_error_everywhere() {
    type Change = fn(CrossEntropy, Tensor) -> (CrossEntropy, Targets);
    fn prior() -> Tensor {
        Tensor::new(&[1f32, 2.0, 0.5, 1.0, 1.0, 1.0, 1.0, 1.0], CPU).unwrap()
    }
    let cases: [(Change, &str); 11] = [
        (
            |loss, t| (loss.z_loss(0.5), t.into()),
            "z_loss is 0.5 on rank 1, 0 on rank 0",
        ),
        (
            |loss, t| (loss.softcap(8.0), t.into()),
            "softcap is 8 on rank 1, 0 on rank 0",
        ),
        (
            |loss, t| (loss.logit_scale(2.0), t.into()),
            "logit_scale is 2 on rank 1, 1 on rank 0",
        ),
        (
            |loss, t| (loss.ignore_index(7), t.into()),
            "ignore_index is 7 on rank 1, -100 on rank 0",
        ),
        (
            |loss, t| (loss.reduction(Reduction::Sum), t.into()),
            "reduction on rank 1",
        ),
        (
            |loss, t| (loss.smoothing(0.1), t.into()),
            "smoothing on rank 1",
        ),
        (
            |loss, t| {
                (
                    loss.row_weights(&Tensor::new(&[1f32, 0.5], CPU).unwrap()),
                    t.into(),
                )
            },
            "row_weights on rank 1",
        ),
        (
            |loss, t| (loss, (t + 1.0).unwrap().into()),
            "targets on rank 1",
        ),
        (|loss, t| (loss.class_weights(&prior()), t.into()), "rank 1"),
        (
            |loss, t| (loss.smoothing_prior(&prior()), t.into()),
            "rank 1",
        ),
        (|loss, t| (loss.entropy_weight(0.1), t.into()), "rank 1"),
    ];
    for (change, says) in cases {
        let errors = errors(2, |comm| {
            let (logits, targets) = simple(4);
            let rank = comm.rank();
            let loss = CrossEntropy::new().vocab_shard(comm, 4 * rank, 8);
            let (loss, targets) = match rank {
                1 => change(loss, targets),
                _ => (loss, targets.into()),
            };
            loss.forward(&logits, targets).map(drop)
        });
        assert_all_say(&errors[..1], &["vocab_shard", says]);
        assert!(
            errors[1].contains("rank 1") || errors[1].contains("row 1"),
            "{errors:?}"
        );
    }
    // General both, but not alike.
    for (name, change) in [
        (
            "class_weights",
            (|l, u| l.class_weights(u)) as fn(CrossEntropy, &Tensor) -> CrossEntropy,
        ),
        ("smoothing_prior", |l, u| l.smoothing_prior(u)),
        ("entropy_weight", |l, u| {
            l.entropy_weight(u.narrow(0, 1, 2).unwrap())
        }),
    ] {
        let errors = errors(2, |comm| {
            let (logits, targets) = simple(4);
            let rank = comm.rank();
            let loss = CrossEntropy::new().vocab_shard(comm, 4 * rank, 8);
            let values = (prior() * (1.0 + rank as f64 * prior().to_vec1::<f32>()?[2] as f64))?;
            let values = match rank {
                0 => values,
                _ => Tensor::cat(&[&values.narrow(0, 1, 7)?, &values.narrow(0, 0, 1)?], 0)?,
            };
            change(loss, &values).forward(&logits, &targets).map(drop)
        });
        assert_all_say(&errors, &["vocab_shard", name, "on rank 1"]);
    }
    // Statistics on one rank alone, rows of another number, logits of another type.
    let run = |f: fn(CrossEntropy, usize) -> Result<()>| {
        errors(2, |comm| {
            let rank = comm.rank();
            f(CrossEntropy::new().vocab_shard(comm, 4 * rank, 8), rank)
        })
    };
    let errors = run(|loss, rank| {
        let (logits, targets) = simple(4);
        match rank {
            0 => loss.forward(&logits, &targets).map(drop),
            _ => loss.forward_with_stats(&logits, &targets).map(drop),
        }
    });
    assert_all_say(&errors, &["vocab_shard", "rank 1"]);
    let errors = run(|loss, rank| {
        let logits = Tensor::zeros((2 + rank, 4), DType::F32, CPU)?;
        let targets = Tensor::zeros(2 + rank, DType::U32, CPU)?;
        loss.forward(&logits, &targets).map(drop)
    });
    assert_all_say(&errors, &["vocab_shard", "rank 1"]);
    let errors = run(|loss, rank| {
        let logits = Tensor::zeros((2, 4), [DType::F32, DType::F64][rank], CPU)?;
        loss.forward(&logits, simple(4).1).map(drop)
    });
    assert_all_say(&errors, &["type of the logits on rank 1"]);
}

/// Rows that ranks leave out of the products, as they are ignored or have no weight, must be the same ones.
#[test]
fn other_rows_that_count_are_an_error() {
    type Change = fn(CrossEntropy, usize) -> (CrossEntropy, [i64; 4]);
    let cases: [Change; 3] = [
        |loss, rank| (loss, [[1, 2, 3, -100], [-100, 1, 2, 3]][rank]),
        |loss, rank| {
            let weights = Tensor::new(
                [[1f32, 0.0, 1.0, 1.0], [0.0, 1.0, 1.0, 1.0]][rank].as_slice(),
                CPU,
            );
            (loss.row_weights(&weights.unwrap()), [1, 1, 2, 3])
        },
        |loss, rank| (loss, [[1, 2, 3, 4], [1, 2, 3, 5]][rank]),
    ];
    for change in cases {
        let errors = errors(2, |comm| {
            let rank = comm.rank();
            let hidden = Tensor::ones((4, 3), DType::F32, CPU)?;
            let weight = Tensor::ones((4, 3), DType::F32, CPU)?;
            let loss = CrossEntropy::new().vocab_shard(comm, 4 * rank, 8);
            let (loss, targets) = change(loss, rank);
            let targets = Tensor::new(targets.as_slice(), CPU)?;
            loss.forward_linear(&hidden, &weight, None, &targets)
                .map(drop)
        });
        assert_all_say(&errors, &["vocab_shard", "on rank 1: not what rank 0 has"]);
    }
}

/// One rank of four, in two groups, fails: both of its groups hear of it, and so does the fourth.
#[test]
fn a_rank_of_two_groups_fails() {
    for probabilities in [false, true] {
        let vocabulary = [threads(2), threads(2)];
        let data = [threads(2), threads(2)];
        let (vocabulary, data) = (&vocabulary, &data);
        for error in errors(4, |comm| {
            let (group, column) = (comm.rank() / 2, comm.rank() % 2);
            let loss = CrossEntropy::new()
                .vocab_shard(vocabulary[group][column].clone(), 3 * column, 6)
                .data_parallel(data[column][group].clone());
            let logits = Tensor::zeros((1, 3), DType::F32, CPU)?;
            let targets: Targets = match probabilities {
                true => Tensor::new(
                    &[[0.5f32, if comm.rank() == 3 { -1.0 } else { 0.0 }, 0.0]],
                    CPU,
                )?
                .into(),
                false => Tensor::new(&[if group == 1 { 60u32 } else { 2 }], CPU)?.into(),
            };
            loss.forward(&logits, targets).map(drop)
        }) {
            assert!(error.contains("targets: row 0"), "{error}");
        }
    }
}

#[test]
fn rows_in_parallel_agree_on_what_is_done() {
    let run = |f: fn(CrossEntropy, usize) -> Result<()>| {
        errors(2, |comm| {
            let rank = comm.rank();
            f(CrossEntropy::new().data_parallel(comm), rank)
        })
    };
    let errors = run(|loss, rank| {
        let reduction = [Reduction::Mean, Reduction::Sum][rank];
        loss.reduction(reduction)
            .forward(&simple(4).0, simple(4).1)
            .map(drop)
    });
    assert_all_say(&errors, &["data_parallel: reduction on rank 1"]);
    let errors = run(|loss, rank| {
        let reduction = Reduction::SumOver([2.0, 3.0][rank]);
        loss.reduction(reduction)
            .forward(&simple(4).0, simple(4).1)
            .map(drop)
    });
    assert_all_say(&errors, &["data_parallel: reduction on rank 1"]);
    let errors = run(|loss, rank| match rank {
        0 => loss.forward(&simple(4).0, simple(4).1).map(drop),
        _ => loss
            .forward(&simple(4).0, Tensor::ones((2, 4), DType::F32, CPU)?)
            .map(drop),
    });
    assert_all_say(&errors, &["data_parallel: form of the targets on rank 1"]);
    // Seen as it is used, and told then.
    let errors = run(|loss, rank| {
        let t = Tensor::full([0.25f32, -1.0][rank], (2, 4), CPU)?;
        loss.loss_and_grad(&simple(4).0, &t).map(drop)
    });
    assert_all_say(&errors, &["targets: row 0 has probability -1 for class 0"]);
}

/// A hidden gradient that one rank alone would sum would wait for ever.
#[test]
fn hidden_states_are_tracked_on_all_ranks_or_none() {
    let run = |tracked: [bool; 2]| {
        ranks(2, |comm| {
            let hidden = Var::ones((2, 3), DType::F32, CPU)?;
            let hidden = match tracked[comm.rank()] {
                true => hidden.as_tensor().clone(),
                false => hidden.as_tensor().detach(),
            };
            let weight = Var::ones((4, 3), DType::F32, CPU)?;
            let loss = CrossEntropy::new().vocab_shard(comm.clone(), 4 * comm.rank(), 8);
            let loss = loss.forward_linear(&hidden, &weight, None, simple(4).1)?;
            let gradients = loss.backward()?;
            Result::Ok(gradients.get(&weight).is_some())
        })
    };
    for result in run([true, false]) {
        let error = result.expect_err("an error on every rank").to_string();
        assert!(
            error.contains("gradient of the hidden states on rank 1"),
            "{error}"
        );
    }
    for tracked in [[true; 2], [false; 2]] {
        assert!(run(tracked).into_iter().all(|result| result.unwrap()));
    }
}

/// Bad input on one rank: its own words there, and on the others that it has failed, and why where it knew its rows.
#[test]
fn a_rank_that_fails_keeps_no_other_waiting() {
    type Call = fn(CrossEntropy, bool) -> Result<()>;
    let cases: [(Call, &str, &str); 6] = [
        (
            |loss, bad| {
                let targets = Tensor::new(&[0u32, if bad { 70 } else { 1 }], CPU)?;
                loss.forward(&simple(4).0, &targets).map(drop)
            },
            "targets: row 1 has 70",
            "rank 1 failed: targets: row 1 has 70",
        ),
        (
            |loss, bad| {
                let smoothing = Tensor::new(&[if bad { 2f32 } else { 0.0 }, 0.0], CPU)?;
                let (logits, targets) = simple(4);
                loss.smoothing(smoothing)
                    .loss_and_grad(&logits, &targets)
                    .map(drop)
            },
            "smoothing: row 0 has 2",
            "rank 1 failed: smoothing: row 0 has 2",
        ),
        (
            |loss, bad| {
                let targets = Tensor::zeros(if bad { 3 } else { 2 }, DType::U32, CPU)?;
                loss.forward(&simple(4).0, &targets).map(drop)
            },
            "targets: shape [3]",
            "rank 1",
        ),
        (
            |loss, bad| {
                let (logits, targets) = simple(4);
                let logits = if bad {
                    logits.narrow(0, 0, 1)?.broadcast_as((2, 4))?
                } else {
                    logits
                };
                loss.loss_and_grad_inplace(logits, &targets).map(drop)
            },
            "overlap",
            "rank 1",
        ),
        (
            |loss, bad| {
                let hidden = Tensor::zeros((2, 3), DType::F32, CPU)?;
                let weight = Tensor::zeros((4, if bad { 5 } else { 3 }), DType::F32, CPU)?;
                loss.forward_linear(&hidden, &weight, None, simple(4).1)
                    .map(drop)
            },
            "weight: shape [4, 5]",
            "rank 1",
        ),
        (
            |loss, bad| {
                let hidden = Tensor::zeros((2, 3), DType::F32, CPU)?;
                let weight = Tensor::zeros((4, 3), DType::F32, CPU)?;
                let targets = Tensor::new(&[if bad { 80u32 } else { 7 }, 0], CPU)?;
                loss.forward_linear(&hidden, &weight, None, &targets)
                    .map(drop)
            },
            "targets: row 0 has 80",
            "rank 1",
        ),
    ];
    for (call, own, others) in cases {
        for data_parallel in [false, true] {
            let errors = errors(3, |comm| {
                let rank = comm.rank();
                let loss = match data_parallel {
                    true => CrossEntropy::new().data_parallel(comm),
                    false => CrossEntropy::new().vocab_shard(comm, 4 * rank, 12),
                };
                // With rows in parallel a vocabulary of four.
                call(loss, rank == 1)
            });
            if data_parallel && errors[0].contains("must be 0 to 3") {
                continue; // the vocabulary of this case is larger
            }
            assert!(errors[1].contains(own), "{errors:?}");
            for error in [&errors[0], &errors[2]] {
                assert!(error.contains(others), "{errors:?}");
                assert!(
                    error.contains(["vocab_shard", "data_parallel"][usize::from(data_parallel)]),
                    "{error}"
                );
            }
        }
    }
    // A probability is seen where it is used: on the rank that has it, and on the others by what it does.
    let errors = errors(2, |comm| {
        let rank = comm.rank();
        let t = Tensor::new(
            &[[0.5f32, 0.0], [0.5, if rank == 1 { -1.0 } else { 0.0 }]],
            CPU,
        )?;
        let logits = Tensor::zeros((2, 2), DType::F32, CPU)?;
        CrossEntropy::new()
            .vocab_shard(comm, 2 * rank, 4)
            .forward(&logits, &t)
            .map(drop)
    });
    assert_all_say(&errors[1..], &["row 1 has probability -1 for class 3"]);
    assert_all_say(
        &errors[..1],
        &["row 1 has", "a bad one for a class of another rank"],
    );
}

#[test]
fn the_reference_is_of_whole_rows() {
    for error in errors(2, |comm| {
        let (logits, targets) = simple(4);
        let loss = CrossEntropy::new();
        let loss = match comm.rank() {
            0 => loss.data_parallel(comm),
            _ => loss.vocab_shard(comm, 0, 4),
        };
        loss.reference(&logits, &targets).map(drop)
    }) {
        assert!(error.contains("reference"), "{error}");
    }
}

#[test]
fn threads_gather_in_rank_order_and_sum() {
    for size in [1, 2, 3, 5] {
        for dtype in FLOATS {
            let results = ranks(size, |comm| {
                assert_eq!(comm.size(), size);
                let mine = (Tensor::ones((2, 3), dtype, CPU)? * (1.0 + comm.rank() as f64))?;
                let mut last = None;
                // Round after round, some ranks faster than others.
                for round in 0..50 {
                    if (round + comm.rank()) % 7 == 0 {
                        thread::sleep(Duration::from_micros(200));
                    }
                    let all = comm.all_gather(&(&mine + round as f64)?)?;
                    let sum = comm.all_reduce_sum(&mine)?;
                    assert_eq!(all.dims(), [size, 2, 3]);
                    for rank in 0..size {
                        let wanted = 1.0 + rank as f64 + round as f64;
                        assert!(values(&all.get(rank)?).iter().all(|v| *v == wanted));
                    }
                    last = Some(sum);
                }
                Result::Ok(last.expect("there were rounds"))
            });
            for sum in results {
                let sum = sum.unwrap();
                assert_eq!((sum.dtype(), sum.dims()), (dtype, &[2, 3][..]));
                let wanted = (size * (size + 1) / 2) as f64;
                assert!(values(&sum).iter().all(|v| *v == wanted));
            }
        }
    }
}

/// What a rank gives may change as soon as it has the result.
#[test]
fn what_is_given_is_a_copy() {
    for results in ranks(3, |comm| {
        let var = Var::from_tensor(&Tensor::full(comm.rank() as f32, 100_000, CPU)?)?;
        for _ in 0..30 {
            let mean = (comm.all_reduce_sum(&var)? / comm.size() as f64)?;
            assert!(values(&mean).iter().all(|m| *m == 1.0));
            var.set(&(mean + (comm.rank() as f64 - 1.0))?)?;
        }
        let all = comm.all_gather(&var)?;
        var.set(&var.zeros_like()?)?;
        Result::Ok(values(&all))
    }) {
        let all = results.unwrap();
        assert!(
            all.chunks(100_000)
                .zip([0.0, 1.0, 2.0])
                .all(|(part, v)| part.iter().all(|x| *x == v))
        );
    }
    for sum in ranks(1, |comm| {
        let var = Var::ones(2, DType::F32, CPU)?;
        var.set(&comm.all_reduce_sum(&var)?)?;
        Result::Ok(values(&var))
    }) {
        assert_eq!(sum.unwrap(), [1.0, 1.0]);
    }
}

/// 256 + 1 + 1 + … in bf16 would stay 256.
#[test]
fn sums_of_narrow_types_are_rounded_once() {
    for sum in ranks(5, |comm| {
        let mine = if comm.rank() == 0 { 256f32 } else { 1.0 };
        let mine = Tensor::new(&[mine], CPU)?.to_dtype(DType::BF16)?;
        comm.all_reduce_sum(&mine)
    }) {
        assert_eq!(values(&sum.unwrap()), [260.0]);
    }
}

#[test]
fn tensors_that_differ_and_ranks_that_are_gone_are_errors() {
    let errors_of = |f: fn(Comm) -> Result<Tensor>| errors(3, |comm| f(comm).map(drop));
    let errors = errors_of(|comm| {
        let shape = if comm.rank() == 2 { (1, 4) } else { (2, 2) };
        comm.all_gather(&Tensor::zeros(shape, DType::F32, CPU)?)
    });
    assert_all_say(
        &errors,
        &["rank 2 gave f32 of shape [1, 4], rank 0 f32 of shape [2, 2]"],
    );
    let errors = errors_of(|comm| {
        let dtype = if comm.rank() == 1 {
            DType::F64
        } else {
            DType::F32
        };
        comm.all_reduce_sum(&Tensor::zeros(2, dtype, CPU)?)
    });
    assert_all_say(&errors, &["rank 1 gave f64", "rank 0 f32"]);
    // One leaves after the first round.
    let left = ranks(3, |comm| {
        let mine = Tensor::zeros(1, DType::F32, CPU)?;
        comm.all_gather(&mine)?;
        match comm.rank() {
            1 => Ok(mine),
            _ => comm.all_gather(&mine),
        }
    });
    assert!(left[1].is_ok());
    for result in [&left[0], &left[2]] {
        let error = result.as_ref().expect_err("it is gone").to_string();
        assert!(error.contains("gone"), "{error}");
    }
}
