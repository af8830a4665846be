//! Times of work on the device, and the records they go into.

use std::{process::Command, time::Instant};

use anyhow::Result;
use candle_core::{CudaDevice, DType, Device, Tensor, cuda_backend::cudarc::driver::sys};
use serde_json::{Value, json};

use super::memory;

pub const SAMPLES: usize = 25;
/// Calls between two looks at the clock, where the host's time a call is what is asked for.
const CALLS: usize = 200;

/// Samples of one piece of work, sorted.
pub struct Samples(Vec<f64>);

impl Samples {
    fn new(mut samples: Vec<f64>) -> Self {
        samples.sort_by(f64::total_cmp);
        Self(samples)
    }

    fn percentile(&self, percent: usize) -> f64 {
        self.0[(self.0.len() - 1) * percent / 100]
    }

    pub fn median(&self) -> f64 {
        self.percentile(50)
    }
}

pub type Work<'a> = &'a dyn Fn() -> Result<()>;

pub struct Timer<'a> {
    pub cuda: &'a CudaDevice,
    /// Written and read between samples.
    flush: Tensor,
    commit: &'a str,
    gpu: String,
    driver: String,
    date: String,
}

impl<'a> Timer<'a> {
    pub fn new(device: &'a Device, commit: &'a str) -> Result<Self> {
        let cuda = device.as_cuda_device()?;
        memory::keep_freed(cuda)?;
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

    /// A record of a bench of bf16 logits, without its numbers.
    pub fn record(&self, bench: &str, by: &str, (n, v): (usize, usize)) -> Value {
        json!({
            "bench": bench, "impl": by, "n": n, "v": v, "dtype": "bf16",
            "commit": self.commit, "gpu": self.gpu, "driver": self.driver, "date": self.date,
        })
    }

    /// A record with the samples' numbers.
    pub fn timed(&self, bench: &str, by: &str, shape: (usize, usize), samples: &Samples) -> Value {
        let mut record = self.record(bench, by, shape);
        record["median_ms"] = json!(samples.median());
        record["p10_ms"] = json!(samples.percentile(10));
        record["p90_ms"] = json!(samples.percentile(90));
        record["samples"] = json!(samples.0.len());
        record
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

    /// Milliseconds of `work` on the device, between two events.
    fn sample(&self, work: impl Fn() -> Result<()>) -> Result<f64> {
        let stream = self.cuda.cuda_stream();
        let timed = Some(sys::CUevent_flags::CU_EVENT_DEFAULT);
        self.evict()?;
        let start = stream.record_event(timed)?;
        work()?;
        let end = stream.record_event(timed)?;
        Ok(f64::from(start.elapsed_ms(&end)?))
    }

    /// Times of `work` on the device; `before` runs untimed ahead of each sample.
    pub fn samples(
        &self,
        before: impl Fn() -> Result<()>,
        work: impl Fn() -> Result<()>,
    ) -> Result<Samples> {
        for _ in 0..3 {
            before()?;
            work()?;
        }
        let sample = || {
            before()?;
            self.sample(&work)
        };
        let samples: Result<_> = (0..SAMPLES).map(|_| sample()).collect();
        Ok(Samples::new(samples?))
    }

    /// Times of several works on the device, a sample of each in turn: matrix products heat the device, and its clock
    /// falls for all of them alike.
    pub fn samples_in_turn(&self, works: &[Work]) -> Result<Vec<Samples>> {
        for work in works {
            work()?;
            work()?;
        }
        let mut samples = vec![vec![]; works.len()];
        for _ in 0..SAMPLES {
            for (samples, work) in samples.iter_mut().zip(works) {
                samples.push(self.sample(work)?);
            }
        }
        Ok(samples.into_iter().map(Samples::new).collect())
    }

    /// Milliseconds a call by the host's clock, of calls back to back: what launching costs, when the work is less.
    pub fn host_samples(&self, work: impl Fn() -> Result<()>) -> Result<Samples> {
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
