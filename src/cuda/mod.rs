//! The loss on CUDA: which kernels run, in which order, over which memory. The twin of `cpu`.
//!
//! Nothing here waits for the device or copies to or from the host, so a step can be captured in a CUDA graph;
//! `check_inputs` is the exception, and so are targets that are not contiguous, which candle copies. On a device of
//! `Device::new_cuda_with_stream` cudarc waits for the event of each memory's last use, which fails in a capture if that was
//! before it: `disable_event_tracking` ahead of the first tensor.
//! Outputs are allocated without being cleared: the kernels write every element.

mod arguments;
mod linear;
mod logits;
mod memory;
mod module;
mod rows;

/// Its `Backend` is in [`logits`], its `LinearBackend` in [`linear`].
pub(crate) struct Cuda;
