//! The loss on CUDA: which kernels run, in which order, over which memory. The twin of `cpu`.
//!
//! Nothing here waits for the device or copies to or from the host, so a step can be captured in a CUDA graph;
//! `check_inputs` is the exception. Outputs are allocated without being cleared: the kernels write every element.

pub(crate) mod linear;
mod module;

use candle_core::{
    CudaDevice, CudaStorage, DType, Layout, Result, Storage, StorageRef, Tensor,
    backend::BackendStorage,
    bail,
    cuda_backend::{
        CudaDType, CudaStorageSlice,
        cudarc::driver::{CudaSlice, DeviceRepr},
    },
    op::BackpropOp,
};

use crate::{
    Reduction, RowStats,
    call::{Call, row_offsets},
    kernel_abi::{BadValue, Element, MAX_ROW_DIMS, Params, RowOffsets, RowState},
    op::{Forward, Fused},
};
use module::{Launch, Work};

/// What the backward needs of the forward, on the device.
pub(crate) struct Saved {
    state: CudaSlice<RowState>,
    /// Σ w, for [`Reduction::Mean`].
    total_weight: Option<CudaSlice<f32>>,
}

pub(crate) fn forward(
    call: &Call,
    logits: &CudaStorage,
    layout: &Layout,
    stats: bool,
) -> Result<Forward<CudaStorage>> {
    let device = logits.device();
    let stream = device.cuda_stream();
    let inputs = Inputs::of(call)?;
    let mut row_loss = alloc(device, call.rows)?;
    let mut state = alloc(device, call.rows)?;
    let mut stats = if stats {
        Some(Stats::alloc(call, device)?)
    } else {
        None
    };
    let mut first_error = FirstError::alloc(call, device)?;
    if call.rows > 0 {
        let mut launch = Launch::new(&stream, scalars(call, layout)?);
        let element = read_logits(&mut launch, logits, layout)?;
        inputs.set(&mut launch)?;
        launch.params.loss = launch.write(&mut row_loss);
        launch.params.state = launch.write(&mut state);
        let work = Work::Forward {
            stats: stats.is_some(),
        };
        if let Some(stats) = &mut stats {
            stats.set(&mut launch);
        }
        first_error.set(&mut launch);
        // SAFETY: the logits cover their layout, and all other memory has an element for each of `call.rows`.
        unsafe { launch.start(work, element, call.softcap.is_some()) }?;
    }
    first_error.check(call, device)?;
    let (loss, total_weight) = reduce(call, device, &inputs, row_loss)?;
    Ok(Forward {
        loss: CudaStorage::wrap_cuda_slice(loss, device.clone()),
        stats: stats.map(|stats| stats.into_tensors(call, device)),
        saved: crate::op::Saved::Cuda(Saved {
            state,
            total_weight,
        }),
    })
}

pub(crate) fn backward(
    call: &Call,
    saved: &crate::op::Saved,
    upstream: &Tensor,
    logits: &CudaStorage,
    layout: &Layout,
) -> Result<CudaStorage> {
    let mut grad = alloc_gradient(call, logits)?;
    run_backward(
        call,
        saved,
        upstream,
        layout,
        Gradient::Apart {
            logits,
            grad: &mut grad,
        },
    )?;
    Ok(grad)
}

pub(crate) fn backward_inplace(
    call: &Call,
    saved: &crate::op::Saved,
    upstream: &Tensor,
    logits: &mut CudaStorage,
    layout: &Layout,
) -> Result<()> {
    run_backward(call, saved, upstream, layout, Gradient::InPlace(logits))
}

pub(crate) fn fused(
    call: &Call,
    logits: &CudaStorage,
    layout: &Layout,
) -> Result<(CudaStorage, Fused)> {
    let mut grad = alloc_gradient(call, logits)?;
    let result = run_fused(
        call,
        layout,
        Gradient::Apart {
            logits,
            grad: &mut grad,
        },
    )?;
    Ok((grad, result))
}

pub(crate) fn fused_inplace(
    call: &Call,
    logits: &mut CudaStorage,
    layout: &Layout,
) -> Result<Fused> {
    run_fused(call, layout, Gradient::InPlace(logits))
}

fn run_backward(
    call: &Call,
    saved: &crate::op::Saved,
    upstream: &Tensor,
    layout: &Layout,
    gradient: Gradient,
) -> Result<()> {
    let crate::op::Saved::Cuda(saved) = saved else {
        bail!("the forward ran on another device than the backward");
    };
    check_upstream(call, upstream)?;
    if call.rows == 0 {
        return Ok(());
    }
    let stream = gradient.device().cuda_stream();
    let inputs = Inputs::of(call)?;
    let upstream = OnDevice::of(upstream);
    let mut launch = Launch::new(&stream, scalars(call, layout)?);
    let element = gradient.set(&mut launch, layout)?;
    inputs.set(&mut launch)?;
    launch.params.state = launch.read(&saved.state);
    launch.params.upstream = upstream.read::<f32>(&mut launch)?;
    launch.params.upstream_per_row = (call.reduction == Reduction::None).into();
    launch.params.divisor = saved.total_weight.as_ref().map_or(0, |w| launch.read(w));
    // SAFETY: logits and gradient cover their layouts, `upstream` has the number of values checked above, and the
    // rest an element for each of `call.rows`.
    unsafe { launch.start(Work::Backward, element, call.softcap.is_some()) }
}

fn check_upstream(call: &Call, upstream: &Tensor) -> Result<()> {
    let expected = match call.reduction {
        Reduction::None => call.rows,
        _ => 1,
    };
    if upstream.dtype() != DType::F32 || upstream.elem_count() != expected {
        bail!(
            "upstream gradient: {:?} {:?}, must be {expected} values of f32",
            upstream.dtype(),
            upstream.dims()
        );
    }
    Ok(())
}

fn run_fused(call: &Call, layout: &Layout, gradient: Gradient) -> Result<Fused> {
    let device = gradient.device().clone();
    let stream = device.cuda_stream();
    let inputs = Inputs::of(call)?;
    let mut row_loss = alloc(&device, call.rows)?;
    let mut stats = Stats::alloc(call, &device)?;
    let mut first_error = FirstError::alloc(call, &device)?;
    if call.rows > 0 {
        // Gradients of a mean are divided by the total weight, which therefore has to be known first.
        let total_weight = match call.reduction {
            Reduction::Mean => Some(launch_reduce(call, &device, &inputs, None)?.total_weight),
            _ => None,
        };
        let mut launch = Launch::new(&stream, scalars(call, layout)?);
        let element = gradient.set(&mut launch, layout)?;
        inputs.set(&mut launch)?;
        launch.params.divisor = total_weight.as_ref().map_or(0, |w| launch.read(w));
        launch.params.loss = launch.write(&mut row_loss);
        stats.set(&mut launch);
        first_error.set(&mut launch);
        // SAFETY: logits and gradient cover their layouts, and all other memory has an element for each of
        // `call.rows`, but for the scalar divisor.
        unsafe { launch.start(Work::LossAndGradient, element, call.softcap.is_some()) }?;
    }
    first_error.check(call, &device)?;
    let (loss, _) = reduce(call, &device, &inputs, row_loss)?;
    Ok(Fused {
        loss: tensor(loss, &device, call.loss_shape()),
        stats: stats.into_tensors(call, &device),
    })
}

/// The result from the losses of the rows, and the total weight where the gradient needs it.
fn reduce(
    call: &Call,
    device: &CudaDevice,
    inputs: &Inputs,
    row_loss: CudaSlice<f32>,
) -> Result<(CudaSlice<f32>, Option<CudaSlice<f32>>)> {
    if call.reduction == Reduction::None {
        return Ok((row_loss, None));
    }
    let reduced = if call.rows == 0 {
        Reduced {
            loss: device.alloc_zeros(1)?,
            total_weight: device.alloc_zeros(1)?,
        }
    } else {
        launch_reduce(call, device, inputs, Some(&row_loss))?
    };
    Ok((
        reduced.loss,
        (call.reduction == Reduction::Mean).then_some(reduced.total_weight),
    ))
}

struct Reduced {
    /// Unset where no losses were given.
    loss: CudaSlice<f32>,
    total_weight: CudaSlice<f32>,
}

fn launch_reduce(
    call: &Call,
    device: &CudaDevice,
    inputs: &Inputs,
    row_loss: Option<&CudaSlice<f32>>,
) -> Result<Reduced> {
    let stream = device.cuda_stream();
    let mut reduced = Reduced {
        loss: alloc(device, 1)?,
        total_weight: alloc(device, 1)?,
    };
    let mut launch = Launch::new(
        &stream,
        scalars(call, &Layout::contiguous((call.rows, call.width)))?,
    );
    inputs.set(&mut launch)?;
    if let Some(row_loss) = row_loss {
        launch.params.loss = launch.read(row_loss);
        launch.params.reduced = launch.write(&mut reduced.loss);
    }
    launch.params.total_weight = launch.write(&mut reduced.total_weight);
    // SAFETY: targets, weights and losses have an element for each of `call.rows`, results are scalars. The kernel
    // reads no logits.
    unsafe { launch.start_reduction() }?;
    Ok(reduced)
}

/// Where the gradient goes.
enum Gradient<'a> {
    /// Contiguous, of the logits' shape and type.
    Apart {
        logits: &'a CudaStorage,
        grad: &'a mut CudaStorage,
    },
    /// Over the logits.
    InPlace(&'a mut CudaStorage),
}

impl<'a> Gradient<'a> {
    fn device(&self) -> &CudaDevice {
        match self {
            Self::Apart { logits, .. } => logits.device(),
            Self::InPlace(logits) => logits.device(),
        }
    }

    /// Sets the addresses of logits and gradient, and the latter's rows.
    fn set(self, launch: &mut Launch<'a>, layout: &Layout) -> Result<Element> {
        let rows = launch.params.logits_rows;
        let (element, grad, grad_rows) = match self {
            Self::Apart { logits, grad } => {
                let element = read_logits(launch, logits, layout)?;
                let (_, grad) = write_floats(launch, grad)?;
                (element, grad, contiguous_rows(launch.params.width))
            }
            Self::InPlace(logits) => {
                let (element, address) = write_floats(launch, logits)?;
                launch.params.logits = address + (layout.start_offset() * element.size()) as u64;
                (element, launch.params.logits, rows)
            }
        };
        launch.params.grad = grad;
        launch.params.grad_rows = grad_rows;
        Ok(element)
    }
}

fn read_logits<'a>(
    launch: &mut Launch<'a>,
    logits: &'a CudaStorage,
    layout: &Layout,
) -> Result<Element> {
    let element = read_floats(launch, logits)?;
    launch.params.logits += (layout.start_offset() * element.size()) as u64;
    Ok(element)
}

/// Sets the logits to the start of a storage.
fn read_floats<'a>(launch: &mut Launch<'a>, logits: &'a CudaStorage) -> Result<Element> {
    let (element, address) = match &logits.slice {
        CudaStorageSlice::F32(slice) => (Element::F32, launch.read(slice)),
        CudaStorageSlice::F16(slice) => (Element::F16, launch.read(slice)),
        CudaStorageSlice::BF16(slice) => (Element::BF16, launch.read(slice)),
        _ => bail!("logits: {:?}, must be f32, f16 or bf16", logits.dtype()),
    };
    launch.params.logits = address;
    Ok(element)
}

fn write_floats<'a>(
    launch: &mut Launch<'a>,
    storage: &'a mut CudaStorage,
) -> Result<(Element, u64)> {
    let dtype = storage.dtype();
    Ok(match &mut storage.slice {
        CudaStorageSlice::F32(slice) => (Element::F32, launch.write(slice)),
        CudaStorageSlice::F16(slice) => (Element::F16, launch.write(slice)),
        CudaStorageSlice::BF16(slice) => (Element::BF16, launch.write(slice)),
        _ => bail!("logits: {dtype:?}, must be f32, f16 or bf16"),
    })
}

/// Parameters without addresses; `layout` is that of the logits.
fn scalars(call: &Call, layout: &Layout) -> Result<Params> {
    let Some(logits_rows) = row_offsets(layout) else {
        bail!(
            "logits: strides {:?}, must have stride 1 inside a row",
            layout.stride()
        );
    };
    Ok(Params {
        logits_rows,
        grad_rows: contiguous_rows(call.width as u32),
        rows: call.rows as u64,
        ignore_index: call.ignore_index,
        vocab: call.vocab as u32,
        width: call.width as u32,
        mean: (call.reduction == Reduction::Mean).into(),
        uniform_smoothing: call.uniform_smoothing,
        z_loss: call.z_loss,
        logit_scale: call.logit_scale,
        softcap: call.softcap.unwrap_or_default(),
        result_scale: match call.reduction {
            Reduction::SumOver(n) => (1.0 / n) as f32,
            _ => 1.0,
        },
        ..bytemuck::Zeroable::zeroed()
    })
}

fn contiguous_rows(width: u32) -> RowOffsets {
    let mut rows = RowOffsets {
        dims: 1,
        sizes: [1; MAX_ROW_DIMS],
        strides: [0; MAX_ROW_DIMS],
    };
    rows.strides[0] = width.into();
    rows
}

/// A tensor's memory, locked for reading.
struct OnDevice<'a>(StorageRef<'a>, &'a Layout);

impl<'a> OnDevice<'a> {
    fn of(tensor: &'a Tensor) -> Self {
        let (storage, layout) = tensor.storage_and_layout();
        Self(storage, layout)
    }

    fn storage(&self) -> Result<&CudaStorage> {
        match &*self.0 {
            Storage::Cuda(storage) => Ok(storage),
            _ => bail!("a tensor is not on the logits' CUDA device"),
        }
    }

    /// Address of the first element of a contiguous tensor.
    fn read<'b, T: CudaDType + 'b>(&'b self, launch: &mut Launch<'b>) -> Result<u64> {
        let address = launch.read(self.storage()?.as_cuda_slice::<T>()?);
        Ok(address + (self.1.start_offset() * size_of::<T>()) as u64)
    }
}

/// Per-row inputs beside the logits.
struct Inputs<'a> {
    targets: OnDevice<'a>,
    targets_are_i64: bool,
    smoothing: Option<OnDevice<'a>>,
    weights: Option<OnDevice<'a>>,
}

impl<'a> Inputs<'a> {
    fn of(call: &'a Call) -> Result<Self> {
        Ok(Self {
            targets: OnDevice::of(&call.targets),
            targets_are_i64: call.targets.dtype() == DType::I64,
            smoothing: call.smoothing.as_ref().map(OnDevice::of),
            weights: call.weights.as_ref().map(OnDevice::of),
        })
    }

    fn set<'b>(&'b self, launch: &mut Launch<'b>) -> Result<()> {
        launch.params.targets = if self.targets_are_i64 {
            self.targets.read::<i64>(launch)?
        } else {
            self.targets.read::<u32>(launch)?
        };
        launch.params.targets_are_i64 = self.targets_are_i64.into();
        if let Some(smoothing) = &self.smoothing {
            launch.params.smoothing = smoothing.read::<f32>(launch)?;
        }
        if let Some(weights) = &self.weights {
            launch.params.weights = weights.read::<f32>(launch)?;
        }
        Ok(())
    }
}

struct Stats {
    nll: CudaSlice<f32>,
    lse: CudaSlice<f32>,
    entropy: CudaSlice<f32>,
    max_prob: CudaSlice<f32>,
    grad_norm_sq: CudaSlice<f32>,
    predicted: CudaSlice<u32>,
}

impl Stats {
    fn alloc(call: &Call, device: &CudaDevice) -> Result<Self> {
        Ok(Self {
            nll: alloc(device, call.rows)?,
            lse: alloc(device, call.rows)?,
            entropy: alloc(device, call.rows)?,
            max_prob: alloc(device, call.rows)?,
            grad_norm_sq: alloc(device, call.rows)?,
            predicted: alloc(device, call.rows)?,
        })
    }

    fn set<'a>(&'a mut self, launch: &mut Launch<'a>) {
        launch.params.nll = launch.write(&mut self.nll);
        launch.params.lse = launch.write(&mut self.lse);
        launch.params.entropy = launch.write(&mut self.entropy);
        launch.params.max_prob = launch.write(&mut self.max_prob);
        launch.params.grad_norm_sq = launch.write(&mut self.grad_norm_sq);
        launch.params.predicted = launch.write(&mut self.predicted);
    }

    fn into_tensors(self, call: &Call, device: &CudaDevice) -> RowStats {
        RowStats {
            nll: tensor(self.nll, device, &call.shape),
            lse: tensor(self.lse, device, &call.shape),
            entropy: tensor(self.entropy, device, &call.shape),
            max_prob: tensor(self.max_prob, device, &call.shape),
            grad_norm_sq: tensor(self.grad_norm_sq, device, &call.shape),
            predicted: tensor(self.predicted, device, &call.shape),
        }
    }
}

/// Where kernels report the first bad row, with `check_inputs`.
struct FirstError(Option<CudaSlice<u64>>);

impl FirstError {
    fn alloc(call: &Call, device: &CudaDevice) -> Result<Self> {
        Ok(Self(if call.check_inputs {
            Some(device.clone_htod(&[u64::MAX])?)
        } else {
            None
        }))
    }

    fn set<'a>(&'a mut self, launch: &mut Launch<'a>) {
        if let Some(slice) = &mut self.0 {
            launch.params.first_error = launch.write(slice);
        }
    }

    /// Waits for the kernel, and fails as the CPU path does on the same values.
    fn check(&self, call: &Call, device: &CudaDevice) -> Result<()> {
        let Some(slice) = &self.0 else { return Ok(()) };
        let reported = device.clone_dtoh(slice)?[0];
        if reported == u64::MAX {
            return Ok(());
        }
        let row = (reported / 4) as usize;
        let at_row = |values: &Tensor, dtype| values.narrow(0, row, 1)?.to_dtype(dtype);
        let (kind, values) = match reported % 4 {
            0 => {
                return Err(call.bad_value(
                    BadValue::Target,
                    row,
                    at_row(&call.targets, DType::I64)?.to_vec1::<i64>()?[0],
                ));
            }
            1 => (BadValue::Smoothing, &call.smoothing),
            _ => (BadValue::Weight, &call.weights),
        };
        let values = values
            .as_ref()
            .expect("only a value of a tensor can be bad");
        Err(call.bad_value(kind, row, at_row(values, DType::F64)?.to_vec1::<f64>()?[0]))
    }
}

fn alloc_gradient(call: &Call, logits: &CudaStorage) -> Result<CudaStorage> {
    alloc_floats(logits.device(), logits.dtype(), call.rows * call.width)
}

/// [`alloc`] of a type of logits.
fn alloc_floats(device: &CudaDevice, dtype: DType, count: usize) -> Result<CudaStorage> {
    let slice = match dtype {
        DType::F32 => CudaStorageSlice::F32(alloc(device, count)?),
        DType::F16 => CudaStorageSlice::F16(alloc(device, count)?),
        DType::BF16 => CudaStorageSlice::BF16(alloc(device, count)?),
        other => bail!("logits: {other:?}, must be f32, f16 or bf16"),
    };
    Ok(CudaStorage {
        slice,
        device: device.clone(),
    })
}

/// Memory that a kernel will write in full; one element where none is needed, since CUDA allocates no less.
fn alloc<T: DeviceRepr>(device: &CudaDevice, count: usize) -> Result<CudaSlice<T>> {
    // SAFETY: nothing reads it before the kernel that writes all of it, which comes first on the stream.
    unsafe { device.alloc(count.max(1)) }
}

fn tensor<T: CudaDType>(slice: CudaSlice<T>, device: &CudaDevice, shape: &[usize]) -> Tensor {
    let storage = CudaStorage::wrap_cuda_slice(slice, device.clone());
    Tensor::from_storage(Storage::Cuda(storage), shape, BackpropOp::none(), false)
}
