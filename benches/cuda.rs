//! Entry points on CUDA, with a smoothing coefficient a row, next to a device copy of the same logits and to candle-nn;
//! `forward_linear` next to its bare matrix products. `cargo bench --features cuda --bench cuda`
//!
//! Throughput is of useful bytes: one read of the logits for a loss, a read and a write for a loss with gradient; from
//! hidden states, of the operations of one product for a loss and of three for gradients. For timings by events on the
//! device, without launch overhead, see `gpu-check`.

use std::time::{Duration, Instant};

use candle_core::{DType, Device, Result, Tensor, Var};
use candle_cross_entropy::CrossEntropy;
use criterion::{Criterion, Throughput, criterion_group, criterion_main};

const ROWS: usize = 8192;
/// Llama 2, GPT-2 (odd: rows at every alignment) and Llama 3.
const VOCABULARIES: [usize; 3] = [32000, 50257, 128256];
/// From hidden states of so many elements.
const DEPTH: usize = 4096;
const LINEAR_VOCABULARIES: [usize; 2] = [32000, 128256];

fn cuda(c: &mut Criterion) {
    let device = Device::new_cuda(0).expect("this benchmark needs a GPU");
    for v in VOCABULARIES {
        entry_points(c, v, &device).expect("inputs fit the GPU's memory");
    }
    for v in LINEAR_VOCABULARIES {
        linear(c, v, &device).expect("inputs fit the GPU's memory");
    }
}

/// What so many calls take by the host's clock.
fn elapsed(device: &Device, iterations: u64, work: &dyn Fn() -> Result<()>) -> Result<Duration> {
    device.synchronize()?;
    let start = Instant::now();
    for _ in 0..iterations {
        work()?;
    }
    device.synchronize()?;
    Ok(start.elapsed())
}

fn entry_points(c: &mut Criterion, v: usize, device: &Device) -> Result<()> {
    // In parts, since noise is made in f32.
    let logits = Tensor::zeros((ROWS, v), DType::BF16, device)?;
    for start in (0..ROWS).step_by(1024) {
        logits.slice_set(
            &Tensor::randn(0f32, 2f32, (1024, v), device)?.to_dtype(DType::BF16)?,
            0,
            start,
        )?;
    }
    let other = logits.copy()?;
    let targets = Tensor::arange(0u32, ROWS as u32, device)?;
    let smoothing = Tensor::rand(0f32, 0.2f32, ROWS, device)?;
    let loss = CrossEntropy::new().smoothing(&smoothing);
    let var = Var::from_tensor(&logits)?;

    let mut group = c.benchmark_group(format!("cuda bf16 {ROWS}x{v}"));
    group
        .sample_size(20)
        .warm_up_time(Duration::from_secs(1))
        .measurement_time(Duration::from_secs(3));
    let mut bench = |name: &str, passes: usize, work: &dyn Fn() -> Result<()>| {
        group.throughput(Throughput::BytesDecimal((passes * ROWS * v * 2) as u64));
        group.bench_function(name, |b| {
            b.iter_custom(|iterations| elapsed(device, iterations, work).expect("the work runs"))
        });
    };
    bench("device copy", 2, &|| other.slice_set(&logits, 0, 0));
    // The logits become gradients after the first time: other values, the same work.
    bench("loss_and_grad_inplace", 2, &|| {
        loss.loss_and_grad_inplace(other.clone(), &targets)
            .map(drop)
    });
    bench("loss_and_grad_inplace_without_stats", 2, &|| {
        loss.loss_and_grad_inplace_without_stats(other.clone(), &targets)
            .map(drop)
    });
    bench("loss_and_grad", 2, &|| {
        loss.loss_and_grad(&logits, &targets).map(drop)
    });
    bench("forward", 1, &|| loss.forward(&logits, &targets).map(drop));
    bench("forward_with_stats", 1, &|| {
        loss.forward_with_stats(&logits, &targets).map(drop)
    });
    bench("forward + backward()", 2, &|| {
        loss.forward(&var, &targets)?.backward().map(drop)
    });
    bench("candle-nn forward + backward()", 2, &|| {
        candle_nn::loss::cross_entropy(&var, &targets)?
            .backward()
            .map(drop)
    });
    group.finish();
    Ok(())
}

fn linear(c: &mut Criterion, v: usize, device: &Device) -> Result<()> {
    let random = |rows: usize, deviation: f32| {
        let noise = Tensor::randn(0f32, deviation, (rows, DEPTH), device)?;
        Var::from_tensor(&noise.to_dtype(DType::BF16)?)
    };
    let (hidden, weight) = (random(ROWS, 1.0)?, random(v, 2.0 / (DEPTH as f32).sqrt())?);
    let (frozen_hidden, frozen_weight) = (hidden.detach(), weight.detach());
    let targets = Tensor::arange(0i64, ROWS as i64, device)?;
    // A prompt, then the quarter that is a response.
    let prompt = vec![-100; ROWS - ROWS / 4];
    let few_targets: Vec<i64> = prompt.into_iter().chain(0..ROWS as i64 / 4).collect();
    let few_targets = Tensor::from_vec(few_targets, ROWS, device)?;
    let smoothing = Tensor::rand(0f32, 0.2f32, ROWS, device)?;
    let loss = CrossEntropy::new().smoothing(&smoothing);
    let logits = || frozen_hidden.matmul(&frozen_weight.t()?);
    let gradient = loss.loss_and_grad_inplace(logits()?, &targets)?.grad;
    let products = |logit_products: usize| {
        for _ in 0..logit_products {
            logits()?;
        }
        gradient.t()?.matmul(&frozen_hidden)?;
        gradient.matmul(&frozen_weight).map(drop)
    };
    let forward = |loss: &CrossEntropy, targets: &Tensor| {
        loss.forward_linear(&frozen_hidden, &frozen_weight, None, targets)
            .map(drop)
    };
    let both = |loss: &CrossEntropy, targets: &Tensor| {
        loss.forward_linear(&hidden, &weight, None, targets)?
            .backward()
            .map(drop)
    };
    let keeping_nothing = loss.clone().memory_budget(0);
    let keeping_all = loss.clone().memory_budget(usize::MAX);
    let compact = keeping_nothing.clone().compact_rows(true);

    let mut group = c.benchmark_group(format!("cuda linear bf16 {ROWS}x{DEPTH}x{v}"));
    group
        .sample_size(20)
        .warm_up_time(Duration::from_secs(1))
        .measurement_time(Duration::from_secs(3));
    let mut bench = |name: &str, products: usize, work: &dyn Fn() -> Result<()>| {
        group.throughput(Throughput::Elements(
            (products * 2 * ROWS * DEPTH * v) as u64,
        ));
        group.bench_function(name, |b| {
            b.iter_custom(|iterations| elapsed(device, iterations, work).expect("the work runs"))
        });
    };
    bench("one product", 1, &|| logits().map(drop));
    bench("forward", 1, &|| forward(&loss, &targets));
    bench("forward, 75 % ignored", 1, &|| {
        forward(&compact, &few_targets)
    });
    bench("three products", 3, &|| products(1));
    bench("four products", 3, &|| products(2));
    bench("forward + backward(), budget 0", 3, &|| {
        both(&keeping_nothing, &targets)
    });
    bench("forward + backward(), budget for all", 3, &|| {
        both(&keeping_all, &targets)
    });
    bench("forward + backward(), budget 0, 75 % ignored", 3, &|| {
        both(&compact, &few_targets)
    });
    bench("whole logits, forward + backward()", 3, &|| {
        let logits = hidden.matmul(&weight.t()?)?;
        loss.forward(&logits, &targets)?.backward().map(drop)
    });
    group.finish();
    Ok(())
}

criterion_group!(benches, cuda);
criterion_main!(benches);
