//! Steps for whoever counts what the driver is asked to do: `scripts/count-driver-calls.py`.

use anyhow::Result;
use candle_core::{DType, Device, Tensor, Var};
use candle_cross_entropy::CrossEntropy;
use clap::ValueEnum;

#[derive(Clone, Copy, ValueEnum)]
pub enum Step {
    LossAndGrad,
    Forward,
    /// With a backward.
    ForwardBackward,
}

/// So many steps with a mean, smoothing and weights, of bf16 logits.
pub fn run(step: Step, count: usize, device: &Device) -> Result<()> {
    let (rows, width) = (8, 1000);
    let logits = Tensor::ones((rows, width), DType::BF16, device)?;
    let targets = Tensor::zeros(rows, DType::U32, device)?;
    let (logits, targets) = (
        logits.reshape((2, rows / 2, width))?,
        targets.reshape((2, rows / 2))?,
    );
    let values = Tensor::ones((2, 1), DType::F32, device)?; // a sample
    let loss = CrossEntropy::new().smoothing(&values).row_weights(&values);
    let var = Var::from_tensor(&logits)?;
    for _ in 0..count {
        match step {
            Step::LossAndGrad => drop(loss.loss_and_grad(&logits, &targets)?),
            Step::Forward => drop(loss.forward(&logits, &targets)?),
            Step::ForwardBackward => drop(loss.forward(&var, &targets)?.backward()?),
        }
    }
    Ok(())
}
