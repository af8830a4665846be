//! Ranks that have a GPU each, over NCCL.

use std::{
    ffi::{CStr, c_void},
    ptr,
    sync::{Arc, Mutex},
};

use candle_core::{
    CudaDevice, CudaStorage, DType, Device, Error, Result, Storage, Tensor, bail,
    cuda_backend::{CudaStorageSlice, WrapErr},
    op::BackpropOp,
};
use cudarc::{
    driver::{CudaContext, DevicePtr, DevicePtrMut},
    nccl::sys::{self, ncclDataType_t, ncclResult_t},
};

use super::{
    Communicator,
    message::{Operation, accumulated_in, check_headers, check_sent, header},
};

/// A rank that has a GPU: tensors on it go over NCCL, on candle's stream, those on the CPU through another communicator of the
/// same ranks.
///
/// That one, the host's ([`Tcp`](super::Tcp), `Mpi`, or [`threads`](super::threads) for several GPUs in a process), carries NCCL's
/// id at the start, and 88 bytes ahead of each operation on GPUs, by which ranks see that they do and give alike and that none has
/// gone: NCCL itself would wait for ever. Nothing waits for a GPU, and a step can be captured in a CUDA graph; ranks compare what
/// they give as it is captured, not as the graph runs.
///
/// Types are f32, f64, f16, bf16, u8, u32, i64; tensors of up to 8 dimensions. In which order a sum is taken is NCCL's choice.
///
/// Each rank has a GPU of its own. Tensors are of the very `Device` that was given: two of one GPU are different devices. Of
/// several groups that share a GPU all ranks call the operations in one order. All ranks drop theirs, those of a machine at about
/// the same time, for NCCL's end waits for them; after an operation that failed it does not, and what is under way is given up.
///
/// ```no_run
/// # use std::{sync::Arc, time::Duration};
/// # use candle_core::Device;
/// # use candle_cross_entropy::{CrossEntropy, parallel::{Nccl, Tcp}};
/// # fn main() -> candle_core::Result<()> {
/// # let (rank, size, gpu) = (0, 2, 0);
/// let device = Device::new_cuda(gpu)?;
/// let host = Tcp::connect("node0:29500", rank, size, Duration::from_secs(60))?;
/// let ranks = Arc::new(Nccl::new(Arc::new(host), &device)?);
/// let loss = CrossEntropy::new().data_parallel(ranks);
/// # Ok(())
/// # }
/// ```
///
/// Under MPI the host's communicator is `Mpi::new(universe.world().duplicate())`.
pub struct Nccl {
    // Dropped first: ranks that wait for this one there would not come to the end of the other.
    host: Arc<dyn Communicator>,
    device: CudaDevice,
    handle: Mutex<Handle>,
}

/// NCCL's communicator, which one thread uses at a time.
struct Handle {
    communicator: sys::ncclComm_t,
    context: Arc<CudaContext>,
    /// Whether the last operation has failed: ranks may be gone.
    failed: bool,
}

// SAFETY: NCCL's communicators are not tied to a thread.
unsafe impl Send for Handle {}

impl Nccl {
    /// Around `host`, a communicator for tensors on the CPU whose ranks all call this, each with its own GPU.
    ///
    /// # Errors
    /// On every rank if a device is not a GPU, or NCCL does not start on one of them.
    pub fn new(host: Arc<dyn Communicator>, device: &Device) -> Result<Self> {
        let prepared = prepare(&*host, device);
        // Whether this rank is ready, and of rank 0 the id.
        let mut message = [0; 1 + ID_BYTES];
        if let Ok((_, id)) = &prepared {
            message[0] = 1;
            message[1..].copy_from_slice(bytemuck::cast_slice(&id.internal));
        }
        let messages = gather(&*host, &message)?;
        let (device, mut id) = prepared?;
        check_all(&messages)?;
        id.internal
            .copy_from_slice(bytemuck::cast_slice(&messages[0][1..]));
        let mut communicator = ptr::null_mut();
        let (rank, size) = (host.rank() as i32, host.size() as i32);
        // SAFETY: the id is rank 0's, and the GPU's context is bound.
        let started = check(unsafe { sys::ncclCommInitRank(&mut communicator, size, id, rank) });
        let handle = started.map(|()| Handle {
            communicator,
            context: device.cuda_stream().context().clone(),
            failed: true, // until it has started everywhere
        });
        let messages = gather(&*host, &[u8::from(handle.is_ok())]);
        let mut handle = handle?;
        check_all(&messages?)?;
        handle.failed = false;
        let handle = Mutex::new(handle);
        Ok(Self {
            host,
            device,
            handle,
        })
    }

    fn operation(&self, operation: Operation, local: &Tensor) -> Result<Tensor> {
        let mut handle = self.handle.lock().unwrap_or_else(|e| e.into_inner());
        let result = match (local.device(), operation) {
            (Device::Cpu, Operation::AllGather) => self.host.all_gather(local),
            (Device::Cpu, Operation::AllReduceSum) => self.host.all_reduce_sum(local),
            _ => self.on_gpu(&handle, operation, local),
        };
        handle.failed = result.is_err();
        result
    }

    fn on_gpu(&self, handle: &Handle, operation: Operation, local: &Tensor) -> Result<Tensor> {
        // All that can fail comes before the other ranks hear of it.
        let sent = self.sent(handle, operation, local);
        let header = header(operation, sent.as_ref().ok().map(|_| local));
        let headers = Tensor::from_slice(&header, header.len(), &Device::Cpu)?;
        let headers = self.host.all_gather(&headers).map_err(|e| {
            let count = header.len();
            Error::Msg(format!(
                "NCCL: what is said ahead of a tensor on a GPU, i64 of shape [{count}]: {e}"
            ))
        })?;
        let headers: Vec<i64> = headers.flatten_all()?.to_vec1()?;
        let (sent, mut result) = sent?;
        check_headers(headers.as_chunks().0)?;
        launch(handle, operation, &sent, &mut result)?;
        let shape = match operation {
            Operation::AllGather => [&[self.size()], local.dims()].concat(),
            Operation::AllReduceSum => local.dims().to_vec(),
        };
        let result = Storage::Cuda(result);
        let result = Tensor::from_storage(result, shape, BackpropOp::none(), false);
        result.to_dtype(local.dtype())
    }

    /// The tensor in the form that NCCL reads, and memory for the result.
    fn sent(
        &self,
        handle: &Handle,
        operation: Operation,
        local: &Tensor,
    ) -> Result<(Tensor, CudaStorage)> {
        check_sent(local)?;
        if !local
            .device()
            .same_device(&Device::Cuda(self.device.clone()))
        {
            let place = local.device().location();
            bail!("NCCL: a tensor on {place:?}, must be on the CPU or the device that was given");
        }
        handle.context.bind_to_thread().w()?;
        let mut state = ncclResult_t::ncclSuccess;
        // SAFETY: the communicator is there until the handle is dropped.
        check(unsafe { sys::ncclCommGetAsyncError(handle.communicator, &mut state) })?;
        check(state)?;
        let local = local.detach();
        let (local, ranks) = match operation {
            Operation::AllGather => (local, self.size()),
            Operation::AllReduceSum => (local.to_dtype(accumulated_in(local.dtype()))?, 1),
        };
        let local = local.contiguous()?;
        let result = alloc(&self.device, local.dtype(), ranks * local.elem_count())?;
        Ok((local, result))
    }
}

impl Communicator for Nccl {
    fn rank(&self) -> usize {
        self.host.rank()
    }

    fn size(&self) -> usize {
        self.host.size()
    }

    fn all_gather(&self, local: &Tensor) -> Result<Tensor> {
        self.operation(Operation::AllGather, local)
    }

    fn all_reduce_sum(&self, local: &Tensor) -> Result<Tensor> {
        self.operation(Operation::AllReduceSum, local)
    }
}

impl Drop for Handle {
    fn drop(&mut self) {
        if self.context.bind_to_thread().is_err() {
            return;
        }
        // SAFETY: once, and nothing uses it any more. What they return is of no use here.
        unsafe {
            match self.failed {
                true => sys::ncclCommAbort(self.communicator),
                false => sys::ncclCommDestroy(self.communicator),
            }
        };
    }
}

const ID_BYTES: usize = size_of::<sys::ncclUniqueId>();

/// The GPU, its context bound to this thread, and of rank 0 an id for the group.
fn prepare(host: &dyn Communicator, device: &Device) -> Result<(CudaDevice, sys::ncclUniqueId)> {
    let Device::Cuda(device) = device else {
        let place = device.location();
        bail!("NCCL: a rank on {place:?}, must be on a GPU");
    };
    device.cuda_stream().context().bind_to_thread().w()?;
    let mut id = sys::ncclUniqueId {
        internal: [0; ID_BYTES],
    };
    if host.rank() == 0 {
        // SAFETY: it writes the id.
        check(unsafe { sys::ncclGetUniqueId(&mut id) })?;
    }
    Ok((device.clone(), id))
}

fn gather(host: &dyn Communicator, message: &[u8]) -> Result<Vec<Vec<u8>>> {
    let message = Tensor::from_slice(message, message.len(), &Device::Cpu)?;
    host.all_gather(&message)?.to_vec2()
}

/// An error if a rank says that it is not ready.
fn check_all(messages: &[Vec<u8>]) -> Result<()> {
    match messages.iter().position(|message| message[0] == 0) {
        Some(rank) => bail!("NCCL: did not start on rank {rank}"),
        None => Ok(()),
    }
}

fn check(result: ncclResult_t) -> Result<()> {
    if let ncclResult_t::ncclSuccess | ncclResult_t::ncclInProgress = result {
        return Ok(());
    }
    // SAFETY: both return texts that stay; the last error is this thread's, of whichever communicator.
    let [text, last] = unsafe {
        [
            sys::ncclGetErrorString(result),
            sys::ncclGetLastError(ptr::null_mut()),
        ]
        .map(|text| match text.is_null() {
            true => "".into(),
            false => CStr::from_ptr(text).to_string_lossy(),
        })
    };
    bail!("NCCL: {text}: {last}")
}

/// Evaluates an expression with `$slice` as the memory of a storage of any type that is sent.
macro_rules! with_slice {
    ($storage:expr, $slice:ident => $body:expr) => {
        with_slice!($storage, $slice => $body; F32 F64 F16 BF16 U8 U32 I64)
    };
    ($storage:expr, $slice:ident => $body:expr; $($kind:ident)+) => {
        match $storage {
            $(CudaStorageSlice::$kind($slice) => $body,)+
            _ => bail!("NCCL: a tensor of a type that is not sent"),
        }
    };
}

/// Starts it on candle's stream.
fn launch(
    handle: &Handle,
    operation: Operation,
    sent: &Tensor,
    result: &mut CudaStorage,
) -> Result<()> {
    let (count, dtype) = (sent.elem_count(), sent.dtype());
    if count == 0 {
        return Ok(());
    }
    let stream = result.device.cuda_stream();
    let (storage, layout) = sent.storage_and_layout();
    let Storage::Cuda(storage) = &*storage else {
        bail!("NCCL: a tensor that is not on a GPU");
    };
    let start = (layout.start_offset() * dtype.size_in_bytes()) as u64;
    let (from, _read) = with_slice!(&storage.slice, slice => slice.device_ptr(&stream));
    let (to, _written) = with_slice!(&mut result.slice, slice => slice.device_ptr_mut(&stream));
    let (from, to) = ((from + start) as *const c_void, to as *mut c_void);
    let (communicator, stream) = (handle.communicator, stream.cu_stream() as sys::cudaStream_t);
    // SAFETY: `from` has as many values as the tensor, and `to` those of the result. Both are freed on this stream, after it.
    check(unsafe {
        match operation {
            Operation::AllGather => {
                let (bytes, dtype) = (count * dtype.size_in_bytes(), ncclDataType_t::ncclUint8);
                sys::ncclAllGather(from, to, bytes, dtype, communicator, stream)
            }
            Operation::AllReduceSum => {
                let (dtype, sum) = (summed_as(dtype)?, sys::ncclRedOp_t::ncclSum);
                sys::ncclAllReduce(from, to, count, dtype, sum, communicator, stream)
            }
        }
    })
}

/// NCCL's name of a type that is [`accumulated_in`].
fn summed_as(dtype: DType) -> Result<ncclDataType_t> {
    Ok(match dtype {
        DType::F32 => ncclDataType_t::ncclFloat32,
        DType::F64 => ncclDataType_t::ncclFloat64,
        DType::U8 => ncclDataType_t::ncclUint8,
        DType::U32 => ncclDataType_t::ncclUint32,
        DType::I64 => ncclDataType_t::ncclInt64,
        other => bail!("NCCL: {} is not summed", other.as_str()),
    })
}

/// Memory for so many values, which an operation will write.
fn alloc(device: &CudaDevice, dtype: DType, count: usize) -> Result<CudaStorage> {
    let count = count.max(1); // CUDA allocates no less
    // SAFETY: nothing reads it before the operation, which comes first on the stream.
    let slice = unsafe {
        match dtype {
            DType::F32 => CudaStorageSlice::F32(device.alloc(count)?),
            DType::F64 => CudaStorageSlice::F64(device.alloc(count)?),
            DType::F16 => CudaStorageSlice::F16(device.alloc(count)?),
            DType::BF16 => CudaStorageSlice::BF16(device.alloc(count)?),
            DType::U8 => CudaStorageSlice::U8(device.alloc(count)?),
            DType::U32 => CudaStorageSlice::U32(device.alloc(count)?),
            DType::I64 => CudaStorageSlice::I64(device.alloc(count)?),
            other => bail!("NCCL: {} is not sent", other.as_str()),
        }
    };
    Ok(CudaStorage {
        slice,
        device: device.clone(),
    })
}
