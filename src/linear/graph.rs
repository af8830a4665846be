//! The loss from hidden states as custom operations of candle.
//!
//! The forward goes over the tiles of the logits (`tiles`): a product, then the tile is merged into its rows' running
//! results. The backward goes over them again: the product, unless the tile was kept, its gradient in place, and from it
//! the gradients of both factors.

use std::sync::Arc;

#[cfg(feature = "cuda")]
use candle_core::CudaStorage;
use candle_core::{
    CpuStorage, CustomOp2, CustomOp3, Device, Layout, Result, Shape, StorageRef, Tensor, bail,
    op::BackpropOp,
};

#[cfg(feature = "cuda")]
use crate::cuda::Cuda;
use crate::{
    backend::{LinearBackend, Operands, Past, Wanted},
    blas::View,
    call::Call,
    cpu::Cpu,
    options::CrossEntropy,
    results::RowStats,
    tiles::{Plan, Tile, Tiles},
};

/// Evaluates an expression with `$B` as the backend of a device.
macro_rules! with_backend {
    ($device:expr, $B:ident => $body:expr) => {
        match $device {
            Device::Cpu => {
                type $B = Cpu;
                $body
            }
            #[cfg(feature = "cuda")]
            Device::Cuda(_) => {
                type $B = Cuda;
                $body
            }
            other => bail!(
                "hidden: on {:?}, for which there is no backend",
                other.location()
            ),
        }
    };
}

/// The loss of all rows of `hidden` (N, D).
pub(super) fn apply(
    options: &CrossEntropy,
    call: Call,
    hidden: &Tensor,
    weight: &Tensor,
    bias: Option<&Tensor>,
    stats: bool,
) -> Result<(Tensor, Option<RowStats>)> {
    let tracked =
        hidden.track_op() || weight.track_op() || bias.is_some_and(|bias| bias.track_op());
    let plan = with_backend!(hidden.device(), B => plan::<B>(options, &call, hidden, tracked));
    let op = LinearOp(Arc::new(LinearState {
        call,
        plan,
        stats,
        past: Past::default(),
    }));
    let state = op.0.clone();
    let (hidden, weight) = (with_unit_stride(hidden)?, with_unit_stride(weight)?);
    let loss = match bias {
        Some(bias) => hidden.apply_op3(&weight, &bias.contiguous()?, op)?,
        None => hidden.apply_op2(&weight, op)?,
    };
    Ok((loss, state.past.stats()))
}

/// Tiles, and how many of them to keep where there will be a backward.
fn plan<B: LinearBackend>(
    options: &CrossEntropy,
    call: &Call,
    hidden: &Tensor,
    tracked: bool,
) -> Plan {
    let logit_size = B::tile_dtype(hidden.dtype()).size_in_bytes();
    let tiles = Tiles::new(
        (call.rows, call.columns.len()),
        logit_size,
        options.tile_bytes.unwrap_or(B::TILE_BYTES),
        options.tile_bytes.is_some(),
    );
    let bytes = |tile: &Tile| tile.rows.len() * tile.pitch(B::TILE_PITCH) * logit_size;
    let keep = match tracked {
        true => tiles.kept(options.memory_budget, bytes),
        false => 0,
    };
    Plan { tiles, keep }
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
    past: Past,
}

impl LinearState {
    fn run<B: LinearBackend>(
        &self,
        operands: &Operands<B::Storage>,
    ) -> Result<(B::Storage, Shape)> {
        let forward = B::forward_linear(&self.call, &self.plan, operands, self.stats)?;
        Ok((self.past.keep(forward), self.call.loss_shape().into()))
    }

    /// Gradients of hidden, weight and bias: of those that are in the graph.
    fn bwd(
        &self,
        hidden: &Tensor,
        weight: &Tensor,
        bias: Option<&Tensor>,
        grad_loss: &Tensor,
    ) -> Result<[Option<Tensor>; 3]> {
        with_backend!(hidden.device(), B => self.run_bwd::<B>(hidden, weight, bias, grad_loss))
    }

    fn run_bwd<B: LinearBackend>(
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
        let saved = self.past.saved::<B::LinearSaved>()?;
        let upstream = grad_loss.detach().contiguous()?.flatten_all()?;
        let shapes = [
            hidden.shape(),
            weight.shape(),
            bias.map_or(weight.shape(), |bias| bias.shape()),
        ];
        let hidden = hidden.storage_and_layout();
        let weight = weight.storage_and_layout();
        let bias = bias.map(|bias| bias.storage_and_layout());
        let operands = Operands {
            hidden: operand::<B>(&hidden)?,
            weight: operand::<B>(&weight)?,
            bias: bias.as_ref().map(operand::<B>).transpose()?,
        };
        let (call, plan) = (&self.call, &self.plan);
        let gradients = B::backward_linear(call, plan, saved, &upstream, &operands, wanted)?;
        let mut shapes = shapes.into_iter();
        Ok(gradients.map(|gradient| {
            let shape = shapes.next().expect("three of each");
            gradient.map(|storage| {
                Tensor::from_storage(B::into_storage(storage), shape, BackpropOp::none(), false)
            })
        }))
    }
}

fn operand<'a, B: LinearBackend>(
    (storage, layout): &'a (StorageRef<'a>, &'a Layout),
) -> Result<(&'a B::Storage, &'a Layout)> {
    match B::storage(storage) {
        Some(storage) => Ok((storage, layout)),
        None => bail!("cross-entropy: forward and backward on different devices"),
    }
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
        self.0.run::<Cpu>(&Operands {
            hidden: (hidden, hidden_layout),
            weight: (weight, weight_layout),
            bias: None,
        })
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        hidden: &CudaStorage,
        hidden_layout: &Layout,
        weight: &CudaStorage,
        weight_layout: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        self.0.run::<Cuda>(&Operands {
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
        self.0.run::<Cpu>(&Operands {
            hidden: (hidden, hidden_layout),
            weight: (weight, weight_layout),
            bias: Some((bias, bias_layout)),
        })
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        hidden: &CudaStorage,
        hidden_layout: &Layout,
        weight: &CudaStorage,
        weight_layout: &Layout,
        bias: &CudaStorage,
        bias_layout: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        self.0.run::<Cuda>(&Operands {
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
