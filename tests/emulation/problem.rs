//! One call of the loss, and what the kernels make of it.

use candle_core::{DType, Device, Tensor};
use candle_cross_entropy::{CrossEntropy, LossAndGrad, Reduction, RowValue, Smoothing, Targets};
use half::{bf16, f16};

use crate::kernels::abi::{Element, MAX_ROW_DIMS, RowOffsets};

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

/// What takes the kernels of target distributions.
#[derive(Clone, Debug)]
pub struct Distribution {
    pub target: Target,
    pub class_weights: Option<Vec<f32>>,
    pub prior: Option<Vec<f32>>,
    pub entropy_weight: Eps,
}

#[derive(Clone, Debug)]
pub enum Target {
    /// [`Problem::targets`]
    Class,
    /// (rows, `k`)
    TopK {
        k: usize,
        classes: Vec<i64>,
        probabilities: Vec<f32>,
    },
    /// (rows, vocab), already of the type's precision.
    Probabilities {
        values: Vec<f32>,
        element: Element,
        view: View,
    },
}

/// A run over one tile of the logits after another: forward, then backward in place.
#[derive(Clone, Copy, Debug)]
pub struct Tiles {
    /// Of a tile; all rows where they are not evenly spaced.
    pub rows: usize,
    pub classes: usize,
    pub stats: bool,
}

/// A run over the slices of the vocabulary that ranks have: the forward of each, tile by tile, the merge, then the backward of each
/// in place.
#[derive(Clone, Debug)]
pub struct Ranks {
    /// Of each rank; its slice ends where the next one begins.
    pub first_classes: Vec<usize>,
    /// Classes of a tile.
    pub tile: usize,
    pub stats: bool,
    /// What the second rank is given otherwise than the rest.
    pub altered: Option<Altered>,
}

/// Of the second row, or of all classes.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Altered {
    Target,
    Smoothing,
    Weight,
    EntropyWeight,
    /// Of an entry of the target.
    Probability,
    ClassWeight,
    Prior,
}

impl Altered {
    /// What the second rank is given.
    pub fn apply(self, p: &Problem) -> Problem {
        let mut p = p.clone();
        let change = |values: &mut Eps| match values {
            Eps::PerRow(values) => values[1] += 0.0625,
            Eps::Uniform(_) => unreachable!("a value a row"),
        };
        if let Some(d) = &mut p.distribution {
            match (self, &mut d.target) {
                (Self::Target, Target::TopK { k, classes, .. }) => {
                    classes[*k] = (classes[*k] + 1) % p.vocab as i64;
                }
                (
                    Self::Probability,
                    Target::TopK {
                        k, probabilities, ..
                    },
                ) => {
                    probabilities[*k] *= 0.5;
                }
                (Self::EntropyWeight, _) => change(&mut d.entropy_weight),
                (Self::ClassWeight, _) => d.class_weights.as_mut().expect("weights")[2] += 1.0,
                (Self::Prior, _) => d.prior.as_mut().expect("a prior")[2] *= 2.0,
                _ => {}
            }
        }
        match self {
            Self::Target => p.targets[1] = (p.targets[1] + 1) % p.vocab as i64,
            Self::Smoothing => change(&mut p.eps),
            Self::Weight => p.weights.as_mut().expect("a weight a row")[1] += 1.0,
            _ => {}
        }
        p
    }

    /// The rows that cannot be computed then.
    pub fn rows(self, p: &Problem) -> Vec<usize> {
        match self {
            Self::ClassWeight | Self::Prior => (0..p.rows()).filter(|&i| !p.ignored(i)).collect(),
            _ => vec![1],
        }
    }
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
    /// Where the targets are not one class a row, smoothed evenly.
    pub distribution: Option<Distribution>,
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
    pub ranks: Vec<Ranks>,
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

    pub fn entropy_weight(&self, i: usize) -> f32 {
        match self.distribution.as_ref().map(|d| &d.entropy_weight) {
            None => 0.0,
            Some(Eps::Uniform(weight)) => *weight,
            Some(Eps::PerRow(weights)) => weights[i],
        }
    }

    /// Classes that the row's target names, with their probabilities, without those that are absent.
    fn entries(&self, i: usize) -> Vec<(i64, f32)> {
        let all = match self.distribution.as_ref().map(|d| &d.target) {
            None | Some(Target::Class) => vec![(self.targets[i], 1.0)],
            Some(Target::TopK {
                k,
                classes,
                probabilities,
            }) => {
                let here = i * k..(i + 1) * k;
                let classes = classes[here.clone()].iter().copied();
                classes.zip(probabilities[here].iter().copied()).collect()
            }
            Some(Target::Probabilities { .. }) => Vec::new(),
        };
        all.into_iter()
            .filter(|&(class, _)| class != self.ignore_index())
            .collect()
    }

    fn probabilities(&self, i: usize) -> Option<&[f32]> {
        match self.distribution.as_ref().map(|d| &d.target) {
            Some(Target::Probabilities { values, .. }) => {
                Some(&values[i * self.vocab..][..self.vocab])
            }
            _ => None,
        }
    }

    pub fn ignored(&self, i: usize) -> bool {
        self.probabilities(i).is_none() && self.entries(i).is_empty()
    }

    /// What a row counts in a mean.
    pub fn count(&self, i: usize) -> f64 {
        let weight = f64::from(self.weight(i));
        let of_class = match &self.distribution {
            Some(Distribution {
                target: Target::Class,
                class_weights: Some(weights),
                ..
            }) => usize::try_from(self.targets[i])
                .ok()
                .and_then(|t| weights.get(t)),
            _ => None,
        };
        weight * of_class.map_or(1.0, |&c| f64::from(c))
    }

    /// u32 targets cannot be negative.
    pub fn ignore_index(&self) -> i64 {
        if self.targets_are_i64 {
            IGNORED
        } else {
            i64::from(u32::MAX)
        }
    }

    /// Whether a row has a bad value of its own.
    pub fn is_bad(&self, i: usize) -> bool {
        let (eps, weight) = (self.eps(i), self.weight(i));
        let good = |value: &f32| (0.0..f32::INFINITY).contains(value);
        let good_entry =
            |(class, t): &(i64, f32)| (0..self.vocab as i64).contains(class) && good(t);
        let good_row = self.entries(i).iter().all(good_entry)
            && self.probabilities(i).is_none_or(|t| t.iter().all(good))
            && (0.0..=1.0).contains(&eps)
            && good(&weight)
            && self.entropy_weight(i).is_finite();
        !self.ignored(i) && !good_row
    }

    /// Whether a class has a bad value, and so every row.
    pub fn has_bad_classes(&self) -> bool {
        let Some(distribution) = &self.distribution else {
            return false;
        };
        let values = [&distribution.class_weights, &distribution.prior];
        let bad = |value: &f32| !(0.0..f32::INFINITY).contains(value);
        let any = values.into_iter().flatten().flatten().any(bad);
        let nothing = |prior: &Vec<f32>| prior.iter().all(|&u| u == 0.0);
        any || distribution.prior.as_ref().is_some_and(nothing)
    }

    /// Whether a row's loss is the probability of one class and nothing else.
    pub fn is_one_term(&self, i: usize) -> bool {
        let class = |d: &Distribution| matches!(d.target, Target::Class);
        self.eps(i) == 0.0
            && self.z_loss == 0.0
            && self.entropy_weight(i) == 0.0
            && self.distribution.as_ref().is_none_or(class)
    }

    /// How large what multiplies a row's probabilities may be: 1, or with class weights or one of the entropy more.
    pub fn magnitude(&self, i: usize) -> f64 {
        let weights = self
            .distribution
            .as_ref()
            .and_then(|d| d.class_weights.as_ref());
        let largest = weights.into_iter().flatten().copied().fold(1.0, f32::max);
        f64::from(largest + self.entropy_weight(i).abs())
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
        let bad = |i: usize| self.has_bad_classes() || self.is_bad(i);
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
        let cpu = &Device::Cpu;
        let good_entries = |i: usize| match () {
            _ if self.ignored(i) => vec![(IGNORED, 0.0)],
            _ if bad(i) => vec![(0, 1.0)],
            _ => self.entries(i),
        };
        let targets = match self.distribution.as_ref().map(|d| &d.target) {
            None | Some(Target::Class) => {
                let classes: Vec<i64> = (0..rows).map(|i| good_entries(i)[0].0).collect();
                Targets::from(Tensor::new(classes, cpu)?)
            }
            Some(&Target::TopK { k, .. }) => {
                let (mut classes, mut probabilities) =
                    (vec![IGNORED; rows * k], vec![0f32; rows * k]);
                for i in 0..rows {
                    for (j, (class, t)) in good_entries(i).into_iter().enumerate() {
                        (classes[i * k + j], probabilities[i * k + j]) = (class, t);
                    }
                }
                Targets::TopK {
                    classes: Tensor::from_vec(classes, (rows, k), cpu)?,
                    probabilities: Tensor::from_vec(probabilities, (rows, k), cpu)?,
                }
            }
            Some(Target::Probabilities { .. }) => {
                let row = |i: usize| match bad(i) {
                    true => vec![0.0; self.vocab],
                    false => self
                        .probabilities(i)
                        .expect("that is what they are")
                        .to_vec(),
                };
                let values = (0..rows).flat_map(row).collect::<Vec<f32>>();
                Targets::from(Tensor::from_vec(values, (rows, self.vocab), cpu)?)
            }
        };
        let mut loss = CrossEntropy::new()
            .reduction(Reduction::None)
            .smoothing(Smoothing::PerRow(Tensor::new(good(Self::eps), cpu)?))
            .row_weights(&Tensor::new(good(Self::weight), cpu)?)
            .z_loss(self.z_loss)
            .logit_scale(self.logit_scale);
        if let Some(distribution) = &self.distribution {
            let weights = Tensor::new(good(Self::entropy_weight), cpu)?;
            loss = loss.entropy_weight(RowValue::PerRow(weights));
            if let (Some(c), false) = (&distribution.class_weights, self.has_bad_classes()) {
                loss = loss.class_weights(&Tensor::new(c.as_slice(), cpu)?);
            }
            if let (Some(u), false) = (&distribution.prior, self.has_bad_classes()) {
                loss = loss.smoothing_prior(&Tensor::new(u.as_slice(), cpu)?);
            }
        }
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
