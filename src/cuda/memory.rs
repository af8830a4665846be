//! Memory on the device: tensors that are read, and what kernels will write.

use candle_core::{
    CudaDevice, CudaStorage, DType, Layout, Result, Storage, StorageRef, Tensor,
    backend::BackendStorage,
    bail,
    cuda_backend::{CudaDType, CudaStorageSlice},
    op::BackpropOp,
};
use cudarc::driver::{CudaSlice, DeviceRepr};

use super::module::Launch;
use crate::{
    kernels::abi::{Element, RowOffsets},
    rows::row_offsets,
};

/// A tensor's memory, locked for reading.
pub(super) struct OnDevice<'a>(StorageRef<'a>, &'a Layout);

impl<'a> OnDevice<'a> {
    pub fn of(tensor: &'a Tensor) -> Self {
        let (storage, layout) = tensor.storage_and_layout();
        Self(storage, layout)
    }

    pub fn storage(&self) -> Result<&CudaStorage> {
        match &*self.0 {
            Storage::Cuda(storage) => Ok(storage),
            _ => bail!("a tensor is not on the logits' CUDA device"),
        }
    }

    /// Where rows of (…, width) start.
    pub fn rows(&self) -> Result<RowOffsets> {
        match row_offsets(self.1) {
            Some(rows) => Ok(rows),
            None => bail!("strides {:?} that no kernel takes", self.1.stride()),
        }
    }

    /// Address of the first element.
    pub fn read<'b, T: CudaDType + 'b>(&'b self, launch: &mut Launch<'b>) -> Result<u64> {
        let address = launch.read(self.storage()?.as_cuda_slice::<T>()?);
        Ok(address + (self.1.start_offset() * size_of::<T>()) as u64)
    }

    /// The same of a tensor of any type of logits.
    pub fn read_floats<'b>(
        &'b self,
        launch: &mut Launch<'b>,
        argument: &str,
    ) -> Result<(Element, u64)> {
        let (element, address) = read_floats(launch, argument, self.storage()?)?;
        let start = (self.1.start_offset() * element.size()) as u64;
        Ok((element, address + start))
    }
}

/// Type and start of a storage.
pub(super) fn read_floats<'a>(
    launch: &mut Launch<'a>,
    argument: &str,
    storage: &'a CudaStorage,
) -> Result<(Element, u64)> {
    Ok(match &storage.slice {
        CudaStorageSlice::F32(slice) => (Element::F32, launch.read(slice)),
        CudaStorageSlice::F16(slice) => (Element::F16, launch.read(slice)),
        CudaStorageSlice::BF16(slice) => (Element::BF16, launch.read(slice)),
        _ => bail!(
            "{argument}: {:?}, must be f32, f16 or bf16",
            storage.dtype()
        ),
    })
}

pub(super) fn write_floats<'a>(
    launch: &mut Launch<'a>,
    storage: &'a mut CudaStorage,
) -> Result<(Element, u64)> {
    let dtype = storage.dtype();
    Ok(match &mut storage.slice {
        CudaStorageSlice::F32(slice) => (Element::F32, launch.write(slice)),
        CudaStorageSlice::F16(slice) => (Element::F16, launch.write(slice)),
        CudaStorageSlice::BF16(slice) => (Element::BF16, launch.write(slice)),
        _ => bail!("logits: {dtype:?}, must be f32, f16 or bf16"),
    })
}

/// [`alloc`] of a type of logits.
pub(super) fn alloc_floats(device: &CudaDevice, dtype: DType, count: usize) -> Result<CudaStorage> {
    let slice = match dtype {
        DType::F32 => CudaStorageSlice::F32(alloc(device, count)?),
        DType::F16 => CudaStorageSlice::F16(alloc(device, count)?),
        DType::BF16 => CudaStorageSlice::BF16(alloc(device, count)?),
        other => bail!("logits: {other:?}, must be f32, f16 or bf16"),
    };
    Ok(CudaStorage {
        slice,
        device: device.clone(),
    })
}

/// Memory that a kernel will write in full; one element where none is needed, since CUDA allocates no less.
pub(super) fn alloc<T: DeviceRepr>(device: &CudaDevice, count: usize) -> Result<CudaSlice<T>> {
    // SAFETY: nothing reads it before the kernel that writes all of it, which comes first on the stream.
    unsafe { device.alloc(count.max(1)) }
}

pub(super) fn tensor<T: CudaDType>(
    slice: CudaSlice<T>,
    device: &CudaDevice,
    shape: &[usize],
) -> Tensor {
    let storage = CudaStorage::wrap_cuda_slice(slice, device.clone());
    Tensor::from_storage(Storage::Cuda(storage), shape, BackpropOp::none(), false)
}
