//! CPU throughput of the loss beside what else there is: `cargo bench --bench cpu`.
//!
//! Reported as GB/s of useful bytes: the logits once for a loss, twice (one read, one write) for loss and gradient and
//! for copies, however often an implementation really moves them. The bars (see the README) compare with
//! `copy, 2 threads` (into memory that exists already) and with `Tensor::copy` (into fresh memory).

use std::{hint::black_box, time::Duration};

use candle_core::{D, DType, Device, Result, Tensor, Var};
use candle_cross_entropy::{CrossEntropy, Targets};
use criterion::{BatchSize, BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};

const SHAPES: [(usize, usize); 2] = [(512, 32000), (256, 128256)];

struct Case {
    logits: Tensor,
    targets: Tensor,
    smoothing: Tensor,
    bytes: u64,
}

impl Case {
    fn new(n: usize, v: usize, dtype: DType) -> Result<Self> {
        let device = Device::Cpu;
        let logits = Tensor::randn(0f32, 3f32, (n, v), &device)?.to_dtype(dtype)?;
        let targets = Tensor::rand(0f32, v as f32, n, &device)?.to_dtype(DType::U32)?;
        let smoothing = Tensor::rand(0f32, 0.2f32, n, &device)?;
        Ok(Self {
            logits,
            targets,
            smoothing,
            bytes: (n * v * dtype.size_in_bytes()) as u64,
        })
    }

    fn loss(&self) -> CrossEntropy {
        CrossEntropy::new().smoothing(&self.smoothing)
    }

    /// The loss and the targets with each option that is about all classes, or about several.
    fn distributions(&self) -> Result<Vec<(&'static str, CrossEntropy, Targets)>> {
        let (device, (n, v)) = (&Device::Cpu, self.logits.dims2()?);
        let (loss, classes) = (self.loss(), Targets::from(&self.targets));
        let values = Tensor::rand(0.5f32, 1.5f32, v, device)?;
        let t = Tensor::rand(0f32, 2.0 / v as f32, (n, v), device)?;
        let few = Tensor::rand(0f32, v as f32, (n, 32), device)?.to_dtype(DType::U32)?;
        let few = Targets::top_k(&few, &Tensor::rand(0f32, 1.0 / 16.0, (n, 32), device)?);
        let weighted = loss.clone().class_weights(&values);
        Ok(vec![
            ("class weights", weighted, classes.clone()),
            (
                "prior",
                loss.clone().smoothing_prior(&values),
                classes.clone(),
            ),
            ("entropy weight", loss.clone().entropy_weight(0.1), classes),
            ("32 classes a row", loss.clone(), few),
            ("probabilities", loss, t.into()),
        ])
    }
}

/// Per-row smoothing from candle's own operations: what a trainer would write without this crate.
fn composite(logits: &Tensor, case: &Case) -> Result<Tensor> {
    let log_p = candle_nn::ops::log_softmax(logits, D::Minus1)?;
    let nll = log_p
        .gather(&case.targets.unsqueeze(1)?, 1)?
        .squeeze(1)?
        .neg()?;
    let smooth = log_p.mean(D::Minus1)?.neg()?;
    let smoothing = case.smoothing.to_dtype(logits.dtype())?;
    (nll.mul(&(1.0 - &smoothing)?)? + smooth.mul(&smoothing)?)?.mean_all()
}

/// A plain copy by two threads into memory that has been written before.
fn copy_2_threads(from: &[u8], to: &mut [u8]) {
    let half = from.len() / 2;
    let (to_low, to_high) = to.split_at_mut(half);
    rayon::join(
        || to_low.copy_from_slice(&from[..half]),
        || to_high.copy_from_slice(&from[half..]),
    );
}

fn bench(c: &mut Criterion) {
    for (n, v) in SHAPES {
        for dtype in [DType::F32, DType::BF16] {
            let case = Case::new(n, v, dtype).expect("inputs");
            let mut group = c.benchmark_group(format!("{n}x{v} {}", dtype.as_str()));
            group
                .sample_size(20)
                .warm_up_time(Duration::from_millis(500))
                .measurement_time(Duration::from_secs(3));
            let id = |name: &str| BenchmarkId::from_parameter(name);

            group.throughput(Throughput::Bytes(2 * case.bytes));
            let from = vec![1u8; case.bytes as usize];
            let mut to = vec![2u8; case.bytes as usize];
            group.bench_function(id("copy, 2 threads"), |b| {
                b.iter(|| copy_2_threads(black_box(&from), &mut to))
            });
            drop((from, to));
            group.bench_function(id("Tensor::copy"), |b| {
                b.iter(|| case.logits.copy().expect("copy"))
            });
            group.bench_function(id("loss_and_grad_inplace"), |b| {
                // Every pass turns the memory into gradients; the next one's logits. The work is the same.
                let logits = case.logits.copy().expect("copy");
                let loss = case.loss();
                b.iter(|| {
                    loss.loss_and_grad_inplace(logits.clone(), &case.targets)
                        .expect("loss")
                });
            });
            for (name, loss, targets) in case.distributions().expect("inputs") {
                group.bench_function(id(&format!("loss_and_grad_inplace, {name}")), |b| {
                    let logits = case.logits.copy().expect("copy");
                    b.iter(|| {
                        loss.loss_and_grad_inplace(logits.clone(), &targets)
                            .expect("loss")
                    });
                });
            }
            group.bench_function(id("loss_and_grad_inplace_without_stats"), |b| {
                let logits = case.logits.copy().expect("copy");
                let loss = case.loss();
                b.iter(|| {
                    loss.loss_and_grad_inplace_without_stats(logits.clone(), &case.targets)
                        .expect("loss")
                });
            });
            group.bench_function(id("loss_and_grad"), |b| {
                b.iter(|| {
                    case.loss()
                        .loss_and_grad(&case.logits, &case.targets)
                        .expect("loss")
                });
            });
            group.bench_function(id("forward and backward"), |b| {
                let logits = Var::from_tensor(&case.logits).expect("var");
                b.iter(|| {
                    let loss = case.loss().forward(&logits, &case.targets).expect("loss");
                    loss.backward().expect("backward")
                });
            });
            if n == SHAPES[0].0 && dtype == DType::F32 {
                group.sample_size(10);
                let logits = Var::from_tensor(&case.logits).expect("var");
                group.bench_function(id("candle-nn, forward and backward"), |b| {
                    b.iter_batched(
                        || (),
                        |()| {
                            let loss = candle_nn::loss::cross_entropy(&logits, &case.targets)
                                .expect("loss");
                            loss.backward().expect("backward")
                        },
                        BatchSize::PerIteration,
                    );
                });
                group.bench_function(id("composite, forward and backward"), |b| {
                    b.iter_batched(
                        || (),
                        |()| {
                            composite(&logits, &case)
                                .and_then(|l| l.backward())
                                .expect("backward")
                        },
                        BatchSize::PerIteration,
                    );
                });
            }

            group
                .throughput(Throughput::Bytes(case.bytes))
                .sample_size(20);
            group.bench_function(id("forward"), |b| {
                b.iter(|| {
                    case.loss()
                        .forward(&case.logits, &case.targets)
                        .expect("loss")
                });
            });
            group.bench_function(id("forward_with_stats"), |b| {
                b.iter(|| {
                    case.loss()
                        .forward_with_stats(&case.logits, &case.targets)
                        .expect("loss")
                });
            });
            if dtype == DType::F32 {
                group.bench_function(id("candle-nn, forward"), |b| {
                    b.iter(|| {
                        candle_nn::loss::cross_entropy(&case.logits, &case.targets).expect("loss")
                    });
                });
                group.bench_function(id("composite, forward"), |b| {
                    b.iter(|| composite(&case.logits, &case).expect("loss"));
                });
            }
            group.finish();
        }
    }
}

criterion_group!(benches, bench);
criterion_main!(benches);
