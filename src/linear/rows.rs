//! The rows that need logits, and how to get from all rows to these and back.

#[cfg(feature = "cuda")]
use candle_core::CudaStorage;
use candle_core::{
    CpuStorage, CustomOp1, DType, Device, Layout, Result, Shape, Storage, Tensor,
    backend::BackendStorage, bail,
};

use crate::{
    call::{Call, ClassValues},
    options::CrossEntropy,
    targets::Targets,
};

/// The rows that need logits, where not all do.
pub(super) struct ChosenRows {
    select: SelectRows,
    /// Of the original rows: what each chosen row stands for.
    ids: Tensor,
}

impl ChosenRows {
    /// Those that are not ignored and have a weight, or all that are not ignored where statistics are asked for. `None`
    /// where all rows do, or where finding out would wait for the device.
    pub fn of(options: &CrossEntropy, call: &Call, stats: bool) -> Result<Option<Self>> {
        let device = call.device();
        let Some(ids) = rows_that_count(options, call, stats)? else {
            return Ok(None);
        };
        let select = SelectRows::new(&ids, call.rows, device)?;
        let ids = match ids == NOTHING {
            true => Tensor::zeros(1, DType::U32, device)?,
            false => select.ids.clone(),
        };
        Ok(Some(Self { select, ids }))
    }

    /// The call about these rows alone.
    pub fn call(&self, call: &Call) -> Result<Call> {
        call.select(&self.ids)
    }

    /// Their hidden states (n, D) of all (N, D).
    pub fn hidden(&self, hidden: &Tensor) -> Result<Tensor> {
        hidden.contiguous()?.apply_op1(self.select.clone())
    }

    /// Values of all rows (N) from theirs (n); those left out have zeros.
    pub fn spread(&self, values: &Tensor) -> Result<Tensor> {
        values.apply_op1(self.select.transposed())
    }
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
    fn cuda_fwd(&self, rows: &CudaStorage, layout: &Layout) -> Result<(CudaStorage, Shape)> {
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

/// The numbers of [`ChosenRows`].
fn rows_that_count(options: &CrossEntropy, call: &Call, stats: bool) -> Result<Option<Vec<u32>>> {
    let on_cpu = call.device().is_cpu();
    if call.rows == 0 || !(on_cpu || options.compact_rows) {
        return Ok(None);
    }
    let classes = ClassValues::default(); // no row counts more or less for its class's weight
    let rows = if on_cpu || call.check_inputs {
        let rows = call.read_rows(&classes)?.rows;
        rows.into_iter().map(Ok).collect()
    } else {
        call.read_each_row(&classes)?.0 // bad rows stay, to become NaN
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
    if let Targets::Probabilities(values) = &call.targets
        && ids.len() < call.rows
    {
        // candle counts what it selects from in 32 bits there.
        if !on_cpu && u32::try_from(values.elem_count()).is_err() {
            return Ok(None);
        }
        if on_cpu || call.check_inputs {
            // Here, where rows have their own numbers, and are all there.
            let read = call.probability_reader(values)?;
            (0..call.rows).try_for_each(|i| read(i).map(drop))?;
        }
    }
    Ok(match ids.len() {
        0 if !on_cpu => Some(NOTHING.to_vec()),
        n if n < call.rows => Some(ids),
        _ => None,
    })
}
