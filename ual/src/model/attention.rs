//! Causal attention's sizes and rotary positions, for every way to compute it.

use std::sync::Arc;

use candle_core::{D, Device, Result, Tensor};

use crate::data::packing::Spans;

/// Rotary positions: Su et al., arXiv 2104.09864.
pub struct Rotation {
    /// (max_tokens, size/2) each.
    cos: Vec<f32>,
    sin: Vec<f32>,
    /// The same as tensors.
    pub tensors: [Tensor; 2],
    /// Neighbours rotate together, as in GGUF files, or halves, as in Hugging Face's.
    pub interleaved: bool,
}

impl Rotation {
    /// For `length` positions and heads of `size`. Element i turns by t/baseⁱᐟʰ at position t, h being half of the size,
    /// and `factors` times slower where there are any: Llama 3.1 stretches the slow rotations.
    pub fn new(
        (length, size): (usize, usize),
        base: f32,
        factors: Option<&[f32]>,
        interleaved: bool,
        device: &Device,
    ) -> Result<Self> {
        let half = size / 2;
        let factor = |i: usize| factors.map_or(1.0, |factors| factors[i]);
        let angle = |t: usize, i: usize| t as f32 / (base.powf(i as f32 / half as f32) * factor(i));
        let angles: Vec<f32> = (0..length)
            .flat_map(|t| (0..half).map(move |i| angle(t, i)))
            .collect();
        let cos: Vec<f32> = angles.iter().map(|angle| angle.cos()).collect();
        let sin: Vec<f32> = angles.iter().map(|angle| angle.sin()).collect();
        let tensor = |values: &Vec<f32>| Tensor::from_vec(values.clone(), (length, half), device);
        Ok(Self {
            tensors: [tensor(&cos)?, tensor(&sin)?],
            cos,
            sin,
            interleaved,
        })
    }

    /// Rows of one head, the first at position `first` and each at the next, by the angle or back by it; also multiplied by
    /// `scale`.
    pub fn apply(&self, rows: &mut [f32], (first, size): (usize, usize), scale: f32, back: bool) {
        let half = size / 2;
        for (t, row) in (first..).zip(rows.chunks_exact_mut(size)) {
            for i in 0..half {
                let (first, second) = match self.interleaved {
                    true => (2 * i, 2 * i + 1),
                    false => (i, i + half),
                };
                let (cos, sin) = (
                    self.cos[t * half + i] * scale,
                    self.sin[t * half + i] * scale,
                );
                let sin = if back { -sin } else { sin };
                let (a, b) = (row[first], row[second]);
                row[first] = a * cos - b * sin;
                row[second] = a * sin + b * cos;
            }
        }
    }
}

/// Causal attention with grouped queries.
#[derive(Clone)]
pub struct Attention {
    pub heads: usize,
    /// Keys and values are shared by heads / kv_heads queries.
    pub kv_heads: usize,
    /// Of a head.
    pub size: usize,
    pub spans: Arc<Spans>,
    pub rotation: Arc<Rotation>,
}

impl Attention {
    /// Every head's queries and keys normed by weights (size) each, in (N, (heads + 2·kv_heads)·size): Qwen 3, arXiv
    /// 2505.09388.
    pub fn with_norms(
        &self,
        qkv: &Tensor,
        norms: &[Tensor; 2],
        norm: impl Fn(&Tensor, &Tensor) -> Result<Tensor>,
    ) -> Result<Tensor> {
        let part = |start: usize, heads: usize| {
            qkv.narrow(D::Minus1, start * self.size, heads * self.size)
        };
        let normed = |start: usize, heads: usize, weight: &Tensor| {
            let part = part(start, heads)?;
            let rows = part.reshape(((), self.size))?;
            norm(&rows, weight)?.reshape(part.shape())
        };
        let q = normed(0, self.heads, &norms[0])?;
        let k = normed(self.heads, self.kv_heads, &norms[1])?;
        let v = part(self.heads + self.kv_heads, self.kv_heads)?;
        Tensor::cat(&[q, k, v], D::Minus1)
    }
}
