//! Ranks that are processes under MPI.

use std::{
    mem::ManuallyDrop,
    sync::{Mutex, MutexGuard},
    thread::{self, ThreadId},
};

use candle_core::{DType, Device, Result, Tensor, WithDType, bail};
use half::{bf16, f16};
use mpi::{
    Threading,
    collective::SystemOperation,
    datatype::Equivalence,
    environment::threading_support,
    topology::SimpleCommunicator,
    traits::{Communicator as _, CommunicatorCollectives},
};

use super::{
    Communicator,
    message::{Operation, accumulated_in, check_headers, header, on_cpu, with_values},
};

/// A rank of an MPI communicator, for tensors on the CPU.
///
/// Which thread may call it is MPI's to say: the one that initialised it, unless that was done by
/// `mpi::initialize_with_threading(Threading::Serialized)` or `Multiple`. A call from another thread is an error. The
/// communicator should be this rank's alone (`duplicate` makes one): operations of others on it would be taken for its own.
/// The `mpi::environment::Universe` must outlive it. A rank that ends early, by a panic too, waits in MPI's own end for the others,
/// which wait for it: `abort` of the communicator ends them.
///
/// Each operation is preceded by an all-gather of 88 bytes, by which ranks see that they do and give alike. That sums have the same
/// bits on all ranks is what MPI recommends to its libraries, and Open MPI does.
///
/// ```no_run
/// # use std::sync::Arc;
/// # use candle_cross_entropy::{CrossEntropy, parallel::Mpi};
/// # use mpi::traits::Communicator as _;
/// let (universe, _) = mpi::initialize_with_threading(mpi::Threading::Serialized).unwrap();
/// let ranks = Arc::new(Mpi::new(universe.world().duplicate()));
/// let loss = CrossEntropy::new().data_parallel(ranks);
/// ```
pub struct Mpi {
    communicator: ManuallyDrop<SimpleCommunicator>,
    rank: usize,
    size: usize,
    created_by: ThreadId,
}

/// Of all calls of the process: MPI may have been promised that there is one at a time.
static CALLS: Mutex<()> = Mutex::new(());

// SAFETY: the communicator is a handle of the MPI library's. It is used behind the lock of all calls, and from other threads only
// where the library was told that there are several.
unsafe impl Send for Mpi {}
unsafe impl Sync for Mpi {}

/// Elements a message: MPI counts them in an `int`.
const MESSAGE: usize = 1 << 28;

impl Mpi {
    /// Around a communicator whose ranks all do the same.
    pub fn new(communicator: SimpleCommunicator) -> Self {
        Self {
            rank: communicator.rank() as usize,
            size: communicator.size() as usize,
            communicator: ManuallyDrop::new(communicator),
            created_by: thread::current().id(),
        }
    }

    fn lock(&self) -> Result<(MutexGuard<'static, ()>, &SimpleCommunicator)> {
        let support = threading_support();
        if !self.may_call(support) {
            bail!(
                "MPI: called from another thread with {support:?}, must be initialised with Threading::Serialized for that"
            );
        }
        let calls = CALLS.lock().unwrap_or_else(|e| e.into_inner());
        Ok((calls, &self.communicator))
    }

    fn may_call(&self, support: Threading) -> bool {
        let several = matches!(support, Threading::Serialized | Threading::Multiple);
        several || thread::current().id() == self.created_by
    }

    /// The values of each rank, one behind the other.
    fn gather<T: Equivalence + Copy + Default>(
        &self,
        communicator: &SimpleCommunicator,
        local: &[T],
    ) -> Vec<T> {
        let mut all = vec![T::default(); self.size * local.len()];
        if local.is_empty() {
            return all; // two empty buffers are one address, which MPI refuses
        }
        let message = (MESSAGE / self.size).max(1);
        if local.len() <= message {
            communicator.all_gather_into(local, &mut all[..]);
            return all;
        }
        let mut part = Vec::new();
        for (m, local) in local.chunks(message).enumerate() {
            part.resize(self.size * local.len(), T::default());
            communicator.all_gather_into(local, &mut part[..]);
            place(&part, &mut all, self.size, m * message);
        }
        all
    }

    fn sum<T: Equivalence + Copy + Default>(
        &self,
        communicator: &SimpleCommunicator,
        local: &[T],
    ) -> Vec<T> {
        let mut sums = vec![T::default(); local.len()];
        for (local, sums) in local.chunks(MESSAGE).zip(sums.chunks_mut(MESSAGE)) {
            communicator.all_reduce_into(local, sums, SystemOperation::sum());
        }
        sums
    }

    /// The tensor, contiguous, if all ranks do and give alike: an error on every rank if not, which MPI itself would not survive.
    fn checked(
        &self,
        communicator: &SimpleCommunicator,
        operation: Operation,
        local: &Tensor,
    ) -> Result<Tensor> {
        let local = on_cpu(local);
        let all = self.gather(communicator, &header(operation, local.as_ref().ok()));
        let local = local?;
        check_headers(all.as_chunks().0)?;
        Ok(local)
    }
}

/// Puts each rank's part of its values, from number `start` on, among `all`.
fn place<T: Copy>(part: &[T], all: &mut [T], ranks: usize, start: usize) {
    let (count, length) = (part.len() / ranks, all.len() / ranks);
    for (part, all) in part.chunks(count).zip(all.chunks_mut(length)) {
        all[start..][..count].copy_from_slice(part);
    }
}

impl Drop for Mpi {
    fn drop(&mut self) {
        // On a thread that may not call MPI the handle is left to its end.
        if self.may_call(threading_support()) {
            let _calls = CALLS.lock().unwrap_or_else(|e| e.into_inner());
            // SAFETY: once, and nothing uses it any more.
            unsafe { ManuallyDrop::drop(&mut self.communicator) }
        }
    }
}

impl Communicator for Mpi {
    fn rank(&self) -> usize {
        self.rank
    }

    fn size(&self) -> usize {
        self.size
    }

    fn all_gather(&self, local: &Tensor) -> Result<Tensor> {
        let (_calls, communicator) = self.lock()?;
        let local = self.checked(communicator, Operation::AllGather, local)?;
        let shape = [&[self.size], local.dims()].concat();
        fn tensor<T: WithDType>(values: Vec<T>, shape: Vec<usize>) -> Result<Tensor> {
            Tensor::from_vec(values, shape, &Device::Cpu)
        }
        // Two bytes each, which MPI has no type for.
        fn halves<T: WithDType + bytemuck::Pod>(
            bits: impl FnOnce(&[u16]) -> Vec<u16>,
            values: &[T],
            shape: Vec<usize>,
        ) -> Result<Tensor> {
            let all = bits(bytemuck::cast_slice(values));
            tensor(bytemuck::cast_slice::<_, T>(&all).to_vec(), shape)
        }
        match local.dtype() {
            DType::F16 => with_values!(local, values: F16 =>
                halves::<f16>(|bits| self.gather(communicator, bits), values, shape)),
            DType::BF16 => with_values!(local, values: BF16 =>
                halves::<bf16>(|bits| self.gather(communicator, bits), values, shape)),
            _ => with_values!(local, values: F32 | F64 | U8 | U32 | I64 =>
                tensor(self.gather(communicator, values), shape)),
        }
    }

    fn all_reduce_sum(&self, local: &Tensor) -> Result<Tensor> {
        let (_calls, communicator) = self.lock()?;
        let local = self.checked(communicator, Operation::AllReduceSum, local)?;
        let exact = local.to_dtype(accumulated_in(local.dtype()))?;
        let sum = with_values!(exact, values: F32 | F64 | U8 | U32 | I64 => {
            Tensor::from_vec(self.sum(communicator, values), exact.shape(), &Device::Cpu)?
        });
        sum.to_dtype(local.dtype())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn long_messages_are_put_together() {
        // Three ranks of five values, sent two at a time.
        let all: Vec<u32> = (0..15).collect();
        let mut together = vec![0; 15];
        for start in [0, 2, 4] {
            let end = (start + 2).min(5);
            let part = (0..3).flat_map(|rank| rank * 5 + start..rank * 5 + end);
            let part: Vec<u32> = part.map(|i| i as u32).collect();
            place(&part, &mut together, 3, start);
        }
        assert_eq!(together, all);
    }
}
