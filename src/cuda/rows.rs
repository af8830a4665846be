//! What a call computes of each row, and of that the result.
//!
//! Every allocation costs calls of the driver, and two events that order its use. So states, statistics, losses on their
//! way to the result and the total weight share one.

use candle_core::{CudaDevice, CudaStorage, Layout, Result, Tensor};
use cudarc::driver::CudaSlice;

use super::{
    arguments::{FirstError, Inputs, scalars},
    memory::{OnDevice, alloc, tensor},
    module::Launch,
};
use crate::{
    call::Call,
    kernels::abi::{ClassCheck, DistributionState, Kernel, NamedGradient, RowState},
    options::Reduction,
    results::RowStats,
    targets::Targets,
};

/// The size of a `T` in floats.
pub(super) const fn floats<T>() -> usize {
    size_of::<T>() / size_of::<f32>()
}

/// Statistics that are floats.
const STATS: usize = 5;

/// Memory that kernels write for a call's rows.
pub(super) struct Rows {
    /// In floats: states if there are any, statistics if there are any, losses, the total weight, what is known of the
    /// classes' values.
    shared: CudaSlice<f32>,
    predicted: Option<CudaSlice<u32>>,
    /// The result: a scalar, or the rows' losses.
    loss: CudaSlice<f32>,
    places: Places,
}

/// Where things begin in the shared memory, in floats.
#[derive(Clone, Copy)]
struct Places {
    rows: usize,
    states: Option<usize>,
    stats: Option<usize>,
    losses: usize,
    total_weight: usize,
    class_check: usize,
    end: usize,
}

impl Places {
    /// `state` is the floats of a row's, if there are any.
    fn new(rows: usize, state: Option<usize>, stats: bool) -> Self {
        let mut end = 0;
        let mut next = |floats: usize| {
            let start = end;
            end += floats;
            start
        };
        Self {
            rows,
            states: state.map(|floats| next(floats * rows)), // first, where the alignment is
            stats: stats.then(|| next(STATS * rows)),
            losses: next(rows),
            total_weight: next(1),
            class_check: next(floats::<ClassCheck>()),
            end,
        }
    }
}

fn address(base: u64, floats: usize) -> u64 {
    base + (floats * size_of::<f32>()) as u64
}

impl Rows {
    pub fn alloc(call: &Call, device: &CudaDevice, states: bool, stats: bool) -> Result<Self> {
        let state = match call.has_distributions() {
            true => floats::<DistributionState>(),
            false => floats::<RowState>(),
        };
        let places = Places::new(call.rows, states.then_some(state), stats);
        let result = match call.reduction {
            Reduction::None => call.rows,
            _ => 1,
        };
        Ok(Self {
            shared: alloc(device, places.end)?,
            predicted: stats.then(|| alloc(device, call.rows)).transpose()?,
            loss: match call.rows {
                0 => device.alloc_zeros(1)?, // nothing will write it
                _ => alloc(device, result)?,
            },
            places,
        })
    }

    /// For a kernel that computes losses, with the total weight as divisor if that is known.
    pub fn set<'a>(&'a mut self, launch: &mut Launch<'a>, call: &Call, divided: bool) {
        let places = self.places;
        let base = launch.write(&mut self.shared);
        let params = &mut launch.params;
        params.loss = address(base, places.losses);
        params.state = places.states.map_or(0, |at| address(base, at));
        if divided {
            params.divisor = address(base, places.total_weight);
        }
        if call.has_class_values() {
            params.class_check = address(base, places.class_check);
        }
        if let Some(first) = places.stats {
            let place = |i: usize| address(base, first + i * places.rows);
            params.nll = place(0);
            params.lse = place(1);
            params.entropy = place(2);
            params.max_prob = place(3);
            params.grad_norm_sq = place(4);
        }
        if let Some(predicted) = &mut self.predicted {
            launch.params.predicted = launch.write(predicted);
        }
        if call.reduction == Reduction::None {
            launch.params.loss = launch.write(&mut self.loss);
        }
    }

    /// Looks at the classes' values, before anything reads them.
    pub fn check_classes(
        &mut self,
        call: &Call,
        device: &CudaDevice,
        inputs: &Inputs,
        first_error: &mut FirstError,
    ) -> Result<()> {
        if call.rows == 0 || !call.has_class_values() {
            return Ok(());
        }
        let stream = device.cuda_stream();
        let layout = Layout::contiguous((call.rows, call.width));
        let mut launch = Launch::new(&stream, scalars(call, &layout)?);
        inputs.set(&mut launch)?;
        let base = launch.write(&mut self.shared);
        launch.params.class_check = address(base, self.places.class_check);
        first_error.set(&mut launch);
        // SAFETY: the values have an element for each of `call.vocab`.
        unsafe { launch.start_alone(Kernel::Classes) }
    }

    /// The total weight alone: gradients of a mean are divided by it, so it has to be known before them.
    pub fn weigh(&mut self, call: &Call, device: &CudaDevice, inputs: &Inputs) -> Result<()> {
        self.start_reduction(call, device, inputs, false)
    }

    /// The result from the losses, and the total weight.
    pub fn reduce(&mut self, call: &Call, device: &CudaDevice, inputs: &Inputs) -> Result<()> {
        match call.reduction {
            Reduction::None => Ok(()),
            _ => self.start_reduction(call, device, inputs, true),
        }
    }

    fn start_reduction(
        &mut self,
        call: &Call,
        device: &CudaDevice,
        inputs: &Inputs,
        losses: bool,
    ) -> Result<()> {
        if call.rows == 0 {
            return Ok(());
        }
        let stream = device.cuda_stream();
        let layout = Layout::contiguous((call.rows, call.width));
        let mut launch = Launch::new(&stream, scalars(call, &layout)?);
        inputs.set(&mut launch)?;
        let base = launch.write(&mut self.shared);
        launch.params.total_weight = address(base, self.places.total_weight);
        if losses {
            launch.params.loss = address(base, self.places.losses);
            launch.params.reduced = launch.write(&mut self.loss);
        }
        // SAFETY: targets, weights and losses have an element for each of `call.rows`, results are scalars. The kernel
        // reads no logits.
        unsafe { launch.start_alone(Kernel::Reduce) }
    }

    /// The result, the statistics, and what a backward needs.
    pub fn finish(
        self,
        call: &Call,
        device: &CudaDevice,
    ) -> Result<(CudaStorage, Option<RowStats>, Saved)> {
        let Places {
            rows,
            states,
            stats,
            total_weight,
            class_check,
            end,
            ..
        } = self.places;
        let shared = tensor(self.shared, device, &[end]);
        let stats = match (stats, self.predicted) {
            (Some(first), Some(predicted)) => {
                let of = |i: usize| {
                    let one = shared.narrow(0, first + i * rows, rows)?;
                    one.reshape(&call.shape[..])
                };
                Some(RowStats {
                    nll: of(0)?,
                    lse: of(1)?,
                    entropy: of(2)?,
                    max_prob: of(3)?,
                    grad_norm_sq: of(4)?,
                    predicted: tensor(predicted, device, &call.shape),
                })
            }
            _ => None,
        };
        let divisor = call.reduction == Reduction::Mean;
        let saved = Saved {
            shared,
            states: states.unwrap_or_default(),
            divisor: divisor.then_some(total_weight),
            class_check: call.has_class_values().then_some(class_check),
        };
        let loss = CudaStorage::wrap_cuda_slice(self.loss, device.clone());
        Ok((loss, stats, saved))
    }
}

/// Memory for the gradients of the classes that targets name, from before their row's others are written until after.
pub(super) struct Named(Option<CudaSlice<NamedGradient>>);

impl Named {
    pub fn alloc(call: &Call, device: &CudaDevice) -> Result<Self> {
        let entries = match &call.targets {
            Targets::Classes(classes) | Targets::TopK { classes, .. } => classes.elem_count(),
            Targets::Probabilities(_) => 0,
        };
        let wanted = call.has_distributions() && entries > 0;
        Ok(Self(wanted.then(|| alloc(device, entries)).transpose()?))
    }

    pub fn set<'a>(&'a mut self, launch: &mut Launch<'a>) {
        if let Some(named) = &mut self.0 {
            launch.params.named = launch.write(named);
        }
    }
}

/// What the backward needs of the forward, on the device.
pub(crate) struct Saved {
    shared: Tensor,
    /// In floats, where the rows' states begin, and where Σ w is, for [`Reduction::Mean`].
    states: usize,
    divisor: Option<usize>,
    /// And what is known of the classes' values, if they have any.
    class_check: Option<usize>,
}

impl Saved {
    pub(super) fn memory(&self) -> OnDevice<'_> {
        OnDevice::of(&self.shared)
    }

    /// `memory` is [`Self::memory`], for as long as the launch.
    pub(super) fn set<'a>(&self, memory: &'a OnDevice<'a>, launch: &mut Launch<'a>) -> Result<()> {
        let base = memory.read::<f32>(launch)?;
        launch.params.state = address(base, self.states);
        let optional = |place: Option<usize>| place.map_or(0, |at| address(base, at));
        launch.params.divisor = optional(self.divisor);
        launch.params.class_check = optional(self.class_check);
        Ok(())
    }
}
