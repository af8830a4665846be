//! What a layer does between its matrix products, on the CPU each step one operation with a backward of its own: as
//! candle's separate operations they take more time there than the products.

use std::ops::Range;

use candle_core::{
    CpuStorage, CustomOp1, CustomOp2, CustomOp3, Layout, Result, Shape, Tensor, bail,
};
use gemm::Parallelism;
use rayon::prelude::*;

use crate::model::{attention::Attention, separate};

fn slice<'a>(storage: &'a CpuStorage, layout: &Layout) -> Result<&'a [f32]> {
    match layout.contiguous_offsets() {
        Some((start, end)) => Ok(&storage.as_slice::<f32>()?[start..end]),
        None => bail!("an operand is not contiguous"),
    }
}

/// x·w / √(mean x² + epsilon) for rows x (N, D) and weights (D): Zhang and Sennrich, arXiv 1910.07467.
pub fn rms_norm(x: &Tensor, weight: &Tensor, epsilon: f32) -> Result<Tensor> {
    if !x.device().is_cpu() {
        return separate::rms_norm(x, weight, epsilon);
    }
    x.contiguous()?.apply_op2(weight, RmsNorm { epsilon })
}

struct RmsNorm {
    epsilon: f32,
}

impl RmsNorm {
    /// 1 / √(mean x² + epsilon)
    fn factor(&self, x: &[f32]) -> f32 {
        let squares: f32 = x.iter().map(|x| x * x).sum();
        (squares / x.len() as f32 + self.epsilon).sqrt().recip()
    }
}

impl CustomOp2 for RmsNorm {
    fn name(&self) -> &'static str {
        "rms-norm"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        x_layout: &Layout,
        weight: &CpuStorage,
        weight_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (x, weight) = (slice(x, x_layout)?, slice(weight, weight_layout)?);
        let dim = weight.len();
        let mut y = vec![0.0; x.len()];
        let rows = y.par_chunks_mut(dim).zip(x.par_chunks(dim));
        rows.for_each(|(y, x)| {
            let factor = self.factor(x);
            for ((y, x), w) in y.iter_mut().zip(x).zip(weight) {
                *y = x * factor * w;
            }
        });
        Ok((CpuStorage::F32(y), x_layout.shape().clone()))
    }

    fn bwd(
        &self,
        x: &Tensor,
        weight: &Tensor,
        _y: &Tensor,
        gradient: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let gradient = gradient.detach().contiguous()?;
        let of_weight = if weight.is_variable() {
            let normed = x.apply_op2_no_bwd(&weight.ones_like()?, self)?;
            Some((&gradient * normed)?.sum(0)?)
        } else {
            None
        };
        let backward = RmsNormBackward(Self { ..*self });
        let of_x = x.apply_op3_no_bwd(weight, &gradient, &backward)?;
        Ok((Some(of_x), of_weight))
    }
}

struct RmsNormBackward(RmsNorm);

impl CustomOp3 for RmsNormBackward {
    fn name(&self) -> &'static str {
        "rms-norm-backward"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        x_layout: &Layout,
        weight: &CpuStorage,
        weight_layout: &Layout,
        gradient: &CpuStorage,
        gradient_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (x, weight) = (slice(x, x_layout)?, slice(weight, weight_layout)?);
        let gradient = slice(gradient, gradient_layout)?;
        let dim = weight.len();
        let mut result = vec![0.0; x.len()];
        let rows = result.par_chunks_mut(dim).zip(x.par_chunks(dim));
        let rows = rows.zip(gradient.par_chunks(dim));
        rows.for_each(|((result, x), gradient)| {
            let factor = self.0.factor(x);
            for ((result, g), w) in result.iter_mut().zip(gradient).zip(weight) {
                *result = factor * g * w;
            }
            let along: f32 = result.iter().zip(x).map(|(r, x)| r * x).sum();
            let shrink = along * factor * factor / dim as f32;
            for (result, x) in result.iter_mut().zip(x) {
                *result -= shrink * x;
            }
        });
        Ok((CpuStorage::F32(result), x_layout.shape().clone()))
    }
}

/// silu(a)·b of rows (N, 2·hidden) of an a and a b each: Shazeer, arXiv 2002.05202.
pub fn swiglu(gate_up: &Tensor) -> Result<Tensor> {
    if !gate_up.device().is_cpu() {
        return separate::swiglu(gate_up);
    }
    gate_up.contiguous()?.apply_op1(SwiGlu)
}

fn sigmoid(x: f32) -> f32 {
    (1.0 + (-x).exp()).recip()
}

struct SwiGlu;

impl CustomOp1 for SwiGlu {
    fn name(&self) -> &'static str {
        "swiglu"
    }

    fn cpu_fwd(&self, gate_up: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let (rows, width) = layout.shape().dims2()?;
        let hidden = width / 2;
        let mut y = vec![0.0; rows * hidden];
        let inputs = slice(gate_up, layout)?.par_chunks(width);
        y.par_chunks_mut(hidden).zip(inputs).for_each(|(y, input)| {
            let (gate, up) = input.split_at(hidden);
            for ((y, a), b) in y.iter_mut().zip(gate).zip(up) {
                *y = a * sigmoid(*a) * b;
            }
        });
        Ok((CpuStorage::F32(y), (rows, hidden).into()))
    }

    fn bwd(&self, gate_up: &Tensor, _y: &Tensor, gradient: &Tensor) -> Result<Option<Tensor>> {
        let gradient = gradient.detach().contiguous()?;
        let result = gate_up.apply_op2_no_bwd(&gradient, &SwiGluBackward)?;
        Ok(Some(result))
    }
}

struct SwiGluBackward;

impl CustomOp2 for SwiGluBackward {
    fn name(&self) -> &'static str {
        "swiglu-backward"
    }

    fn cpu_fwd(
        &self,
        gate_up: &CpuStorage,
        layout: &Layout,
        gradient: &CpuStorage,
        gradient_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (_, width) = layout.shape().dims2()?;
        let hidden = width / 2;
        let (gate_up, gradient) = (slice(gate_up, layout)?, slice(gradient, gradient_layout)?);
        let mut result = vec![0.0; gate_up.len()];
        let rows = result.par_chunks_mut(width).zip(gate_up.par_chunks(width));
        let rows = rows.zip(gradient.par_chunks(hidden));
        rows.for_each(|((result, input), gradient)| {
            let (gate, up) = input.split_at(hidden);
            let (of_gate, of_up) = result.split_at_mut(hidden);
            for i in 0..hidden {
                let (a, g, s) = (gate[i], gradient[i], sigmoid(gate[i]));
                of_gate[i] = g * up[i] * s * (1.0 + a * (1.0 - s));
                of_up[i] = g * a * s;
            }
        });
        Ok((CpuStorage::F32(result), layout.shape().clone()))
    }
}

/// A view of a matrix: data, distances from row to row and from column to column.
#[derive(Clone, Copy)]
struct Matrix<'a>(&'a [f32], usize, usize);

impl<'a> Matrix<'a> {
    fn t(self) -> Self {
        Self(self.0, self.2, self.1)
    }

    fn holds(self, rows: usize, columns: usize) -> bool {
        (rows - 1) * self.1 + (columns - 1) * self.2 < self.0.len()
    }
}

/// out (m, n), rows `stride` apart, becomes a (m, k) · b (k, n).
fn product(
    (out, stride): (&mut [f32], usize),
    (m, k, n): (usize, usize, usize),
    a: Matrix,
    b: Matrix,
) {
    assert!(a.holds(m, k) && b.holds(k, n) && n <= stride && Matrix(out, stride, 1).holds(m, n));
    let Matrix(a, a_row, a_column) = a;
    let Matrix(b, b_row, b_column) = b;
    // SAFETY: the three lie in their slices.
    unsafe {
        gemm::gemm(
            m,
            n,
            k,
            out.as_mut_ptr(),
            1,
            stride as isize,
            false,
            a.as_ptr(),
            a_column as isize,
            a_row as isize,
            b.as_ptr(),
            b_column as isize,
            b_row as isize,
            1.0,
            1.0,
            false,
            false,
            false,
            Parallelism::None,
        );
    }
}

/// Where the parts of a head begin in a row of queries, keys and values.
struct Head {
    query: usize,
    key: usize,
    value: usize,
}

impl Attention {
    /// Rows (N, (heads + 2·kv_heads)·size) of queries, keys and values to rows (N, heads·size).
    pub fn forward(self, qkv: &Tensor) -> Result<Tensor> {
        if qkv.dims2()? != (self.spans.rows(), self.width()) {
            bail!(
                "queries, keys and values are {:?}, and the sequences have {} rows",
                qkv.shape(),
                self.spans.rows()
            );
        }
        if !qkv.device().is_cpu() {
            return separate::attention(&self, qkv);
        }
        qkv.contiguous()?.apply_op1(self)
    }

    fn width(&self) -> usize {
        (self.heads + 2 * self.kv_heads) * self.size
    }

    fn head(&self, head: usize) -> Head {
        let kv = head / (self.heads / self.kv_heads);
        Head {
            query: head * self.size,
            key: (self.heads + kv) * self.size,
            value: (self.heads + self.kv_heads + kv) * self.size,
        }
    }

    /// Of each sequence a mutable slice of its own rows.
    fn split<'a>(&self, mut rows: &'a mut [f32], width: usize) -> Vec<&'a mut [f32]> {
        let lengths = (0..self.spans.sequences()).map(|i| self.spans.own(i).len());
        let split = lengths.map(|length| rows.split_off_mut(..length * width));
        split
            .map(|own| own.expect("there is a row for each"))
            .collect()
    }

    /// A part of a head, (rows, size).
    fn part(&self, qkv: &[f32], rows: Range<usize>, start: usize) -> impl Iterator<Item = f32> {
        let width = self.width();
        let rows = qkv[rows.start * width..rows.end * width].chunks_exact(width);
        rows.flat_map(move |row| &row[start..start + self.size])
            .copied()
    }

    /// That of all rows of a sequence, (T, size).
    fn of_sequence(&self, qkv: &[f32], sequence: usize, start: usize) -> Vec<f32> {
        let shared = self.part(qkv, 0..self.spans.before(sequence), start);
        let own = self.part(qkv, self.spans.own(sequence), start);
        shared.chain(own).collect()
    }

    /// A sequence's own queries (own, size), rotated and scaled, and its keys (T, size), rotated.
    fn rotated(&self, qkv: &[f32], sequence: usize, head: &Head) -> (Vec<f32>, Vec<f32>) {
        let own = self.spans.own(sequence);
        let mut q: Vec<f32> = self.part(qkv, own, head.query).collect();
        let mut k = self.of_sequence(qkv, sequence, head.key);
        let first = self.spans.before(sequence);
        self.rotation
            .apply(&mut q, (first, self.size), self.scale(), false);
        self.rotation.apply(&mut k, (0, self.size), 1.0, false);
        (q, k)
    }

    fn scale(&self) -> f32 {
        (self.size as f32).powf(-0.5)
    }

    /// What every own row pays to which: softmax of q·kᵀ up to the row itself, into (own, T).
    fn weights(&self, q: &[f32], k: &[f32], weights: &mut [f32]) {
        let size = self.size;
        let (own, length) = (q.len() / size, k.len() / size);
        let (q, k) = (Matrix(q, size, 1), Matrix(k, size, 1).t());
        product((&mut *weights, length), (own, size, length), q, k);
        let first = length - own;
        for (t, row) in (first..).zip(weights.chunks_exact_mut(length)) {
            let (seen, unseen) = row.split_at_mut(t + 1);
            let largest = seen.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            seen.iter_mut().for_each(|s| *s = (*s - largest).exp());
            let sum: f32 = seen.iter().sum();
            seen.iter_mut().for_each(|s| *s /= sum);
            unseen.fill(0.0);
        }
    }

    /// One sequence's own rows.
    fn mix(&self, qkv: &[f32], sequence: usize, y: &mut [f32]) {
        let size = self.size;
        let (own, length) = (self.spans.own(sequence).len(), self.spans.length(sequence));
        if own == 0 {
            return;
        }
        let mut weights = vec![0.0; own * length];
        for h in 0..self.heads {
            let head = self.head(h);
            let (q, k) = self.rotated(qkv, sequence, &head);
            let v = self.of_sequence(qkv, sequence, head.value);
            self.weights(&q, &k, &mut weights);
            product(
                (&mut y[h * size..], self.heads * size),
                (own, length, size),
                Matrix(&weights, length, 1),
                Matrix(&v, size, 1),
            );
        }
    }

    /// One sequence: into `result` of its own rows, which is zeros, and what it adds to the shared rows of another,
    /// (before, width).
    fn mix_backward(
        &self,
        qkv: &[f32],
        sequence: usize,
        gradient: &[f32],
        result: &mut [f32],
    ) -> Vec<f32> {
        let (size, width) = (self.size, self.width());
        let (before, own) = (self.spans.before(sequence), self.spans.own(sequence).len());
        let length = before + own;
        let mut shared = vec![0.0; before * width];
        if own == 0 {
            return shared;
        }
        let mut weights = vec![0.0; own * length];
        let mut of_scores = weights.clone();
        let mut of_k = vec![0.0; length * size];
        let mut of_v = of_k.clone();
        let mut of_q = vec![0.0; own * size];
        // The last rows that there are, and those before.
        let mut add_rows = |start: usize, rows: &[f32]| {
            let places = shared
                .chunks_exact_mut(width)
                .chain(result.chunks_exact_mut(width));
            for (row, more) in places
                .skip(length - rows.len() / size)
                .zip(rows.chunks_exact(size))
            {
                let row = &mut row[start..start + size];
                row.iter_mut()
                    .zip(more)
                    .for_each(|(sum, more)| *sum += more);
            }
        };
        for h in 0..self.heads {
            let head = self.head(h);
            let (q, k) = self.rotated(qkv, sequence, &head);
            let v = self.of_sequence(qkv, sequence, head.value);
            self.weights(&q, &k, &mut weights);
            let gradient = Matrix(&gradient[h * size..], self.heads * size, 1);
            let values = Matrix(&v, size, 1);
            product(
                (&mut of_scores, length),
                (own, size, length),
                gradient,
                values.t(),
            );
            let tall = (length, own, size);
            product(
                (&mut of_v, size),
                tall,
                Matrix(&weights, length, 1).t(),
                gradient,
            );
            add_rows(head.value, &of_v);
            // Of the scores: w·(g − Σ w·g).
            let rows = of_scores.chunks_exact_mut(length);
            for (of_scores, weights) in rows.zip(weights.chunks_exact(length)) {
                let pairs = of_scores.iter().zip(weights);
                let mean: f32 = pairs.map(|(g, w)| g * w).sum();
                for (g, w) in of_scores.iter_mut().zip(weights) {
                    *g = w * (*g - mean);
                }
            }
            let scores = Matrix(&of_scores, length, 1);
            product((&mut of_k, size), tall, scores.t(), Matrix(&q, size, 1));
            self.rotation.apply(&mut of_k, (0, size), 1.0, true);
            add_rows(head.key, &of_k);
            let wide = (own, length, size);
            product((&mut of_q, size), wide, scores, Matrix(&k, size, 1));
            self.rotation
                .apply(&mut of_q, (before, size), self.scale(), true);
            add_rows(head.query, &of_q);
        }
        shared
    }
}

impl CustomOp1 for Attention {
    fn name(&self) -> &'static str {
        "attention"
    }

    fn cpu_fwd(&self, qkv: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let qkv = slice(qkv, layout)?;
        let (rows, dim) = (self.spans.rows(), self.heads * self.size);
        let mut y = vec![0.0; rows * dim];
        let outputs = self.split(&mut y, dim).into_par_iter().enumerate();
        outputs.for_each(|(sequence, y)| self.mix(qkv, sequence, y));
        Ok((CpuStorage::F32(y), (rows, dim).into()))
    }

    fn bwd(&self, qkv: &Tensor, _y: &Tensor, gradient: &Tensor) -> Result<Option<Tensor>> {
        let gradient = gradient.detach().contiguous()?;
        let backward = AttentionBackward(self.clone());
        Ok(Some(qkv.apply_op2_no_bwd(&gradient, &backward)?))
    }
}

struct AttentionBackward(Attention);

impl CustomOp2 for AttentionBackward {
    fn name(&self) -> &'static str {
        "attention-backward"
    }

    fn cpu_fwd(
        &self,
        qkv: &CpuStorage,
        layout: &Layout,
        gradient: &CpuStorage,
        gradient_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let attention = &self.0;
        let (qkv, gradient) = (slice(qkv, layout)?, slice(gradient, gradient_layout)?);
        let dim = attention.heads * attention.size;
        let mut result = vec![0.0; qkv.len()];
        let outputs = attention.split(&mut result, attention.width());
        let outputs = outputs.into_par_iter().enumerate();
        let shared = outputs.map(|(sequence, result)| {
            let Range { start, end } = attention.spans.own(sequence);
            let gradient = &gradient[start * dim..end * dim];
            attention.mix_backward(qkv, sequence, gradient, result)
        });
        let shared: Vec<Vec<f32>> = shared.collect();
        // In the sequences' order: the sums have the same bits each time.
        for shared in &shared {
            let pairs = result.iter_mut().zip(shared);
            pairs.for_each(|(sum, more)| *sum += more);
        }
        Ok((CpuStorage::F32(result), layout.shape().clone()))
    }
}
