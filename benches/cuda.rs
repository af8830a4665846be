//! Entry points on CUDA, with a smoothing coefficient a row, next to a device copy of the same logits and to candle-nn.
//!
//! Throughput is of useful bytes: one read of the logits for a loss, a read and a write for a loss with gradient. `cargo bench --features cuda --bench cuda`; for timings by events on the
//! device, without launch overhead, see `examples/gpu_check`.

use std::time::{Duration, Instant};

use candle_core::{DType, Device, Result, Tensor, Var};
use candle_cross_entropy::CrossEntropy;
use criterion::{Criterion, Throughput, criterion_group, criterion_main};

const ROWS: usize = 8192;
/// Llama 2, GPT-2 (odd: rows at every alignment) and Llama 3.
const VOCABULARIES: [usize; 3] = [32000, 50257, 128256];

fn cuda(c: &mut Criterion) {
    let device = Device::new_cuda(0).expect("this benchmark needs a GPU");
    for v in VOCABULARIES {
        entry_points(c, v, &device).expect("inputs fit the GPU's memory");
    }
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
            b.iter_custom(|iterations| {
                let time = || {
                    device.synchronize()?;
                    let start = Instant::now();
                    for _ in 0..iterations {
                        work()?;
                    }
                    device.synchronize()?;
                    Ok(start.elapsed())
                };
                let time: Result<Duration> = time();
                time.expect("the work runs")
            })
        });
    };
    bench("device copy", 2, &|| other.slice_set(&logits, 0, 0));
    // The logits become gradients after the first time: other values, the same work.
    bench("loss_and_grad_inplace", 2, &|| {
        loss.loss_and_grad_inplace(other.clone(), &targets)
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

criterion_group!(benches, cuda);
criterion_main!(benches);
