//! Properties beside the values: the same bits every time, rows that do not see each other, huge offsets, bad input.

use anyhow::{Result, ensure};
use candle_core::{DType, Device, IndexOp, Tensor};
use candle_cross_entropy::{CrossEntropy, LossAndGrad, Reduction};
use rand::{Rng, SeedableRng, rngs::StdRng};

use crate::{
    bad_values,
    cases::{gaussian, values},
    report::Report,
};

pub fn run(device: &Device, reduced: bool, report: &mut Report) {
    let widths: &[usize] = if reduced {
        &[33, 4099]
    } else {
        &[33, 4099, 50257, 128256]
    };
    for dtype in [DType::F32, DType::F16, DType::BF16] {
        let name = dtype.as_str();
        report.holds(&format!("{name} same bits again"), || {
            for &width in widths {
                let inputs = Inputs::new(dtype, 24, width, device)?;
                let first = bits(&inputs.run(Reduction::Mean)?)?;
                for run in 1..10 {
                    ensure!(
                        bits(&inputs.run(Reduction::Mean)?)? == first,
                        "V {width}: run {run} differs"
                    );
                }
            }
            Ok(format!("10 runs each, V {widths:?}"))
        });
        report.holds(
            &format!("{name} a row's bits do not depend on the others"),
            || {
                for &width in widths {
                    let inputs = Inputs::new(dtype, 24, width, device)?;
                    let all = inputs.run(Reduction::None)?;
                    for (start, len) in [(0, 1), (5, 1), (5, 7), (23, 1)] {
                        let part = inputs.narrow(start, len)?.run(Reduction::None)?;
                        let same = LossAndGrad {
                            loss: all.loss.narrow(0, start, len)?,
                            grad: all.grad.narrow(0, start, len)?,
                            stats: all.stats.clone(),
                        };
                        ensure!(
                            bits(&part)? == bits(&same)?,
                            "V {width}: rows {start}..{} differ",
                            start + len
                        );
                    }
                }
                Ok(format!("rows alone and among 24, V {widths:?}"))
            },
        );
    }
    report.holds("values that serve several rows", || shared_values(device));
    report.holds("no rows", || no_rows(device));
    report.holds("bad values in tensors", || bad_values::check(device));
    report.holds("check_inputs passes good values", || {
        let inputs = Inputs::new(DType::BF16, 8, 1000, device)?;
        inputs
            .loss(Reduction::Mean)
            .check_inputs(true)
            .forward(&inputs.logits, &inputs.targets)?;
        Ok("8 rows".into())
    });
    if !reduced {
        // On the CPU the same program with small offsets, to rehearse it.
        let limits: [u64; 2] = if device.is_cpu() {
            [1 << 16, 1 << 17]
        } else {
            [1 << 31, 1 << 32]
        };
        for limit in limits {
            report.holds(&format!("more than {limit} elements"), || {
                beyond(limit, device)
            });
        }
    }
}

pub struct Inputs {
    pub logits: Tensor,
    pub targets: Tensor,
    pub smoothing: Tensor,
}

impl Inputs {
    pub fn new(dtype: DType, rows: usize, width: usize, device: &Device) -> Result<Self> {
        let mut rng = StdRng::seed_from_u64(width as u64);
        let logits: Vec<f32> = (0..rows * width)
            .map(|_| 2.0 * gaussian(&mut rng))
            .collect();
        let targets: Vec<u32> = (0..rows)
            .map(|_| rng.random_range(0..width as u32))
            .collect();
        let smoothing: Vec<f32> = (0..rows).map(|_| rng.random_range(0.0..0.3)).collect();
        Ok(Self {
            logits: Tensor::from_vec(logits, (rows, width), &Device::Cpu)?
                .to_dtype(dtype)?
                .to_device(device)?,
            targets: Tensor::from_vec(targets, rows, device)?,
            smoothing: Tensor::from_vec(smoothing, rows, device)?,
        })
    }

    fn narrow(&self, start: usize, len: usize) -> Result<Self> {
        Ok(Self {
            logits: self.logits.narrow(0, start, len)?,
            targets: self.targets.narrow(0, start, len)?,
            smoothing: self.smoothing.narrow(0, start, len)?,
        })
    }

    fn loss(&self, reduction: Reduction) -> CrossEntropy {
        CrossEntropy::new()
            .smoothing(&self.smoothing)
            .reduction(reduction)
    }

    fn run(&self, reduction: Reduction) -> Result<LossAndGrad> {
        Ok(self
            .loss(reduction)
            .loss_and_grad(&self.logits, &self.targets)?)
    }
}

/// Losses, then gradients; widening 16-bit values to f64 keeps their bits apart.
fn bits(result: &LossAndGrad) -> Result<Vec<u64>> {
    let mut all = values(&result.loss)?;
    all.extend(values(&result.grad)?);
    Ok(all.into_iter().map(f64::to_bits).collect())
}

/// Smoothing of a sample, weight of a position: the bits of a value each.
fn shared_values(device: &Device) -> Result<String> {
    let (batch, length, width) = (3, 4, 33);
    let inputs = Inputs::new(DType::F32, batch * length, width, device)?;
    let logits = inputs.logits.reshape((batch, length, width))?;
    let targets = inputs.targets.reshape((batch, length))?;
    let column = Tensor::new(&[[0.1f32], [0.0], [0.3]], &Device::Cpu)?;
    let row = Tensor::new(&[[1f32, 0.5, 2.0, 0.0]], &Device::Cpu)?;
    let whole = |values: &Tensor| values.broadcast_as((batch, length))?.contiguous();
    let run = |smoothing: &Tensor, weights: &Tensor| -> Result<Vec<u64>> {
        let (smoothing, weights) = (smoothing.to_device(device)?, weights.to_device(device)?);
        let loss = CrossEntropy::new()
            .smoothing(&smoothing)
            .row_weights(&weights);
        bits(&loss.loss_and_grad(&logits, &targets)?)
    };
    let expected = run(&whole(&column)?, &whole(&row)?)?;
    ensure!(run(&column, &row)? == expected, "of (B, 1) and (1, T)");
    let transposed = whole(&column)?.t()?.contiguous()?.t()?;
    ensure!(
        run(&transposed, &whole(&row)?)? == expected,
        "of a transposed (B, T)"
    );
    ensure!(
        run(&row.zeros_like()?.narrow(1, 0, 1)?, &row)?
            == run(&whole(&column.zeros_like()?)?, &row)?,
        "of (1, 1)"
    );
    Ok("(B, 1), (1, T), (1, 1) and strides".into())
}

fn no_rows(device: &Device) -> Result<String> {
    // Views, as CUDA allocates no memory of no bytes.
    let logits = Tensor::zeros((1, 10), DType::F32, device)?.narrow(0, 0, 0)?;
    let targets = Tensor::zeros(1, DType::U32, device)?.narrow(0, 0, 0)?;
    for reduction in [Reduction::Mean, Reduction::Sum, Reduction::SumOver(3.0)] {
        let result = CrossEntropy::new()
            .reduction(reduction)
            .loss_and_grad(&logits, &targets)?;
        ensure!(
            values(&result.loss)? == [0.0] && result.grad.dims() == [0, 10],
            "{reduction:?}: {:?}",
            result.loss
        );
        ensure!(
            result.stats.nll.dims() == [0],
            "{reduction:?}: statistics {:?}",
            result.stats.nll
        );
    }
    let none = CrossEntropy::new()
        .reduction(Reduction::None)
        .forward(&logits, &targets)?;
    ensure!(none.dims() == [0], "without reduction: {none:?}");
    let ignored = Tensor::full(-100i64, 4, device)?;
    let mean =
        CrossEntropy::new().forward(&Tensor::ones((4, 10), DType::F32, device)?, &ignored)?;
    ensure!(
        values(&mean)? == [0.0],
        "mean of no rows that count: {:?}",
        values(&mean)?
    );
    Ok("loss 0 or empty, every reduction".into())
}

/// Without the backtrace that RUST_BACKTRACE adds.
pub fn message(error: &candle_core::Error) -> String {
    error
        .to_string()
        .lines()
        .next()
        .unwrap_or_default()
        .to_string()
}

/// Logits of more than `limit` elements, in place: every row has the bits of its model in a small block.
fn beyond(limit: u64, device: &Device) -> Result<String> {
    // An odd width, so that rows lie at every alignment, and a prime number of model rows, so that an offset that
    // wrapped at a power of two would meet another model's row.
    let (width, models) = if device.is_cpu() {
        (257, 61)
    } else {
        (128257, 61)
    };
    let rows = (limit / width as u64) as usize + 2 * models;
    if let Device::Cuda(_) = device {
        let needed = rows * width * 2 + (8 << 30);
        let free = free_bytes(device)?;
        ensure!(
            free >= needed,
            "needs {} GB of GPU memory, {} are free",
            needed >> 30,
            free >> 30
        );
    }
    let block = Inputs::new(DType::BF16, models, width, device)?;
    let model = block.run(Reduction::None)?;
    let model_loss = values(&model.loss)?;
    let logits = Tensor::zeros((rows, width), DType::BF16, device)?;
    let row_of = |i: usize| i % models;
    for start in (0..rows).step_by(models) {
        let len = models.min(rows - start);
        logits.slice_set(&block.logits.narrow(0, 0, len)?, 0, start)?;
    }
    let index = Tensor::from_vec(
        (0..rows).map(|i| row_of(i) as u32).collect::<Vec<_>>(),
        rows,
        device,
    )?;
    let (targets, smoothing) = (
        block.targets.index_select(&index, 0)?,
        block.smoothing.index_select(&index, 0)?,
    );
    let loss = CrossEntropy::new()
        .smoothing(&smoothing)
        .reduction(Reduction::None);

    let forward = values(&loss.forward(&logits, &targets)?)?;
    let result = loss.loss_and_grad_inplace(logits, &targets)?;
    let fused = values(&result.loss)?;
    for i in 0..rows {
        let expected = model_loss[row_of(i)];
        ensure!(
            fused[i].to_bits() == expected.to_bits(),
            "loss of row {i} is {} for {expected}",
            fused[i]
        );
        ensure!(
            (forward[i] - expected).abs() <= 1e-5 * expected,
            "forward: row {i} is {} for {expected}",
            forward[i]
        );
    }
    // Gradients of the first rows, the last, and those around each multiple of 2³¹ bytes and elements.
    let mut looked_at = 0;
    let boundary = |at: u64| (at / width as u64) as usize;
    let near = [
        0,
        boundary(limit / 4),
        boundary(limit / 2),
        boundary(limit),
        rows,
    ];
    for i in near
        .into_iter()
        .flat_map(|b| b.saturating_sub(3)..(b + 3).min(rows))
    {
        let (got, expected) = (
            values(&result.grad.i(i)?)?,
            values(&model.grad.i(row_of(i))?)?,
        );
        let same = got
            .iter()
            .zip(&expected)
            .all(|(a, b)| a.to_bits() == b.to_bits());
        ensure!(same, "gradient of row {i} differs from its model's");
        looked_at += 1;
    }
    Ok(format!(
        "{rows} rows of {width}: every loss and {looked_at} rows of gradient bitwise as in a block of {models}"
    ))
}

#[cfg(feature = "cuda")]
fn free_bytes(device: &Device) -> Result<usize> {
    crate::device::memory::free_bytes(device)
}

#[cfg(not(feature = "cuda"))]
fn free_bytes(_: &Device) -> Result<usize> {
    anyhow::bail!("built without the feature cuda")
}
