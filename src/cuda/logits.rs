//! The loss of logits on CUDA.

use candle_core::{CudaDevice, CudaStorage, Layout, Result, Tensor, backend::BackendStorage};
use cudarc::driver::CudaSlice;

use super::{
    Cuda,
    arguments::{FirstError, Inputs, Stats, check_upstream, scalars},
    memory::{OnDevice, alloc, alloc_floats, read_floats, tensor, write_floats},
    module::{Launch, Work},
    reduce::{launch_reduce, reduce},
};
use crate::{
    backend::{Backend, Forward, Fused},
    call::Call,
    kernels::abi::{Element, RowOffsets, RowState},
    options::Reduction,
};

/// What the backward needs of the forward, on the device.
pub(crate) struct Saved {
    pub(super) state: CudaSlice<RowState>,
    /// Σ w, for [`Reduction::Mean`].
    pub(super) total_weight: Option<CudaSlice<f32>>,
}

impl Backend for Cuda {
    type Storage = CudaStorage;
    type Saved = Saved;

    fn forward(
        call: &Call,
        logits: &CudaStorage,
        layout: &Layout,
        stats: bool,
    ) -> Result<Forward<CudaStorage, Saved>> {
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
            saved: Saved {
                state,
                total_weight,
            },
        })
    }

    fn backward(
        call: &Call,
        saved: &Saved,
        upstream: &Tensor,
        logits: &CudaStorage,
        layout: &Layout,
    ) -> Result<CudaStorage> {
        let mut grad = alloc_gradient(call, logits)?;
        let gradient = Gradient::Apart {
            logits,
            grad: &mut grad,
        };
        run_backward(call, saved, upstream, layout, gradient)?;
        Ok(grad)
    }

    fn backward_inplace(
        call: &Call,
        saved: &Saved,
        upstream: &Tensor,
        logits: &mut CudaStorage,
        layout: &Layout,
    ) -> Result<()> {
        run_backward(call, saved, upstream, layout, Gradient::InPlace(logits))
    }

    fn loss_and_grad(
        call: &Call,
        logits: &CudaStorage,
        layout: &Layout,
    ) -> Result<(CudaStorage, Fused)> {
        let mut grad = alloc_gradient(call, logits)?;
        let gradient = Gradient::Apart {
            logits,
            grad: &mut grad,
        };
        let result = run_fused(call, layout, gradient)?;
        Ok((grad, result))
    }

    fn loss_and_grad_inplace(
        call: &Call,
        logits: &mut CudaStorage,
        layout: &Layout,
    ) -> Result<Fused> {
        run_fused(call, layout, Gradient::InPlace(logits))
    }
}

fn run_backward(
    call: &Call,
    saved: &Saved,
    upstream: &Tensor,
    layout: &Layout,
    gradient: Gradient,
) -> Result<()> {
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
                (
                    element,
                    grad,
                    RowOffsets::contiguous(launch.params.width as usize),
                )
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

fn alloc_gradient(call: &Call, logits: &CudaStorage) -> Result<CudaStorage> {
    alloc_floats(logits.device(), logits.dtype(), call.rows * call.width)
}
