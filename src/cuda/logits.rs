//! The loss of logits on CUDA.

use candle_core::{
    CudaDevice, CudaStorage, Layout, Result, Storage, Tensor, backend::BackendStorage,
    op::BackpropOp,
};

use super::{
    Cuda,
    arguments::{Inputs, check_upstream, scalars},
    memory::{OnDevice, alloc_floats, read_floats, write_floats},
    module::{Launch, Work},
    rows::{Evaluation, Named, Saved},
};
use crate::{
    backend::{Backend, Forward, Fused},
    call::Call,
    kernels::abi::{Element, RowOffsets},
    options::Reduction,
};

impl Backend for Cuda {
    type Storage = CudaStorage;
    type Saved = Saved;

    fn forward(
        call: &Call,
        logits: &CudaStorage,
        layout: &Layout,
        stats: bool,
    ) -> Result<Forward<CudaStorage, Saved>> {
        let launched = launch_forward(call, logits.device(), logits, layout, (true, stats));
        let (loss, stats, saved) = Evaluation::join(launched, call, stats)?.finish()?;
        Ok(Forward { loss, stats, saved })
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
        stats: bool,
    ) -> Result<(CudaStorage, Fused)> {
        let mut grad = alloc_gradient(call, logits)?;
        let gradient = Gradient::Apart {
            logits,
            grad: &mut grad,
        };
        let result = run_fused(call, layout, gradient, stats)?;
        Ok((grad, result))
    }

    fn loss_and_grad_inplace(
        call: &Call,
        logits: &mut CudaStorage,
        layout: &Layout,
        stats: bool,
    ) -> Result<Fused> {
        run_fused(call, layout, Gradient::InPlace(logits), stats)
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
    let (upstream, memory) = (OnDevice::of(upstream), saved.memory());
    let mut named = Named::alloc(call, gradient.device())?;
    let mut launch = Launch::new(&stream, scalars(call, layout)?);
    let element = gradient.set(&mut launch, layout)?;
    inputs.set(&mut launch)?;
    named.set(&mut launch);
    saved.set(&memory, &mut launch)?;
    launch.params.upstream = upstream.read::<f32>(&mut launch)?;
    launch.params.upstream_per_row = (call.reduction == Reduction::None).into();
    // SAFETY: logits and gradient cover their layouts, `upstream` has the number of values checked above, and the
    // rest an element for each of `call.rows`.
    unsafe { launch.start(Work::Backward, element, call) }
}

/// The rows' losses, or of a rank's classes its part of them; `states`: for a backward.
fn launch_forward<'a>(
    call: &'a Call,
    device: &'a CudaDevice,
    logits: &CudaStorage,
    layout: &Layout,
    (states, stats): (bool, bool),
) -> Result<Evaluation<'a>> {
    let mut evaluation = Evaluation::new(call, device, (states, stats, false))?;
    if call.rows > 0 {
        let stream = device.cuda_stream();
        let mut launch = Launch::new(&stream, scalars(call, layout)?);
        let element = read_logits(&mut launch, logits, layout)?;
        evaluation.set(&mut launch, false)?;
        let work = match call.groups.vocab_shard {
            Some(_) => Work::ForwardOfTile { stats },
            None => Work::Forward { stats },
        };
        // SAFETY: the logits cover their layout, and all other memory has an element for each of `call.rows`.
        unsafe { launch.start(work, element, call) }?;
    }
    Ok(evaluation)
}

fn run_fused(call: &Call, layout: &Layout, gradient: Gradient, stats: bool) -> Result<Fused> {
    let device = gradient.device().clone();
    // Where ranks have parts of the rows, no gradient is known before all their losses are.
    let (states, work) = match call.groups.vocab_shard {
        Some(_) => (true, Work::Backward),
        None => (false, Work::LossAndGradient { stats }),
    };
    let launched = match states {
        true => launch_forward(call, &device, gradient.logits(), layout, (states, stats)),
        false => Evaluation::new(call, &device, (states, stats, false)),
    };
    let mut evaluation = Evaluation::join(launched, call, stats)?;
    let mut named = Named::alloc(call, &device)?;
    evaluation.weigh()?;
    if call.rows > 0 {
        let stream = device.cuda_stream();
        let mut launch = Launch::new(&stream, scalars(call, layout)?);
        let element = gradient.set(&mut launch, layout)?;
        evaluation.set(&mut launch, call.reduction == Reduction::Mean)?;
        named.set(&mut launch);
        // SAFETY: logits and gradient cover their layouts, and all other memory has an element for each of
        // `call.rows`, but for the scalar divisor.
        unsafe { launch.start(work, element, call) }?;
    }
    let (loss, stats, _) = evaluation.finish()?;
    Ok(Fused {
        loss: Tensor::from_storage(
            Storage::Cuda(loss),
            call.loss_shape(),
            BackpropOp::none(),
            false,
        ),
        stats,
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
        self.logits().device()
    }

    fn logits(&self) -> &CudaStorage {
        match self {
            Self::Apart { logits, .. } => logits,
            Self::InPlace(logits) => logits,
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
    let (element, address) = read_floats(launch, "logits", logits)?;
    launch.params.logits = address + (layout.start_offset() * element.size()) as u64;
    Ok(element)
}

fn alloc_gradient(call: &Call, logits: &CudaStorage) -> Result<CudaStorage> {
    alloc_floats(logits.device(), logits.dtype(), call.rows * call.width)
}
