//! `forward_linear` on the CPU: tile by tile, a product, and the rows' sums or gradients over what it left.
//!
//! Products are computed in f32 (f64 for f64), whatever the type of their factors, and so are the logits between them.

use std::ops::Range;

use candle_core::{
    CpuStorage, DType, Device, Layout, Result, Storage, Tensor, WithDType, backend::BackendStorage,
    bail, utils::get_num_threads,
};
use gemm::Parallelism;
use rayon::prelude::*;

use super::{
    Cpu,
    element::{Element, Precise},
    finish::{Normaliser, RowResult},
    memory::{GradRows, Logits},
    parallel::{Given, Work, differentiate_tile},
    probabilities::Locked,
    real::Real,
    results::{self, Inputs, forward_result, result_type},
    row,
    running::{self, Running, merge_stretch},
};
use crate::{
    backend::{Forward, KeptTiles, LinearBackend, Operands, Wanted},
    call::Call,
    parallel::Ranks,
    shard,
    tiles::{Plan, Tile},
};

/// What the forward leaves for the backward.
pub(crate) struct Saved {
    of_rows: results::Saved,
    kept: KeptTiles<CpuStorage>,
}

/// A type that products are computed in.
trait Compute: Element<Real = Self> + Real + WithDType {
    /// The same memory, for rows with a softcap.
    type Capped: Element;
}

impl Compute for f32 {
    type Capped = Precise<f32>;
}

impl Compute for f64 {
    type Capped = f64;
}

/// A view of two dimensions.
#[derive(Clone, Copy)]
struct Matrix<'a, T> {
    data: &'a [T],
    shape: [usize; 2],
    stride: [usize; 2],
}

impl<'a, T> Matrix<'a, T> {
    fn contiguous(data: &'a [T], columns: usize) -> Self {
        Self {
            data,
            shape: [data.len() / columns, columns],
            stride: [columns, 1],
        }
    }

    fn of(storage: &'a [T], layout: &Layout) -> Result<Self> {
        let (rows, columns) = layout.shape().dims2()?;
        Ok(Self {
            data: &storage[layout.start_offset()..],
            shape: [rows, columns],
            stride: [layout.stride()[0], layout.stride()[1]],
        })
    }

    fn rows(self, rows: &Range<usize>) -> Self {
        assert!(rows.end <= self.shape[0]);
        Self {
            data: &self.data[rows.start * self.stride[0]..],
            shape: [rows.len(), self.shape[1]],
            ..self
        }
    }

    fn transposed(self) -> Self {
        let ([rows, columns], [by_row, by_column]) = (self.shape, self.stride);
        Self {
            shape: [columns, rows],
            stride: [by_column, by_row],
            ..self
        }
    }

    /// Elements from the first to the last.
    fn extent(&self) -> usize {
        if self.shape.contains(&0) {
            return 0;
        }
        (0..2)
            .map(|i| (self.shape[i] - 1) * self.stride[i])
            .sum::<usize>()
            + 1
    }
}

/// `out` (contiguous) = a·b, or `out` + a·b.
fn multiply<C: Compute>(out: &mut [C], add: bool, a: Matrix<C>, b: Matrix<C>) {
    let ([m, k], [b_rows, n]) = (a.shape, b.shape);
    assert!(k == b_rows && out.len() == m * n);
    assert!(a.extent() <= a.data.len() && b.extent() <= b.data.len());
    let threads = get_num_threads();
    let parallelism = if threads > 1 {
        Parallelism::Rayon(threads)
    } else {
        Parallelism::None
    };
    // SAFETY: the shapes fit each other and lie in their slices, as checked above.
    unsafe {
        gemm::gemm(
            m,
            n,
            k,
            out.as_mut_ptr(),
            1,
            n as isize,
            add,
            a.data.as_ptr(),
            a.stride[1] as isize,
            a.stride[0] as isize,
            b.data.as_ptr(),
            b.stride[1] as isize,
            b.stride[0] as isize,
            C::ONE,
            C::ONE,
            false,
            false,
            false,
            parallelism,
        );
    }
}

/// Elements a task where a matrix is converted.
const CONVERTED: usize = 1 << 15;

/// Rows of a matrix in the type of the products: a view, or a copy of those that were asked for last.
struct Factor<'a, E: Element> {
    matrix: Matrix<'a, E>,
    copy: Vec<E::Real>,
    copied: Range<usize>,
}

impl<'a, E: Element<Real: Compute>> Factor<'a, E> {
    fn new(matrix: Matrix<'a, E>) -> Self {
        Self {
            matrix,
            copy: Vec::new(),
            copied: 0..0,
        }
    }

    fn rows(&mut self, rows: &Range<usize>) -> Matrix<'_, E::Real> {
        let view = self.matrix.rows(rows);
        if E::IS_REAL {
            return Matrix {
                data: bytemuck::cast_slice(view.data),
                shape: view.shape,
                stride: view.stride,
            };
        }
        let columns = view.shape[1];
        if self.copied != *rows {
            self.copied = rows.clone();
            self.copy.resize(rows.len() * columns, E::Real::ZERO);
            let rows_per_task = (CONVERTED / columns).max(1);
            let convert = |(task, copy): (usize, &mut [E::Real])| {
                for (r, to) in copy.chunks_exact_mut(columns).enumerate() {
                    let from = &view.data[(task * rows_per_task + r) * view.stride[0]..];
                    if view.stride[1] == 1 {
                        E::widen_in_order(&from[..columns], to);
                    } else {
                        for (c, to) in to.iter_mut().enumerate() {
                            *to = row::one(from[c * view.stride[1]]);
                        }
                    }
                }
            };
            self.copy
                .par_chunks_mut(rows_per_task * columns)
                .enumerate()
                .for_each(convert);
        }
        Matrix::contiguous(&self.copy, columns)
    }
}

fn narrow<E: Element>(from: &[E::Real], to: &mut [E]) {
    from.par_chunks(CONVERTED)
        .zip(to.par_chunks_mut(CONVERTED))
        .for_each(|(from, to)| E::narrow_in_order(from, to));
}

/// Gradient of a factor: either complete in one product for each range of its rows, or the sum of products.
struct FactorGradient<E: Element> {
    gradient: Vec<E>,
    depth: usize,
    is_sum: bool,
    /// Whether other ranks have a part of it too.
    is_part: bool,
    /// What is not yet rounded to the factor's type; not used where that is the products' own.
    exact: Vec<E::Real>,
    any: bool,
}

impl<E: Element<Real: Compute>> FactorGradient<E> {
    fn new(rows: usize, depth: usize, is_sum: bool, is_part: bool) -> Self {
        Self {
            gradient: bytemuck::zeroed_vec(rows * depth),
            depth,
            is_sum,
            is_part,
            exact: Vec::new(),
            any: false,
        }
    }

    /// Adds a·b to `rows`, which are the same each time for a sum and others each time if not.
    fn multiply(&mut self, rows: &Range<usize>, a: Matrix<E::Real>, b: Matrix<E::Real>) {
        let span = rows.start * self.depth..rows.end * self.depth;
        let add = self.is_sum && self.any;
        self.any = true;
        if E::IS_REAL {
            multiply(
                bytemuck::cast_slice_mut(&mut self.gradient[span]),
                add,
                a,
                b,
            );
            return;
        }
        if self.is_part {
            self.exact.resize(self.gradient.len(), E::Real::ZERO);
            multiply(&mut self.exact[span], add, a, b);
            return;
        }
        self.exact.resize(span.len(), E::Real::ZERO);
        multiply(&mut self.exact, add, a, b);
        if !self.is_sum {
            narrow(&self.exact, &mut self.gradient[span]);
        }
    }

    /// The sum of all ranks' parts.
    fn sum_over(&mut self, ranks: &Ranks) -> Result<()> {
        let sum = |part: Vec<E::Real>| -> Result<Vec<E::Real>> {
            let length = part.len();
            let part = Tensor::from_vec(part, length, &Device::Cpu)?;
            ranks.0.all_reduce_sum(&part)?.to_vec1()
        };
        if E::IS_REAL {
            let part = std::mem::take(&mut self.gradient);
            self.gradient = bytemuck::cast_vec(sum(bytemuck::cast_vec(part))?);
        } else {
            self.exact.resize(self.gradient.len(), E::Real::ZERO);
            self.exact = sum(std::mem::take(&mut self.exact))?;
        }
        Ok(())
    }

    fn into_storage(mut self) -> CpuStorage {
        if (self.is_sum && self.any || self.is_part) && !E::IS_REAL {
            let sums = &self.exact;
            narrow(sums, &mut self.gradient[..sums.len()]);
        }
        E::storage(self.gradient)
    }
}

/// The factors of the logits, of whatever type.
struct Factors<'a, E: Element> {
    hidden: Factor<'a, E>,
    weight: Factor<'a, E>,
    bias: Option<Vec<E::Real>>,
}

impl<'a, E: Element<Real: Compute> + WithDType> Factors<'a, E> {
    fn new(operands: &Operands<'a, CpuStorage>) -> Result<Self> {
        let matrix = |(storage, layout): (&'a CpuStorage, &Layout)| {
            Matrix::of(E::cpu_storage_as_slice(storage)?, layout)
        };
        let bias = |(storage, layout): (&CpuStorage, &Layout)| {
            let (values, stride) = (E::cpu_storage_as_slice(storage)?, layout.stride()[0]);
            let at = |i: usize| row::one(values[layout.start_offset() + i * stride]);
            Result::Ok((0..layout.dims()[0]).map(at).collect())
        };
        Ok(Self {
            hidden: Factor::new(matrix(operands.hidden)?),
            weight: Factor::new(matrix(operands.weight)?),
            bias: operands.bias.map(bias).transpose()?,
        })
    }

    fn depth(&self) -> usize {
        self.weight.matrix.shape[1]
    }

    /// Logits of a tile.
    fn logits(&mut self, tile: &Tile, out: &mut [E::Real]) {
        if let Some(bias) = &self.bias {
            let bias = &bias[tile.classes.clone()];
            out.par_chunks_mut(bias.len())
                .for_each(|row| row.copy_from_slice(bias));
        }
        let (hidden, weight) = (
            self.hidden.rows(&tile.rows),
            self.weight.rows(&tile.classes),
        );
        multiply(out, self.bias.is_some(), hidden, weight.transposed());
    }
}

/// Memory for a tile's logits, which the product writes in full.
fn resize<C: Compute>(logits: &mut Vec<C>, tile: &Tile) {
    if logits.capacity() < tile.len() {
        *logits = bytemuck::zeroed_vec(tile.len());
    }
    logits.resize(tile.len(), C::ZERO);
}

fn evaluate<E: Element<Real: Compute> + WithDType>(
    given: Given,
    plan: &Plan,
    operands: &Operands<CpuStorage>,
    stats: bool,
) -> Result<(Vec<RowResult>, Vec<Normaliser>, Vec<CpuStorage>)> {
    let call = given.call;
    let mut factors = Factors::<E>::new(operands)?;
    let mut running = vec![Running::default(); call.rows];
    let (mut kept, mut logits) = (Vec::new(), Vec::new());
    for (t, tile) in plan.tiles.iter().enumerate() {
        resize(&mut logits, &tile);
        factors.logits(&tile, &mut logits);
        let running = &mut running[tile.rows.clone()];
        let width = tile.classes.len();
        if call.softcap.is_some() {
            let x = bytemuck::cast_slice::<_, <E::Real as Compute>::Capped>(&logits);
            let work = Work::of_tile(given, &tile);
            merge_stretch(&work, |i| &x[i * width..][..width], running, stats);
        } else {
            let work = Work::of_tile(given, &tile);
            merge_stretch(&work, |i| &logits[i * width..][..width], running, stats);
        }
        if t < plan.keep {
            kept.push(Element::storage(std::mem::take(&mut logits)));
        }
    }
    let (results, normalisers) = running::finish_rows(given, stats, running)?;
    Ok((results, normalisers, kept))
}

fn differentiate<E: Element<Real: Compute> + WithDType>(
    given: Given,
    plan: &Plan,
    saved: &Saved,
    upstream: &Tensor,
    operands: &Operands<CpuStorage>,
    wanted: Wanted,
) -> Result<[Option<CpuStorage>; 3]> {
    let call = given.call;
    let mut factors = Factors::<E>::new(operands)?;
    let (depth, by_rows) = (factors.depth(), plan.tiles.by_rows);
    let gradient = |rows, is_sum, is_part, wanted: bool| {
        wanted.then(|| FactorGradient::<E>::new(rows, depth, is_sum, is_part))
    };
    let ranks = call.groups.vocab_shard.as_ref();
    let mut hidden_gradient = gradient(call.rows, !by_rows, ranks.is_some(), wanted.hidden);
    let mut weight_gradient = gradient(call.width, by_rows, false, wanted.weight);
    let mut bias_gradient = wanted.bias.then(|| vec![0.0f64; call.width]);

    let mut kept = saved.kept.take();
    let mut logits = Vec::new();
    for tile in plan.tiles.iter() {
        match kept.next() {
            Some(storage) => logits = <E::Real as WithDType>::cpu_storage_data(storage)?,
            None => {
                resize(&mut logits, &tile);
                factors.logits(&tile, &mut logits);
            }
        }
        if call.softcap.is_some() {
            let x = bytemuck::cast_slice_mut::<_, <E::Real as Compute>::Capped>(&mut logits);
            differentiate_logits(given, &saved.of_rows, upstream, x, &tile)?;
        } else {
            differentiate_logits(given, &saved.of_rows, upstream, &mut logits[..], &tile)?;
        }
        let gradients = Matrix::contiguous(&logits, tile.classes.len());
        if let Some(weight) = &mut weight_gradient {
            let hidden = factors.hidden.rows(&tile.rows);
            weight.multiply(&tile.classes, gradients.transposed(), hidden);
        }
        if let Some(hidden) = &mut hidden_gradient {
            let weight = factors.weight.rows(&tile.classes);
            hidden.multiply(&tile.rows, gradients, weight);
        }
        if let Some(bias) = &mut bias_gradient {
            add_columns(gradients, &mut bias[tile.classes.clone()]);
        }
    }
    if let (Some(hidden), Some(ranks)) = (&mut hidden_gradient, ranks) {
        hidden.sum_over(ranks)?;
    }
    let bias = |sums: Vec<f64>| {
        let sums: Vec<_> = sums.into_iter().map(E::Real::of).collect();
        let mut gradient = bytemuck::zeroed_vec(sums.len());
        narrow::<E>(&sums, &mut gradient);
        E::storage(gradient)
    };
    Ok([
        hidden_gradient.map(FactorGradient::into_storage),
        weight_gradient.map(FactorGradient::into_storage),
        bias_gradient.map(bias),
    ])
}

/// Overwrites the logits `x` of a tile with their gradients.
fn differentiate_logits<T: Element>(
    given: Given,
    saved: &results::Saved,
    upstream: &Tensor,
    x: &mut [T],
    tile: &Tile,
) -> Result<()> {
    let work = Work::of_tile(given, tile);
    let (rows, general) = (tile.rows.len(), given.call.is_general_in_parts());
    let out = GradRows::contiguous(rows, tile.classes.len(), x);
    differentiate_tile(&work, saved, upstream, general, Logits::InPlace, &out, rows)
}

/// Adds the sum of each column of a contiguous matrix, in f64.
fn add_columns<C: Compute>(matrix: Matrix<C>, sums: &mut [f64]) {
    const COLUMNS: usize = 256;
    let width = sums.len();
    sums.par_chunks_mut(COLUMNS)
        .enumerate()
        .for_each(|(chunk, sums)| {
            for row in matrix.data.chunks_exact(width) {
                let row = &row[chunk * COLUMNS..];
                for (sum, x) in sums.iter_mut().zip(row) {
                    *sum += x.f64();
                }
            }
        });
}

/// Evaluates an expression with `$E` as the type of the operands.
macro_rules! with_type {
    ($operands:expr, $E:ident => $body:expr) => {{
        use half::{bf16, f16};
        match $operands.hidden.0 {
            CpuStorage::F32(_) => {
                type $E = f32;
                $body
            }
            CpuStorage::F64(_) => {
                type $E = f64;
                $body
            }
            CpuStorage::F16(_) => {
                type $E = f16;
                $body
            }
            CpuStorage::BF16(_) => {
                type $E = bf16;
                $body
            }
            _ => bail!("hidden: must be f32, f16, bf16 or f64"),
        }
    }};
}

impl LinearBackend for Cpu {
    type LinearSaved = Saved;

    /// About what stays in the shared cache until the products have read it.
    const TILE_BYTES: usize = 8 << 20;
    const TILE_PITCH: usize = 1;

    fn tile_dtype(factors: DType) -> DType {
        result_type(factors)
    }

    fn storage(storage: &Storage) -> Option<&CpuStorage> {
        match storage {
            Storage::Cpu(storage) => Some(storage),
            _ => None,
        }
    }

    fn into_storage(storage: CpuStorage) -> Storage {
        Storage::Cpu(storage)
    }

    fn forward_linear(
        call: &Call,
        plan: &Plan,
        operands: &Operands<CpuStorage>,
        stats: bool,
    ) -> Result<Forward<CpuStorage, Saved>> {
        let inputs = Inputs::read(call, stats)?;
        let locked = Locked::of(call.probabilities());
        let probabilities = locked.rows()?;
        let given = inputs.given(call, probabilities.as_ref());
        let evaluate = || with_type!(operands, E => evaluate::<E>(given, plan, operands, stats));
        let (results, normalisers, kept) = shard::settle(call, evaluate())?;
        let dtype = result_type(operands.hidden.0.dtype());
        let (loss, stats) = forward_result(call, &inputs, &results, dtype, stats)?;
        Ok(Forward {
            loss,
            stats,
            saved: Saved {
                of_rows: results::Saved {
                    inputs,
                    normalisers,
                },
                kept: KeptTiles::new(kept),
            },
        })
    }

    fn backward_linear(
        call: &Call,
        plan: &Plan,
        saved: &Saved,
        upstream: &Tensor,
        operands: &Operands<CpuStorage>,
        wanted: Wanted,
    ) -> Result<[Option<CpuStorage>; 3]> {
        let locked = Locked::of(call.probabilities());
        let probabilities = locked.rows()?;
        let given = saved.of_rows.inputs.given(call, probabilities.as_ref());
        with_type!(operands, E => differentiate::<E>(given, plan, saved, upstream, operands, wanted))
    }
}
