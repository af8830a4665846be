//! Time and peak memory of a loss from hidden states, with its backward, against `memory_budget`, beside the loss of
//! whole logits. Draws the figure of the README.

#[path = "../common/allocator.rs"]
mod allocator;
mod plot;

use std::{path::PathBuf, time::Instant};

use anyhow::{Context, Result};
use candle_core::{DType, Device, Tensor, Var};
use candle_cross_entropy::CrossEntropy;
use clap::Parser;

const MIB: f64 = (1 << 20) as f64;

/// Times forward and backward of `forward_linear` on the CPU at budgets from nothing to all logits, and counts the bytes
/// they take beyond hidden states, weight and their gradients.
#[derive(Parser)]
struct Args {
    /// Hidden states, N
    #[arg(long, default_value_t = 4096)]
    rows: usize,
    /// Length of a hidden state, D
    #[arg(long, default_value_t = 256)]
    depth: usize,
    /// Classes, V
    #[arg(long, default_value_t = 32000)]
    vocab: usize,
    /// Budgets between nothing and everything
    #[arg(long, default_value_t = 4)]
    steps: usize,
    /// Runs, of which the fastest counts
    #[arg(long, default_value_t = 3)]
    repeat: usize,
    /// Where to draw the figure
    #[arg(long, value_name = "FILE.svg")]
    out: Option<PathBuf>,
}

/// What a step takes.
#[derive(Clone, Copy)]
struct Cost {
    /// Bytes of logits that may be kept.
    budget: f64,
    /// Peak, beyond inputs and gradients as candle accumulates them.
    mib: f64,
    seconds: f64,
}

struct Problem {
    hidden: Var,
    weight: Var,
    targets: Tensor,
    repeat: usize,
}

impl Problem {
    fn new(args: &Args) -> Result<Self> {
        let device = Device::Cpu;
        let (rows, depth, vocab) = (args.rows, args.depth, args.vocab);
        let deviation = 3.0 / (depth as f32).sqrt();
        Ok(Self {
            hidden: Var::randn(0f32, 1f32, (rows, depth), &device)?,
            weight: Var::randn(0f32, deviation, (vocab, depth), &device)?,
            targets: Tensor::rand(0f32, vocab as f32, rows, &device)?.to_dtype(DType::U32)?,
            repeat: args.repeat,
        })
    }

    /// The fastest of some runs, the first not among them, and the peak of the last.
    fn cost(&self, budget: f64, step: impl Fn(&Self) -> Result<()>) -> Result<Cost> {
        step(self)?;
        let mut cost = Cost {
            budget,
            mib: 0.0,
            seconds: f64::INFINITY,
        };
        for _ in 0..self.repeat.max(1) {
            let start = Instant::now();
            let (result, usage) = allocator::measure(|| step(self));
            result?;
            cost.seconds = cost.seconds.min(start.elapsed().as_secs_f64());
            cost.mib = usage.peak as f64 / MIB;
        }
        Ok(cost)
    }

    /// What candle's accumulation of the gradients holds at its peak: the sum, zeros and the addend.
    fn gradients_mib(&self) -> f64 {
        let larger = self.hidden.elem_count().max(self.weight.elem_count());
        let smaller = self.hidden.elem_count().min(self.weight.elem_count());
        (3 * larger + smaller) as f64 * 4.0 / MIB
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
}

fn main() -> Result<()> {
    let args = Args::parse();
    let problem = Problem::new(&args)?;
    let logits = args.rows * args.vocab * size_of::<f32>();
    let steps = args.steps.max(1);
    let budgets = (0..=steps).map(|step| logits * step / steps);
    println!("logits: {:.0} MiB", logits as f64 / MIB);
    println!(
        "gradients, as candle accumulates them: {:.0} MiB",
        problem.gradients_mib()
    );
    println!("budget MiB   peak MiB   seconds");
    let print = |name: String, cost: &Cost| {
        println!("{name:>10} {:>10.0} {:>9.3}", cost.mib, cost.seconds);
    };
    let mut costs = Vec::new();
    for budget in budgets {
        let mib = budget as f64 / MIB;
        let cost = problem.cost(mib, |problem| problem.linear(budget))?;
        print(format!("{mib:.0}"), &cost);
        costs.push(cost);
    }
    let whole = problem.cost(f64::NAN, Problem::whole_logits)?;
    print("whole".into(), &whole);
    if let Some(path) = &args.out {
        let title = format!(
            "forward and backward, N {}, D {}, V {}, f32",
            args.rows, args.depth, args.vocab
        );
        plot::draw(path, &title, &costs, whole)
            .with_context(|| format!("cannot draw {}", path.display()))?;
    }
    Ok(())
}
