//! What holds of `forward_linear` beside the values of the grid: views, rows that are left out, bad input, arguments
//! without a gradient.

use anyhow::{Context, Result, bail, ensure};
use candle_core::{DType, Device, Tensor, Var};
use candle_cross_entropy::{CrossEntropy, Reduction};

use super::{
    compare::{self, Unfused},
    problem::{Placement, Problem, Shape, TYPES},
};
use crate::{
    cases::{ALL, REDUCTIONS, values},
    properties::message,
    report::{Report, Worst},
};

/// More classes than rows: the tests here cut it in slices of the vocabulary.
const SLICES: Shape = Shape {
    rows: &[3, 8],
    vocab: 90,
    depth: 20,
    bias: true,
};
/// And in blocks of rows.
const BLOCKS: Shape = Shape {
    rows: &[5, 16],
    vocab: 21,
    depth: 20,
    bias: true,
};
/// Hidden states as a matrix, whose rows are used where they are.
const MATRIX: Shape = Shape {
    rows: &[26],
    vocab: 70,
    depth: 20,
    bias: false,
};
/// Bytes of logits that cut all of these in several tiles.
const TILE: usize = 1500;

pub fn run(device: &Device, reduced: bool, report: &mut Report) {
    let types = if reduced { &TYPES[2..] } else { &TYPES[..] };
    for &dtype in types {
        let name = dtype.as_str();
        report.numbers(&format!("linear {name} views"), || views(dtype, device));
        report.numbers(&format!("linear {name} rows without a loss"), || {
            rows_without_a_loss(dtype, device)
        });
    }
    report.holds("linear: only what is tracked gets a gradient", || {
        frozen(device)
    });
    report.holds("linear: backward twice", || backward_twice(device));
    report.holds("linear: no rows", || no_rows(device));
    report.holds("linear: one row without a stride", || one_row(device));
    report.holds("linear: bad values in tensors", || bad_values(device));
    if !reduced {
        report.numbers("linear: a tile beyond 32 bits", || large_tile(device));
    }
}

fn problem(dtype: DType, shape: Shape, reduction: Reduction) -> Result<Problem> {
    let everything = ALL;
    let mut problem = Problem::new(dtype, everything, shape, reduction, 5)?;
    problem.loss = problem.loss.tile_bytes(TILE);
    Ok(problem)
}

fn views(dtype: DType, device: &Device) -> Result<Worst> {
    let mut worst = Worst::default();
    for shape in [SLICES, BLOCKS, MATRIX] {
        let problem = problem(dtype, shape, Reduction::Mean)?;
        let exact = problem.exact(device)?;
        let unfused = Unfused::measure(&problem, &exact, device)?;
        for placement in Placement::ALL {
            for budget in [0, usize::MAX] {
                let loss = problem.loss.clone().memory_budget(budget);
                let got = problem.run(device, &loss, placement)?;
                let mut here = Worst::default();
                compare::see(&mut here, &problem, &got, &exact)?;
                unfused.see(&mut here, &problem, &got, &exact, 2.0)?;
                here.at = format!("{placement:?}, {}", here.at);
                worst.merge(here);
            }
        }
    }
    Ok(worst)
}

/// Most rows ignored, or all, left out of the products or not: the same results, and rows left out are not read.
fn rows_without_a_loss(dtype: DType, device: &Device) -> Result<Worst> {
    let mut worst = Worst::default();
    for shape in [SLICES, BLOCKS] {
        for reduction in REDUCTIONS {
            for kept in [4, usize::MAX] {
                let counts = |row: usize| row % kept == kept - 1;
                let problem = problem(dtype, shape, reduction)?
                    .with_targets(|row, y| if counts(row) { y.max(0) } else { -100 })?;
                let exact = problem.exact(device)?;
                let unfused = Unfused::measure(&problem, &exact, device)?;
                let mut nan = problem.clone();
                let rows = problem.shape.row_count();
                let factors: Vec<f32> = (0..rows)
                    .map(|row| if counts(row) { 1.0 } else { f32::NAN })
                    .collect();
                let dims = [shape.rows, &[1]].concat();
                let factors = Tensor::from_vec(factors, dims, &Device::Cpu)?.to_dtype(dtype)?;
                nan.hidden = problem.hidden.broadcast_mul(&factors)?;
                for (problem, compact) in [(&problem, false), (&problem, true), (&nan, true)] {
                    let loss = problem.loss.clone().compact_rows(compact);
                    let got = problem.run(device, &loss, Placement::Contiguous)?;
                    let mut here = Worst::default();
                    compare::see(&mut here, problem, &got, &exact)?;
                    unfused.see(&mut here, problem, &got, &exact, 2.0)?;
                    here.at = format!("compact_rows({compact}), {}", here.at);
                    worst.merge(here);
                }
            }
        }
    }
    Ok(worst)
}

/// Each argument alone a variable: its gradient has the same bits as beside the others', which have none.
fn frozen(device: &Device) -> Result<String> {
    for shape in [SLICES, BLOCKS] {
        let problem = problem(DType::BF16, shape, Reduction::Mean)?;
        let expected = problem.run(device, &problem.loss, Placement::Contiguous)?;
        let loss = problem.on(device, &problem.loss)?;
        let targets = problem.targets_on(device)?;
        let bias = problem.bias.as_ref().context("the shape has a bias")?;
        for tracked in 0..3 {
            let mut arguments = [&problem.hidden, &problem.weight, bias]
                .map(|argument| argument.to_device(device))
                .into_iter()
                .collect::<candle_core::Result<Vec<_>>>()?;
            let var = Var::from_tensor(&arguments[tracked])?;
            arguments[tracked] = var.as_tensor().clone();
            let [hidden, weight, bias] = &arguments[..] else {
                unreachable!()
            };
            let (value, _) =
                loss.forward_linear_with_stats(hidden, weight, Some(bias), &targets)?;
            let gradients = (value * 3.0)?.backward()?; // as in the problem's own run
            for (i, argument) in arguments.iter().enumerate() {
                let gradient = gradients.get(argument).map(values).transpose()?;
                let right = match gradient {
                    None => i != tracked,
                    Some(got) => i == tracked && got == values(&expected.gradients[i])?,
                };
                ensure!(
                    right,
                    "{}: gradient {i} with {tracked} tracked",
                    problem.label
                );
            }
        }
    }
    Ok("hidden, weight, bias; the one's gradient bitwise as with all".into())
}

/// The first backward uses the kept logits up; a second computes them again.
fn backward_twice(device: &Device) -> Result<String> {
    let problem = problem(DType::BF16, MATRIX, Reduction::Sum)?;
    for budget in [0, 3000, usize::MAX] {
        let loss = problem.on(device, &problem.loss.clone().memory_budget(budget))?;
        let hidden = Var::from_tensor(&problem.hidden.to_device(device)?)?;
        let weight = Var::from_tensor(&problem.weight.to_device(device)?)?;
        let targets = problem.targets_on(device)?;
        let value = loss.forward_linear(&hidden, &weight, None, &targets)?;
        let gradients = || -> Result<[Vec<f64>; 2]> {
            let store = value.backward()?;
            let of = |var: &Var| values(store.get(var).context("no gradient")?);
            Ok([of(&hidden)?, of(&weight)?])
        };
        ensure!(gradients()? == gradients()?, "budget {budget}: they differ");
    }
    Ok("the same bits".into())
}

/// Not a variable itself: candle has no operation on a tensor of no elements.
fn no_rows(device: &Device) -> Result<String> {
    // Views, as CUDA allocates no memory of no bytes.
    let hidden = Tensor::zeros((1, 4), DType::F32, device)?.narrow(0, 0, 0)?;
    let weight = Var::zeros((10, 4), DType::F32, device)?;
    let bias = Var::zeros(10, DType::F32, device)?;
    let targets = Tensor::zeros(1, DType::U32, device)?.narrow(0, 0, 0)?;
    for bias in [None, Some(&bias)] {
        for reduction in [Reduction::Mean, Reduction::Sum, Reduction::SumOver(3.0)] {
            let loss = CrossEntropy::new().reduction(reduction);
            let (value, stats) =
                loss.forward_linear_with_stats(&hidden, &weight, bias.map(|b| &**b), &targets)?;
            let gradients = value.backward()?;
            let zeros = |var: &Var| -> Result<bool> {
                let gradient = gradients.get(var).context("no gradient")?;
                Ok(values(gradient)?.into_iter().all(|g| g == 0.0))
            };
            let right = values(&value)? == [0.0]
                && stats.nll.dims() == [0]
                && zeros(&weight)?
                && bias.map_or(Ok(true), zeros)?;
            ensure!(right, "{reduction:?}, bias {}", bias.is_some());
        }
    }
    Ok("loss and gradients 0, every reduction".into())
}

/// Strides of a dimension of one element mean nothing, and candle does not tidy them up.
fn one_row(device: &Device) -> Result<String> {
    let weight = Tensor::randn(0f32, 1f32, (50, 6), device)?;
    let row = Tensor::randn(0f32, 1f32, 6, device)?;
    let targets = Tensor::new(&[7u32], device)?;
    let run = |hidden: &Tensor, weight: &Tensor, targets: &Tensor| {
        CrossEntropy::new().forward_linear(hidden, weight, None, targets)
    };
    let expected = values(&run(&row.reshape((1, 6))?, &weight, &targets)?)?;
    for (what, hidden) in [
        ("unsqueezed", row.unsqueeze(0)?),
        ("broadcast", row.broadcast_as((1, 6))?),
    ] {
        let got = values(&run(&hidden, &weight, &targets)?)?;
        ensure!(
            (got[0] - expected[0]).abs() < 1e-5,
            "{what}: {got:?} for {expected:?}"
        );
    }
    let one_class = values(&run(
        &weight,
        &row.broadcast_as((1, 6))?,
        &Tensor::zeros(50, DType::U32, device)?,
    )?)?;
    ensure!(one_class == [0.0], "one class: loss {one_class:?}");
    Ok("hidden states and weight of strides 1 and 0".into())
}

/// Bad values: with `check_inputs` the CPU's error, word for word, whichever tile has the row; without, on CUDA, NaN in
/// that row's loss and hidden gradient alone.
fn bad_values(device: &Device) -> Result<String> {
    for shape in [SLICES, BLOCKS] {
        // The first block of rows, and a late one.
        for bad in [3, shape.row_count() - 2] {
            let good = problem(DType::F32, shape, Reduction::None)?;
            let ill = good
                .clone()
                .with_targets(|row, y| if row == bad { shape.vocab as i64 } else { y })?;
            let run =
                |device: &Device, loss: CrossEntropy| ill.run(device, &loss, Placement::Contiguous);
            let error = |result: Result<_>| match result {
                Ok(_) => bail!("{}: no error", ill.label),
                Err(error) => error
                    .downcast_ref::<candle_core::Error>()
                    .map(message)
                    .context("another error"),
            };
            let expected = error(run(&Device::Cpu, ill.loss.clone()).map(drop))?;
            ensure!(expected.contains(&format!("row {bad} ")), "{expected}");
            for compact in [false, true] {
                let loss = ill.loss.clone().check_inputs(true).compact_rows(compact);
                let got = error(run(device, loss).map(drop))?;
                ensure!(
                    got == expected,
                    "{}: {got:?} for {expected:?} with compact_rows({compact})",
                    ill.label
                );
            }
            let checked = good.loss.clone().check_inputs(true);
            let clean = good.run(device, &checked, Placement::Contiguous)?;
            if device.is_cpu() {
                continue;
            }
            let poisoned = run(device, ill.loss.clone())?;
            for (what, got, clean) in [
                ("loss", &poisoned.loss, &clean.loss),
                (
                    "gradient of hidden",
                    &poisoned.gradients[0],
                    &clean.gradients[0],
                ),
            ] {
                let (got, clean) = (values(got)?, values(clean)?);
                let per_row = got.len() / shape.row_count();
                for (i, (got, clean)) in got.into_iter().zip(clean).enumerate() {
                    let right = if i / per_row == bad {
                        got.is_nan()
                    } else {
                        got.to_bits() == clean.to_bits()
                    };
                    ensure!(
                        right,
                        "{}: {what} of row {} is {got} with row {bad} bad",
                        ill.label,
                        i / per_row
                    );
                }
            }
        }
    }
    Ok("the error names the row as the CPU's does, in early and late tiles".into())
}

/// All logits in one tile of more than 2³¹ elements: the last rows' losses and hidden gradients.
fn large_tile(device: &Device) -> Result<Worst> {
    // On the CPU the same program with a small tile, to rehearse it.
    let (rows, vocab) = if device.is_cpu() {
        (300, 1031)
    } else {
        (16800, 128257)
    };
    #[cfg(feature = "cuda")]
    if device.is_cuda() {
        let free = crate::device::memory::free_bytes(device)?;
        ensure!(free > 16 << 30, "needs 16 GB, {} are free", free >> 30);
    }
    let depth = 16;
    let dtype = DType::BF16;
    let hidden =
        Var::from_tensor(&Tensor::randn(0f32, 1f32, (rows, depth), device)?.to_dtype(dtype)?)?;
    let weight = Tensor::randn(0f32, 1f32, (vocab, depth), device)?.to_dtype(dtype)?;
    let targets: Vec<i64> = (0..rows).map(|i| (i * 31 % vocab) as i64).collect();
    let targets = Tensor::from_vec(targets, rows, device)?;
    let loss = CrossEntropy::new().reduction(Reduction::None);
    let whole = loss
        .clone()
        .tile_bytes(usize::MAX)
        .memory_budget(usize::MAX);
    let value = whole.forward_linear(&hidden, &weight, None, &targets)?;
    let gradient = value
        .sum_all()?
        .backward()?
        .remove(&hidden)
        .context("no gradient")?;

    let last = 5;
    let cpu = |tensor: &Tensor| tensor.to_device(&Device::Cpu)?.to_dtype(DType::F64);
    let some = |tensor: &Tensor| tensor.detach().narrow(0, rows - last, last)?.contiguous();
    let weight = cpu(&weight)?;
    let logits = cpu(&some(&hidden)?)?.matmul(&weight.t()?)?;
    let exact = loss.reference(&logits, &some(&targets)?.to_device(&Device::Cpu)?)?;
    let mut worst = Worst::default();
    // bf16 logits up to 32 are off by 1/16 at the most, and gradients by as much of the weights' size.
    for (what, got, expected, tolerance) in [
        ("loss", &value, exact.loss, 0.125),
        ("gradient", &gradient, exact.grad.matmul(&weight)?, 0.25),
    ] {
        for (i, (got, e)) in values(&some(got)?)?
            .into_iter()
            .zip(values(&expected)?)
            .enumerate()
        {
            worst.see((got - e).abs() / tolerance, || {
                format!("{what} {i} of the last {last} of {rows} rows: {got} for {e}")
            });
        }
    }
    Ok(worst)
}
