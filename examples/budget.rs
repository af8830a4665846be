//! Time and peak memory of a loss from hidden states, with its backward, against `memory_budget`, beside the loss of
//! whole logits:
//!
//! ```sh
//! cargo run --release --example budget                     # 4096 hidden states of length 256, 32000 classes
//! cargo run --release --example budget -- 1024 576 49152
//! ```

use std::time::Instant;

use candle_core::{Context, DType, Device, Result, Tensor, Var, bail};
use candle_cross_entropy::CrossEntropy;
use counting_allocator::Counting;

#[global_allocator]
static ALLOCATOR: Counting = Counting;

const MIB: f64 = (1 << 20) as f64;
/// Budgets between nothing and all logits.
const STEPS: usize = 4;
/// Runs, of which the fastest counts.
const RUNS: usize = 3;

struct Problem {
    hidden: Var,
    weight: Var,
    targets: Tensor,
}

impl Problem {
    fn new(rows: usize, depth: usize, vocab: usize) -> Result<Self> {
        let device = Device::Cpu;
        let deviation = 3.0 / (depth as f32).sqrt();
        Ok(Self {
            hidden: Var::randn(0f32, 1f32, (rows, depth), &device)?,
            weight: Var::randn(0f32, deviation, (vocab, depth), &device)?,
            targets: Tensor::rand(0f32, vocab as f32, rows, &device)?.to_dtype(DType::U32)?,
        })
    }

    fn linear(&self, budget: usize) -> Result<()> {
        let loss = CrossEntropy::new().smoothing(0.1).memory_budget(budget);
        loss.forward_linear(&self.hidden, &self.weight, None, &self.targets)?
            .backward()?;
        Ok(())
    }

    fn whole_logits(&self) -> Result<()> {
        let logits = self.hidden.matmul(&self.weight.t()?)?;
        let loss = CrossEntropy::new().smoothing(0.1).inplace_backward(true);
        loss.forward(&logits, &self.targets)?.backward()?;
        Ok(())
    }

    /// What candle's accumulation of the gradients holds at its peak: the sum, zeros and the addend.
    fn gradients(&self) -> usize {
        let (hidden, weight) = (self.hidden.elem_count(), self.weight.elem_count());
        (3 * hidden.max(weight) + hidden.min(weight)) * size_of::<f32>()
    }
}

/// A line of the table: the peak of the last run, and the fastest run's time; the first is not among them.
fn line(name: &str, step: impl Fn() -> Result<()>) -> Result<()> {
    step()?;
    let (mut peak, mut seconds) = (0, f64::INFINITY);
    for _ in 0..RUNS {
        let start = Instant::now();
        let (result, usage) = counting_allocator::measure(&step);
        result?;
        seconds = seconds.min(start.elapsed().as_secs_f64());
        peak = usage.peak;
    }
    println!("{name:>10} {:>10.0} {seconds:>9.3}", peak as f64 / MIB);
    Ok(())
}

fn main() -> Result<()> {
    let sizes = std::env::args().skip(1);
    let sizes: Vec<usize> = sizes
        .map(|size| size.parse().context("sizes are numbers"))
        .collect::<Result<_>>()?;
    if !(sizes.is_empty() || sizes.len() == 3) || sizes.contains(&0) {
        bail!("there are three sizes above 0, or none: rows depth vocab")
    }
    let &[rows, depth, vocab] = sizes
        .as_slice()
        .first_chunk()
        .unwrap_or(&[4096, 256, 32000]);
    let problem = Problem::new(rows, depth, vocab)?;
    let logits = rows * vocab * size_of::<f32>();
    println!("N {rows}, D {depth}, V {vocab}, f32");
    println!("logits: {:.0} MiB", logits as f64 / MIB);
    println!(
        "gradients, as candle accumulates them: {:.0} MiB",
        problem.gradients() as f64 / MIB
    );
    println!("budget MiB   peak MiB   seconds");
    for budget in (0..=STEPS).map(|step| logits * step / STEPS) {
        let name = format!("{:.0}", budget as f64 / MIB);
        line(&name, || problem.linear(budget))?;
    }
    line("whole", || problem.whole_logits())
}
