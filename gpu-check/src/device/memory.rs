//! The device's memory, as its default pool sees it, and what `forward_linear` takes of it.
//!
//! The pool has candle's tensors and this crate's buffers, not cuBLAS's workspace: 32 MiB on Hopper, one for all
//! products of a process.

use anyhow::{Context, Result, ensure};
use candle_core::{
    CudaDevice, DType, Device, Tensor, Var,
    cuda_backend::cudarc::driver::{DriverError, result, sys},
};
use candle_cross_entropy::CrossEntropy;

use crate::report::Report;

type Attribute = sys::CUmemPool_attribute;

pub fn free_bytes(device: &Device) -> Result<usize> {
    let cuda = device.as_cuda_device()?;
    let stream = cuda.cuda_stream();
    // What the pool keeps for later allocations is free as well.
    stream.synchronize()?;
    // SAFETY: the pool is that of a live context.
    unsafe { result::mem_pool::trim_to(pool(cuda)?, 0) }?;
    Ok(stream.context().mem_get_info()?.0)
}

/// Runs `work`, and notes how many bytes of the device's memory it held at most beyond those held before.
pub fn with_peak<T>(cuda: &CudaDevice, work: impl FnOnce() -> Result<T>) -> Result<(T, u64)> {
    let before = used_bytes(cuda, Attribute::CU_MEMPOOL_ATTR_USED_MEM_CURRENT)?;
    let high = Attribute::CU_MEMPOOL_ATTR_USED_MEM_HIGH;
    set(cuda, high, 0)?; // only 0 may be written: it starts anew
    let done = work()?;
    Ok((done, used_bytes(cuda, high)?.saturating_sub(before)))
}

/// Lets the pool keep memory that was freed. By default it goes back to the system whenever the host waits for the
/// device, and the next sample would time getting it again.
pub fn keep_freed(cuda: &CudaDevice) -> Result<()> {
    set(cuda, Attribute::CU_MEMPOOL_ATTR_RELEASE_THRESHOLD, u64::MAX)
}

fn pool(cuda: &CudaDevice) -> Result<sys::CUmemoryPool, DriverError> {
    let stream = cuda.cuda_stream();
    stream.context().bind_to_thread()?;
    // SAFETY: the device handle is that of a live context.
    unsafe { result::device::get_default_mem_pool(stream.context().cu_device()) }
}

fn used_bytes(cuda: &CudaDevice, what: Attribute) -> Result<u64> {
    cuda.cuda_stream().synchronize()?;
    let mut bytes = 0u64;
    // SAFETY: the attributes asked for are 64-bit integers.
    unsafe { result::mem_pool::get_attribute(pool(cuda)?, what, (&raw mut bytes).cast()) }?;
    Ok(bytes)
}

fn set(cuda: &CudaDevice, what: Attribute, mut value: u64) -> Result<()> {
    // SAFETY: the attributes set are 64-bit integers.
    unsafe { result::mem_pool::set_attribute(pool(cuda)?, what, (&raw mut value).cast()) }?;
    Ok(())
}

const ROWS: usize = 8192;
const DEPTH: usize = 4096;
/// Llama 2's, Llama 3's and Gemma's: what it takes must not grow with the vocabulary.
const VOCABULARIES: [usize; 3] = [32000, 128256, 262144];
/// The most that it may take beyond inputs and their gradients, and beyond what the budget lets it keep.
const BAR: u64 = 256 << 20;

/// What `forward_linear` takes beyond its arguments, at a model's sizes.
pub fn check_linear(device: &Device, report: &mut Report) {
    for vocab in VOCABULARIES {
        report.holds(&format!("linear: memory at V {vocab}"), || {
            linear(device, vocab)
        });
    }
}

fn linear(device: &Device, vocab: usize) -> Result<String> {
    let cuda = device.as_cuda_device()?;
    let (hidden_bytes, weight_bytes) = (2 * ROWS * DEPTH, 2 * vocab * DEPTH);
    let logits_bytes = 2 * ROWS * vocab;
    let (free, needed) = (
        free_bytes(device)?,
        5 * weight_bytes + 2 * logits_bytes + (4 << 30),
    );
    if free < needed {
        return Ok(format!("not measured, {} GB are free", free >> 30));
    }
    let random = |rows: usize, deviation: f32| -> candle_core::Result<Tensor> {
        Tensor::randn(0f32, deviation, (rows, DEPTH), device)?.to_dtype(DType::BF16)
    };
    let hidden = Var::from_tensor(&random(ROWS, 1.0)?)?;
    let weight = Var::from_tensor(&random(vocab, 2.0 / (DEPTH as f32).sqrt())?)?;
    let targets = Tensor::arange(0u32, ROWS as u32, device)?;
    let forward = |hidden: &Tensor, weight: &Tensor, budget: usize| {
        let loss = CrossEntropy::new().memory_budget(budget);
        loss.forward_linear(hidden, weight, None, &targets)
    };
    forward(&hidden, &weight, 0)?.backward()?; // loads modules and cuBLAS
    let mib = |bytes: u64| bytes.div_ceil(1 << 20);
    let mut found = vec![];

    let (_, peak) = with_peak(cuda, || Ok(forward(&hidden.detach(), &weight.detach(), 0)?))?;
    found.push(format!("forward alone {} MiB", mib(peak)));
    ensure!(peak <= BAR, "{}", found.join(", "));
    // The weight is frozen: for each gradient that an operation returns, candle makes zeros and a sum beside it. Those
    // of the hidden states come when all else is free again; those of the weight would be the peak, and are not ours.
    for budget in [0, 512 << 20, logits_bytes] {
        let (_, peak) = with_peak(cuda, || {
            let store = forward(&hidden, &weight.detach(), budget)?.backward()?;
            store.get(&hidden).context("no gradient").map(drop)
        })?;
        let beyond = peak.saturating_sub(hidden_bytes as u64);
        found.push(format!(
            "with a backward, frozen weight and a budget of {} MiB: {} MiB beyond the gradient",
            mib(budget as u64),
            mib(beyond)
        ));
        ensure!(beyond <= BAR + budget as u64, "{}", found.join(", "));
    }
    let (_, peak) = with_peak(cuda, || Ok(forward(&hidden, &weight, 0)?.backward()?))?;
    let gradients = (hidden_bytes + weight_bytes) as u64;
    let beyond = peak.saturating_sub(gradients);
    found.push(format!(
        "with all gradients: {} MiB beyond them, of which candle's zeros and sum for the weight are {}",
        mib(beyond),
        mib(2 * weight_bytes as u64)
    ));
    ensure!(
        beyond <= BAR + 2 * weight_bytes as u64,
        "{}",
        found.join(", ")
    );
    Ok(found.join(", "))
}
