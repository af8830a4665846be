//! The logits' and the gradients' memory, row by row.

use candle_core::{Layout, Result, bail};

use crate::{call::Call, kernels::abi::RowOffsets, rows::row_offsets};

/// Where rows start in the storage.
#[derive(Clone, Copy)]
pub(super) struct Starts {
    first: usize,
    offsets: RowOffsets,
}

impl Starts {
    pub(super) fn of(&self, row: usize) -> usize {
        self.first + self.offsets.offset(row)
    }
}

pub(super) fn readable(layout: &Layout) -> Result<Starts> {
    match row_offsets(layout) {
        Some(offsets) => Ok(Starts {
            first: layout.start_offset(),
            offsets,
        }),
        None => bail!(
            "logits: strides {:?} cannot be read row by row",
            layout.stride()
        ),
    }
}

/// Rows of gradients, to be written from several threads.
pub(super) struct GradRows<'a, T> {
    base: *mut T,
    starts: Starts,
    width: usize,
    storage: std::marker::PhantomData<&'a mut [T]>,
}

// SAFETY: threads only get at disjoint stretches, by the contract of `stretch`.
unsafe impl<T: Send> Sync for GradRows<'_, T> {}

impl<'a, T> GradRows<'a, T> {
    pub(super) fn contiguous(rows: usize, width: usize, grad: &'a mut [T]) -> Self {
        assert_eq!(grad.len(), rows * width);
        Self {
            base: grad.as_mut_ptr(),
            starts: Starts {
                first: 0,
                offsets: RowOffsets::contiguous(width),
            },
            width,
            storage: std::marker::PhantomData,
        }
    }

    pub(super) fn inside(call: &Call, storage: &'a mut [T], layout: &Layout) -> Result<Self> {
        let starts = readable(layout)?;
        if !starts.offsets.disjoint(call.width) {
            bail!(
                "logits: strides {:?} overlap and cannot be overwritten",
                layout.stride()
            );
        }
        // Offsets grow with every digit of the row's number, so the last row ends last.
        assert!(call.rows == 0 || starts.of(call.rows - 1) + call.width <= storage.len());
        Ok(Self {
            base: storage.as_mut_ptr(),
            starts,
            width: call.width,
            storage: std::marker::PhantomData,
        })
    }

    pub(super) fn width(&self) -> usize {
        self.width
    }

    /// Elements `columns` of a row.
    ///
    /// # Safety
    /// `row` is below the call's number of rows, and no other reference to these elements is in use.
    #[allow(clippy::mut_from_ref)] // what the contract is about
    pub(super) unsafe fn stretch(&self, row: usize, columns: std::ops::Range<usize>) -> &mut [T] {
        assert!(columns.start <= columns.end && columns.end <= self.width);
        // SAFETY: inside the storage (checked when `self` was made), disjoint from other rows, unaliased by contract.
        unsafe {
            std::slice::from_raw_parts_mut(
                self.base.add(self.starts.of(row) + columns.start),
                columns.len(),
            )
        }
    }
}

/// Where logits are read.
#[derive(Clone, Copy)]
pub(super) enum Logits<'a, T> {
    Separate(&'a [T], Starts),
    /// From the gradients' memory, before they are written.
    InPlace,
}

impl<'a, T> Logits<'a, T> {
    /// Elements `columns` of a row.
    ///
    /// # Safety
    /// As for [`GradRows::stretch`] when in place.
    pub(super) unsafe fn stretch(
        &self,
        out: &'a GradRows<T>,
        row: usize,
        columns: std::ops::Range<usize>,
    ) -> &'a [T] {
        match self {
            Self::Separate(x, starts) => &x[starts.of(row)..][columns],
            // SAFETY: the caller's.
            Self::InPlace => unsafe { out.stretch(row, columns) },
        }
    }
}
