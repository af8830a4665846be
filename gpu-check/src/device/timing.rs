//! Times of the entry points that take logits, next to a device copy and to candle-nn.

use std::path::Path;

use anyhow::{Result, bail, ensure};
use candle_core::{
    CudaDevice, DType, Device, Storage, Tensor, Var,
    cuda_backend::{
        CudaStorageSlice,
        cudarc::driver::{DevicePtr, result::memcpy_dtod_async},
    },
};
use candle_cross_entropy::{CrossEntropy, Reduction};
use serde_json::{Value, json};

use super::{
    memory::{free_bytes, with_peak},
    timer::{SAMPLES, Samples, Timer, Work},
};
use crate::{
    cases::values,
    report::{Report, Worst},
};

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

/// Times every entry point over all shapes. Looks at a few rows' results first.
pub fn run(timer: &Timer, device: &Device, report: &mut Report, out: Option<&Path>) -> Result<()> {
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
        let timed = time_shape(timer, &inputs, &mut timings);
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
        let (value, grad) =
            loss.loss_and_grad_inplace_without_stats(self.logits.copy()?, &self.targets)?;
        let what = "loss_and_grad_inplace_without_stats";
        compare(what, &value, &expected.loss, loss_tolerance)?;
        compare(what, &grad, &expected.grad, grad_tolerance)?;
        Ok(worst)
    }
}

/// The driver's own copy between tensors of as many bf16: what the memory can do.
fn copy(cuda: &CudaDevice, from: &Tensor, to: &Tensor) -> Result<()> {
    let stream = cuda.cuda_stream();
    let address = |tensor: &Tensor| -> Result<u64> {
        let (storage, _) = tensor.storage_and_layout();
        match &*storage {
            Storage::Cuda(storage) => match &storage.slice {
                CudaStorageSlice::BF16(slice) => Ok(slice.device_ptr(&stream).0),
                _ => bail!("{:?}, must be bf16", tensor.dtype()),
            },
            _ => bail!("not on the GPU"),
        }
    };
    ensure!(from.shape() == to.shape());
    let bytes = from.elem_count() * from.dtype().size_in_bytes();
    // SAFETY: both are contiguous and of so many bytes; what uses them before and after is in the same stream.
    unsafe {
        memcpy_dtod_async(address(to)?, address(from)?, bytes, stream.cu_stream())?;
    }
    Ok(())
}

fn time_shape(timer: &Timer, inputs: &Inputs, timings: &mut Vec<Value>) -> Result<()> {
    let (n, v) = (inputs.n, inputs.v);
    let (pristine, targets) = (&inputs.logits, &inputs.targets);
    let loss = CrossEntropy::new().smoothing(&inputs.smoothing);
    let logits = pristine.copy()?;
    let (bytes, small) = (2 * n * v, n < ROWS);
    let restore = || copy(timer.cuda, pristine, &logits);
    let nothing = || Ok(());

    let copies = timer.samples(nothing, restore)?;
    let copy_gb_per_s = 2.0 * bytes as f64 / copies.median() / 1e6;
    let mut record = |bench, by, bytes, samples: Samples, peak_bytes: Option<u64>| {
        let mut timing = timer.timed(bench, by, (n, v), &samples);
        let gb_per_s = bytes as f64 / samples.median() / 1e6;
        timing["gb_per_s"] = json!(gb_per_s);
        timing["fraction_of_copy"] = json!(gb_per_s / copy_gb_per_s);
        timing["peak_bytes"] = json!(peak_bytes);
        timings.push(timing);
    };
    record("copy", "device", 2 * bytes, copies, None);
    if small {
        let host = timer.host_samples(restore)?;
        record("copy, host", "device", 2 * bytes, host, None);
    }

    // Timed on the device, and by the host's clock as well where launches are what it costs. Logits that are
    // overwritten are restored before each sample; between back-to-back calls they stay gradients, which are as
    // much work as the logits were.
    let in_place = || {
        loss.loss_and_grad_inplace(logits.clone(), targets)?;
        Ok(())
    };
    let in_place_alone = || {
        loss.loss_and_grad_inplace_without_stats(logits.clone(), targets)?;
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
    let entry_points: [(_, _, _, Work, Work); 5] = [
        (
            "loss_and_grad_inplace",
            "loss_and_grad_inplace, host",
            2 * bytes,
            &restore,
            &in_place,
        ),
        (
            "loss_and_grad_inplace_without_stats",
            "loss_and_grad_inplace_without_stats, host",
            2 * bytes,
            &restore,
            &in_place_alone,
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
        record(bench, "ours", bytes, timer.samples(before, work)?, None);
        if small {
            let host = timer.host_samples(work)?;
            record(host_bench, "ours", bytes, host, None);
        }
    }
    drop(logits);

    // Through candle's graph: its own accumulation is part of the time, not of the useful bytes.
    type Step<'a> = Box<dyn Fn(&Tensor) -> candle_core::Result<Tensor> + 'a>;
    let ours: Step = Box::new(|x| loss.forward(x, targets));
    let theirs: Step = Box::new(|x| candle_nn::loss::cross_entropy(x, targets));
    let mut skipped = vec![];
    for (by, step) in [("ours", ours), ("candle-nn", theirs)] {
        let var = Var::from_tensor(pristine)?;
        let run = || {
            step(var.as_tensor())?.backward()?;
            Ok(())
        };
        let bench = "forward + backward()";
        match with_peak(timer.cuda, || timer.samples(nothing, run)) {
            Ok((samples, peak)) => record(bench, by, 2 * bytes, samples, Some(peak)),
            // candle-nn's temporaries may not fit where ours do.
            Err(error) => {
                let mut timing = timer.record(bench, by, (n, v));
                timing["skipped"] = json!(format!("{error:#}"));
                skipped.push(timing);
                continue;
            }
        }
        if small {
            let host = timer.host_samples(run)?;
            record("forward + backward(), host", by, 2 * bytes, host, None);
        }
    }
    timings.append(&mut skipped);
    Ok(())
}
