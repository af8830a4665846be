//! From the losses of rows to the result.

use candle_core::{CudaDevice, Layout, Result};
use cudarc::driver::CudaSlice;

use super::{
    arguments::{Inputs, scalars},
    memory::alloc,
    module::Launch,
};
use crate::{call::Call, options::Reduction};

/// The result from the losses of the rows, and the total weight where the gradient needs it.
pub(super) fn reduce(
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

pub(super) struct Reduced {
    /// Unset where no losses were given.
    loss: CudaSlice<f32>,
    pub total_weight: CudaSlice<f32>,
}

pub(super) fn launch_reduce(
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
