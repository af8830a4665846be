//! The compiled kernels: loaded once per CUDA context, launched on candle's stream.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex},
};

use candle_core::{
    Error, Result,
    cuda_backend::{
        WrapErr,
        cudarc::{
            driver::{
                CudaContext, CudaFunction, CudaSlice, CudaStream, DevicePtr, DevicePtrMut,
                DeviceRepr, LaunchConfig, PushKernelArg, SyncOnDrop,
            },
            nvrtc::Ptx,
        },
    },
};

use crate::kernel_abi::{Kernel, Params, REDUCE_THREADS, RowState, threads_per_row};

/// Machine code for the architectures in `ARCHS`, and PTX for newer ones.
static FATBIN: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/cross_entropy.fatbin"));
const ARCHS: &str = env!("CROSS_ENTROPY_ARCHS");

// SAFETY: `repr(C)` structs of integers and floats with twins in kernels/params.cuh.
unsafe impl DeviceRepr for Params {}
unsafe impl DeviceRepr for RowState {}

type Functions = Arc<HashMap<Kernel, CudaFunction>>;

/// All kernels in the context. Loading a module may synchronise the context, so the first step must not be captured
/// in a graph; every later one finds them here.
fn functions(context: &Arc<CudaContext>) -> Result<Functions> {
    // Never emptied: a module keeps its context alive, so an entry cannot be mistaken for a later context's.
    static LOADED: Mutex<Vec<(Arc<CudaContext>, Functions)>> = Mutex::new(Vec::new());
    let mut loaded = LOADED
        .lock()
        .unwrap_or_else(|poisoned| poisoned.into_inner());
    if let Some((_, functions)) = loaded.iter().find(|(of, _)| of == context) {
        return Ok(functions.clone());
    }
    let module = context.load_module(Ptx::from_binary(FATBIN.to_vec())).map_err(|error| {
        let (major, minor) = context.compute_capability().unwrap_or_default();
        Error::Msg(format!(
            "cross-entropy kernels: {error} when loading them for {}, sm_{major}{minor}; they were compiled for {ARCHS}, \
             and CANDLE_CROSS_ENTROPY_CUDA_ARCHS={major}{minor} at build time compiles them for this GPU",
            context.name().unwrap_or_else(|_| "a GPU".into()),
        ))
        .bt()
    })?;
    let function = |kernel: Kernel| Ok((kernel, module.load_function(&kernel.symbol()).w()?));
    let functions = Arc::new(
        Kernel::all()
            .into_iter()
            .map(function)
            .collect::<Result<HashMap<_, _>>>()?,
    );
    loaded.push((context.clone(), functions.clone()));
    Ok(functions)
}

/// A launch being prepared: its argument, and what orders the memory behind it with other streams.
///
/// The argument holds bare addresses. Each comes from a borrow that lives as long as the launch does.
pub(super) struct Launch<'a> {
    pub params: Params,
    stream: &'a Arc<CudaStream>,
    // Dropped after the launch: each then records that its memory is in use until the kernel ends.
    uses: Vec<SyncOnDrop<'a>>,
}

impl<'a> Launch<'a> {
    pub fn new(stream: &'a Arc<CudaStream>, params: Params) -> Self {
        Self {
            params,
            stream,
            uses: Vec::new(),
        }
    }

    /// Address of memory the kernel reads.
    pub fn read<T>(&mut self, slice: &'a CudaSlice<T>) -> u64 {
        let (address, used) = slice.device_ptr(self.stream);
        self.uses.push(used);
        address
    }

    /// Address of memory the kernel writes, and may read.
    pub fn write<T>(&mut self, slice: &'a mut CudaSlice<T>) -> u64 {
        let (address, used) = slice.device_ptr_mut(self.stream);
        self.uses.push(used);
        address
    }

    /// Starts the kernel, one block a row or a single block for the reduction.
    ///
    /// # Safety
    ///
    /// Every address in the parameters that `kernel` uses has the extent that [`Params`] states, for its rows, width
    /// and offsets, and comes from [`read`](Self::read) or [`write`](Self::write) of this launch.
    pub unsafe fn start(self, kernel: Kernel) -> Result<()> {
        let Self {
            params,
            stream,
            uses,
        } = self;
        #[cfg(feature = "nvtx")]
        let _range = nvtx::LocalRange::new(nvtx::Str::from_str_lossy(&label(kernel, &params)));
        let functions = functions(stream.context())?;
        let (blocks, threads) = match kernel {
            Kernel::Forward { element, .. }
            | Kernel::Backward { element, .. }
            | Kernel::Fused { element, .. } => (
                params.rows as u32,
                threads_per_row(params.width as usize, element.size()),
            ),
            Kernel::Reduce => (1, REDUCE_THREADS),
        };
        let config = LaunchConfig {
            grid_dim: (blocks, 1, 1),
            block_dim: (threads, 1, 1),
            shared_mem_bytes: 0,
        };
        // SAFETY: every kernel takes one `Params` by value; the caller vouches for the addresses in it.
        unsafe {
            stream
                .launch_builder(&functions[&kernel])
                .arg(&params)
                .launch(config)
        }
        .w()?;
        drop(uses);
        Ok(())
    }
}

/// What a timeline shows, such as "cross-entropy forward bf16 8192×50257".
#[cfg(feature = "nvtx")]
fn label(kernel: Kernel, params: &Params) -> String {
    let (name, element) = match kernel {
        Kernel::Forward { element, .. } => ("forward", element),
        Kernel::Backward { element, .. } => ("backward", element),
        Kernel::Fused { element, .. } => ("forward+backward", element),
        Kernel::Reduce => return format!("cross-entropy reduction of {} rows", params.rows),
    };
    format!(
        "cross-entropy {name} {} {}×{}",
        element.name(),
        params.rows,
        params.width
    )
}
