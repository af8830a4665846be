//! A row's results are the same bits from run to run, whatever stands beside it, wherever it lies in memory, and however
//! many threads work.

use crate::common::*;
use candle_core::{DType, IndexOp, Tensor, Var};
use candle_cross_entropy::{CrossEntropy, LossAndGrad, Reduction};

/// Short and long rows, of odd length too: each row then starts at another alignment.
const WIDTHS: [usize; 7] = [1, 17, 40, 301, 2049, 20_001, 50_257];

/// All bits of all entry points.
fn all_bits(loss: &CrossEntropy, logits: &Tensor, targets: &Tensor) -> Vec<Vec<u64>> {
    let var = Var::from_tensor(logits).unwrap();
    let (forward, stats) = loss.forward_with_stats(&var, targets).unwrap();
    let gradients = forward.sum_all().unwrap().backward().unwrap();
    let fused = loss.loss_and_grad(logits, targets).unwrap();
    let inplace = loss
        .loss_and_grad_inplace(logits.copy().unwrap(), targets)
        .unwrap();
    let mut all = vec![
        bits(&loss.forward(logits, targets).unwrap()),
        bits(&forward),
        bits(gradients.get(&var).unwrap()),
        bits(&fused.loss),
        bits(&fused.grad),
        bits(&inplace.loss),
        bits(&inplace.grad),
    ];
    for stats in [&stats, &fused.stats, &inplace.stats] {
        all.extend(stats_bits(stats));
    }
    all
}

fn with_threads<T: Send>(threads: usize, run: impl FnOnce() -> T + Send) -> T {
    rayon::ThreadPoolBuilder::new()
        .num_threads(threads)
        .build()
        .unwrap()
        .install(run)
}

#[test]
fn any_number_of_threads() {
    for dtype in FLOATS {
        for width in WIDTHS {
            for rows in [1, 2, 3, 13] {
                let problem =
                    Problem::everything(width as u64, &[rows, width], dtype, Reduction::Mean);
                let loss = problem.loss();
                let run = || all_bits(&loss, &problem.logits, &problem.targets);
                let want = with_threads(1, run);
                for threads in [1, 2, 3, 7] {
                    assert!(
                        with_threads(threads, run) == want,
                        "{dtype:?} {rows}×{width}, {threads} threads"
                    );
                }
                assert!(run() == want, "{dtype:?} {rows}×{width}, the global pool");
            }
        }
    }
}

/// Sums over very many rows keep their order, too.
#[test]
fn reductions_of_many_rows() {
    for dtype in FLOATS {
        for rows in [1000, 5003, 20_000] {
            for reduction in [Reduction::Sum, Reduction::Mean, Reduction::SumOver(3.0)] {
                let mut problem = Problem::random(
                    rows as u64,
                    &[rows, 5],
                    dtype,
                    Setup {
                        reduction,
                        ..Setup::default()
                    },
                );
                problem.setup.weights = Some((0..rows).map(|i| (i % 7) as f32 / 3.0).collect());
                let loss = problem.loss();
                let run = || all_bits(&loss, &problem.logits, &problem.targets);
                let want = with_threads(1, run);
                for threads in [2, 3, 7] {
                    assert!(
                        with_threads(threads, run) == want,
                        "{dtype:?} {rows}, {threads} threads"
                    );
                }
            }
        }
    }
}

fn row_bits(result: &LossAndGrad, row: usize) -> Vec<Vec<u64>> {
    let mut all = vec![bits(&result.grad.i(row).unwrap())];
    all.extend(
        stats_bits(&result.stats)
            .into_iter()
            .map(|stat| vec![stat[row]]),
    );
    all.push(vec![bits(&result.loss)[row]]);
    all
}

fn loss() -> CrossEntropy {
    CrossEntropy::new()
        .smoothing(0.1)
        .z_loss(1e-3)
        .softcap(30.0)
        .reduction(Reduction::None)
}

/// One row alone (threads share its length), and as the first, a middle and the last of 2, 5 and 64 rows (threads share
/// the rows), whose lengths put it at any alignment.
#[test]
fn neighbours_row_count_and_position() {
    for dtype in FLOATS {
        for width in WIDTHS {
            let Problem {
                logits, targets: y, ..
            } = Problem::random(3, &[1, width], dtype, Setup::default());
            let fused = |x: &Tensor, y: &Tensor| loss().loss_and_grad(x, y).unwrap();
            let backward = |x: &Tensor, y: &Tensor| {
                let var = Var::from_tensor(x).unwrap();
                let (loss, stats) = loss().forward_with_stats(&var, y).unwrap();
                let grad = loss
                    .sum_all()
                    .unwrap()
                    .backward()
                    .unwrap()
                    .get(&var)
                    .unwrap()
                    .clone();
                LossAndGrad { loss, grad, stats }
            };
            let forward = |x: &Tensor, y: &Tensor| bits(&loss().forward(x, y).unwrap());
            let (alone, alone_backward) = (
                row_bits(&fused(&logits, &y), 0),
                row_bits(&backward(&logits, &y), 0),
            );
            let alone_forward = forward(&logits, &y);
            for rows in if width > 10_000 {
                vec![2, 5]
            } else {
                vec![2, 5, 64]
            } {
                let others = Problem::random(4, &[rows, width], dtype, Setup::default());
                for at in [0, rows / 2, rows - 1] {
                    let place = |all: &Tensor, one: &Tensor| {
                        let parts = [
                            all.narrow(0, 0, at).unwrap(),
                            one.clone(),
                            all.narrow(0, at + 1, rows - at - 1).unwrap(),
                        ];
                        let parts: Vec<_> = parts
                            .into_iter()
                            .filter(|p| p.dim(0).unwrap() > 0)
                            .collect();
                        Tensor::cat(&parts, 0).unwrap()
                    };
                    let (x, y) = (place(&others.logits, &logits), place(&others.targets, &y));
                    let context = format!("{dtype:?} row {at} of {rows}×{width}");
                    assert!(
                        row_bits(&fused(&x, &y), at) == alone,
                        "loss_and_grad {context}"
                    );
                    assert!(
                        row_bits(&backward(&x, &y), at) == alone_backward,
                        "backward {context}"
                    );
                    assert!(forward(&x, &y)[at] == alone_forward[0], "forward {context}");
                }
            }
        }
    }
}

#[test]
fn alignment() {
    for dtype in FLOATS {
        for width in [17, 40, 301, 20_001] {
            let Problem {
                logits, targets, ..
            } = Problem::random(5, &[2, width], dtype, Setup::default());
            let want = all_bits(&loss(), &logits, &targets);
            for offset in [1, 2, 3, 5, 8, 13] {
                let memory = Tensor::zeros((2, width + 16), dtype, CPU).unwrap();
                let memory = memory
                    .slice_assign(&[0..2, offset..offset + width], &logits)
                    .unwrap();
                let view = memory.narrow(1, offset, width).unwrap();
                let fused = loss().loss_and_grad(&view, &targets).unwrap();
                assert!(
                    bits(&fused.grad) == want[4] && bits(&fused.loss) == want[3],
                    "{dtype:?} {width} +{offset}"
                );
                assert!(
                    bits(&loss().forward(&view, &targets).unwrap()) == want[0],
                    "{dtype:?} {width} +{offset}"
                );
                let inplace = loss().loss_and_grad_inplace(view, &targets).unwrap();
                assert!(
                    bits(&inplace.grad) == want[6],
                    "{dtype:?} {width} +{offset}"
                );
            }
        }
    }
}

/// What an option does to one row does not depend on how it is given, and rows see their own value only.
#[test]
fn uniform_and_per_row_values_agree() {
    for dtype in FLOATS {
        for width in [17, 2049] {
            let Problem {
                logits, targets, ..
            } = Problem::random(6, &[3, width], dtype, Setup::default());
            let plain = CrossEntropy::new().reduction(Reduction::None);
            let ones = Tensor::ones(3, DType::F32, CPU).unwrap();
            for eps in [0.0f32, 0.125, 1.0] {
                let uniform = all_bits(&plain.clone().smoothing(eps), &logits, &targets);
                let per_row = plain.clone().smoothing((&ones * f64::from(eps)).unwrap());
                assert!(all_bits(&per_row, &logits, &targets) == uniform);
                assert!(all_bits(&per_row.row_weights(&ones), &logits, &targets) == uniform);
            }
            let mixed = plain
                .clone()
                .smoothing(Tensor::new(&[0.5f32, 0.125, 0.0], CPU).unwrap());
            let got = mixed.loss_and_grad(&logits, &targets).unwrap();
            let want = plain
                .smoothing(0.125)
                .loss_and_grad(&logits, &targets)
                .unwrap();
            assert!(row_bits(&got, 1) == row_bits(&want, 1));
        }
    }
}

/// Logits and offset are multiples of 1/16 that the type represents: not a bit of loss, gradient, entropy or any other
/// statistic but the log-sum-exp changes.
#[test]
fn representable_offsets_change_nothing() {
    for (dtype, range, offsets) in [
        (DType::F64, 128, vec![1.0, -64.0, 4096.0, 1e9]),
        (DType::F32, 128, vec![1.0, -64.0, 4096.0, -65536.0]),
        (DType::F16, 128, vec![1.0, -32.0, 100.0]),
        (DType::BF16, 64, vec![1.0, -4.0, 8.0]),
    ] {
        for width in [5, 40, 301, 20_001] {
            let whole: Vec<i64> = (0..3 * width as i64)
                .map(|i| (i * i * 31 + i * 7) % range - range / 2)
                .collect();
            let row = |offset: f64| {
                let x: Vec<f64> = whole.iter().map(|&v| v as f64 / 16.0 + offset).collect();
                let logits = tensor(x.clone(), &[3, width], dtype);
                assert_eq!(values(&logits), x, "representable");
                logits
            };
            let y = targets(vec![0, 3, width as i64 - 1], &[3], DType::I64);
            for eps in [0.0, 0.25] {
                let loss = CrossEntropy::new()
                    .smoothing(eps)
                    .reduction(Reduction::None);
                let results = |offset| {
                    let mut all = all_bits(&loss, &row(offset), &y);
                    for n in [20, 14, 8] {
                        all.remove(n); // the log-sum-exp of each entry point
                    }
                    all
                };
                let want = results(0.0);
                for &offset in &offsets {
                    let got = results(offset);
                    let differ: Vec<_> = (0..want.len()).filter(|&n| got[n] != want[n]).collect();
                    assert!(
                        differ.is_empty(),
                        "{dtype:?} {width} + {offset}, ε {eps}: results {differ:?}"
                    );
                }
            }
        }
    }
}
