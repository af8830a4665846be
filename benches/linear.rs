//! `forward_linear` on the CPU beside its bare matrix products: `cargo bench --bench linear`.
//!
//! The products are candle's, of the whole logits, and so write fresh memory as ours do: N·V logits, V·D and N·D
//! gradients. `backward()` adds every gradient to zeros, which costs the same whatever the loss; `candle's own
//! accumulation` is that alone, and the bars (see the README) are for the rest.

use std::time::Duration;

use candle_core::{DType, Device, Result, Tensor, Var};
use candle_cross_entropy::CrossEntropy;
use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};

/// N, D, V: the logits of the other benchmark, and SmolLM2-135M's projection.
const SHAPES: [(usize, usize, usize); 2] = [(512, 1024, 32000), (1024, 576, 49152)];

struct Case {
    hidden: Var,
    weight: Var,
    targets: Tensor,
    mostly_ignored: Tensor,
    smoothing: Tensor,
}

impl Case {
    fn new(n: usize, d: usize, v: usize) -> Result<Self> {
        let device = Device::Cpu;
        let targets = Tensor::rand(0f32, v as f32, n, &device)?.to_dtype(DType::I64)?;
        let ignored = Tensor::full(-100i64, n, &device)?;
        // A prompt, then the quarter that is a response.
        let response = Tensor::arange(0u32, n as u32, &device)?.ge((n - n / 4) as u32)?;
        Ok(Self {
            hidden: Var::randn(0f32, 1f32, (n, d), &device)?,
            weight: Var::randn(0f32, 3.0 / (d as f32).sqrt(), (v, d), &device)?,
            mostly_ignored: response.where_cond(&targets, &ignored)?,
            targets,
            smoothing: Tensor::rand(0f32, 0.2f32, n, &device)?,
        })
    }

    fn loss(&self) -> CrossEntropy {
        CrossEntropy::new().smoothing(&self.smoothing)
    }

    fn forward(&self, budget: usize, targets: &Tensor, tracked: bool) -> Result<Tensor> {
        let of = |var: &Var| match tracked {
            true => var.as_tensor().clone(),
            false => var.as_detached_tensor(),
        };
        let loss = self.loss().memory_budget(budget);
        loss.forward_linear(&of(&self.hidden), &of(&self.weight), None, targets)
    }

    /// Logits, computed so often, and both gradients.
    fn products(&self, logits: usize) -> Result<()> {
        let (hidden, weight) = (
            self.hidden.as_detached_tensor(),
            self.weight.as_detached_tensor(),
        );
        let product = || hidden.matmul(&weight.t()?);
        for _ in 1..logits {
            product()?;
        }
        let product = product()?;
        product.t()?.matmul(&hidden)?;
        product.matmul(&weight)?;
        Ok(())
    }

    fn accumulation(&self, gradients: &[Tensor]) -> Result<()> {
        for gradient in gradients {
            gradient.zeros_like()?.add(gradient)?;
        }
        Ok(())
    }

    /// What a trainer does with whole logits.
    fn unfused(&self) -> Result<()> {
        let logits = self.hidden.matmul(&self.weight.t()?)?;
        self.loss().forward(&logits, &self.targets)?.backward()?;
        Ok(())
    }
}

fn bench(c: &mut Criterion) {
    for (n, d, v) in SHAPES {
        let case = Case::new(n, d, v).expect("inputs");
        let mut group = c.benchmark_group(format!("linear {n}x{d}x{v} f32"));
        group
            .sample_size(10)
            .warm_up_time(Duration::from_millis(500))
            .measurement_time(Duration::from_secs(8));
        let id = |name: &str| BenchmarkId::from_parameter(name);
        let product = 2 * (n * d * v) as u64;

        group.throughput(Throughput::Elements(product));
        group.bench_function(id("one product"), |b| {
            let hidden = case.hidden.as_detached_tensor();
            let weight = case.weight.as_detached_tensor();
            b.iter(|| hidden.matmul(&weight.t().expect("t")).expect("product"));
        });
        group.bench_function(id("forward"), |b| {
            b.iter(|| case.forward(0, &case.targets, false).expect("loss"));
        });
        group.bench_function(id("candle's own accumulation"), |b| {
            let gradients = [&case.hidden, &case.weight].map(|var| var.ones_like().expect("ones"));
            b.iter(|| case.accumulation(&gradients).expect("sums"));
        });
        for (logits, budget, name) in [(2, 0, "nothing"), (1, usize::MAX, "all logits")] {
            let products = logits + 2;
            group.throughput(Throughput::Elements(products as u64 * product));
            group.bench_function(id(&format!("{products} products")), |b| {
                b.iter(|| case.products(logits).expect("products"));
            });
            group.bench_function(id(&format!("forward and backward, keeping {name}")), |b| {
                b.iter(|| {
                    let loss = case.forward(budget, &case.targets, true).expect("loss");
                    loss.backward().expect("backward")
                });
            });
        }
        group.bench_function(id("unfused, forward and backward"), |b| {
            b.iter(|| case.unfused().expect("step"));
        });
        group.bench_function(
            id("forward and backward, keeping nothing, 75 % ignored"),
            |b| {
                b.iter(|| {
                    let loss = case.forward(0, &case.mostly_ignored, true).expect("loss");
                    loss.backward().expect("backward")
                });
            },
        );
        group.finish();
    }
}

criterion_group!(benches, bench);
criterion_main!(benches);
