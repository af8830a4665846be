//! What a call computes of each row, and of that the result.
//!
//! Every allocation costs calls of the driver, and two events that order its use. So states, statistics, losses on their
//! way to the result and the total weight share one.

use candle_core::{CudaDevice, CudaStorage, Layout, Result, Tensor};
use cudarc::driver::CudaSlice;

use super::{
    arguments::{Inputs, scalars},
    memory::{OnDevice, alloc, tensor},
    module::Launch,
};
use crate::{call::Call, kernels::abi::RowState, options::Reduction, results::RowStats};

/// Floats of a row's state.
const STATE: usize = size_of::<RowState>() / size_of::<f32>();
/// Statistics that are floats.
const STATS: usize = 5;

/// Memory that kernels write for a call's rows.
pub(super) struct Rows {
    /// In floats: states if there are any, statistics if there are any, losses, the total weight.
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
}

impl Places {
    fn new(rows: usize, states: bool, stats: bool) -> Self {
        let mut end = 0;
        let mut next = |floats: usize| {
            let start = end;
            end += floats * rows;
            start
        };
        let states = states.then(|| next(STATE)); // first, where the alignment is
        let stats = stats.then(|| next(STATS));
        Self {
            rows,
            states,
            stats,
            losses: next(1),
            total_weight: end,
        }
    }
}

fn address(base: u64, floats: usize) -> u64 {
    base + (floats * size_of::<f32>()) as u64
}

impl Rows {
    pub fn alloc(call: &Call, device: &CudaDevice, states: bool, stats: bool) -> Result<Self> {
        let places = Places::new(call.rows, states, stats);
        let result = match call.reduction {
            Reduction::None => call.rows,
            _ => 1,
        };
        Ok(Self {
            shared: alloc(device, places.total_weight + 1)?,
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
        unsafe { launch.start_reduction() }
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
            ..
        } = self.places;
        let shared = tensor(self.shared, device, &[total_weight + 1]);
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
        };
        let loss = CudaStorage::wrap_cuda_slice(self.loss, device.clone());
        Ok((loss, stats, saved))
    }
}

/// What the backward needs of the forward, on the device.
pub(crate) struct Saved {
    shared: Tensor,
    /// In floats, where the rows' states begin, and where Σ w is, for [`Reduction::Mean`].
    states: usize,
    divisor: Option<usize>,
}

impl Saved {
    pub(super) fn memory(&self) -> OnDevice<'_> {
        OnDevice::of(&self.shared)
    }

    /// `memory` is [`Self::memory`], for as long as the launch.
    pub(super) fn set<'a>(&self, memory: &'a OnDevice<'a>, launch: &mut Launch<'a>) -> Result<()> {
        let base = memory.read::<f32>(launch)?;
        launch.params.state = address(base, self.states);
        launch.params.divisor = self.divisor.map_or(0, |at| address(base, at));
        Ok(())
    }
}
