//! What only a GPU can do: capture a step in a CUDA graph, and time kernels.

use std::process::Command;

use anyhow::{Context, Result, ensure};
use candle_core::{
    CudaDevice, DType, Device, Tensor, Var,
    cuda_backend::cudarc::driver::{CudaContext, DriverError, result, sys},
};
use candle_cross_entropy::CrossEntropy;
use serde_json::json;

use crate::{cases::values, report::Report};

pub fn free_bytes(device: &Device) -> Result<usize> {
    Ok(device
        .as_cuda_device()?
        .cuda_stream()
        .context()
        .mem_get_info()?
        .0)
}

/// A forward and backward through candle, captured once and replayed: the results follow the logits' memory.
pub fn check_graph(device: &Device, report: &mut Report) {
    report.holds("CUDA graph of forward and backward", || {
        let cuda = device.as_cuda_device()?;
        // candle uploads shapes of its own kernels; during a capture it may only find them uploaded already.
        let _uploads = cuda.enable_cuda_graph_htod_cache();
        let (rows, width) = (64, 4099);
        let logits = Var::from_tensor(
            &Tensor::randn(0f32, 2f32, (rows, width), device)?.to_dtype(DType::BF16)?,
        )?;
        let targets = Tensor::arange(0u32, rows as u32, device)?;
        let smoothing = Tensor::full(0.1f32, rows, device)?;
        let loss = CrossEntropy::new().smoothing(&smoothing);
        let step = || -> Result<(Tensor, Tensor)> {
            let value = loss.forward(logits.as_tensor(), &targets)?;
            let grad = value.backward()?.remove(&logits).context("no gradient")?;
            Ok((value, grad))
        };
        step()?; // loads modules, which a capture must not
        step()?;
        let stream = cuda.cuda_stream();
        stream.synchronize()?;
        stream.begin_capture(sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL)?;
        let captured = step();
        // The outputs are allocated by the graph, anew at each launch.
        let flags = sys::CUgraphInstantiate_flags::CUDA_GRAPH_INSTANTIATE_FLAG_AUTO_FREE_ON_LAUNCH;
        let graph = stream.end_capture(flags);
        let (value, grad) = captured?;
        let graph = graph?.context("nothing was captured")?;
        for replay in 0..3 {
            let new = Tensor::randn(0f32, 1f32 + replay as f32, (rows, width), device)?
                .to_dtype(DType::BF16)?;
            logits.set(&new)?;
            graph.launch()?;
            stream.synchronize()?;
            let got = (values(&value)?, values(&grad)?);
            let (value, grad) = step()?;
            ensure!(
                got == (values(&value)?, values(&grad)?),
                "replay {replay} differs from a step without the graph"
            );
        }
        Ok("3 replays with new logits, bitwise as without".into())
    });
}

const ROWS: usize = 8192;
const VOCABULARIES: [usize; 6] = [32000, 50257, 128256, 151936, 202048, 262144];
const SAMPLES: usize = 25;

/// Times every entry point over the design's shapes, next to a device copy of the same logits and to candle-nn.
pub fn time(device: &Device, commit: &str, report: &mut Report) -> Result<()> {
    let cuda = device.as_cuda_device()?;
    let stream = cuda.cuda_stream();
    let gpu = stream.context().name()?;
    let (driver, date) = (
        shell("nvidia-smi --query-gpu=driver_version --format=csv,noheader"),
        shell("date -u +%F"),
    );
    // Written between samples, so that nothing of the logits is left in the L2 cache.
    let l2 = stream
        .context()
        .attribute(sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE)?
        as usize;
    let flush = Tensor::zeros(4 * l2.max(64 << 20), DType::U8, device)?;
    for v in VOCABULARIES {
        let bytes = ROWS * v * 2;
        // Logits, their pristine copy and a gradient, with room for the temporaries of randn.
        if free_bytes(device)? < 4 * bytes + (2 << 30) {
            println!(
                "SKIP timing of V {v}: {} GB free",
                free_bytes(device)? >> 30
            );
            continue;
        }
        let pristine = noise(v, device)?;
        let logits = pristine.copy()?;
        let targets = Tensor::arange(0u32, ROWS as u32, device)?;
        let smoothing = Tensor::rand(0f32, 0.2f32, ROWS, device)?;
        let loss = CrossEntropy::new().smoothing(&smoothing);
        let evict = || Ok(flush.zero_set()?);

        let copy = median_ms(cuda, evict, || Ok(logits.slice_set(&pristine, 0, 0)?))?;
        let copy_gb_per_s = 2.0 * bytes as f64 / copy / 1e6;
        let mut record = |bench: &str, by: &str, ms: f64, moved: usize, peak: Option<u64>| {
            let gb_per_s = moved as f64 / ms / 1e6;
            report.timings.push(json!({
                "bench": bench, "impl": by, "n": ROWS, "v": v, "dtype": "bf16", "median_ms": ms, "gb_per_s": gb_per_s,
                "fraction_of_copy": gb_per_s / copy_gb_per_s, "peak_bytes": peak,
                "commit": commit, "gpu": gpu, "driver": driver, "date": date,
            }));
        };
        record("copy", "device", copy, 2 * bytes, None);

        let restore = || {
            logits.slice_set(&pristine, 0, 0)?;
            evict()
        };
        let ms = median_ms(cuda, restore, || {
            loss.loss_and_grad_inplace(logits.clone(), &targets)
                .map(drop)
                .map_err(Into::into)
        })?;
        record("loss_and_grad_inplace", "ours", ms, 2 * bytes, None);
        let ms = median_ms(cuda, evict, || {
            loss.loss_and_grad(&pristine, &targets)
                .map(drop)
                .map_err(Into::into)
        })?;
        record("loss_and_grad", "ours", ms, 2 * bytes, None);
        let ms = median_ms(cuda, evict, || {
            loss.forward(&pristine, &targets)
                .map(drop)
                .map_err(Into::into)
        })?;
        record("forward", "ours", ms, bytes, None);
        let ms = median_ms(cuda, evict, || {
            loss.forward_with_stats(&pristine, &targets)
                .map(drop)
                .map_err(Into::into)
        })?;
        record("forward_with_stats", "ours", ms, bytes, None);
        drop(logits);

        // Through candle's graph: its own accumulation is part of the time. Useful bytes are two reads and a write.
        type Step<'a> = Box<dyn Fn(&Tensor) -> candle_core::Result<Tensor> + 'a>;
        let ours: Step = Box::new(|x| loss.forward(x, &targets));
        let theirs: Step = Box::new(|x| candle_nn::loss::cross_entropy(x, &targets));
        for (by, step) in [("ours", ours), ("candle-nn", theirs)] {
            let var = Var::from_tensor(&pristine)?;
            let run = || Ok(step(var.as_tensor())?.backward().map(drop)?);
            let before = pool_bytes(
                cuda,
                sys::CUmemPool_attribute::CU_MEMPOOL_ATTR_USED_MEM_CURRENT,
            )?;
            reset_peak(cuda)?;
            match median_ms(cuda, evict, run) {
                Ok(ms) => {
                    let peak = pool_bytes(
                        cuda,
                        sys::CUmemPool_attribute::CU_MEMPOOL_ATTR_USED_MEM_HIGH,
                    )?;
                    record(
                        "forward + backward()",
                        by,
                        ms,
                        3 * bytes,
                        Some(peak - before),
                    );
                    println!(
                        "peak of forward + backward(), {by}, V {v}: {:.2} GB beyond the logits",
                        (peak - before) as f64 / 1e9
                    );
                }
                // candle-nn's temporaries may not fit where ours do.
                Err(error) => println!("SKIP forward + backward(), {by}, V {v}: {error:#}"),
            }
        }
    }
    Ok(())
}

/// Rows of noise, made in parts: `randn` is f32.
fn noise(v: usize, device: &Device) -> Result<Tensor> {
    let logits = Tensor::zeros((ROWS, v), DType::BF16, device)?;
    for start in (0..ROWS).step_by(1024) {
        logits.slice_set(
            &Tensor::randn(0f32, 2f32, (1024, v), device)?.to_dtype(DType::BF16)?,
            0,
            start,
        )?;
    }
    Ok(logits)
}

/// Median time of `work` on the device, between two events; `before` runs untimed ahead of each sample, and keeps the
/// device busy while the host prepares the launch.
fn median_ms(
    cuda: &CudaDevice,
    before: impl Fn() -> Result<()>,
    work: impl Fn() -> Result<()>,
) -> Result<f64> {
    let stream = cuda.cuda_stream();
    let timed = Some(sys::CUevent_flags::CU_EVENT_DEFAULT);
    for _ in 0..3 {
        before()?;
        work()?;
    }
    let mut samples = vec![];
    for _ in 0..SAMPLES {
        before()?;
        let start = stream.record_event(timed)?;
        work()?;
        let end = stream.record_event(timed)?;
        samples.push(f64::from(start.elapsed_ms(&end)?));
    }
    samples.sort_by(f64::total_cmp);
    Ok(samples[SAMPLES / 2])
}

fn pool(context: &CudaContext) -> Result<sys::CUmemoryPool, DriverError> {
    // SAFETY: the device handle is that of a live context.
    unsafe { result::device::get_default_mem_pool(context.cu_device()) }
}

fn pool_bytes(cuda: &CudaDevice, what: sys::CUmemPool_attribute) -> Result<u64> {
    let stream = cuda.cuda_stream();
    stream.synchronize()?;
    let mut bytes = 0u64;
    // SAFETY: the attributes asked for are 64-bit integers.
    unsafe {
        result::mem_pool::get_attribute(pool(stream.context())?, what, (&raw mut bytes).cast())
    }?;
    Ok(bytes)
}

fn reset_peak(cuda: &CudaDevice) -> Result<()> {
    let high = sys::CUmemPool_attribute::CU_MEMPOOL_ATTR_USED_MEM_HIGH;
    let mut zero = 0u64;
    // SAFETY: as above; only 0 may be written.
    unsafe {
        result::mem_pool::set_attribute(
            pool(cuda.cuda_stream().context())?,
            high,
            (&raw mut zero).cast(),
        )
    }?;
    Ok(())
}

fn shell(command: &str) -> String {
    let mut words = command.split(' ');
    let Some(program) = words.next() else {
        return String::new();
    };
    let output = Command::new(program).args(words).output();
    output
        .map(|o| {
            String::from_utf8_lossy(&o.stdout)
                .lines()
                .next()
                .unwrap_or_default()
                .to_string()
        })
        .unwrap_or_default()
}
