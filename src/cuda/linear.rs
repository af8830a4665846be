//! `forward_linear` on CUDA: tile by tile, a product by cuBLAS, and a kernel over what it left. The number of launches a
//! tile is constant, and nothing waits for the device. The twin of `cpu::linear`.

use std::{ffi::c_void, ops::Range, sync::Arc};

use candle_core::{
    CudaDevice, CudaStorage, DType, Device, Error, Layout, Result, Storage, Tensor,
    backend::{BackendDevice, BackendStorage},
    bail,
    cuda_backend::{CudaStorageSlice, WrapErr, gemm_reduced_precision_f32},
    op::BackpropOp,
};
use cudarc::{
    cublas::{result::gemm_ex, sys},
    driver::{CudaStream, DevicePtr, DevicePtrMut},
};

use super::{
    Cuda,
    arguments::{Inputs, check_upstream, scalars},
    memory::{OnDevice, alloc_floats, read_floats, write_floats},
    module::{Launch, Work},
    rows::{self, Evaluation, Named},
};
use crate::{
    backend::{Forward, KeptTiles, LinearBackend, Operands, Wanted},
    blas::{Gemm, View},
    call::Call,
    kernels::abi::{Params, RowOffsets},
    options::Reduction,
    parallel::Ranks,
    tiles::{Plan, Tile},
};

/// What the forward leaves for the backward.
pub(crate) struct Saved {
    of_rows: rows::Saved,
    kept: KeptTiles<CudaStorage>,
}

/// A view of two dimensions, one of whose strides is 1.
#[derive(Clone, Copy)]
struct Matrix<'a> {
    storage: &'a CudaStorage,
    start: usize,
    view: View,
}

impl<'a> Matrix<'a> {
    fn of((storage, layout): (&'a CudaStorage, &Layout)) -> Result<Self> {
        let (rows, columns) = layout.shape().dims2()?;
        Ok(Self {
            storage,
            start: layout.start_offset(),
            view: View {
                shape: [rows, columns],
                stride: [layout.stride()[0], layout.stride()[1]],
            },
        })
    }

    /// Rows of a matrix, `pitch` elements from one to the next.
    fn pitched(storage: &'a CudaStorage, start: usize, shape: [usize; 2], pitch: usize) -> Self {
        let view = View {
            shape,
            stride: [pitch, 1],
        };
        Self {
            storage,
            start,
            view,
        }
    }

    fn rows(self, rows: &Range<usize>) -> Self {
        let View { shape, stride } = self.view;
        assert!(rows.end <= shape[0]);
        let view = View {
            shape: [rows.len(), shape[1]],
            stride,
        };
        Self {
            start: self.start + rows.start * stride[0],
            view,
            ..self
        }
    }

    fn transposed(self) -> Self {
        Self {
            view: self.view.transposed(),
            ..self
        }
    }

    /// First element behind the last one.
    fn end(&self) -> usize {
        self.start + self.view.extent()
    }
}

fn data_type(dtype: DType) -> Result<sys::cudaDataType> {
    match dtype {
        DType::F32 => Ok(sys::cudaDataType::CUDA_R_32F),
        DType::F16 => Ok(sys::cudaDataType::CUDA_R_16F),
        DType::BF16 => Ok(sys::cudaDataType::CUDA_R_16BF),
        other => bail!("{other:?}, must be f32, f16 or bf16"),
    }
}

fn operation(transpose: bool) -> sys::cublasOperation_t {
    if transpose {
        sys::cublasOperation_t::CUBLAS_OP_T
    } else {
        sys::cublasOperation_t::CUBLAS_OP_N
    }
}

/// Evaluates an expression with `$slice` as the memory of a storage.
macro_rules! with_slice {
    ($storage:expr, $slice:ident => $body:expr) => {
        match $storage {
            CudaStorageSlice::F32($slice) => $body,
            CudaStorageSlice::F16($slice) => $body,
            CudaStorageSlice::BF16($slice) => $body,
            _ => bail!("a factor of the logits is not f32, f16 or bf16"),
        }
    };
}

/// A matrix that a product writes: rows of `columns` elements, contiguous, or `pitch` elements apart.
struct Output<'a> {
    storage: &'a mut CudaStorage,
    start: usize,
    pitch: usize,
}

impl<'a> Output<'a> {
    fn tile(storage: &'a mut CudaStorage, tile: &Tile) -> Self {
        Self {
            storage,
            start: 0,
            pitch: pitch(tile),
        }
    }
}

/// The factors of the logits, and cuBLAS.
struct Products<'a> {
    device: CudaDevice,
    stream: Arc<CudaStream>,
    hidden: Matrix<'a>,
    weight: Matrix<'a>,
    /// (1, V)
    bias: Option<Matrix<'a>>,
    /// As many ones as a tile has rows, where there is a bias: products with them spread it over the rows, and add up
    /// its gradient.
    ones: Option<Tensor>,
}

impl<'a> Products<'a> {
    fn new(call: &Call, operands: &Operands<'a, CudaStorage>) -> Result<Self> {
        let device = operands.hidden.0.device().clone();
        let bias = |(storage, layout): (&'a CudaStorage, &Layout)| {
            let (start, columns) = (layout.start_offset(), call.width);
            Matrix::pitched(storage, start, [1, columns], columns)
        };
        let ones = |_| {
            let dtype = operands.hidden.0.dtype();
            Tensor::ones(call.rows.max(1), dtype, &Device::Cuda(device.clone()))
        };
        Ok(Self {
            hidden: Matrix::of(operands.hidden)?,
            weight: Matrix::of(operands.weight)?,
            bias: operands.bias.map(bias),
            ones: operands.bias.map(ones).transpose()?,
            stream: device.cuda_stream(),
            device,
        })
    }

    fn dtype(&self) -> DType {
        self.hidden.storage.dtype()
    }

    /// `out` = a·b, or `out` + a·b, accumulated in f32 and rounded once.
    fn multiply(&self, out: Output, add: bool, a: Matrix, b: Matrix) -> Result<()> {
        let gemm = Gemm::new(a.view, b.view, out.pitch).map_err(Error::Msg)?;
        let (out_type, out_size) = (out.storage.dtype(), out.storage.dtype().size_in_bytes());
        let out_end = out.start + (a.view.shape[0] - 1) * out.pitch + b.view.shape[1];
        for (storage, end) in [
            (&*out.storage, out_end),
            (a.storage, a.end()),
            (b.storage, b.end()),
        ] {
            assert!(with_slice!(&storage.slice, slice => end <= slice.len()));
        }
        let in_type = data_type(a.storage.dtype())?;
        // As candle's own products.
        let compute = if self.dtype() == DType::F32 && gemm_reduced_precision_f32() {
            sys::cublasComputeType_t::CUBLAS_COMPUTE_32F_FAST_TF32
        } else {
            sys::cublasComputeType_t::CUBLAS_COMPUTE_32F
        };
        let (alpha, beta) = (1f32, if add { 1f32 } else { 0.0 });
        let stream = &self.stream;
        let pointer = |matrix: &Matrix<'_>, address: u64| {
            (address + (matrix.start * matrix.storage.dtype().size_in_bytes()) as u64)
                as *const c_void
        };
        let (a_address, _a_use) = with_slice!(&a.storage.slice, slice => slice.device_ptr(stream));
        let (b_address, _b_use) = with_slice!(&b.storage.slice, slice => slice.device_ptr(stream));
        let (out_address, _out_use) =
            with_slice!(&mut out.storage.slice, slice => slice.device_ptr_mut(stream));
        let blas = self.device.cublas_handle();
        let out_type = data_type(out_type)?;
        // SAFETY: the matrices lie in their memory, as checked above; the handle's stream is the device's.
        unsafe {
            // Parts of a sum that several blocks share out must not be rounded to the result's type. candle leaves the
            // mode at its default.
            set_math_mode(
                *blas.handle(),
                sys::cublasMath_t::CUBLAS_MATH_DISALLOW_REDUCED_PRECISION_REDUCTION,
            )?;
            let result = gemm_ex(
                *blas.handle(),
                operation(gemm.transpose[0]),
                operation(gemm.transpose[1]),
                gemm.m,
                gemm.n,
                gemm.k,
                (&raw const alpha).cast(),
                pointer(&b, b_address),
                in_type,
                gemm.lead[0],
                pointer(&a, a_address),
                in_type,
                gemm.lead[1],
                (&raw const beta).cast(),
                (out_address + (out.start * out_size) as u64) as *mut c_void,
                out_type,
                gemm.out_lead,
                compute,
                sys::cublasGemmAlgo_t::CUBLAS_GEMM_DEFAULT_TENSOR_OP,
            );
            set_math_mode(*blas.handle(), sys::cublasMath_t::CUBLAS_DEFAULT_MATH)?;
            result.w()
        }
    }

    /// Logits of a tile, rows [`pitch`] elements apart.
    fn logits(&self, tile: &Tile, out: &mut CudaStorage) -> Result<()> {
        #[cfg(feature = "nvtx")]
        let _range = range("logits", tile);
        if let (Some(bias), Some(ones)) = (self.bias, &self.ones) {
            let ones = OnDevice::of(ones);
            let ones = Matrix::pitched(ones.storage()?, 0, [tile.rows.len(), 1], 1);
            let (start, columns) = (bias.start + tile.classes.start, tile.classes.len());
            let bias = Matrix::pitched(bias.storage, start, [1, columns], columns);
            self.multiply(Output::tile(&mut *out, tile), false, ones, bias)?;
        }
        let weight = self.weight.rows(&tile.classes).transposed();
        let hidden = self.hidden.rows(&tile.rows);
        self.multiply(Output::tile(out, tile), self.bias.is_some(), hidden, weight)
    }
}

/// # Safety
/// `handle` is one of cuBLAS's that is in use.
unsafe fn set_math_mode(handle: sys::cublasHandle_t, mode: sys::cublasMath_t) -> Result<()> {
    // SAFETY: the caller's.
    unsafe { sys::cublasSetMathMode(handle, mode) }.result().w()
}

/// Elements from a row of a tile to the next.
fn pitch(tile: &Tile) -> usize {
    tile.pitch(Cuda::TILE_PITCH)
}

#[cfg(feature = "nvtx")]
fn range(what: &str, tile: &Tile) -> nvtx::LocalRange {
    let Tile { rows, classes } = tile;
    let text = format!("cross-entropy {what}, rows {rows:?}, classes {classes:?}");
    nvtx::LocalRange::new(nvtx::Str::from_str_lossy(&text))
}

/// Gradient of a factor: either complete in one product for each range of its rows, or the sum of products, which stays
/// f32 until all are added.
struct FactorGradient<'a> {
    storage: CudaStorage,
    dtype: DType,
    shape: [usize; 2],
    is_sum: bool,
    /// Who has the other parts of it, which are added too.
    ranks: Option<&'a Ranks>,
    any: bool,
}

impl<'a> FactorGradient<'a> {
    /// Of a factor of which products reach the first `covered` rows.
    fn new(
        products: &Products,
        [rows, depth]: [usize; 2],
        covered: usize,
        is_sum: bool,
        ranks: Option<&'a Ranks>,
    ) -> Result<Self> {
        let (device, dtype) = (&products.device, products.dtype());
        let stored = match is_sum || ranks.is_some() {
            true => DType::F32,
            false => dtype,
        };
        let storage = if covered < rows {
            device.zeros_impl(&(rows, depth).into(), stored)?
        } else {
            alloc_floats(device, stored, rows * depth)?
        };
        Ok(Self {
            storage,
            dtype,
            shape: [rows, depth],
            is_sum,
            ranks,
            any: false,
        })
    }

    /// Adds a·b to `rows`, which are the same each time for a sum and others each time if not.
    fn multiply(
        &mut self,
        products: &Products,
        rows: &Range<usize>,
        a: Matrix,
        b: Matrix,
    ) -> Result<()> {
        let [_, depth] = self.shape;
        let add = self.is_sum && self.any;
        self.any = true;
        let out = Output {
            storage: &mut self.storage,
            start: rows.start * depth,
            pitch: depth,
        };
        products.multiply(out, add, a, b)
    }

    fn into_storage(self) -> Result<CudaStorage> {
        let [rows, depth] = self.shape;
        if rows == 0 {
            return alloc_floats(self.storage.device(), self.dtype, 0);
        }
        if let Some(ranks) = self.ranks {
            let part = Storage::Cuda(self.storage);
            let part = Tensor::from_storage(part, (rows, depth), BackpropOp::none(), false);
            let sum = ranks.0.all_reduce_sum(&part)?;
            let (storage, layout) = sum.storage_and_layout();
            return match &*storage {
                Storage::Cuda(sum) => sum.to_dtype(layout, self.dtype),
                _ => bail!("vocab_shard: a sum that is not on the device"),
            };
        }
        if self.storage.dtype() == self.dtype {
            return Ok(self.storage);
        }
        self.storage
            .to_dtype(&Layout::contiguous((rows, depth)), self.dtype)
    }
}

/// Parameters of a launch over a tile, without addresses.
fn tile_scalars(call: &Call, tile: &Tile) -> Result<Params> {
    let rows = RowOffsets::contiguous(pitch(tile));
    Ok(Params {
        logits_rows: rows,
        grad_rows: rows,
        rows: tile.rows.len() as u64,
        width: tile.classes.len() as u32,
        first_row: tile.rows.start as u32,
        first_column: (call.columns.start + tile.classes.start) as u32,
        ..scalars(call, &Layout::contiguous((call.rows, call.width)))?
    })
}

/// Memory for a tile, zeros where rows are apart: cuBLAS reads what is between them, though no result depends on it.
fn alloc_tile(products: &Products, tile: &Tile) -> Result<CudaStorage> {
    let count = tile.rows.len() * pitch(tile);
    if pitch(tile) == tile.classes.len() {
        alloc_floats(&products.device, products.dtype(), count)
    } else {
        (products.device).zeros_impl(&count.into(), products.dtype())
    }
}

/// The rows' losses, or of a rank's classes its part of them, and the logits of the tiles that the plan keeps.
fn launch_forward<'a>(
    call: &'a Call,
    plan: &Plan,
    operands: &Operands<'a, CudaStorage>,
    stats: bool,
    kept: &mut Vec<CudaStorage>,
) -> Result<Evaluation<'a>> {
    let device = operands.hidden.0.device();
    let stream = device.cuda_stream();
    let parts = plan
        .tiles
        .iter()
        .any(|tile| tile.classes.len() < call.vocab);
    let mut evaluation = Evaluation::new(call, device, (true, stats, parts))?;
    if call.rows == 0 {
        return Ok(evaluation);
    }
    let products = Products::new(call, operands)?;
    let mut free = None;
    for (t, tile) in plan.tiles.iter().enumerate() {
        let mut logits = match free.take() {
            Some(logits) => logits, // the first tile is the largest
            None => alloc_tile(&products, &tile)?,
        };
        products.logits(&tile, &mut logits)?;
        let mut launch = Launch::new(&stream, tile_scalars(call, &tile)?);
        let (element, address) = read_floats(&mut launch, "logits", &logits)?;
        launch.params.logits = address;
        evaluation.set(&mut launch, false)?;
        // SAFETY: the tile has its rows `pitch` apart, and all other memory has an element for each of `call.rows`.
        unsafe { launch.start(Work::ForwardOfTile { stats }, element, call) }?;
        if t < plan.keep {
            kept.push(logits);
        } else {
            free = Some(logits);
        }
    }
    Ok(evaluation)
}

impl LinearBackend for Cuda {
    type LinearSaved = Saved;

    /// Wider tiles mean fewer passes over the f32 sums, which cost more than what a tile that fits in the L2 saves
    /// (docs/performance.md); with the sums of a batch of 8192 states of 4096, this is 240 MiB.
    const TILE_BYTES: usize = 112 << 20;
    /// 16 bytes of two-byte elements, for the products' sake.
    const TILE_PITCH: usize = 8;

    fn tile_dtype(factors: DType) -> DType {
        factors
    }

    fn storage(storage: &Storage) -> Option<&CudaStorage> {
        match storage {
            Storage::Cuda(storage) => Some(storage),
            _ => None,
        }
    }

    fn into_storage(storage: CudaStorage) -> Storage {
        Storage::Cuda(storage)
    }

    fn forward_linear(
        call: &Call,
        plan: &Plan,
        operands: &Operands<CudaStorage>,
        stats: bool,
    ) -> Result<Forward<CudaStorage, Saved>> {
        let mut kept = Vec::new();
        let launched = launch_forward(call, plan, operands, stats, &mut kept);
        let (loss, stats, of_rows) = Evaluation::join(launched, call, stats)?.finish()?;
        let kept = KeptTiles::new(kept);
        Ok(Forward {
            loss,
            stats,
            saved: Saved { of_rows, kept },
        })
    }

    fn backward_linear(
        call: &Call,
        plan: &Plan,
        saved: &Saved,
        upstream: &Tensor,
        operands: &Operands<CudaStorage>,
        wanted: Wanted,
    ) -> Result<[Option<CudaStorage>; 3]> {
        let device = operands.hidden.0.device();
        let stream = device.cuda_stream();
        check_upstream(call, upstream)?;
        let inputs = Inputs::of(call)?;
        let (upstream, memory) = (OnDevice::of(upstream), saved.of_rows.memory());
        let mut named = Named::alloc(call, device)?;
        let products = Products::new(call, operands)?;
        let by_rows = plan.tiles.by_rows;
        let covered = if call.rows == 0 {
            0
        } else {
            call.columns.len()
        };
        let gradient = |wanted: bool, shape, covered, is_sum, ranks| {
            wanted
                .then(|| FactorGradient::new(&products, shape, covered, is_sum, ranks))
                .transpose()
        };
        let (depth, ranks) = (
            products.weight.view.shape[1],
            call.groups.vocab_shard.as_ref(),
        );
        let hidden_shape = [call.rows, depth];
        let mut hidden_gradient =
            gradient(wanted.hidden, hidden_shape, call.rows, !by_rows, ranks)?;
        let mut weight_gradient =
            gradient(wanted.weight, [call.width, depth], covered, by_rows, None)?;
        let mut bias_gradient = gradient(wanted.bias, [call.width, 1], covered, by_rows, None)?;

        let mut kept = saved.kept.take();
        let mut free = None;
        for tile in plan.tiles.iter() {
            let mut logits = match kept.next() {
                Some(logits) => logits,
                None => {
                    let mut logits = match free.take() {
                        Some(logits) => logits,
                        None => alloc_tile(&products, &tile)?,
                    };
                    products.logits(&tile, &mut logits)?;
                    logits
                }
            };
            let mut launch = Launch::new(&stream, tile_scalars(call, &tile)?);
            let (element, address) = write_floats(&mut launch, &mut logits)?;
            (launch.params.logits, launch.params.grad) = (address, address);
            inputs.set(&mut launch)?;
            named.set(&mut launch);
            saved.of_rows.set(&memory, &mut launch)?;
            launch.params.upstream = upstream.read::<f32>(&mut launch)?;
            launch.params.upstream_per_row = (call.reduction == Reduction::None).into();
            // SAFETY: the tile has its rows `pitch` apart, `upstream` has the number of values checked above, and all other
            // memory has an element for each of `call.rows`.
            unsafe { launch.start(Work::Backward, element, call) }?;

            #[cfg(feature = "nvtx")]
            let _range = range("gradients", &tile);
            let shape = [tile.rows.len(), tile.classes.len()];
            let gradients = Matrix::pitched(&logits, 0, shape, pitch(&tile));
            if let Some(weight) = &mut weight_gradient {
                let hidden = products.hidden.rows(&tile.rows);
                weight.multiply(&products, &tile.classes, gradients.transposed(), hidden)?;
            }
            if let Some(hidden) = &mut hidden_gradient {
                let weight = products.weight.rows(&tile.classes);
                hidden.multiply(&products, &tile.rows, gradients, weight)?;
            }
            if let (Some(bias), Some(ones)) = (&mut bias_gradient, &products.ones) {
                let ones = OnDevice::of(ones);
                let ones = Matrix::pitched(ones.storage()?, 0, [tile.rows.len(), 1], 1);
                bias.multiply(&products, &tile.classes, gradients.transposed(), ones)?;
            }
            free = Some(logits);
        }
        let finish = |gradient: Option<FactorGradient>| {
            gradient.map(FactorGradient::into_storage).transpose()
        };
        Ok([
            finish(hidden_gradient)?,
            finish(weight_gradient)?,
            finish(bias_gradient)?,
        ])
    }
}
