//! Products of matrices stored row by row, in the terms of BLAS, which stores them column by column: outᵀ = bᵀ·aᵀ, where a
//! matrix stored by rows is its own transpose.

/// Sizes and strides of a view of two dimensions.
#[derive(Clone, Copy, Debug)]
pub(crate) struct View {
    pub shape: [usize; 2],
    pub stride: [usize; 2],
}

impl View {
    #[cfg(any(test, feature = "cuda"))]
    pub fn transposed(self) -> Self {
        let ([rows, columns], [by_row, by_column]) = (self.shape, self.stride);
        Self {
            shape: [columns, rows],
            stride: [by_column, by_row],
        }
    }

    /// Elements from the first to the last; there are some.
    #[cfg(any(test, feature = "cuda"))]
    pub fn extent(&self) -> usize {
        let last = |i: usize| (self.shape[i] - 1) * self.stride[i];
        last(0) + last(1) + 1
    }

    /// The transpose as BLAS reads it: whether it must transpose what is in memory, and the leading dimension. The stride
    /// of a dimension of one element does not matter.
    fn transposed_factor(&self) -> Result<(bool, usize), String> {
        let ([rows, columns], [by_row, by_column]) = (self.shape, self.stride);
        let lead = |stride: usize, count: usize, length: usize| {
            if count == 1 {
                stride.max(length)
            } else {
                stride
            }
        };
        let (row_lead, column_lead) = (lead(by_row, rows, columns), lead(by_column, columns, rows));
        if (by_column == 1 || columns == 1) && row_lead >= columns {
            Ok((false, row_lead))
        } else if (by_row == 1 || rows == 1) && column_lead >= rows {
            Ok((true, column_lead))
        } else {
            Err(format!(
                "a matrix {:?} with strides {:?}, one of which must be 1",
                self.shape, self.stride
            ))
        }
    }

    /// Whether BLAS can read it where it is.
    pub fn is_readable(&self) -> bool {
        self.transposed_factor().is_ok()
    }
}

/// Arguments of a gemm. BLAS's first matrix is our second.
#[cfg(any(test, feature = "cuda"))]
#[derive(Clone, Copy, Debug)]
pub(crate) struct Gemm {
    pub m: i32,
    pub n: i32,
    pub k: i32,
    pub transpose: [bool; 2],
    pub lead: [i32; 2],
    pub out_lead: i32,
}

#[cfg(any(test, feature = "cuda"))]
impl Gemm {
    /// For a·b, written to rows `pitch` elements apart.
    pub fn new(a: View, b: View, pitch: usize) -> Result<Self, String> {
        let ([rows, inner], [b_rows, columns]) = (a.shape, b.shape);
        if inner != b_rows || columns > pitch {
            return Err(format!("a product of {a:?} and {b:?} with rows of {pitch}"));
        }
        let int = |size: usize| {
            i32::try_from(size).map_err(|_| format!("a matrix dimension of {size}, beyond 2³¹ − 1"))
        };
        let (first, second) = (b.transposed_factor()?, a.transposed_factor()?);
        Ok(Self {
            m: int(columns)?,
            n: int(rows)?,
            k: int(inner)?,
            transpose: [first.0, second.0],
            lead: [int(first.1)?, int(second.1)?],
            out_lead: int(pitch)?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// BLAS's gemm, from its definition.
    fn gemm(g: &Gemm, first: &[f64], second: &[f64], out: &mut [f64]) {
        let [m, n, k] = [g.m, g.n, g.k].map(|size| size as usize);
        let element = |matrix: &[f64], which: usize, i: usize, j: usize| {
            let lead = g.lead[which] as usize;
            let (row, column) = if g.transpose[which] { (j, i) } else { (i, j) };
            assert!(row < lead);
            matrix[row + column * lead]
        };
        assert!(m <= g.out_lead as usize);
        for i in 0..m {
            for j in 0..n {
                out[i + j * g.out_lead as usize] = (0..k)
                    .map(|l| element(first, 0, i, l) * element(second, 1, l, j))
                    .sum();
            }
        }
    }

    /// A view of its own numbers: by rows or by columns, with some elements between.
    fn matrix(rows: usize, columns: usize, by_rows: bool, gap: usize) -> (View, Vec<f64>) {
        let stride = if by_rows {
            [columns + gap, 1]
        } else {
            [1, rows + gap]
        };
        let view = View {
            shape: [rows, columns],
            stride,
        };
        let values = (0..view.extent()).map(|i| (i * 7 % 31) as f64 - 11.0);
        (view, values.collect())
    }

    #[test]
    fn products_of_every_layout() {
        for [m, n, k] in [
            [1, 1, 1],
            [3, 5, 2],
            [4, 1, 6],
            [1, 4, 3],
            [5, 7, 1],
            [2, 8, 9],
        ] {
            for layout in 0..8 {
                let (a, a_values) = matrix(m, k, layout & 1 == 0, layout);
                let (b, b_values) = matrix(k, n, layout & 2 == 0, 3 * (layout / 4));
                let pitch = n + layout;
                let mut out = vec![f64::NAN; m * pitch];
                let g = Gemm::new(a, b, pitch).expect("unit strides");
                gemm(&g, &b_values, &a_values, &mut out);
                let at = |view: View, values: &[f64], i, j| {
                    values[i * view.stride[0] + j * view.stride[1]]
                };
                for i in 0..m {
                    for j in 0..n {
                        let exact: f64 = (0..k)
                            .map(|l| at(a, &a_values, i, l) * at(b, &b_values, l, j))
                            .sum();
                        assert_eq!(out[i * pitch + j], exact, "{m}×{k}×{n} {layout}: {i}, {j}");
                    }
                    assert!(
                        out[i * pitch + n..(i + 1) * pitch]
                            .iter()
                            .all(|x| x.is_nan())
                    );
                }
            }
        }
    }

    /// As broadcasting leaves them.
    #[test]
    fn strides_of_one_element_do_not_matter() {
        for stride in [[0, 1], [1, 1], [9, 1]] {
            let row = View {
                shape: [1, 5],
                stride,
            };
            let values = [1.0, 2.0, 3.0, 4.0, 5.0];
            let g = Gemm::new(row, row.transposed(), 1).expect("one row");
            let mut out = [0.0];
            gemm(&g, &values, &values, &mut out);
            assert_eq!(out, [55.0]);
            let mut outer = [0.0; 25];
            let g = Gemm::new(row.transposed(), row, 5).expect("one row");
            gemm(&g, &values, &values, &mut outer);
            assert!((0..25).all(|i| outer[i] == values[i / 5] * values[i % 5]));
        }
    }

    #[test]
    fn what_blas_cannot_read() {
        let view = |shape, stride| View { shape, stride };
        let good = view([4, 4], [4, 1]);
        assert!(Gemm::new(good, view([4, 4], [8, 2]), 4).is_err());
        assert!(Gemm::new(view([4, 4], [0, 1]), good, 4).is_err());
        assert!(Gemm::new(good, view([3, 4], [4, 1]), 4).is_err());
        assert!(Gemm::new(good, good, 3).is_err());
        let long = view([4, 4], [1 << 31, 1]);
        assert!(Gemm::new(good, long, 4).is_err_and(|error| error.contains("2³¹")));
    }
}
