//! The output projection in slices (`--vocab-parallel`): each process computes the whole of every batch up to the hidden states, and
//! the logits of its classes alone. All have the whole projection, which evaluation and checkpoints need.
//!
//! A process's gradient of the projection lacks what other processes' classes give, and is complete in its own: also where the
//! projection is the embedding, whose lookup is computed alike by all. So classes are put together, where parts of a batch are summed.

use std::{ops::Range, sync::Arc};

#[cfg(feature = "cuda")]
use candle_core::CudaStorage;
use candle_core::{
    CpuStorage, CustomOp1, Layout, Result, Shape, Tensor,
    backend::{BackendDevice, BackendStorage},
    backprop::GradStore,
};
use candle_cross_entropy::{CrossEntropy, parallel::Communicator};

use crate::model::decoder::Decoder;

/// The classes of one process.
pub struct Slice {
    comm: Arc<dyn Communicator>,
    classes: Range<usize>,
    vocabulary: usize,
}

impl Slice {
    /// One of as many, as even as may be, as there are processes, of which none may be without a class.
    pub fn new(comm: Arc<dyn Communicator>, vocabulary: usize) -> Self {
        let start = |rank: usize| vocabulary * rank / comm.size();
        Self {
            classes: start(comm.rank())..start(comm.rank() + 1),
            vocabulary,
            comm,
        }
    }

    /// The loss, as one of these classes' logits.
    pub fn shard(&self, loss: CrossEntropy) -> CrossEntropy {
        loss.vocab_shard(self.comm.clone(), self.classes.start, self.vocabulary)
    }

    /// Of the output projection (V, D) these classes' rows.
    pub fn rows(&self, projection: &Tensor) -> Result<Tensor> {
        projection.narrow(0, self.classes.start, self.classes.len())
    }

    /// Hidden states (N, D) and the projection (V, D) to these classes' logits (N, classes).
    pub fn logits(&self, hidden: &Tensor, projection: &Tensor) -> Result<Tensor> {
        let hidden = hidden.apply_op1(SumGradient(self.comm.clone()))?;
        hidden.matmul(&self.rows(projection)?.t()?)
    }

    /// Leaves of a step's gradients what this process is to give to their sum over all: its classes of the projection's, and if it is
    /// the first everything else, of which the others have the same, but where processors differ other last bits.
    pub fn keep_own(&self, gradients: &mut GradStore, model: &Decoder) -> Result<()> {
        for var in model.vars() {
            let Some(gradient) = gradients.remove(var) else {
                continue;
            };
            match model.trained_projection() {
                Some((projection, dim)) if projection.id() == var.id() => {
                    let Range { start, end } = self.classes;
                    let own = gradient.narrow(dim, start, end - start)?;
                    let own = own.pad_with_zeros(dim, start, self.vocabulary - end)?;
                    gradients.insert(var, own);
                }
                _ if self.comm.rank() == 0 => {
                    gradients.insert(var, gradient);
                }
                _ => {}
            }
        }
        Ok(())
    }
}

fn copy<S>(hidden: &S, layout: &Layout) -> Result<(S, Shape)>
where
    S: BackendStorage<Device: BackendDevice<Storage = S>>,
{
    let mut copy = hidden.device().zeros_impl(layout.shape(), hidden.dtype())?;
    hidden.copy_strided_src(&mut copy, 0, layout)?;
    Ok((copy, layout.shape().clone()))
}

/// Leaves hidden states as they are; their gradient is the sum of what each process's logits give.
struct SumGradient(Arc<dyn Communicator>);

impl CustomOp1 for SumGradient {
    fn name(&self) -> &'static str {
        "sum-gradient"
    }

    fn cpu_fwd(&self, hidden: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        copy(hidden, layout)
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(&self, hidden: &CudaStorage, layout: &Layout) -> Result<(CudaStorage, Shape)> {
        copy(hidden, layout)
    }

    fn bwd(&self, _x: &Tensor, _y: &Tensor, gradient: &Tensor) -> Result<Option<Tensor>> {
        Ok(Some(self.0.all_reduce_sum(&gradient.detach())?))
    }
}
