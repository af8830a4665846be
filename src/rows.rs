//! Where the rows of a view of the logits start.

use candle_core::Layout;

use crate::kernels::abi::{MAX_ROW_DIMS, RowOffsets};

/// Rows of a view (…, width) where they can be read in place: elements adjacent and few enough strides.
pub(crate) fn row_offsets(layout: &Layout) -> Option<RowOffsets> {
    let (&width, dims) = layout.dims().split_last()?;
    let (&step, strides) = layout.stride().split_last()?;
    if width > 1 && step != 1 {
        return None;
    }
    // Innermost first; a dimension that continues the one inside it is merged with it.
    let mut merged: Vec<(usize, usize)> = Vec::new();
    for (&size, &stride) in dims.iter().zip(strides).rev() {
        match merged.last_mut() {
            _ if size == 1 => {}
            Some((inner, inner_stride)) if stride == *inner * *inner_stride => *inner *= size,
            _ => merged.push((size, stride)),
        }
    }
    if merged.len() > MAX_ROW_DIMS {
        return None;
    }
    let mut rows = RowOffsets {
        dims: merged.len().max(1) as u64,
        sizes: [1; MAX_ROW_DIMS],
        strides: [0; MAX_ROW_DIMS],
    };
    for (d, (size, stride)) in merged.into_iter().enumerate() {
        rows.sizes[d] = size as u64;
        rows.strides[d] = stride as u64;
    }
    Some(rows)
}

impl RowOffsets {
    /// Rows of `width` elements, one behind the other.
    pub fn contiguous(width: usize) -> Self {
        let mut strides = [0; MAX_ROW_DIMS];
        strides[0] = width as u64;
        Self {
            dims: 1,
            sizes: [1; MAX_ROW_DIMS],
            strides,
        }
    }

    /// First element of row i, counted from the view's start.
    pub fn offset(&self, mut row: usize) -> usize {
        let mut offset = 0;
        let last = self.dims as usize - 1;
        for d in 0..last {
            offset += row % self.sizes[d] as usize * self.strides[d] as usize;
            row /= self.sizes[d] as usize;
        }
        offset + row * self.strides[last] as usize
    }

    /// Whether rows of `width` elements share none: what writing them needs.
    pub fn disjoint(&self, width: usize) -> bool {
        let mut dims: Vec<_> = (0..self.dims as usize)
            .map(|d| (self.strides[d] as usize, self.sizes[d] as usize))
            .collect();
        dims.retain(|&(_, size)| size > 1);
        dims.sort_unstable();
        let mut extent = width;
        dims.into_iter().all(|(stride, size)| {
            let fits = stride >= extent;
            extent += stride * (size - 1);
            fits
        })
    }
}
