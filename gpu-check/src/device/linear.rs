//! Times of `forward_linear` next to its bare matrix products, which candle computes with whole logits, at a language
//! model's size.

use std::path::Path;

use anyhow::{Context, Result, ensure};
use candle_core::{DType, Device, Tensor, Var};
use candle_cross_entropy::CrossEntropy;
use serde_json::{Value, json};

use super::{
    memory::{free_bytes, with_peak},
    timer::{SAMPLES, Timer, Work},
};
use crate::report::Report;

const ROWS: usize = 8192;
const DEPTH: usize = 4096;
/// Llama 2's and Llama 3's.
const VOCABULARIES: [usize; 2] = [32000, 128256];
/// Of so many rows all but one are ignored, where some are.
const IGNORED: usize = 4;

pub fn run(timer: &Timer, device: &Device, report: &mut Report, out: Option<&Path>) -> Result<()> {
    for v in VOCABULARIES {
        let shape = format!("forward_linear {ROWS}x{DEPTH}x{v} bf16");
        // Whole logits with candle's three copies of their gradient, and as many of the weight's.
        let (free, needed) = (
            free_bytes(device)?,
            12 * ROWS * v + 12 * v * DEPTH + (4 << 30),
        );
        if free < needed {
            println!("SKIP timing of {shape}: {} GB free", free >> 30);
            continue;
        }
        let inputs = Inputs::new(v, device)?;
        report.holds(&format!("{shape} before timing"), || inputs.check());
        let mut timings = vec![];
        let timed = inputs.time(timer, &mut timings);
        report.timings.append(&mut timings);
        report.holds(&format!("timing of {shape}"), || {
            timed.map(|()| format!("{SAMPLES} samples of each"))
        });
        report.write(out)?;
    }
    Ok(())
}

/// Logits like those of random bf16 with a deviation of 2, and what goes with them.
struct Inputs {
    v: usize,
    hidden: Var,
    weight: Var,
    targets: Tensor,
    /// With only one of [`IGNORED`] rows not ignored.
    few_targets: Tensor,
    smoothing: Tensor,
    /// A gradient of the logits, for the bare products.
    gradient: Tensor,
}

/// Something to time.
struct Step<'a> {
    bench: &'static str,
    by: String,
    /// Matrix products that it takes; between 3 and 4 where some logits are kept, as if tiles were of any size.
    products: f64,
    budget: Option<usize>,
    /// Gradients that it leaves.
    gradient_bytes: usize,
    work: Box<dyn Fn() -> Result<()> + 'a>,
}

impl Inputs {
    fn new(v: usize, device: &Device) -> Result<Self> {
        let random = |rows: usize, deviation: f32| -> candle_core::Result<Tensor> {
            Tensor::randn(0f32, deviation, (rows, DEPTH), device)?.to_dtype(DType::BF16)
        };
        let hidden = Var::from_tensor(&random(ROWS, 1.0)?)?;
        let weight = Var::from_tensor(&random(v, 2.0 / (DEPTH as f32).sqrt())?)?;
        let targets: Vec<i64> = (0..ROWS).map(|i| (i * 31 % v) as i64).collect();
        let few = targets.iter().enumerate();
        let few = few.map(|(i, &y)| if i % IGNORED == 0 { y } else { -100 });
        let few_targets = Tensor::from_vec(few.collect::<Vec<_>>(), ROWS, device)?;
        let targets = Tensor::from_vec(targets, ROWS, device)?;
        let logits = hidden.detach().matmul(&weight.detach().t()?)?;
        let gradient = CrossEntropy::new().loss_and_grad_inplace(logits, &targets)?;
        Ok(Self {
            v,
            hidden,
            weight,
            targets,
            few_targets,
            smoothing: Tensor::rand(0f32, 0.2f32, ROWS, device)?,
            gradient: gradient.grad,
        })
    }

    fn loss(&self) -> CrossEntropy {
        CrossEntropy::new().smoothing(&self.smoothing)
    }

    /// By candle's products and [`CrossEntropy::forward`].
    fn whole_logits(&self, targets: &Tensor) -> candle_core::Result<Tensor> {
        let logits = self.hidden.matmul(&self.weight.t()?)?;
        self.loss().forward(&logits, targets)
    }

    /// Loss and gradients against those of whole logits, which other checks compare with the reference.
    fn check(&self) -> Result<String> {
        let mut found = vec![];
        for (targets, compact) in [(&self.targets, false), (&self.few_targets, true)] {
            let loss = self.loss().memory_budget(1 << 30).compact_rows(compact);
            let ours = loss.forward_linear(&self.hidden, &self.weight, None, targets)?;
            let theirs = self.whole_logits(targets)?;
            let (a, e) = (ours.to_scalar::<f32>()?, theirs.to_scalar::<f32>()?);
            ensure!((a - e).abs() <= 1e-4 * e.abs(), "loss {a}, must be {e}");
            let (ours, theirs) = (ours.backward()?, theirs.backward()?);
            for (name, var) in [("hidden", &self.hidden), ("weight", &self.weight)] {
                let wide = |store: &candle_core::backprop::GradStore| -> Result<Tensor> {
                    Ok(store
                        .get(var)
                        .context("no gradient")?
                        .to_dtype(DType::F32)?)
                };
                let (ours, theirs) = (wide(&ours)?, wide(&theirs)?);
                let square = |tensor: Tensor| -> Result<f32> {
                    Ok(tensor.sqr()?.sum(1)?.sum_all()?.to_scalar()?)
                };
                let off = (square((ours - &theirs)?)? / square(theirs)?).sqrt();
                // Each is rounded to bf16, after sums of logits' gradients that are.
                ensure!(off <= 0.01, "gradient of {name} off by {off} of its size");
                found.push(format!("gradient of {name} {off:.1e}"));
            }
        }
        Ok(format!(
            "differences from whole logits: {}",
            found.join(", ")
        ))
    }

    fn time(&self, timer: &Timer, timings: &mut Vec<Value>) -> Result<()> {
        let all = 2 * ROWS * self.v;
        let sums = Step {
            bench: "linear forward + backward()",
            by: "candle's own accumulation".into(),
            products: 0.0,
            budget: None,
            gradient_bytes: 0,
            work: Box::new(|| {
                for var in [&self.hidden, &self.weight] {
                    (var.zeros_like()? + var.detach())?;
                }
                Ok(())
            }),
        };
        let whole = Step {
            bench: "linear forward + backward()",
            by: "ours, whole logits".into(),
            products: 3.0,
            budget: None,
            gradient_bytes: self.gradient_bytes(),
            work: Box::new(|| {
                self.whole_logits(&self.targets)?.backward()?;
                Ok(())
            }),
        };
        let forward = "linear forward";
        let steps = vec![self.bare(forward, ROWS, 1), self.forward(forward, false)];
        self.time_steps(timer, steps, 1, timings)?;
        let both = "linear forward + backward()";
        let mut steps = vec![self.bare(both, ROWS, 3), self.bare(both, ROWS, 4)];
        for (name, budget) in [
            ("ours, budget 0", 0),
            ("ours, budget for 25 %", all / 4),
            ("ours, budget for 50 %", all / 2),
            ("ours, budget for 75 %", 3 * all / 4),
            ("ours, budget for all", all),
        ] {
            steps.push(self.backward(both, name, budget, false));
        }
        steps.extend([whole, sums]);
        self.time_steps(timer, steps, 1, timings)?;

        let forward = "linear forward, 75 % ignored";
        let steps = vec![
            self.bare(forward, ROWS / IGNORED, 1),
            self.forward(forward, true),
        ];
        self.time_steps(timer, steps, IGNORED, timings)?;
        let both = "linear forward + backward(), 75 % ignored";
        let steps = vec![
            self.bare(both, ROWS / IGNORED, 3),
            self.bare(both, ROWS / IGNORED, 4),
            self.backward(both, "ours, budget 0", 0, true),
            self.backward(both, "ours, budget for all", all, true),
        ];
        self.time_steps(timer, steps, IGNORED, timings)
    }

    fn gradient_bytes(&self) -> usize {
        2 * (ROWS + self.v) * DEPTH
    }

    /// Logits once or twice, and the gradients of both factors, of the first `rows`.
    fn bare(&self, bench: &'static str, rows: usize, products: usize) -> Step<'_> {
        let work = move || -> Result<()> {
            let (hidden, weight) = (self.hidden.detach(), self.weight.detach());
            let hidden = hidden.narrow(0, 0, rows)?;
            let gradient = self.gradient.narrow(0, 0, rows)?;
            for _ in 0..if products == 4 { 2 } else { 1 } {
                hidden.matmul(&weight.t()?)?;
            }
            if products > 1 {
                gradient.t()?.matmul(&hidden)?;
                gradient.matmul(&weight)?;
            }
            Ok(())
        };
        Step {
            bench,
            by: format!("bare products, {products}"),
            products: products as f64,
            budget: None,
            gradient_bytes: if products > 1 {
                self.gradient_bytes()
            } else {
                0
            },
            work: Box::new(work),
        }
    }

    fn targets(&self, few: bool) -> &Tensor {
        if few {
            &self.few_targets
        } else {
            &self.targets
        }
    }

    fn forward(&self, bench: &'static str, few: bool) -> Step<'_> {
        let loss = self.loss().compact_rows(few);
        let (hidden, weight) = (self.hidden.detach(), self.weight.detach());
        Step {
            bench,
            by: "ours".into(),
            products: 1.0,
            budget: None,
            gradient_bytes: 0,
            work: Box::new(move || {
                loss.forward_linear(&hidden, &weight, None, self.targets(few))?;
                Ok(())
            }),
        }
    }

    fn backward(&self, bench: &'static str, by: &str, budget: usize, few: bool) -> Step<'_> {
        let loss = self.loss().memory_budget(budget).compact_rows(few);
        let all = 2 * ROWS * self.v;
        Step {
            bench,
            by: by.into(),
            products: 4.0 - budget as f64 / all as f64,
            budget: Some(budget),
            gradient_bytes: self.gradient_bytes(),
            work: Box::new(move || {
                let targets = self.targets(few);
                let value = loss.forward_linear(&self.hidden, &self.weight, None, targets)?;
                value.backward()?;
                Ok(())
            }),
        }
    }

    /// Of `share` rows one counts.
    fn time_steps(
        &self,
        timer: &Timer,
        steps: Vec<Step>,
        share: usize,
        timings: &mut Vec<Value>,
    ) -> Result<()> {
        let mut peaks = vec![];
        for step in &steps {
            (step.work)()?; // loads what it needs
            peaks.push(with_peak(timer.cuda, &step.work)?.1);
        }
        let works: Vec<Work> = steps.iter().map(|step| &*step.work).collect();
        let samples = timer.samples_in_turn(&works)?;
        let bare: Vec<(f64, f64)> = steps
            .iter()
            .zip(&samples)
            .filter(|(step, _)| step.by.starts_with("bare"))
            .map(|(step, samples)| (step.products, samples.median()))
            .collect();
        for ((step, samples), peak) in steps.iter().zip(samples).zip(peaks) {
            let mut timing = timer.timed(step.bench, &step.by, (ROWS, self.v), &samples);
            timing["d"] = json!(DEPTH);
            timing["budget_bytes"] = json!(step.budget);
            timing["peak_bytes"] = json!(peak);
            timing["gradient_bytes"] = json!(step.gradient_bytes);
            if step.products > 0.0 {
                let product = 2.0 * (ROWS / share * DEPTH) as f64 * self.v as f64;
                // Computing logits again is no useful work.
                let useful = step.products.min(3.0) * product;
                timing["tflop_per_s"] = json!(useful / samples.median() / 1e9);
                let bare = between(&bare, step.products);
                timing["fraction_of_products"] = json!(bare / samples.median());
            }
            timings.push(timing);
        }
        Ok(())
    }
}

/// What so many bare products take, by those that were timed.
fn between(bare: &[(f64, f64)], products: f64) -> f64 {
    match *bare {
        [(fewer, less), (more, most)] => less + (products - fewer) / (more - fewer) * (most - less),
        _ => bare[0].1,
    }
}
