//! How much memory a batch takes with either way to compute the loss, so that they can be compared.

use std::fmt;

use anyhow::Result;
use candle_core::Device;
use serde::Serialize;

use crate::{
    data::{batches::Batch, samples::Sample},
    model::decoder::Decoder,
    training::{
        method::Method,
        plan::{Loss, Plan},
        train,
    },
};

/// Peak bytes of a batch's forward and backward, beyond the weights, the optimizer's state, the data and the gradients of a
/// step's other batches.
#[derive(Clone, Copy, Serialize)]
pub struct BatchMemory {
    linear: usize,
    logits: usize,
}

impl BatchMemory {
    /// Of the largest batch in the first epoch of `plan`, with either loss. No weight changes. `None` where memory cannot
    /// be counted.
    pub fn measure(
        model: &Decoder,
        method: &Method,
        samples: &[Sample],
        plan: &Plan,
    ) -> Result<Option<Self>> {
        let batch = Batch::new(&train::largest_batch(samples, plan), model.device())?;
        let step = |loss| {
            peak(model.device(), || {
                train::forward(model, method, loss, (&batch, batch.rows), None)?
                    .0
                    .backward()?;
                Ok(())
            })
        };
        step(Loss::Linear)?; // what threads allocate once and keep
        let (linear, logits) = (step(Loss::Linear)?, step(Loss::Logits)?);
        Ok(linear
            .zip(logits)
            .map(|(linear, logits)| Self { linear, logits }))
    }
}

impl fmt::Display for BatchMemory {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        let mib = |bytes: usize| bytes as f64 / f64::from(1 << 20);
        write!(
            f,
            "peak memory of a batch's forward and backward, beside weights and optimizer: {:.1} MiB with \
             --loss linear, {:.1} MiB with --loss logits",
            mib(self.linear),
            mib(self.logits)
        )
    }
}

/// The most bytes in use during `work`, beyond those before it: of the host's memory on the CPU (in a program whose
/// allocator is the counting one), of the device's pool
/// on CUDA. `None`, without running it, where neither counts what tensors take.
fn peak(device: &Device, work: impl FnOnce() -> Result<()>) -> Result<Option<usize>> {
    match device {
        Device::Cpu => {
            let (result, usage) = counting_allocator::measure(work);
            result?;
            Ok(Some(usage.peak))
        }
        #[cfg(feature = "cuda")]
        Device::Cuda(cuda) => pool::peak(&cuda.cuda_stream(), work),
        _ => Ok(None),
    }
}

/// The driver's own count of its default memory pool, which candle's tensors are allocated from.
#[cfg(feature = "cuda")]
mod pool {
    use anyhow::Result;
    use candle_core::cuda_backend::cudarc::driver::{
        CudaStream, DriverError, result,
        sys::{
            CUmemPool_attribute::{
                self as Attribute, CU_MEMPOOL_ATTR_USED_MEM_CURRENT, CU_MEMPOOL_ATTR_USED_MEM_HIGH,
            },
            CUmemoryPool,
        },
    };

    pub fn peak(stream: &CudaStream, work: impl FnOnce() -> Result<()>) -> Result<Option<usize>> {
        let context = stream.context();
        if !context.has_async_alloc() {
            return Ok(None); // tensors are not in the pool
        }
        stream.synchronize()?;
        // SAFETY: the device handle is that of a live context.
        let pool = unsafe { result::device::get_default_mem_pool(context.cu_device()) }?;
        let before = bytes(pool, CU_MEMPOOL_ATTR_USED_MEM_CURRENT)?;
        reset_high(pool)?;
        work()?;
        stream.synchronize()?;
        let high = bytes(pool, CU_MEMPOOL_ATTR_USED_MEM_HIGH)?;
        Ok(Some(high.saturating_sub(before) as usize))
    }

    fn bytes(pool: CUmemoryPool, what: Attribute) -> Result<u64, DriverError> {
        let mut bytes = 0u64;
        // SAFETY: the pool is the device's, and both attributes asked for are 64-bit integers.
        unsafe { result::mem_pool::get_attribute(pool, what, (&raw mut bytes).cast()) }?;
        Ok(bytes)
    }

    fn reset_high(pool: CUmemoryPool) -> Result<(), DriverError> {
        let mut zero = 0u64; // the only value that may be written
        // SAFETY: as above.
        unsafe {
            result::mem_pool::set_attribute(
                pool,
                CU_MEMPOOL_ATTR_USED_MEM_HIGH,
                (&raw mut zero).cast(),
            )
        }
    }
}
