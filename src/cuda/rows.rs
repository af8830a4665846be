//! What a call computes of each row, and of that the result.
//!
//! Every allocation costs calls of the driver, and two events that order its use. So states, statistics, losses on their
//! way to the result and the total weight share one.

use candle_core::{
    CudaDevice, CudaStorage, DType, Device, Layout, Result, Storage, Tensor, bail,
    cuda_backend::WrapErr,
};
use cudarc::driver::CudaSlice;

use super::{
    arguments::{FirstError, Inputs, scalars},
    memory::{OnDevice, alloc, tensor},
    module::Launch,
};
use crate::{
    call::Call,
    kernels::abi::{
        ClassCheck, DistributionRunning, DistributionState, Kernel, NamedGradient, RowState,
        Running,
    },
    options::Reduction,
    results::RowStats,
    shard,
    targets::Targets,
};

/// A call on its way: what its rows are given, and what kernels make of them.
pub(super) struct Evaluation<'a> {
    call: &'a Call,
    device: &'a CudaDevice,
    stats: bool,
    inputs: Inputs<'a>,
    rows: Rows,
    first_error: FirstError,
    /// Partial results of the rows, (rows) of [`Running`] or [`DistributionRunning`], where their classes come in parts.
    running: Option<CudaSlice<u32>>,
}

impl<'a> Evaluation<'a> {
    /// `states`: for a backward. `parts`: the classes come in parts on this device, too.
    pub fn new(
        call: &'a Call,
        device: &'a CudaDevice,
        (states, stats, parts): (bool, bool, bool),
    ) -> Result<Self> {
        let inputs = Inputs::of(call)?;
        let mut rows = Rows::alloc(call, device, states, stats)?;
        let mut first_error = FirstError::alloc(call, device)?;
        rows.check_classes(call, device, &inputs, &mut first_error)?;
        let in_parts = parts || call.groups.vocab_shard.is_some();
        let running = in_parts.then(|| alloc(device, call.rows * running_words(call)));
        Ok(Self {
            call,
            device,
            stats,
            inputs,
            rows,
            first_error,
            running: running.transpose()?,
        })
    }

    /// For a kernel over the logits.
    pub fn set<'b>(&'b mut self, launch: &mut Launch<'b>, divided: bool) -> Result<()> {
        self.inputs.set(launch)?;
        self.rows.set(launch, self.call, divided);
        self.first_error.set(launch);
        if let Some(running) = &mut self.running {
            launch.params.running = launch.write(running);
        }
        Ok(())
    }

    /// With other ranks, where there are any: `launched`, which has this one's part of every row, or of its error the others are
    /// told; then every row's loss is known.
    pub fn join(launched: Result<Self>, call: &Call, stats: bool) -> Result<Self> {
        let read = || -> Result<_> {
            let classes = call.read_classes()?;
            Ok((call.read_rows(&classes)?, classes))
        };
        let ranks = call.groups.vocab_shard.as_ref();
        // Without `check_inputs` nothing is read that is on the device, and kernels compare what rows are given.
        let launched = launched.and_then(|launched| {
            let given = (ranks.is_some() && call.check_inputs).then(read);
            Ok((launched, given.transpose()?))
        });
        let count = shard::count_of_all(call, launched.as_ref().map(|_| 0.0));
        let launched = launched.and_then(|launched| count.map(|_| launched));
        let (mut launched, given) = shard::tell_slices(call, stats, launched)?;
        let Some(ranks) = ranks else {
            return Ok(launched);
        };
        shard::agree(
            call,
            stats,
            given.as_ref().map(|(rows, classes)| (rows, classes)),
        )?;
        if let (Some(running), true) = (launched.running.take(), call.rows > 0) {
            let shape = [call.rows, running_words(call)];
            let gathered = ranks
                .0
                .all_gather(&tensor(running, launched.device, &shape))?;
            launched.merge(&gathered.contiguous()?)?;
        }
        Ok(launched)
    }

    /// Merges the partial results of all ranks, (ranks, rows).
    fn merge(&mut self, gathered: &Tensor) -> Result<()> {
        let stream = self.device.cuda_stream();
        let (call, stats, gathered) = (self.call, self.stats, OnDevice::of(gathered));
        let layout = Layout::contiguous((call.rows, call.width));
        let mut launch = Launch::new(&stream, scalars(call, &layout)?);
        launch.params.gathered = gathered.read::<u32>(&mut launch)?;
        self.set(&mut launch, false)?;
        // SAFETY: there are partial results of each row of each rank; all other memory has an element for each of `call.rows`.
        unsafe { launch.start_merge(stats, call) }
    }

    /// Σ w, before gradients of a mean are divided by it.
    pub fn weigh(&mut self) -> Result<()> {
        match self.call.reduction {
            Reduction::Mean => self.rows.weigh(self.call, self.device, &self.inputs),
            _ => Ok(()),
        }
    }

    /// The result; an error for the first bad value with `check_inputs`.
    pub fn finish(self) -> Result<(CudaStorage, Option<RowStats>, Saved)> {
        let Self {
            call,
            device,
            inputs,
            mut rows,
            first_error,
            ..
        } = self;
        rows.reduce(call, device, &inputs)?;
        shard::settle(call, first_error.check(call, device))?;
        rows.finish(call, device)
    }
}

/// Of a row's partial result.
fn running_words(call: &Call) -> usize {
    match call.has_distributions() {
        true => words::<DistributionRunning>(),
        false => words::<Running>(),
    }
}

/// The size of a `T` in floats, or in words.
const fn words<T>() -> usize {
    size_of::<T>() / size_of::<f32>()
}

/// Statistics that are floats.
const STATS: usize = 5;

/// Memory that kernels write for a call's rows.
struct Rows {
    /// In floats: states if there are any, statistics if there are any, losses, the total weight, what is known of the
    /// classes' values.
    shared: CudaSlice<f32>,
    predicted: Option<CudaSlice<u32>>,
    /// The result: a scalar, or the rows' losses.
    loss: CudaSlice<f32>,
    places: Places,
    /// Whether the total weight is that of all ranks.
    weighed: bool,
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
            class_check: next(words::<ClassCheck>()),
            end,
        }
    }
}

fn address(base: u64, floats: usize) -> u64 {
    base + (floats * size_of::<f32>()) as u64
}

impl Rows {
    fn alloc(call: &Call, device: &CudaDevice, states: bool, stats: bool) -> Result<Self> {
        let state = match call.has_distributions() {
            true => words::<DistributionState>(),
            false => words::<RowState>(),
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
            weighed: false,
        })
    }

    /// For a kernel that computes losses, with the total weight as divisor if that is known.
    fn set<'a>(&'a mut self, launch: &mut Launch<'a>, call: &Call, divided: bool) {
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
    fn check_classes(
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

    /// The total weight alone, of all ranks that have rows: gradients of a mean are divided by it, so it has to be known before
    /// them.
    fn weigh(&mut self, call: &Call, device: &CudaDevice, inputs: &Inputs) -> Result<()> {
        self.start_reduction(call, device, inputs, false)?;
        let Some(ranks) = &call.groups.data_parallel else {
            return Ok(());
        };
        self.weighed = true;
        let at = self.places.total_weight;
        if call.rows == 0 {
            let nothing = Tensor::zeros(1, DType::F32, &Device::Cuda(device.clone()))?;
            return ranks.0.all_reduce_sum(&nothing).map(drop);
        }
        let stream = device.cuda_stream();
        let mut of_rank: CudaSlice<f32> = alloc(device, 1)?;
        stream
            .memcpy_dtod(&self.shared.slice(at..at + 1), &mut of_rank)
            .w()?;
        let sum = ranks.0.all_reduce_sum(&tensor(of_rank, device, &[1]))?;
        let (storage, layout) = sum.storage_and_layout();
        let Storage::Cuda(sum) = &*storage else {
            bail!("data_parallel: a sum that is not on the device")
        };
        let (sum, start) = (sum.as_cuda_slice::<f32>()?, layout.start_offset());
        let mut total = self.shared.slice_mut(at..at + 1);
        stream
            .memcpy_dtod(&sum.slice(start..start + 1), &mut total)
            .w()
    }

    /// The result from the losses, and the total weight.
    fn reduce(&mut self, call: &Call, device: &CudaDevice, inputs: &Inputs) -> Result<()> {
        let is_mean = call.reduction == Reduction::Mean;
        if is_mean && call.groups.data_parallel.is_some() && !self.weighed {
            self.weigh(call, device, inputs)?;
        }
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
        let total_weight = address(base, self.places.total_weight);
        match losses && self.weighed {
            true => launch.params.divisor = total_weight,
            false => launch.params.total_weight = total_weight,
        }
        if losses {
            launch.params.loss = address(base, self.places.losses);
            launch.params.reduced = launch.write(&mut self.loss);
        }
        // SAFETY: targets, weights and losses have an element for each of `call.rows`, results are scalars. The kernel
        // reads no logits.
        unsafe { launch.start_alone(Kernel::Reduce) }
    }

    /// The result, the statistics, and what a backward needs.
    fn finish(
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
