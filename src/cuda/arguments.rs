//! What kernels are given of a call: scalars, rows' inputs, the error flag.

use candle_core::{CudaDevice, DType, Layout, Result, Tensor, bail};
use cudarc::driver::CudaSlice;

use super::{memory::OnDevice, module::Launch};
use crate::{
    call::Call,
    kernels::abi::{BadValue, Params, RowOffsets, inner_factors},
    options::Reduction,
    rows::row_offsets,
};

/// Parameters without addresses; `layout` is that of the logits.
pub(super) fn scalars(call: &Call, layout: &Layout) -> Result<Params> {
    let Some(logits_rows) = row_offsets(layout) else {
        bail!(
            "logits: strides {:?}, must have stride 1 inside a row",
            layout.stride()
        );
    };
    Ok(Params {
        logits_rows,
        grad_rows: RowOffsets::contiguous(call.width),
        rows: call.rows as u64,
        ignore_index: call.ignore_index,
        vocab: call.vocab as u32,
        width: call.width as u32,
        mean: (call.reduction == Reduction::Mean).into(),
        uniform_smoothing: call.uniform_smoothing,
        z_loss: call.z_loss,
        logit_scale: call.logit_scale,
        softcap: call.softcap.unwrap_or_default(),
        inner: call
            .softcap
            .map_or([0.0; 2], |cap| inner_factors(call.logit_scale, cap)),
        result_scale: match call.reduction {
            Reduction::SumOver(n) => (1.0 / n) as f32,
            _ => 1.0,
        },
        ..bytemuck::Zeroable::zeroed()
    })
}

pub(super) fn check_upstream(call: &Call, upstream: &Tensor) -> Result<()> {
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

/// Per-row inputs beside the logits.
pub(super) struct Inputs<'a> {
    targets: OnDevice<'a>,
    targets_are_i64: bool,
    smoothing: Option<OnDevice<'a>>,
    weights: Option<OnDevice<'a>>,
}

impl<'a> Inputs<'a> {
    pub fn of(call: &'a Call) -> Result<Self> {
        Ok(Self {
            targets: OnDevice::of(call.classes()?),
            targets_are_i64: call.classes()?.dtype() == DType::I64,
            smoothing: call.smoothing.as_ref().map(OnDevice::of),
            weights: call.weights.as_ref().map(OnDevice::of),
        })
    }

    pub fn set<'b>(&'b self, launch: &mut Launch<'b>) -> Result<()> {
        launch.params.targets = if self.targets_are_i64 {
            self.targets.read::<i64>(launch)?
        } else {
            self.targets.read::<u32>(launch)?
        };
        launch.params.targets_are_i64 = self.targets_are_i64.into();
        if let Some(smoothing) = &self.smoothing {
            launch.params.smoothing = smoothing.read::<f32>(launch)?;
            launch.params.smoothing_rows = smoothing.rows()?;
        }
        if let Some(weights) = &self.weights {
            launch.params.weights = weights.read::<f32>(launch)?;
            launch.params.weight_rows = weights.rows()?;
        }
        Ok(())
    }
}

/// Where kernels report the first bad row, with `check_inputs`.
pub(super) struct FirstError(Option<CudaSlice<u64>>);

impl FirstError {
    pub fn alloc(call: &Call, device: &CudaDevice) -> Result<Self> {
        Ok(Self(if call.check_inputs {
            Some(device.clone_htod(&[u64::MAX])?)
        } else {
            None
        }))
    }

    pub fn set<'a>(&'a mut self, launch: &mut Launch<'a>) {
        if let Some(slice) = &mut self.0 {
            launch.params.first_error = launch.write(slice);
        }
    }

    /// Waits for the kernel, and fails as the CPU path does on the same values.
    pub fn check(&self, call: &Call, device: &CudaDevice) -> Result<()> {
        let Some(slice) = &self.0 else { return Ok(()) };
        let reported = device.clone_dtoh(slice)?[0];
        if reported == u64::MAX {
            return Ok(());
        }
        let row = (reported / 4) as usize;
        let at_row =
            |values: &Tensor, dtype| values.flatten_all()?.narrow(0, row, 1)?.to_dtype(dtype);
        let (kind, values) = match reported % 4 {
            0 => {
                return Err(call.bad_value(
                    BadValue::Target,
                    row,
                    at_row(call.classes()?, DType::I64)?.to_vec1::<i64>()?[0],
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
