//! The compiled kernels: loaded once per CUDA context, launched on candle's stream.

use std::{
    collections::HashMap,
    sync::{Arc, LazyLock, Mutex},
};

use candle_core::{Error, Result, cuda_backend::WrapErr};
use cudarc::{
    driver::{
        CudaContext, CudaFunction, CudaSlice, CudaStream, DevicePtr, DevicePtrMut, DeviceRepr,
        DriverError, LaunchConfig, SyncOnDrop,
        sys::{
            self, CUdevice_attribute as DeviceAttribute,
            CUfunction_attribute_enum as FunctionAttribute,
        },
    },
    nvrtc::Ptx,
};

use crate::{
    call::Call,
    kernels::{
        abi::{Element, Kernel, MERGE_THREADS, NamedGradient, Params, REDUCE_THREADS},
        select::{self, Forced, Geometry, Gpu},
    },
};

/// Machine code for the architectures in `ARCHS`, and PTX for newer ones.
static FATBIN: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/cross_entropy.fatbin"));
const ARCHS: &str = env!("CROSS_ENTROPY_ARCHS");

// SAFETY: a `repr(C)` struct of an integer and a float with a twin in kernels/params.cuh.
unsafe impl DeviceRepr for NamedGradient {}

struct Loaded {
    functions: HashMap<Kernel, CudaFunction>,
    gpu: Gpu,
    /// Whether a kernel may start while the one before it in the stream runs, for whose end its code waits.
    overlap: bool,
}

/// All kernels in the stream's context. Loading a module may synchronise the context, so the first step must not be
/// captured in a graph; every later one finds them here.
fn loaded(stream: &CudaStream) -> Result<Arc<Loaded>> {
    // Never emptied: a module keeps its context alive, so an entry cannot be mistaken for a later context's.
    static LOADED: Mutex<Vec<(Arc<CudaContext>, Arc<Loaded>)>> = Mutex::new(Vec::new());
    let context = stream.context();
    let mut all = LOADED
        .lock()
        .unwrap_or_else(|poisoned| poisoned.into_inner());
    if let Some((_, loaded)) = all.iter().find(|(of, _)| of == context) {
        return Ok(loaded.clone());
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
    let functions = Kernel::all()
        .into_iter()
        .map(function)
        .collect::<Result<HashMap<_, _>>>()?;
    let gpu = describe(stream, &functions).w()?;
    // A driver that refuses to tell has kernels one after the other.
    let overlap = may_overlap(context, &functions).unwrap_or(false);
    let loaded = Arc::new(Loaded {
        functions,
        gpu,
        overlap,
    });
    all.push((context.clone(), loaded.clone()));
    Ok(loaded)
}

/// What the choice of kernels depends on; lets kernels have the shared memory that the choice may give them.
fn describe(
    stream: &CudaStream,
    functions: &HashMap<Kernel, CudaFunction>,
) -> std::result::Result<Gpu, DriverError> {
    let attribute = |which| {
        let value = stream.context().attribute(which)?;
        Ok::<usize, DriverError>(value.max(0) as usize)
    };
    let mut gpu = Gpu {
        multiprocessors: attribute(DeviceAttribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?,
        l2: attribute(DeviceAttribute::CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE)?,
        shared_per_multiprocessor: attribute(
            DeviceAttribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR,
        )?,
        shared_per_block: attribute(
            DeviceAttribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN,
        )?,
        shared_reserved: attribute(
            DeviceAttribute::CU_DEVICE_ATTRIBUTE_RESERVED_SHARED_MEMORY_PER_BLOCK,
        )?,
        max_cluster: 0,
        max_cluster_alone: 0,
        uneven_clusters: 0,
    };
    for (kernel, function) in functions {
        if let Kernel::Fused { .. } | Kernel::DistributionFused { .. } = kernel {
            allow_shared_memory(function, &gpu)?;
        }
    }
    // A GPU or driver that refuses any of it has the general kernels.
    if let Ok((several, alone)) = largest_clusters(stream, functions, &gpu) {
        (gpu.max_cluster, gpu.max_cluster_alone) = (several, alone);
        gpu.uneven_clusters = uneven_clusters(stream, functions, &gpu).unwrap_or(0);
    }
    Ok(gpu)
}

fn may_overlap(
    context: &CudaContext,
    functions: &HashMap<Kernel, CudaFunction>,
) -> std::result::Result<bool, DriverError> {
    let mut driver = 0;
    // SAFETY: writes the number.
    unsafe { sys::cuDriverGetVersion(&raw mut driver) }.result()?;
    // Graphs have edges between kernels that overlap since CUDA 12.3.
    let known = driver >= 12030 && context.compute_capability()?.0 >= 9;
    Ok(known && is_for_sm_90(functions)?)
}

/// Code made from PTX of an older architecture traps where it needs a cluster, and does not wait for earlier kernels.
fn is_for_sm_90(
    functions: &HashMap<Kernel, CudaFunction>,
) -> std::result::Result<bool, DriverError> {
    for function in functions.values() {
        if function.get_attribute(FunctionAttribute::CU_FUNC_ATTRIBUTE_PTX_VERSION)? < 90 {
            return Ok(false);
        }
    }
    Ok(true)
}

fn allow_shared_memory(function: &CudaFunction, gpu: &Gpu) -> std::result::Result<(), DriverError> {
    // The driver refuses more than what the function's own leaves.
    let own = function.get_attribute(FunctionAttribute::CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES)?;
    function.set_attribute(
        FunctionAttribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES,
        gpu.shared_per_block as i32 - own,
    )
}

/// Blocks a cluster of the on-chip kernels may have, with several blocks a multiprocessor and with one: the least over
/// the kernels, as the choice is one for all. 0 where they cannot run.
fn largest_clusters(
    stream: &CudaStream,
    functions: &HashMap<Kernel, CudaFunction>,
    gpu: &Gpu,
) -> std::result::Result<(usize, usize), DriverError> {
    let clusters = DeviceAttribute::CU_DEVICE_ATTRIBUTE_CLUSTER_LAUNCH;
    if stream.context().attribute(clusters)? == 0 || !is_for_sm_90(functions)? {
        return Ok((0, 0));
    }
    let mut least = (16, 16);
    for (_, function) in functions.iter().filter(|(kernel, _)| kernel.is_on_chip()) {
        allow_shared_memory(function, gpu)?;
        for (attribute, value) in [
            (
                FunctionAttribute::CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT,
                100,
            ),
            (
                FunctionAttribute::CU_FUNC_ATTRIBUTE_NON_PORTABLE_CLUSTER_SIZE_ALLOWED,
                1,
            ),
        ] {
            function.set_attribute(attribute, value)?;
        }
        let largest = |shared: usize| {
            let config = LaunchConfig {
                grid_dim: (16, 1, 1),
                block_dim: (select::ON_CHIP_THREADS, 1, 1),
                shared_mem_bytes: shared as u32,
            };
            let blocks = function.occupancy_max_potential_cluster_size(config, stream)?;
            Ok::<usize, DriverError>(blocks as usize)
        };
        let several = gpu.dynamic_shared_for(select::BLOCKS_A_MULTIPROCESSOR);
        let (several, alone) = (largest(several)?, largest(gpu.most_dynamic_shared())?);
        least = (least.0.min(several), least.1.min(alone));
    }
    Ok(least)
}

/// [`Gpu::uneven_clusters`]: those that leave at most a tenth of the places empty that the next power of two fills, of
/// blocks of which several fit, whatever the kernel.
fn uneven_clusters(
    stream: &CudaStream,
    functions: &HashMap<Kernel, CudaFunction>,
    gpu: &Gpu,
) -> std::result::Result<u16, DriverError> {
    let shared = gpu.dynamic_shared_for(select::BLOCKS_A_MULTIPROCESSOR);
    let mut sizes = 0;
    for size in select::UNEVEN.into_iter().filter(|&n| n <= gpu.max_cluster) {
        let power = size.next_power_of_two().min(gpu.max_cluster);
        let mut busy = true;
        for (_, function) in functions.iter().filter(|(kernel, _)| kernel.is_on_chip()) {
            let blocks = active_blocks(stream, function, size, shared)?;
            busy &= blocks * 10 >= active_blocks(stream, function, power, shared)? * 9;
        }
        sizes |= u16::from(busy) << size;
    }
    Ok(sizes)
}

/// Blocks at once in clusters of so many.
fn active_blocks(
    stream: &CudaStream,
    function: &CudaFunction,
    cluster: usize,
    shared: usize,
) -> std::result::Result<usize, DriverError> {
    stream.context().bind_to_thread()?;
    let mut attributes = [cluster_of(cluster as u32)];
    let config = LaunchConfig {
        grid_dim: (cluster as u32, 1, 1),
        block_dim: (select::ON_CHIP_THREADS, 1, 1),
        shared_mem_bytes: shared as u32,
    };
    let config = with_attributes(stream, config, &mut attributes);
    let mut clusters = 0;
    // SAFETY: reads the function's attributes and the configuration, and writes the number.
    unsafe {
        sys::cuOccupancyMaxActiveClusters(
            &raw mut clusters,
            function.cu_function(),
            &raw const config,
        )
    }
    .result()?;
    Ok(clusters.max(0) as usize * cluster)
}

fn attribute(id: sys::CUlaunchAttributeID) -> sys::CUlaunchAttribute {
    // SAFETY: an attribute of integers only, for which zeros are valid.
    let mut attribute: sys::CUlaunchAttribute = unsafe { std::mem::zeroed() };
    attribute.id = id;
    attribute
}

fn cluster_of(blocks: u32) -> sys::CUlaunchAttribute {
    let mut cluster = attribute(sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION);
    cluster.value.clusterDim = sys::CUlaunchAttributeValue_union__bindgen_ty_1 {
        x: blocks,
        y: 1,
        z: 1,
    };
    cluster
}

/// Programmatic dependent launch.
fn overlapping() -> sys::CUlaunchAttribute {
    let mut overlap =
        attribute(sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION);
    overlap.value.programmaticStreamSerializationAllowed = 1;
    overlap
}

/// The launch that the driver is asked for; it points to the attributes.
fn with_attributes(
    stream: &CudaStream,
    config: LaunchConfig,
    attributes: &mut [sys::CUlaunchAttribute],
) -> sys::CUlaunchConfig {
    sys::CUlaunchConfig {
        gridDimX: config.grid_dim.0,
        gridDimY: config.grid_dim.1,
        gridDimZ: config.grid_dim.2,
        blockDimX: config.block_dim.0,
        blockDimY: config.block_dim.1,
        blockDimZ: config.block_dim.2,
        sharedMemBytes: config.shared_mem_bytes,
        hStream: stream.cu_stream(),
        attrs: attributes.as_mut_ptr(),
        numAttrs: attributes.len() as u32,
    }
}

/// What the user chose in the environment, read once.
fn forced() -> Result<Option<Forced>> {
    static FORCED: LazyLock<std::result::Result<Option<Forced>, String>> =
        LazyLock::new(|| match std::env::var(select::OVERRIDE) {
            Ok(value) => Forced::parse(&value).map(Some),
            Err(_) => Ok(None),
        });
    FORCED.clone().map_err(|error| Error::Msg(error).bt())
}

/// What a launch computes, over rows of the parameters' width.
#[derive(Clone, Copy)]
pub(super) enum Work {
    Forward {
        stats: bool,
    },
    /// Of the rows' classes in a tile.
    ForwardOfTile {
        stats: bool,
    },
    Backward,
    LossAndGradient {
        stats: bool,
    },
}

fn choose(
    work: Work,
    element: Element,
    call: &Call,
    params: &Params,
    gpu: &Gpu,
) -> Result<(Kernel, Geometry)> {
    let softcap = call.softcap.is_some();
    let (vocab, width) = (params.vocab as usize, params.width as usize);
    if call.has_distributions() {
        return Ok(match work {
            Work::Forward { .. } | Work::ForwardOfTile { .. } => {
                select::distribution_forward(element, softcap, width)
            }
            Work::Backward => select::distribution_backward(element, softcap, width),
            Work::LossAndGradient { .. } => {
                select::distribution_loss_and_gradient(element, softcap, width, gpu)
            }
        });
    }
    let shape = (vocab, width);
    match work {
        Work::Forward { stats } => {
            select::forward((element, stats, softcap), shape, gpu, forced()?)
        }
        Work::ForwardOfTile { stats } => {
            Ok(select::forward_of_tile((element, stats, softcap), width))
        }
        Work::Backward => Ok(select::backward(element, softcap, width)),
        Work::LossAndGradient { stats } => {
            select::loss_and_gradient((element, stats, softcap), shape, gpu, forced()?)
        }
    }
    .map_err(|error| Error::Msg(error).bt())
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

    /// Starts the kernel that `work` of the call on rows of this type takes.
    ///
    /// # Safety
    ///
    /// Every address in the parameters that the work uses has the extent that [`Params`] states, for its rows, width
    /// and offsets, and comes from [`read`](Self::read) or [`write`](Self::write) of this launch.
    pub unsafe fn start(mut self, work: Work, element: Element, call: &Call) -> Result<()> {
        let loaded = loaded(self.stream)?;
        let (kernel, geometry) = choose(work, element, call, &self.params, &loaded.gpu)?;
        self.params.blocks_per_row = geometry.blocks_per_row;
        self.params.groups_per_block = geometry.groups_per_block;
        // SAFETY: the caller's.
        unsafe { self.launch_rows(&loaded, kernel, geometry.threads, geometry.dynamic_shared) }
    }

    /// Starts the kernel that merges what ranks have of each row.
    ///
    /// # Safety
    ///
    /// As of [`start`](Self::start).
    pub unsafe fn start_merge(self, stats: bool, call: &Call) -> Result<()> {
        let loaded = loaded(self.stream)?;
        let softcap = call.softcap.is_some();
        let kernel = match call.has_distributions() {
            true => Kernel::DistributionMerge { softcap },
            false => Kernel::Merge { stats, softcap },
        };
        // SAFETY: the caller's.
        unsafe { self.launch_rows(&loaded, kernel, MERGE_THREADS, 0) }
    }

    /// # Safety
    ///
    /// As of [`start`](Self::start).
    unsafe fn launch_rows(
        self,
        loaded: &Loaded,
        kernel: Kernel,
        threads: u32,
        dynamic_shared: u32,
    ) -> Result<()> {
        let blocks = self.params.rows * u64::from(self.params.blocks_per_row.max(1));
        let blocks = i32::try_from(blocks).map_err(|_| {
            Error::Msg(format!(
                "logits: {} rows, too many for a launch",
                self.params.rows
            ))
            .bt()
        })?;
        // SAFETY: the caller's.
        unsafe {
            self.launch(
                loaded,
                kernel,
                LaunchConfig {
                    grid_dim: (blocks as u32, 1, 1),
                    block_dim: (threads, 1, 1),
                    shared_mem_bytes: dynamic_shared,
                },
            )
        }
    }

    /// Starts a kernel of one block: the reduction of row losses, the check of the classes' values.
    ///
    /// # Safety
    ///
    /// As of [`start`](Self::start).
    pub unsafe fn start_alone(self, kernel: Kernel) -> Result<()> {
        let loaded = loaded(self.stream)?;
        // SAFETY: the caller's.
        unsafe {
            self.launch(
                &loaded,
                kernel,
                LaunchConfig {
                    grid_dim: (1, 1, 1),
                    block_dim: (REDUCE_THREADS, 1, 1),
                    shared_mem_bytes: 0,
                },
            )
        }
    }

    /// # Safety
    ///
    /// As of [`start`](Self::start).
    unsafe fn launch(self, loaded: &Loaded, kernel: Kernel, config: LaunchConfig) -> Result<()> {
        let Self {
            mut params,
            stream,
            uses,
        } = self;
        #[cfg(feature = "nvtx")]
        let _range = nvtx::LocalRange::new(nvtx::Str::from_str_lossy(&label(kernel, &params)));
        let mut attributes = Vec::with_capacity(2);
        if loaded.overlap {
            attributes.push(overlapping());
        }
        if params.blocks_per_row > 1 {
            attributes.push(cluster_of(params.blocks_per_row));
        }
        let launch = with_attributes(stream, config, &mut attributes);
        let mut arguments = [(&raw mut params).cast()];
        stream.context().bind_to_thread().w()?;
        // cudarc has no safe function for launches with attributes.
        // SAFETY: every kernel takes one `Params` by value, which is copied before the call returns; the caller vouches
        // for the addresses in it.
        unsafe {
            sys::cuLaunchKernelEx(
                &raw const launch,
                loaded.functions[&kernel].cu_function(),
                arguments.as_mut_ptr(),
                std::ptr::null_mut(),
            )
        }
        .result()
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
        Kernel::Fused { element, .. } => ("forward and backward", element),
        Kernel::OnChipForward { element, .. } => ("forward on chip", element),
        Kernel::OnChipFused { element, .. } => ("forward and backward on chip", element),
        Kernel::DistributionForward { element, .. } => ("forward of distributions", element),
        Kernel::DistributionBackward { element, .. } => ("backward of distributions", element),
        Kernel::DistributionFused { element, .. } => {
            ("forward and backward of distributions", element)
        }
        Kernel::Merge { .. } | Kernel::DistributionMerge { .. } => {
            let (rows, ranks) = (params.rows, params.ranks);
            return format!("cross-entropy merge of {rows} rows of {ranks} ranks");
        }
        Kernel::Classes => return format!("cross-entropy check of {} classes", params.vocab),
        Kernel::Reduce => return format!("cross-entropy reduction of {} rows", params.rows),
    };
    format!(
        "cross-entropy {name} {} {}×{}",
        element.name(),
        params.rows,
        params.width
    )
}
