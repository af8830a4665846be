//! Probabilities as targets: rows of a tensor of any float type, read piece by piece.

use std::ops::Range;

use candle_core::{
    CpuStorage, Layout, Result, Storage, StorageRef, Tensor, backend::BackendStorage, bail,
};
use half::{bf16, f16};

use super::{
    element::Element,
    memory::{Starts, readable},
    real::Real,
    row::PIECE,
};
use crate::call::bad_probability;

/// Rows of probabilities, of any float type.
pub(super) struct Probabilities<'a> {
    values: Floats<'a>,
    starts: Starts,
}

enum Floats<'a> {
    F32(&'a [f32]),
    F64(&'a [f64]),
    F16(&'a [f16]),
    BF16(&'a [bf16]),
}

impl<'a> Probabilities<'a> {
    pub fn new((storage, layout): (&'a CpuStorage, &Layout)) -> Result<Self> {
        let values = match storage {
            CpuStorage::F32(values) => Floats::F32(values),
            CpuStorage::F64(values) => Floats::F64(values),
            CpuStorage::F16(values) => Floats::F16(values),
            CpuStorage::BF16(values) => Floats::BF16(values),
            other => bail!("targets: {:?}, must be a float type", other.dtype()),
        };
        Ok(Self {
            values,
            starts: readable(layout)?,
        })
    }

    /// The address of a column of a row, or beyond it, and the bytes of an element.
    pub fn at(&self, row: usize, column: usize) -> (*const u8, usize) {
        let (first, size) = match self.values {
            Floats::F32(values) => (values.as_ptr().cast(), 4),
            Floats::F64(values) => (values.as_ptr().cast(), 8),
            Floats::F16(values) => (values.as_ptr().cast(), 2),
            Floats::BF16(values) => (values.as_ptr().cast(), 2),
        };
        let at: *const u8 = first;
        (at.wrapping_add((self.starts.of(row) + column) * size), size)
    }

    /// `columns` of a row, in the buffer if they are not of type `R`.
    pub fn stretch<'b, R: Real>(
        &'b self,
        row: usize,
        columns: Range<usize>,
        buffer: &'b mut [R; PIECE],
    ) -> &'b [R] {
        let start = self.starts.of(row) + columns.start;
        let here = start..start + columns.len();
        let buffer = &mut buffer[..columns.len()];
        match self.values {
            Floats::F32(values) => {
                let values = &values[here];
                match R::same_f32(values) {
                    Some(values) => return values,
                    None => convert(values, buffer),
                }
            }
            Floats::F64(values) => {
                let values = &values[here];
                match R::same_f64(values) {
                    Some(values) => return values,
                    None => {
                        for (to, &from) in buffer.iter_mut().zip(values) {
                            *to = R::of(from);
                        }
                    }
                }
            }
            Floats::F16(values) => widen(&values[here], buffer),
            Floats::BF16(values) => widen(&values[here], buffer),
        }
        buffer
    }

    /// The error for the first bad one of a row's classes, which are those of the columns.
    pub fn error_in(&self, row: usize, classes: &Range<usize>) -> candle_core::Error {
        let mut value = [0.0f64; PIECE];
        for column in 0..classes.len() {
            let value = self.stretch(row, column..column + 1, &mut value)[0];
            // As f32, which it may be beyond.
            if !((value as f32).is_finite() && value >= 0.0) {
                return bad_probability(row, classes.start + column, value);
            }
        }
        candle_core::Error::Msg(format!(
            "targets: row {row} has probabilities whose sum is not finite, or a bad one for a class of another rank"
        ))
        .bt()
    }
}

fn convert<R: Real>(from: &[f32], to: &mut [R]) {
    for (to, &from) in to.iter_mut().zip(from) {
        *to = R::of(f64::from(from));
    }
}

fn widen<T: Element<Real = f32>, R: Real>(from: &[T], to: &mut [R]) {
    let mut singles = [0.0f32; 64];
    for (from, to) in from.chunks(64).zip(to.chunks_mut(64)) {
        let singles = &mut singles[..from.len()];
        T::widen_in_order(from, singles);
        match R::same_f32(singles) {
            Some(values) => to.copy_from_slice(values),
            None => convert(singles, to),
        }
    }
}

/// The tensor of probabilities, locked for reading while the rows are at work.
pub(super) struct Locked<'a>(Option<(StorageRef<'a>, &'a Layout)>);

impl<'a> Locked<'a> {
    pub fn of(probabilities: Option<&'a Tensor>) -> Self {
        Self(probabilities.map(|values| values.storage_and_layout()))
    }

    pub fn rows(&self) -> Result<Option<Probabilities<'_>>> {
        let Some((storage, layout)) = &self.0 else {
            return Ok(None);
        };
        match &**storage {
            Storage::Cpu(storage) => Ok(Some(Probabilities::new((storage, layout))?)),
            _ => bail!("targets: on another device than the logits"),
        }
    }
}
