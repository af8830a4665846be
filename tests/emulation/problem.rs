//! One call of the loss, and what the kernels make of it.

use candle_core::{DType, Device, Tensor};
use candle_cross_entropy::{CrossEntropy, LossAndGrad, Reduction, Smoothing};
use half::{bf16, f16};

use crate::kernels::abi::{BadValue, Element, MAX_ROW_DIMS, RowOffsets};

pub const IGNORED: i64 = -100;

/// Where the rows of a tensor lie: sizes and strides of its leading dimensions, innermost first.
#[derive(Clone, Debug)]
pub struct View {
    pub sizes: Vec<usize>,
    pub strides: Vec<usize>,
    /// Bytes from a 16-byte boundary to the first element.
    pub offset: usize,
}

impl View {
    pub fn contiguous(rows: usize, width: usize) -> Self {
        Self {
            sizes: vec![rows],
            strides: vec![width],
            offset: 0,
        }
    }

    /// Element offset of row `i`.
    pub fn row(&self, mut i: usize) -> usize {
        let mut offset = 0;
        for (&size, &stride) in self.sizes.iter().zip(&self.strides) {
            offset += i % size * stride;
            i /= size;
        }
        offset
    }

    /// Elements from the first to the last, both included.
    pub fn extent(&self, rows: usize, width: usize) -> usize {
        (0..rows).map(|i| self.row(i) + width).max().unwrap_or(0)
    }

    pub fn abi(&self) -> RowOffsets {
        let mut abi = RowOffsets {
            dims: self.sizes.len() as u64,
            // Those not in use would lead far away.
            sizes: [1 << 40; MAX_ROW_DIMS],
            strides: [1 << 40; MAX_ROW_DIMS],
        };
        for (i, (&size, &stride)) in self.sizes.iter().zip(&self.strides).enumerate() {
            abi.strides[i] = stride as u64;
            if i + 1 < self.sizes.len() {
                abi.sizes[i] = size as u64;
            }
        }
        abi
    }
}

#[derive(Clone, Debug)]
pub enum Eps {
    Uniform(f32),
    PerRow(Vec<f32>),
}

/// A run over one tile of the logits after another: forward, then backward in place.
#[derive(Clone, Copy, Debug)]
pub struct Tiles {
    /// Of a tile; all rows where they are not evenly spaced.
    pub rows: usize,
    pub classes: usize,
    pub stats: bool,
}

/// Rows with the values as they are stored, in row order.
#[derive(Clone, Debug)]
pub struct Problem {
    pub name: String,
    pub element: Element,
    pub vocab: usize,
    /// Columns from `vocab` to here are padding.
    pub width: usize,
    /// (rows, vocab), already of the element's precision.
    pub logits: Vec<f32>,
    pub targets: Vec<i64>,
    pub targets_are_i64: bool,
    pub eps: Eps,
    pub weights: Option<Vec<f32>>,
    pub z_loss: f32,
    pub logit_scale: f32,
    pub softcap: Option<f32>,
    pub logits_view: View,
    pub grad_view: View,
    /// Backward: one value a row, or one for all.
    pub upstream: Vec<f32>,
    pub mean: bool,
    pub result_scale: f32,
    /// Runs of the on-chip kernel.
    pub on_chip: Vec<OnChip>,
    pub tiles: Vec<Tiles>,
    pub seeds: Vec<u64>,
}

#[derive(Clone, Copy, Debug, PartialEq)]
pub struct OnChip {
    pub blocks_per_row: usize,
    pub in_place: bool,
    /// A block's. The crate launches 256; fewer cost less here.
    pub threads: u32,
}

impl Problem {
    pub fn rows(&self) -> usize {
        self.targets.len()
    }

    pub fn row(&self, i: usize) -> &[f32] {
        &self.logits[i * self.vocab..][..self.vocab]
    }

    pub fn eps(&self, i: usize) -> f32 {
        match &self.eps {
            Eps::Uniform(eps) => *eps,
            Eps::PerRow(eps) => eps[i],
        }
    }

    pub fn weight(&self, i: usize) -> f32 {
        self.weights.as_ref().map_or(1.0, |weights| weights[i])
    }

    pub fn ignored(&self, i: usize) -> bool {
        self.targets[i] == self.ignore_index()
    }

    /// u32 targets cannot be negative.
    pub fn ignore_index(&self) -> i64 {
        if self.targets_are_i64 {
            IGNORED
        } else {
            i64::from(u32::MAX)
        }
    }

    /// What is wrong with a row's values, as `first_error` says it.
    pub fn bad_value(&self, i: usize) -> Option<BadValue> {
        let (eps, weight) = (self.eps(i), self.weight(i));
        if self.ignored(i) {
            None
        } else if !(0..self.vocab as i64).contains(&self.targets[i]) {
            Some(BadValue::Target)
        } else if !(0.0..=1.0).contains(&eps) {
            Some(BadValue::Smoothing)
        } else if !(0.0..f32::INFINITY).contains(&weight) {
            Some(BadValue::Weight)
        } else {
            None
        }
    }

    pub fn upstream(&self, i: usize) -> f32 {
        if self.upstream.len() == 1 {
            self.upstream[0]
        } else {
            self.upstream[i]
        }
    }

    /// Each row's own loss, gradient and statistics, in f64. Rows with bad values are given good ones.
    pub fn reference(&self) -> candle_core::Result<LossAndGrad> {
        let rows = self.rows();
        let bad = |i: usize| self.bad_value(i).is_some();
        let good = |value: fn(&Self, usize) -> f32| -> Vec<f32> {
            (0..rows)
                .map(|i| {
                    if bad(i) || self.ignored(i) {
                        0.0
                    } else {
                        value(self, i)
                    }
                })
                .collect()
        };
        let logits: Vec<f64> = self.logits.iter().map(|&x| f64::from(x)).collect();
        let logits = Tensor::from_vec(logits, (rows, self.vocab), &Device::Cpu)?;
        let targets: Vec<i64> = (0..rows)
            .map(|i| match () {
                _ if self.ignored(i) => IGNORED,
                _ if bad(i) => 0,
                _ => self.targets[i],
            })
            .collect();
        let targets = Tensor::new(targets, &Device::Cpu)?;
        let mut loss = CrossEntropy::new()
            .reduction(Reduction::None)
            .smoothing(Smoothing::PerRow(Tensor::new(
                good(Self::eps),
                &Device::Cpu,
            )?))
            .row_weights(&Tensor::new(good(Self::weight), &Device::Cpu)?)
            .z_loss(self.z_loss)
            .logit_scale(self.logit_scale);
        if let Some(softcap) = self.softcap {
            loss = loss.softcap(softcap);
        }
        let result = loss.reference(&logits, &targets)?;
        assert_eq!(result.grad.dtype(), DType::F64);
        Ok(result)
    }
}

/// Nearest value of the element type.
pub fn round(element: Element, x: f32) -> f32 {
    match element {
        Element::F32 => x,
        Element::F16 => f16::from_f32(x).to_f32(),
        Element::BF16 => bf16::from_f32(x).to_f32(),
    }
}

/// Bytes of values that are of the element's precision.
pub fn to_bytes(element: Element, values: &[f32]) -> Vec<u8> {
    match element {
        Element::F32 => bytemuck::cast_slice(values).to_vec(),
        Element::F16 => values
            .iter()
            .flat_map(|&x| f16::from_f32(x).to_le_bytes())
            .collect(),
        Element::BF16 => values
            .iter()
            .flat_map(|&x| bf16::from_f32(x).to_le_bytes())
            .collect(),
    }
}

pub fn from_bytes(element: Element, bytes: &[u8]) -> Vec<f32> {
    match element {
        Element::F32 => bytemuck::pod_collect_to_vec(bytes),
        Element::F16 => bytes
            .chunks_exact(2)
            .map(|b| f16::from_le_bytes([b[0], b[1]]).to_f32())
            .collect(),
        Element::BF16 => bytes
            .chunks_exact(2)
            .map(|b| bf16::from_le_bytes([b[0], b[1]]).to_f32())
            .collect(),
    }
}
