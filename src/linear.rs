//! `forward_linear` as custom operations of candle: from hidden states and the output projection to the loss, with as
//! much of the logits in memory as the budget allows.
//!
//! The forward goes over the tiles of the logits (`tiles`): a product, then the tile is merged into its rows' running
//! results. The backward goes over them again: the product, unless the tile was kept, its gradient in place, and from it
//! the gradients of both factors.

use std::sync::{Arc, Mutex, OnceLock};

use candle_core::{
    CpuStorage, CustomOp1, CustomOp2, CustomOp3, DType, Device, Layout, Result, Shape, Storage,
    StorageRef, Tensor, backend::BackendStorage, bail, op::BackpropOp,
};

#[cfg(feature = "cuda")]
use crate::cuda;
use crate::{
    CrossEntropy, Reduction, RowStats,
    blas::View,
    call::Call,
    cpu,
    op::Forward,
    tiles::{Tile, Tiles},
};

/// Logits of a tile on the CPU: about what stays in the shared cache until the products have read it.
const CPU_TILE: usize = 8 << 20;
/// The same on CUDA. Wider tiles mean fewer passes over the f32 sums, which cost more than what a tile that fits in the
/// L2 saves (docs/performance.md); with the sums of a batch of 8192 states of 4096, this is 240 MiB.
const CUDA_TILE: usize = 112 << 20;

/// Rows of a tile on CUDA start at multiples of so many elements, 16 bytes, for the products' sake.
pub(crate) const CUDA_PITCH: usize = 8;

/// What the backends do, in which order.
pub(crate) struct Plan {
    pub tiles: Tiles,
    /// Tiles, from the first on, whose logits the forward keeps for the backward.
    pub keep: usize,
}

/// Storages of the arguments: hidden (N, D), weight (V, D), bias (V).
pub(crate) struct Operands<'a, S> {
    pub hidden: (&'a S, &'a Layout),
    pub weight: (&'a S, &'a Layout),
    pub bias: Option<(&'a S, &'a Layout)>,
}

/// Gradients that someone asks for.
#[derive(Clone, Copy)]
pub(crate) struct Wanted {
    pub hidden: bool,
    pub weight: bool,
    pub bias: bool,
}

/// Logits of the first tiles. The first backward takes them, a second one computes them again.
pub(crate) struct Kept<S>(Mutex<Vec<S>>);

impl<S> Kept<S> {
    pub fn new(tiles: Vec<S>) -> Self {
        Self(Mutex::new(tiles))
    }

    pub fn take(&self) -> impl Iterator<Item = S> + use<S> {
        let mut tiles = self.0.lock().unwrap_or_else(|e| e.into_inner());
        std::mem::take(&mut *tiles).into_iter()
    }
}

/// What a backend's forward leaves for its backward.
pub(crate) enum Saved {
    Cpu(cpu::linear::Saved),
    #[cfg(feature = "cuda")]
    Cuda(cuda::linear::Saved),
}

pub(crate) fn forward(
    options: &CrossEntropy,
    hidden: &Tensor,
    weight: &Tensor,
    bias: Option<&Tensor>,
    targets: &Tensor,
    stats: bool,
) -> Result<(Tensor, Option<RowStats>)> {
    let call = Call::linear(options, hidden, weight, bias, targets)?;
    let depth = hidden.dims()[hidden.rank() - 1];
    let hidden = if hidden.rank() == 2 {
        hidden.clone()
    } else {
        hidden.reshape((call.rows, depth))?
    };
    let Some(ids) = rows_that_count(options, &call, stats)? else {
        return apply(options, call, &hidden, weight, bias, stats);
    };
    let select = SelectRows::new(&ids, call.rows, hidden.device())?;
    let selected = if ids == NOTHING {
        call.select(&Tensor::zeros(1, DType::U32, hidden.device())?)?
    } else {
        call.select(&select.ids)?
    };
    let hidden = hidden.contiguous()?.apply_op1(select.clone())?;
    let (loss, stats) = apply(options, selected, &hidden, weight, bias, stats)?;
    // Back to all rows; those left out have zeros.
    let spread = select.transposed();
    let all_rows = |values: &Tensor| {
        let values = values.apply_op1(spread.clone())?;
        values.reshape(call.shape.as_slice())
    };
    let loss = match call.reduction {
        Reduction::None => all_rows(&loss)?,
        _ => loss,
    };
    let all_stats = |stats: RowStats| {
        Result::Ok(RowStats {
            nll: all_rows(&stats.nll)?,
            lse: all_rows(&stats.lse)?,
            entropy: all_rows(&stats.entropy)?,
            max_prob: all_rows(&stats.max_prob)?,
            grad_norm_sq: all_rows(&stats.grad_norm_sq)?,
            predicted: all_rows(&stats.predicted)?,
        })
    };
    Ok((loss, stats.map(all_stats).transpose()?))
}

/// On CUDA, where candle cannot launch a kernel over nothing: a hidden state of zeros, for which the first row stands in
/// everything else. It has no loss either.
const NOTHING: [u32; 1] = [u32::MAX];

/// Rows `ids` of a contiguous tensor, zeros where an id is `u32::MAX`. The backward selects again instead of adding, which
/// on CUDA would take the rows one after another.
#[derive(Clone)]
struct SelectRows {
    ids: Tensor,
    /// What selects each row's gradient.
    back: Tensor,
}

impl SelectRows {
    /// `ids` of `rows` rows, each at most once.
    fn new(ids: &[u32], rows: usize, device: &Device) -> Result<Self> {
        let mut back = vec![u32::MAX; rows];
        for (place, &id) in (0..).zip(ids).filter(|(_, id)| **id != u32::MAX) {
            back[id as usize] = place;
        }
        Ok(Self {
            ids: Tensor::new(ids, device)?,
            back: Tensor::new(back, device)?,
        })
    }

    fn transposed(&self) -> Self {
        Self {
            ids: self.back.clone(),
            back: self.ids.clone(),
        }
    }

    fn apply<S: BackendStorage>(&self, rows: &S, layout: &Layout, ids: &S) -> Result<(S, Shape)> {
        let mut dims = layout.dims().to_vec();
        dims[0] = self.ids.elem_count();
        let selected = rows.index_select(ids, layout, self.ids.layout(), 0)?;
        Ok((selected, dims.into()))
    }
}

impl CustomOp1 for SelectRows {
    fn name(&self) -> &'static str {
        "select-rows"
    }

    fn cpu_fwd(&self, rows: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        match &*self.ids.storage_and_layout().0 {
            Storage::Cpu(ids) => self.apply(rows, layout, ids),
            _ => bail!("rows and their numbers on different devices"),
        }
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        rows: &candle_core::CudaStorage,
        layout: &Layout,
    ) -> Result<(candle_core::CudaStorage, Shape)> {
        match &*self.ids.storage_and_layout().0 {
            Storage::Cuda(ids) => self.apply(rows, layout, ids),
            _ => bail!("rows and their numbers on different devices"),
        }
    }

    fn bwd(&self, _rows: &Tensor, _selected: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        let grad = grad.detach().contiguous()?;
        Ok(Some(grad.apply_op1_no_bwd(&SelectRows::transposed(self))?))
    }
}

/// Numbers of the rows that need logits: those that are not ignored and have a weight, or all that are not ignored where
/// statistics are asked for. `None` where all rows do, or where finding out would wait for the device.
fn rows_that_count(options: &CrossEntropy, call: &Call, stats: bool) -> Result<Option<Vec<u32>>> {
    let on_cpu = call.targets.device().is_cpu();
    if call.rows == 0 || !(on_cpu || options.compact_rows) {
        return Ok(None);
    }
    let rows = if on_cpu || call.check_inputs {
        call.read_rows()?.into_iter().map(Ok).collect()
    } else {
        call.read_each_row()? // bad rows stay, to become NaN
    };
    let ids: Vec<u32> = (0..)
        .zip(&rows)
        .filter(|(_, row)| match row {
            Ok(Some(row)) => stats || row.weight != 0.0,
            Ok(None) => false,
            Err(_) => true,
        })
        .map(|(i, _)| i)
        .collect();
    Ok(match ids.len() {
        0 if !on_cpu => Some(NOTHING.to_vec()),
        n if n < call.rows => Some(ids),
        _ => None,
    })
}

/// The loss of all rows of `hidden` (N, D).
fn apply(
    options: &CrossEntropy,
    call: Call,
    hidden: &Tensor,
    weight: &Tensor,
    bias: Option<&Tensor>,
    stats: bool,
) -> Result<(Tensor, Option<RowStats>)> {
    let on_cpu = hidden.device().is_cpu();
    // The CPU's logits are f32 or f64, as its products are.
    let logit_size = match hidden.dtype() {
        DType::F16 | DType::BF16 if on_cpu => 4,
        dtype => dtype.size_in_bytes(),
    };
    let default = if on_cpu { CPU_TILE } else { CUDA_TILE };
    let tiles = Tiles::new(
        (call.rows, call.vocab),
        logit_size,
        options.tile_bytes.unwrap_or(default),
        options.tile_bytes.is_some(),
    );
    let tracked =
        hidden.track_op() || weight.track_op() || bias.is_some_and(|bias| bias.track_op());
    let pitch = if on_cpu { 1 } else { CUDA_PITCH };
    let keep = if tracked {
        let bytes = |tile: &Tile| tile.rows.len() * tile.pitch(pitch) * logit_size;
        tiles.kept(options.memory_budget, bytes)
    } else {
        0
    };
    let op = LinearOp(Arc::new(LinearState {
        call,
        plan: Plan { tiles, keep },
        stats,
        saved: OnceLock::new(),
        row_stats: OnceLock::new(),
    }));
    let state = op.0.clone();
    let (hidden, weight) = (with_unit_stride(hidden)?, with_unit_stride(weight)?);
    let loss = match bias {
        Some(bias) => hidden.apply_op3(&weight, &bias.contiguous()?, op)?,
        None => hidden.apply_op2(&weight, op)?,
    };
    Ok((loss, state.row_stats.get().cloned()))
}

/// A matrix that products on every device can read.
fn with_unit_stride(matrix: &Tensor) -> Result<Tensor> {
    let (rows, columns) = matrix.dims2()?;
    let view = View {
        shape: [rows, columns],
        stride: [matrix.stride()[0], matrix.stride()[1]],
    };
    if view.is_readable() {
        Ok(matrix.clone())
    } else {
        matrix.contiguous()
    }
}

struct LinearOp(Arc<LinearState>);

struct LinearState {
    call: Call,
    plan: Plan,
    stats: bool,
    saved: OnceLock<Saved>,
    row_stats: OnceLock<RowStats>,
}

impl LinearState {
    fn keep<S>(&self, forward: Forward<S, Saved>) -> (S, Shape) {
        let _ = self.saved.set(forward.saved);
        if let Some(stats) = forward.stats {
            let _ = self.row_stats.set(stats);
        }
        (forward.loss, self.call.loss_shape().into())
    }

    fn cpu_fwd(&self, operands: &Operands<CpuStorage>) -> Result<(CpuStorage, Shape)> {
        Ok(self.keep(cpu::linear::forward(
            &self.call, &self.plan, operands, self.stats,
        )?))
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        operands: &Operands<candle_core::CudaStorage>,
    ) -> Result<(candle_core::CudaStorage, Shape)> {
        Ok(self.keep(cuda::linear::forward(
            &self.call, &self.plan, operands, self.stats,
        )?))
    }

    /// Gradients of hidden, weight and bias: of those that are in the graph.
    fn bwd(
        &self,
        hidden: &Tensor,
        weight: &Tensor,
        bias: Option<&Tensor>,
        grad_loss: &Tensor,
    ) -> Result<[Option<Tensor>; 3]> {
        let wanted = Wanted {
            hidden: hidden.track_op(),
            weight: weight.track_op(),
            bias: bias.is_some_and(|bias| bias.track_op()),
        };
        let upstream = grad_loss.detach().contiguous()?.flatten_all()?;
        let shapes = [
            hidden.shape(),
            weight.shape(),
            bias.map_or(weight.shape(), |bias| bias.shape()),
        ];
        let hidden = hidden.storage_and_layout();
        let weight = weight.storage_and_layout();
        let bias = bias.map(|bias| bias.storage_and_layout());
        let tensor = |storage: Storage, shape: &Shape| {
            Tensor::from_storage(storage, shape, BackpropOp::none(), false)
        };
        let guards = (&hidden, &weight, bias.as_ref());
        let gradients: [Option<Storage>; 3] = match self.saved.get().expect("the forward ran") {
            Saved::Cpu(saved) => {
                let operands = operands(guards, |storage| match storage {
                    Storage::Cpu(storage) => Some(storage),
                    _ => None,
                })?;
                cpu::linear::backward(&self.call, &self.plan, saved, &upstream, &operands, wanted)?
                    .map(|gradient| gradient.map(Storage::Cpu))
            }
            #[cfg(feature = "cuda")]
            Saved::Cuda(saved) => {
                let operands = operands(guards, |storage| match storage {
                    Storage::Cuda(storage) => Some(storage),
                    _ => None,
                })?;
                cuda::linear::backward(&self.call, &self.plan, saved, &upstream, &operands, wanted)?
                    .map(|gradient| gradient.map(Storage::Cuda))
            }
        };
        let mut shapes = shapes.into_iter();
        Ok(gradients.map(|gradient| {
            let shape = shapes.next().expect("three of each");
            gradient.map(|storage| tensor(storage, shape))
        }))
    }
}

type Guard<'a> = (StorageRef<'a>, &'a Layout);

/// The arguments' storages, if all are what `pick` takes.
fn operands<'a, S>(
    (hidden, weight, bias): (&'a Guard, &'a Guard, Option<&'a Guard>),
    pick: fn(&Storage) -> Option<&S>,
) -> Result<Operands<'a, S>> {
    let read = |(storage, layout): &'a Guard| match pick(storage) {
        Some(storage) => Ok((storage, *layout)),
        None => bail!("cross-entropy: forward and backward on different devices"),
    };
    Ok(Operands {
        hidden: read(hidden)?,
        weight: read(weight)?,
        bias: bias.map(read).transpose()?,
    })
}

const NAME: &str = "linear-cross-entropy";

impl CustomOp2 for LinearOp {
    fn name(&self) -> &'static str {
        NAME
    }

    fn cpu_fwd(
        &self,
        hidden: &CpuStorage,
        hidden_layout: &Layout,
        weight: &CpuStorage,
        weight_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        self.0.cpu_fwd(&Operands {
            hidden: (hidden, hidden_layout),
            weight: (weight, weight_layout),
            bias: None,
        })
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        hidden: &candle_core::CudaStorage,
        hidden_layout: &Layout,
        weight: &candle_core::CudaStorage,
        weight_layout: &Layout,
    ) -> Result<(candle_core::CudaStorage, Shape)> {
        self.0.cuda_fwd(&Operands {
            hidden: (hidden, hidden_layout),
            weight: (weight, weight_layout),
            bias: None,
        })
    }

    fn bwd(
        &self,
        hidden: &Tensor,
        weight: &Tensor,
        _loss: &Tensor,
        grad_loss: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let [hidden, weight, _] = self.0.bwd(hidden, weight, None, grad_loss)?;
        Ok((hidden, weight))
    }
}

impl CustomOp3 for LinearOp {
    fn name(&self) -> &'static str {
        NAME
    }

    fn cpu_fwd(
        &self,
        hidden: &CpuStorage,
        hidden_layout: &Layout,
        weight: &CpuStorage,
        weight_layout: &Layout,
        bias: &CpuStorage,
        bias_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        self.0.cpu_fwd(&Operands {
            hidden: (hidden, hidden_layout),
            weight: (weight, weight_layout),
            bias: Some((bias, bias_layout)),
        })
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        hidden: &candle_core::CudaStorage,
        hidden_layout: &Layout,
        weight: &candle_core::CudaStorage,
        weight_layout: &Layout,
        bias: &candle_core::CudaStorage,
        bias_layout: &Layout,
    ) -> Result<(candle_core::CudaStorage, Shape)> {
        self.0.cuda_fwd(&Operands {
            hidden: (hidden, hidden_layout),
            weight: (weight, weight_layout),
            bias: Some((bias, bias_layout)),
        })
    }

    fn bwd(
        &self,
        hidden: &Tensor,
        weight: &Tensor,
        bias: &Tensor,
        _loss: &Tensor,
        grad_loss: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let [hidden, weight, bias] = self.0.bwd(hidden, weight, Some(bias), grad_loss)?;
        Ok((hidden, weight, bias))
    }
}
