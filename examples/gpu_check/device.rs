//! What only a GPU can do: capture a step in a CUDA graph, and time kernels.

use std::{path::Path, process::Command, time::Instant};

use anyhow::{Context, Result, ensure};
use candle_core::{
    CudaDevice, DType, Device, Tensor, Var,
    cuda_backend::cudarc::driver::{CudaContext, DriverError, result, sys},
};
use candle_cross_entropy::{CrossEntropy, Reduction};
use serde_json::{Value, json};

use crate::{
    cases::values,
    report::{Report, Worst},
};

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

/// Rows of the large shapes, and their vocabularies: the design's.
const ROWS: usize = 8192;
const VOCABULARIES: [usize; 6] = [32000, 50257, 128256, 151936, 202048, 262144];
/// Rows and vocabularies where launches cost more than memory does.
const SMALL: [(usize, usize); 6] = [
    (1, 1000),
    (8, 1000),
    (64, 1000),
    (1, 128256),
    (8, 128256),
    (64, 128256),
];
const SAMPLES: usize = 25;
/// Calls between two looks at the clock, where the host's time a call is what is asked for.
const CALLS: usize = 200;

/// Times every entry point over all shapes, next to a device copy of the same logits and to candle-nn. Looks at a few
/// rows' results first, and writes what it has to `out` after each shape: a run that is cut off keeps it.
pub fn time(device: &Device, commit: &str, report: &mut Report, out: Option<&Path>) -> Result<()> {
    let timer = Timer::new(device, commit)?;
    let large = VOCABULARIES.map(|v| (ROWS, v));
    for (n, v) in large.into_iter().chain(SMALL) {
        let shape = format!("{n}x{v} bf16");
        // Logits, their pristine copy and a gradient, with room for the temporaries of randn.
        let (free, needed) = (free_bytes(device)?, 8 * n * v + (2 << 30));
        if free < needed {
            println!("SKIP timing of {shape}: {} GB free", free >> 30);
            continue;
        }
        let inputs = Inputs::new(n, v, device)?;
        report.numbers(&format!("rows of {shape} before timing"), || inputs.check());
        let mut timings = vec![];
        let timed = timer.shape(&inputs, &mut timings);
        report.timings.append(&mut timings);
        report.holds(&format!("timing of {shape}"), || {
            timed.map(|()| format!("{SAMPLES} samples of each entry point"))
        });
        report.write(out)?;
    }
    Ok(())
}

/// Random bf16 logits, and what goes with them.
struct Inputs {
    n: usize,
    v: usize,
    logits: Tensor,
    targets: Tensor,
    smoothing: Tensor,
}

impl Inputs {
    fn new(n: usize, v: usize, device: &Device) -> Result<Self> {
        // In parts: `randn` is f32.
        let logits = Tensor::zeros((n, v), DType::BF16, device)?;
        for start in (0..n).step_by(1024) {
            let part = Tensor::randn(0f32, 2f32, (1024.min(n - start), v), device)?;
            logits.slice_set(&part.to_dtype(DType::BF16)?, 0, start)?;
        }
        let targets: Vec<u32> = (0..n).map(|i| (i * 31 % v) as u32).collect();
        Ok(Self {
            n,
            v,
            logits,
            targets: Tensor::from_vec(targets, n, device)?,
            smoothing: Tensor::rand(0f32, 0.2f32, n, device)?,
        })
    }

    /// The first four and the last four rows' losses and gradients, from each entry point that is timed, against the
    /// reference.
    fn check(&self) -> Result<Worst> {
        let first = self.n.min(4);
        let last = (self.n - first).min(4);
        let pick = |t: &Tensor| {
            let parts = [t.narrow(0, 0, first)?, t.narrow(0, self.n - last, last)?];
            Tensor::cat(&parts[..1 + usize::from(last > 0)], 0)
        };
        let plain = CrossEntropy::new().reduction(Reduction::None);
        let expected = plain
            .clone()
            .smoothing(pick(&self.smoothing)?)
            .reference(&pick(&self.logits)?, &pick(&self.targets)?)?;
        let mut worst = Worst::default();
        let mut compare = |what: &str, got: &Tensor, expected: &Tensor, relative: f64| {
            let (got, expected) = (values(&pick(got)?)?, values(expected)?);
            for (at, (got, e)) in got.into_iter().zip(expected).enumerate() {
                let error = (got - e).abs() / (relative * e.abs()).max(1e-7);
                worst.see(error, || format!("{what}: value {at} is {got} for {e}"));
            }
            Ok::<_, anyhow::Error>(())
        };
        // One unit in the last place of bf16 is at most this part of a value.
        let (loss_tolerance, grad_tolerance) = (1e-5, 1.0 / 128.0);
        let loss = plain.smoothing(&self.smoothing);
        let got = loss.forward(&self.logits, &self.targets)?;
        compare("forward", &got, &expected.loss, loss_tolerance)?;
        let (got, _) = loss.forward_with_stats(&self.logits, &self.targets)?;
        compare("forward_with_stats", &got, &expected.loss, loss_tolerance)?;
        let got = loss.loss_and_grad(&self.logits, &self.targets)?;
        compare(
            "loss_and_grad, loss",
            &got.loss,
            &expected.loss,
            loss_tolerance,
        )?;
        compare(
            "loss_and_grad, gradient",
            &got.grad,
            &expected.grad,
            grad_tolerance,
        )?;
        let got = loss.loss_and_grad_inplace(self.logits.copy()?, &self.targets)?;
        compare(
            "loss_and_grad_inplace, loss",
            &got.loss,
            &expected.loss,
            loss_tolerance,
        )?;
        compare(
            "loss_and_grad_inplace, gradient",
            &got.grad,
            &expected.grad,
            grad_tolerance,
        )?;
        Ok(worst)
    }
}

/// Samples of one piece of work, sorted.
struct Samples(Vec<f64>);

impl Samples {
    fn new(mut samples: Vec<f64>) -> Self {
        samples.sort_by(f64::total_cmp);
        Self(samples)
    }

    fn percentile(&self, percent: usize) -> f64 {
        self.0[(self.0.len() - 1) * percent / 100]
    }
}

enum Outcome {
    Timed {
        samples: Samples,
        peak_bytes: Option<u64>,
    },
    Skipped(String),
}

impl From<Samples> for Outcome {
    fn from(samples: Samples) -> Self {
        Self::Timed {
            samples,
            peak_bytes: None,
        }
    }
}

struct Timer<'a> {
    cuda: &'a CudaDevice,
    /// Written and read between samples.
    flush: Tensor,
    commit: &'a str,
    gpu: String,
    driver: String,
    date: String,
}

impl<'a> Timer<'a> {
    fn new(device: &'a Device, commit: &'a str) -> Result<Self> {
        let cuda = device.as_cuda_device()?;
        let stream = cuda.cuda_stream();
        let l2 = stream
            .context()
            .attribute(sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE)?
            as usize;
        // f32, in rows short enough for a sum by many blocks.
        let flush_rows = 4 * l2.max(64 << 20) / (4 * 1024);
        Ok(Self {
            cuda,
            flush: Tensor::zeros((flush_rows, 1024), DType::F32, device)?,
            commit,
            gpu: stream.context().name()?,
            driver: shell("nvidia-smi --query-gpu=driver_version --format=csv,noheader"),
            date: shell("date -u +%F"),
        })
    }

    fn shape(&self, inputs: &Inputs, timings: &mut Vec<Value>) -> Result<()> {
        let (n, v) = (inputs.n, inputs.v);
        let (pristine, targets) = (&inputs.logits, &inputs.targets);
        let loss = CrossEntropy::new().smoothing(&inputs.smoothing);
        let logits = pristine.copy()?;
        let (bytes, small) = (2 * n * v, n < ROWS);
        let restore = || Ok(logits.slice_set(pristine, 0, 0)?);
        let nothing = || Ok(());

        let copy = self.samples(nothing, restore)?;
        let copy_gb_per_s = 2.0 * bytes as f64 / copy.percentile(50) / 1e6;
        let mut record = |bench, by, bytes, outcome: Outcome| {
            let mut timing = json!({
                "bench": bench, "impl": by, "n": n, "v": v, "dtype": "bf16",
                "commit": self.commit, "gpu": self.gpu, "driver": self.driver, "date": self.date,
            });
            match outcome {
                Outcome::Timed {
                    samples,
                    peak_bytes,
                } => {
                    let median = samples.percentile(50);
                    let gb_per_s = bytes as f64 / median / 1e6;
                    timing["median_ms"] = json!(median);
                    timing["p10_ms"] = json!(samples.percentile(10));
                    timing["p90_ms"] = json!(samples.percentile(90));
                    timing["samples"] = json!(samples.0.len());
                    timing["gb_per_s"] = json!(gb_per_s);
                    timing["fraction_of_copy"] = json!(gb_per_s / copy_gb_per_s);
                    timing["peak_bytes"] = json!(peak_bytes);
                }
                Outcome::Skipped(why) => timing["skipped"] = json!(why),
            }
            timings.push(timing);
        };
        record("copy", "device", 2 * bytes, copy.into());
        if small {
            let host = self.host_samples(restore)?;
            record("copy, host", "device", 2 * bytes, host.into());
        }

        // Timed on the device, and by the host's clock as well where launches are what it costs. Logits that are
        // overwritten are restored before each sample; between back-to-back calls they stay gradients, which are as
        // much work as the logits were.
        let in_place = || {
            loss.loss_and_grad_inplace(logits.clone(), targets)?;
            Ok(())
        };
        let out_of_place = || {
            loss.loss_and_grad(pristine, targets)?;
            Ok(())
        };
        let forward = || {
            loss.forward(pristine, targets)?;
            Ok(())
        };
        let with_stats = || {
            loss.forward_with_stats(pristine, targets)?;
            Ok(())
        };
        type Call<'a> = &'a dyn Fn() -> Result<()>;
        let entry_points: [(_, _, _, Call, Call); 4] = [
            (
                "loss_and_grad_inplace",
                "loss_and_grad_inplace, host",
                2 * bytes,
                &restore,
                &in_place,
            ),
            (
                "loss_and_grad",
                "loss_and_grad, host",
                2 * bytes,
                &nothing,
                &out_of_place,
            ),
            ("forward", "forward, host", bytes, &nothing, &forward),
            (
                "forward_with_stats",
                "forward_with_stats, host",
                bytes,
                &nothing,
                &with_stats,
            ),
        ];
        for (bench, host_bench, bytes, before, work) in entry_points {
            record(bench, "ours", bytes, self.samples(before, work)?.into());
            if small {
                record(host_bench, "ours", bytes, self.host_samples(work)?.into());
            }
        }
        drop(logits);

        // Through candle's graph: its own accumulation is part of the time, not of the useful bytes.
        type Step<'a> = Box<dyn Fn(&Tensor) -> candle_core::Result<Tensor> + 'a>;
        let ours: Step = Box::new(|x| loss.forward(x, targets));
        let theirs: Step = Box::new(|x| candle_nn::loss::cross_entropy(x, targets));
        for (by, step) in [("ours", ours), ("candle-nn", theirs)] {
            let var = Var::from_tensor(pristine)?;
            let run = || {
                step(var.as_tensor())?.backward()?;
                Ok(())
            };
            // candle-nn's temporaries may not fit where ours do.
            let outcome = self
                .with_peak(|| self.samples(nothing, run))
                .unwrap_or_else(|error| Outcome::Skipped(format!("{error:#}")));
            record("forward + backward()", by, 2 * bytes, outcome);
            if small {
                let host = self.host_samples(run)?;
                record("forward + backward(), host", by, 2 * bytes, host.into());
            }
        }
        Ok(())
    }

    /// Leaves nothing of the logits in the L2 cache, and nothing dirty, whose writing back a sample would pay for:
    /// reading follows writing. Written several times over, it also keeps the device busy while the host prepares the
    /// launches of a sample.
    fn evict(&self) -> Result<()> {
        for _ in 0..8 {
            self.flush.zero_set()?;
        }
        self.flush.sum(1)?;
        Ok(())
    }

    /// Times of `work` on the device in milliseconds, between two events; `before` runs untimed ahead of each sample.
    fn samples(
        &self,
        before: impl Fn() -> Result<()>,
        work: impl Fn() -> Result<()>,
    ) -> Result<Samples> {
        let stream = self.cuda.cuda_stream();
        let timed = Some(sys::CUevent_flags::CU_EVENT_DEFAULT);
        for _ in 0..3 {
            before()?;
            work()?;
        }
        let mut samples = vec![];
        for _ in 0..SAMPLES {
            before()?;
            self.evict()?;
            let start = stream.record_event(timed)?;
            work()?;
            let end = stream.record_event(timed)?;
            samples.push(f64::from(start.elapsed_ms(&end)?));
        }
        Ok(Samples::new(samples))
    }

    /// Milliseconds a call by the host's clock, of calls back to back: what launching costs, when the work is less.
    fn host_samples(&self, work: impl Fn() -> Result<()>) -> Result<Samples> {
        let stream = self.cuda.cuda_stream();
        let mut samples = vec![];
        // The first is a warm-up.
        for _ in 0..8 {
            stream.synchronize()?;
            let start = Instant::now();
            for _ in 0..CALLS {
                work()?;
            }
            stream.synchronize()?;
            samples.push(start.elapsed().as_secs_f64() * 1e3 / CALLS as f64);
        }
        Ok(Samples::new(samples.split_off(1)))
    }

    /// Runs `work`, and notes how many bytes of the device's memory it held at most beyond those held before.
    fn with_peak(&self, work: impl FnOnce() -> Result<Samples>) -> Result<Outcome> {
        let current = sys::CUmemPool_attribute::CU_MEMPOOL_ATTR_USED_MEM_CURRENT;
        let high = sys::CUmemPool_attribute::CU_MEMPOOL_ATTR_USED_MEM_HIGH;
        let before = pool_bytes(self.cuda, current)?;
        reset_peak(self.cuda)?;
        let samples = work()?;
        let peak = pool_bytes(self.cuda, high)?.saturating_sub(before);
        Ok(Outcome::Timed {
            samples,
            peak_bytes: Some(peak),
        })
    }
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
