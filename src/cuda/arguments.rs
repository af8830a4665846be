//! What kernels are given of a call: scalars, rows' inputs, the error flag.

use candle_core::{CudaDevice, DType, Layout, Result, Tensor, bail};
use cudarc::driver::CudaSlice;

use super::{memory::OnDevice, module::Launch};
use crate::{
    call::{Call, ClassValues},
    kernels::abi::{Params, RowOffsets, inner_factors},
    options::Reduction,
    rows::row_offsets,
    targets::Targets,
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
        first_column: call.columns.start as u32,
        first_class: call.columns.start as u32,
        end_class: call.columns.end as u32,
        ranks: (call.groups.vocab_shard.as_ref()).map_or(0, |ranks| ranks.0.size() as u32),
        mean: (call.reduction == Reduction::Mean).into(),
        uniform_smoothing: call.uniform_smoothing,
        uniform_entropy_weight: call.uniform_entropy_weight,
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

/// What rows and classes are given beside the logits.
pub(super) struct Inputs<'a> {
    targets: TargetInputs<'a>,
    smoothing: Option<OnDevice<'a>>,
    weights: Option<OnDevice<'a>>,
    entropy_weight: Option<OnDevice<'a>>,
    class_weights: Option<OnDevice<'a>>,
    prior: Option<OnDevice<'a>>,
}

enum TargetInputs<'a> {
    /// (rows, `entries`), and probabilities of the same shape if there are several.
    Named {
        classes: OnDevice<'a>,
        are_i64: bool,
        entries: usize,
        probabilities: Option<OnDevice<'a>>,
    },
    Probabilities(OnDevice<'a>),
}

impl<'a> Inputs<'a> {
    pub fn of(call: &'a Call) -> Result<Self> {
        let named =
            |classes: &'a Tensor, entries, probabilities: Option<&'a Tensor>| TargetInputs::Named {
                classes: OnDevice::of(classes),
                are_i64: classes.dtype() == DType::I64,
                entries,
                probabilities: probabilities.map(OnDevice::of),
            };
        Ok(Self {
            targets: match &call.targets {
                Targets::Classes(classes) => named(classes, 1, None),
                Targets::TopK {
                    classes,
                    probabilities,
                } => named(classes, classes.dim(1)?, Some(probabilities)),
                Targets::Probabilities(values) => TargetInputs::Probabilities(OnDevice::of(values)),
            },
            smoothing: call.smoothing.as_ref().map(OnDevice::of),
            weights: call.weights.as_ref().map(OnDevice::of),
            entropy_weight: call.entropy_weight.as_ref().map(OnDevice::of),
            class_weights: call.class_weights.as_ref().map(OnDevice::of),
            prior: call.smoothing_prior.as_ref().map(OnDevice::of),
        })
    }

    pub fn set<'b>(&'b self, launch: &mut Launch<'b>) -> Result<()> {
        match &self.targets {
            TargetInputs::Named {
                classes,
                are_i64,
                entries,
                probabilities,
            } => {
                launch.params.targets = if *are_i64 {
                    classes.read::<i64>(launch)?
                } else {
                    classes.read::<u32>(launch)?
                };
                launch.params.targets_are_i64 = (*are_i64).into();
                launch.params.entries = *entries as u32;
                if let Some(probabilities) = probabilities {
                    launch.params.probabilities = probabilities.read::<f32>(launch)?;
                }
            }
            TargetInputs::Probabilities(values) => {
                let (element, address) = values.read_floats(launch, "targets")?;
                launch.params.probabilities = address;
                launch.params.probability_type = element.number();
                launch.params.probability_rows = values.rows()?;
            }
        }
        if let Some(smoothing) = &self.smoothing {
            launch.params.smoothing = smoothing.read::<f32>(launch)?;
            launch.params.smoothing_rows = smoothing.rows()?;
        }
        if let Some(weights) = &self.weights {
            launch.params.weights = weights.read::<f32>(launch)?;
            launch.params.weight_rows = weights.rows()?;
        }
        if let Some(weights) = &self.entropy_weight {
            launch.params.entropy_weights = weights.read::<f32>(launch)?;
            launch.params.entropy_rows = weights.rows()?;
        }
        if let Some(weights) = &self.class_weights {
            launch.params.class_weights = weights.read::<f32>(launch)?;
        }
        if let Some(prior) = &self.prior {
            launch.params.prior = prior.read::<f32>(launch)?;
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
        let Some(row) = (match device.clone_dtoh(slice)?[0] {
            u64::MAX => return Ok(()),
            reported => reported.checked_sub(1),
        }) else {
            call.read_classes()?;
            bail!("class_weights or smoothing_prior: a bad value, no longer there");
        };
        let row = row as usize;
        let (mut rows, _) = call.read_each_row(&ClassValues::default())?;
        rows.swap_remove(row)?;
        if let Some(values) = call.probabilities() {
            call.probability_reader(values)?(row)?;
        }
        if call.groups.vocab_shard.is_some() {
            bail!("targets: row {row} has a bad probability on another rank");
        }
        bail!("row {row}: a bad value, no longer there")
    }
}
