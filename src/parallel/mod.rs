//! Ranks that work on one loss together, and what passes between them.
//!
//! * [`CrossEntropy::vocab_shard`]: each rank has the logits of some classes, or their rows of the output projection. A loss
//!   takes one all-gather of a partial result a row.
//! * [`CrossEntropy::data_parallel`]: each rank has rows of its own, and a mean is over the rows of all.
//!
//! Ranks are threads of a process ([`threads`]), processes that find each other over TCP ([`Tcp`]) or under MPI (`Mpi`, feature
//! `mpi`), or whatever implements [`Communicator`]: for tensors on the CPU. With `Nccl` (feature `nccl`) each of them has a GPU too.
//!
//! [`CrossEntropy::vocab_shard`]: crate::CrossEntropy::vocab_shard
//! [`CrossEntropy::data_parallel`]: crate::CrossEntropy::data_parallel

mod message;
#[cfg(feature = "mpi")]
mod mpi;
#[cfg(feature = "nccl")]
mod nccl;
mod rendezvous;
mod tcp;
mod threads;

use std::{fmt, sync::Arc};

use candle_core::{Result, Tensor};

#[cfg(feature = "mpi")]
#[cfg_attr(docsrs, doc(cfg(feature = "mpi")))]
pub use self::mpi::Mpi;
#[cfg(feature = "nccl")]
#[cfg_attr(docsrs, doc(cfg(feature = "nccl")))]
pub use self::nccl::Nccl;
pub use self::{tcp::Tcp, threads::threads};

/// One rank's end of a group of ranks. Every rank calls the same operations in the same order, each of which returns once all
/// have called it, or of tensors on a GPU at once, to go on in the order of candle's stream.
///
/// A loss of tensors on a GPU gives some there and some on the CPU: what ranks compare, or that one has failed, is exchanged
/// without waiting for the device.
///
/// An implementation must return an error on every rank, and not wait, where ranks give tensors of different shapes or types: a
/// rank that fails before an operation tells the others so.
pub trait Communicator: Send + Sync {
    /// This rank's number, from 0 on.
    fn rank(&self) -> usize;

    /// How many ranks there are.
    fn size(&self) -> usize;

    /// What each rank gives, (…), stacked in rank order: (size, …), of its type.
    fn all_gather(&self, local: &Tensor) -> Result<Tensor>;

    /// The sum of what the ranks give, of its shape and type, with the same bits on all of them. Of f16 and bf16 it is
    /// accumulated in f32 and rounded once.
    fn all_reduce_sum(&self, local: &Tensor) -> Result<Tensor>;
}

/// A group of ranks, as options keep it.
#[derive(Clone)]
pub(crate) struct Ranks(pub Arc<dyn Communicator>);

impl fmt::Debug for Ranks {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        write!(f, "rank {} of {}", self.0.rank(), self.0.size())
    }
}
