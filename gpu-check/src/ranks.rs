//! Ranks that are threads of this process and share the device: slices of a vocabulary, parts of a batch, and what they do wrong.

use std::{ops::Range, sync::Arc, thread};

use anyhow::{Result, anyhow, ensure};
use candle_core::{D, DType, Device, Tensor, Var};
use candle_cross_entropy::{
    CrossEntropy, LossAndGrad, Reduction, RowStats,
    parallel::{Communicator, threads},
};

use crate::{
    cases::{Case, Layout, OPTIONS, REDUCTIONS, values},
    report::{Report, Worst},
    targets::targets_on,
};

/// Classes, and where the slices of all ranks begin, in rank order.
const SHAPES: &[(usize, &[usize])] = &[
    (33, &[0, 20, 7]),     // not in the order of their classes
    (2, &[1, 0]),          // one class each
    (4099, &[0, 1, 2050]), // uneven; rows at every address
    (1000, &[0]),          // one rank
];

pub fn run(device: &Device, reduced: bool, report: &mut Report) {
    let shapes = if reduced { &SHAPES[..2] } else { SHAPES };
    for dtype in [DType::F32, DType::F16, DType::BF16] {
        for options in OPTIONS {
            let name = format!("ranks {} {}", dtype.as_str(), options.name);
            report.numbers(&name, || {
                let mut worst = Worst::default();
                for (i, &(vocab, first_classes)) in shapes.iter().enumerate() {
                    let reduction = REDUCTIONS[i % 4];
                    let layout = Layout::Contiguous;
                    let case = Case::new(dtype, *options, vocab, layout, reduction, i);
                    worst.merge(slices(&case, vocab, first_classes, device)?);
                }
                Ok(worst)
            });
        }
    }
    report.holds("ranks with rows of one batch", || rows_of_a_batch(device));
    report.holds("ranks that differ", || mistakes(device));
}

/// What `f` gives on each of so many ranks, in rank order.
pub fn on_ranks<R: Send>(
    count: usize,
    f: impl Fn(Arc<dyn Communicator>) -> Result<R> + Sync,
) -> Vec<Result<R>> {
    thread::scope(|scope| {
        let spawn = |comm| scope.spawn(|| f(comm));
        let handles: Vec<_> = threads(count).into_iter().map(spawn).collect();
        let join = |handle: thread::ScopedJoinHandle<Result<R>>| match handle.join() {
            Ok(result) => result,
            Err(_) => Err(anyhow!("a rank panicked")),
        };
        handles.into_iter().map(join).collect()
    })
}

/// The classes of the rank whose first one is `first`.
pub fn classes_of(first: usize, first_classes: &[usize], vocab: usize) -> Range<usize> {
    let after = first_classes.iter().copied().filter(|&other| other > first);
    first..after.min().unwrap_or(vocab)
}

/// Slices side by side, in the order of their classes.
pub fn whole<'a>(
    slices: impl IntoIterator<Item = &'a Tensor>,
    first_classes: &[usize],
    dim: usize,
) -> Result<Tensor> {
    let mut slices: Vec<_> = first_classes.iter().zip(slices).collect();
    slices.sort_by_key(|(first, _)| **first);
    let slices: Vec<&Tensor> = slices.into_iter().map(|(_, slice)| slice).collect();
    Ok(Tensor::cat(&slices, dim)?)
}

/// What a rank has of a case.
struct Slice {
    fused: LossAndGrad,
    forward: (Tensor, RowStats),
    without_stats: (Tensor, Tensor),
    backward: Tensor,
}

/// Every entry point. Slices are views: rows as long as the whole vocabulary's apart.
fn slices(case: &Case, vocab: usize, first_classes: &[usize], device: &Device) -> Result<Worst> {
    let width = case.logits.dim(D::Minus1)?;
    let (loss, logits) = (case.loss_on(device)?, case.logits.to_device(device)?);
    let results = on_ranks(first_classes.len(), |comm| {
        let first = first_classes[comm.rank()];
        let classes = classes_of(first, first_classes, vocab);
        let columns = if classes.end == vocab {
            width
        } else {
            classes.end
        } - first;
        // Memory of its own, so that no rank waits for another's lock on it.
        let logits = logits.copy()?.narrow(D::Minus1, first, columns)?;
        let targets = targets_on(&case.given.of_classes(classes.clone())?.targets, device)?;
        let loss = (loss.clone())
            .vocab_size(classes.len())
            .vocab_shard(comm, first, vocab);
        let parameter = Var::from_tensor(&logits)?;
        let of_parameter = loss.forward(&parameter, &targets)?;
        let scalar = match of_parameter.rank() {
            0 => of_parameter, // candle has no sum of a scalar on CUDA
            _ => of_parameter.sum_all()?,
        };
        let mut gradients = scalar.backward()?;
        Ok(Slice {
            backward: gradients
                .remove(&parameter)
                .ok_or_else(|| anyhow!("no gradient"))?,
            forward: loss.forward_with_stats(&logits, &targets)?,
            without_stats: loss.loss_and_grad_without_stats(&logits, &targets)?,
            fused: loss.loss_and_grad_inplace(logits, &targets)?,
        })
    });
    let results: Vec<Slice> = results.into_iter().collect::<Result<_>>()?;
    let expected = case.expected()?;
    let mut worst = Worst::default();
    let first = &results[0];
    for slice in &results {
        let losses = [&slice.fused.loss, &slice.forward.0, &slice.without_stats.0];
        for loss in losses {
            ensure!(
                bits(loss)? == bits(&first.fused.loss)?,
                "losses differ in bits"
            );
        }
        for (a, b) in all(&slice.fused.stats)
            .into_iter()
            .zip(all(&first.forward.1))
        {
            ensure!(bits(a)? == bits(b)?, "statistics differ in bits");
        }
    }
    expected.see_loss(&mut worst, "loss", &first.fused.loss)?;
    expected.see_stats(&mut worst, "statistics", &first.fused.stats)?;
    for (what, gradient) in [
        (
            "gradient in place",
            (|slice| &slice.fused.grad) as fn(&Slice) -> &Tensor,
        ),
        ("gradient", |slice| &slice.without_stats.1),
        ("backward", |slice| &slice.backward),
    ] {
        let gradient = whole(results.iter().map(gradient), first_classes, 2)?;
        expected.see_grad(&mut worst, what, &gradient, &|_| 1.0)?;
    }
    Ok(worst)
}

pub fn all(stats: &RowStats) -> [&Tensor; 6] {
    let RowStats {
        nll,
        lse,
        entropy,
        max_prob,
        grad_norm_sq,
        predicted,
    } = stats;
    [nll, lse, entropy, max_prob, grad_norm_sq, predicted]
}

pub fn bits(tensor: &Tensor) -> Result<Vec<u64>> {
    Ok(values(tensor)?.into_iter().map(f64::to_bits).collect())
}

/// A mean over the rows of all ranks, of which one has few, one many and one none: parts of the loss add up to the whole's, and so
/// does every gradient.
fn rows_of_a_batch(device: &Device) -> Result<String> {
    let (rows, vocab, cuts) = (9, 40, [0usize, 2, 9, 9]);
    let logits = Tensor::randn(0f32, 2.0, (rows, vocab), device)?;
    let targets: Vec<i64> = (0..rows as i64)
        .map(|i| if i == 3 { -100 } else { 4 * i })
        .collect();
    let targets = Tensor::from_vec(targets, rows, device)?;
    let weights: Vec<f32> = (0..rows).map(|i| 0.5 + i as f32).collect();
    let weights = Tensor::from_vec(weights, rows, device)?;
    let loss = CrossEntropy::new().smoothing(0.1);
    let expected = (loss.clone().row_weights(&weights)).loss_and_grad(&logits, &targets)?;
    let results = on_ranks(3, |comm| {
        let (start, end) = (cuts[comm.rank()], cuts[comm.rank() + 1]);
        let part = |of: &Tensor| of.narrow(0, start, end - start);
        let (logits, targets) = (part(&logits)?, part(&targets)?);
        let loss = loss
            .clone()
            .row_weights(&part(&weights)?)
            .data_parallel(comm);
        let fused = loss.loss_and_grad(&logits, &targets)?;
        if end == start {
            return Ok((loss.forward(&logits, &targets)?, None, fused)); // candle has no variable of nothing on CUDA
        }
        let parameter = Var::from_tensor(&logits)?;
        let forward = loss.forward(&parameter, &targets)?;
        let gradient = forward.backward()?.remove(&parameter);
        Ok((forward, gradient, fused))
    });
    let results = results.into_iter().collect::<Result<Vec<_>>>()?;
    let close = |got: &Tensor, e: &Tensor| -> Result<bool> {
        let pairs = values(got)?.into_iter().zip(values(e)?);
        Ok(pairs
            .into_iter()
            .all(|(a, b)| (a - b).abs() <= 1e-6 * b.abs() + 1e-8))
    };
    let sum = |of: &dyn Fn(usize) -> Result<f64>| (0..3).map(of).sum::<Result<f64>>();
    let value = values(&expected.loss)?[0];
    for total in [
        sum(&|i| Ok(values(&results[i].0)?[0]))?,
        sum(&|i| Ok(values(&results[i].2.loss)?[0]))?,
    ] {
        ensure!((total - value).abs() <= 1e-6 * value, "{total} for {value}");
    }
    let gradients: Vec<&Tensor> = results.iter().filter_map(|r| r.1.as_ref()).collect();
    for gradient in [
        Tensor::cat(&gradients, 0)?,
        Tensor::cat(&[&results[0].2.grad, &results[1].2.grad], 0)?,
    ] {
        ensure!(close(&gradient, &expected.grad)?, "a gradient is another");
    }
    Ok(format!(
        "3 ranks with 2, 7 and 0 of {rows} rows, loss {value:.6}"
    ))
}

/// Whatever a rank does wrong is an error on all of them, and what only the device can see makes its rows NaN.
fn mistakes(device: &Device) -> Result<String> {
    let (rows, vocab) = (4, 30);
    let logits = Tensor::randn(0f32, 2.0, (rows, vocab), device)?;
    let targets = |first: i64| Tensor::new(&[first, 5, -100, 29], device);
    let eps = |second: f32| Tensor::new(&[0.1, second, 0.1, 0.1], device);
    let run =
        |loss: CrossEntropy, comm: Arc<dyn Communicator>, first: usize, count: usize, y: i64| {
            let logits = logits.copy()?.narrow(1, first, count)?;
            let loss = loss
                .reduction(Reduction::None)
                .vocab_shard(comm, first, vocab);
            Ok(loss.loss_and_grad(&logits, targets(y)?)?)
        };
    let mut seen = 0;
    let mut refused = |what: &str, results: Vec<Result<LossAndGrad>>| {
        for (rank, result) in results.iter().enumerate() {
            match result {
                Ok(_) => ensure!(false, "{what}: nothing on rank {rank}"),
                Err(error) => {
                    let text = error.to_string();
                    // Of a rank that failed before it knew its rows the CPU's others know no more.
                    let known = text.contains(what)
                        || device.is_cpu() && text.contains("64 alone of a rank that has failed");
                    ensure!(known, "rank {rank}: `{text}` for `{what}`");
                }
            }
        }
        seen += 1;
        Ok(())
    };
    let plain = CrossEntropy::new;
    refused(
        "both have class 14",
        on_ranks(2, |comm| {
            let first = 14 * comm.rank();
            run(plain(), comm, first, 15 + first / 14, 3)
        }),
    )?;
    refused(
        "no rank has class 15",
        on_ranks(2, |comm| {
            let first = 16 * comm.rank();
            run(plain(), comm, first, 15 - first / 16, 3)
        }),
    )?;
    refused(
        "z_loss is 0.5 on rank 1, 0 on rank 0",
        on_ranks(2, |comm| {
            let rank = comm.rank();
            run(plain().z_loss(0.5 * rank as f32), comm, 15 * rank, 15, 3)
        }),
    )?;
    refused(
        "softcap: -1, must be",
        on_ranks(2, |comm| {
            let rank = comm.rank();
            let loss = if rank == 1 {
                plain().softcap(-1.0)
            } else {
                plain()
            };
            run(loss, comm, 15 * rank, 15, 3)
        }),
    )?;
    refused(
        "targets on rank 1: not what rank 0 has",
        on_ranks(2, |comm| {
            let rank = comm.rank();
            run(
                plain().check_inputs(true),
                comm,
                15 * rank,
                15,
                3 + rank as i64,
            )
        }),
    )?;
    refused(
        "targets: row 0 has 30",
        on_ranks(2, |comm| {
            let rank = comm.rank();
            run(plain().check_inputs(true), comm, 15 * rank, 15, 30)
        }),
    )?;
    if !device.is_cpu() {
        refused(
            "and it at most 2147467263",
            on_ranks(2, |comm| {
                let loss = plain().vocab_shard(comm, 0, 1 << 31);
                Ok(loss.loss_and_grad(&logits, &targets(3)?)?)
            }),
        )?;
        for (differ, row) in [(0, 0), (1, 1)] {
            let results = on_ranks(2, |comm| {
                let rank = comm.rank();
                let of_row = |other: usize| if differ == other { rank } else { 0 };
                let loss = plain().smoothing(eps(0.1 + of_row(1) as f32)?);
                run(loss, comm, 15 * rank, 15, 3 + of_row(0) as i64)
            });
            for result in results {
                let LossAndGrad { loss, grad, .. } = result?;
                let nan: Vec<bool> = values(&loss)?.iter().map(|l| l.is_nan()).collect();
                let expected: Vec<bool> = (0..rows).map(|i| i == row).collect();
                ensure!(nan == expected, "rows {nan:?} are NaN, row {row} differs");
                let grad = values(&grad)?;
                let (bad, columns) = (grad.iter().position(|g| g.is_nan()), grad.len() / rows);
                ensure!(
                    bad == Some(row * columns),
                    "the gradient is NaN from {bad:?} on"
                );
            }
            seen += 1;
        }
    }
    Ok(format!("{seen} mistakes"))
}
