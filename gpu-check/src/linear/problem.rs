//! One call of `forward_linear`: its inputs, its exact results in f64, and the same call on a device, where its arguments
//! may lie in other tensors' memory.

use std::{ops::Range, sync::Arc};

use anyhow::{Context, Result, ensure};
use candle_core::{DType, Device, Tensor, Var};
use candle_cross_entropy::{
    CrossEntropy, LossAndGrad, Reduction, RowStats, Targets, parallel::Communicator,
};
use rand::{Rng, SeedableRng, rngs::StdRng};

use crate::{
    cases::{Options, gaussian, values},
    targets::{Given, targets_on},
};

pub const TYPES: [DType; 3] = [DType::F32, DType::F16, DType::BF16];

/// Sizes of a problem, and whether it has a bias.
#[derive(Clone, Copy)]
pub struct Shape {
    /// The targets'.
    pub rows: &'static [usize],
    /// Classes, padding not counted.
    pub vocab: usize,
    pub depth: usize,
    pub bias: bool,
}

impl Shape {
    pub fn row_count(&self) -> usize {
        self.rows.iter().product()
    }
}

/// Inputs, on the CPU.
#[derive(Clone)]
pub struct Problem {
    pub shape: Shape,
    pub label: String,
    pub reduction: Reduction,
    /// Without the values of each row.
    pub loss: CrossEntropy,
    smoothing: Option<Tensor>,
    weights: Option<Tensor>,
    /// (…, D), in the type under test as the next two.
    pub hidden: Tensor,
    /// (V and padding, D)
    pub weight: Tensor,
    pub bias: Option<Tensor>,
    /// (…), i64, of which `given` was made
    pub classes: Tensor,
    given: Given,
    /// What a logit is multiplied by at the most.
    scale: f64,
}

/// Where hidden and weight lie in memory.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Placement {
    Contiguous,
    /// (D, V), seen through a transposition.
    TransposedWeight,
    /// The middle of a table of classes.
    RowsOfATable,
    /// Part of each row of something wider: strides above the length, odd starts.
    InsideLongerRows,
    /// Hidden states (D, N) or (T, B, D), seen through a transposition.
    TransposedHidden,
    /// All but the last state, or the last of each sequence.
    WithoutTheLast,
}

impl Placement {
    pub const ALL: [Self; 6] = [
        Self::Contiguous,
        Self::TransposedWeight,
        Self::RowsOfATable,
        Self::InsideLongerRows,
        Self::TransposedHidden,
        Self::WithoutTheLast,
    ];

    /// A tensor that [`hidden`](Self::hidden) finds `hidden` in; what is around it must not be read.
    fn around_hidden(self, hidden: &Tensor) -> candle_core::Result<Tensor> {
        match self {
            Self::InsideLongerRows => surround(hidden, hidden.rank() - 1, 3, 2),
            Self::TransposedHidden => hidden.transpose(0, 1)?.contiguous(),
            Self::WithoutTheLast => surround(hidden, hidden.rank() - 2, 0, 1),
            _ => Ok(hidden.clone()),
        }
    }

    fn hidden(self, whole: &Tensor, shape: &Shape) -> candle_core::Result<Tensor> {
        let last = shape.rows.len() - 1;
        match self {
            Self::InsideLongerRows => whole.narrow(last + 1, 3, shape.depth),
            Self::TransposedHidden => whole.transpose(0, 1),
            Self::WithoutTheLast => whole.narrow(last, 0, shape.rows[last]),
            _ => Ok(whole.clone()),
        }
    }

    fn around_weight(self, weight: &Tensor) -> candle_core::Result<Tensor> {
        match self {
            Self::TransposedWeight => weight.t()?.contiguous(),
            Self::RowsOfATable => surround(weight, 0, 5, 7),
            Self::InsideLongerRows => surround(weight, 1, 1, 4),
            _ => Ok(weight.clone()),
        }
    }

    fn weight(self, whole: &Tensor, [rows, depth]: [usize; 2]) -> candle_core::Result<Tensor> {
        match self {
            Self::TransposedWeight => whole.t(),
            Self::RowsOfATable => whole.narrow(0, 5, rows),
            Self::InsideLongerRows => whole.narrow(1, 1, depth),
            _ => Ok(whole.clone()),
        }
    }
}

/// NaN before and behind a tensor, along a dimension.
fn surround(
    tensor: &Tensor,
    dim: usize,
    before: usize,
    behind: usize,
) -> candle_core::Result<Tensor> {
    let guard = |len: usize| {
        let mut dims = tensor.dims().to_vec();
        dims[dim] = len;
        Tensor::full(f32::NAN, dims, tensor.device())?.to_dtype(tensor.dtype())
    };
    let parts = [guard(before)?, tensor.clone(), guard(behind)?];
    let some: Vec<_> = parts.iter().filter(|part| part.elem_count() > 0).collect();
    Tensor::cat(&some, dim)
}

/// What a call gives: on a device, or exactly.
pub struct Outcome {
    pub loss: Tensor,
    pub stats: RowStats,
    /// Of hidden, weight and, where there is one, bias.
    pub gradients: Vec<Tensor>,
}

pub struct Exact {
    pub outcome: Outcome,
    /// (rows, vocab), before scale and softcap.
    pub logits: Vec<f64>,
    /// Each row's part of the result: its weight, divided as the reduction does. 0 for ignored rows.
    pub shares: Vec<f64>,
    /// What a logit may be off on the device, scaled.
    pub blur: f64,
}

impl Problem {
    pub fn new(
        dtype: DType,
        options: Options,
        shape: Shape,
        reduction: Reduction,
        seed: u64,
    ) -> Result<Self> {
        let mut rng = StdRng::seed_from_u64(seed);
        let Shape {
            vocab, depth, bias, ..
        } = shape;
        let rows = shape.row_count();
        let cpu = &Device::Cpu;
        let mut random = |dims: &[usize], deviation: f32| -> Result<Tensor> {
            let count = dims.iter().product();
            let x: Vec<f32> = (0..count).map(|_| deviation * gaussian(&mut rng)).collect();
            Ok(Tensor::from_vec(x, dims, cpu)?.to_dtype(dtype)?)
        };
        let hidden = random(&[shape.rows, &[depth]].concat(), 1.0)?;
        let classes = random(&[vocab, depth], 3.0 / (depth as f32).sqrt())?;
        let bias = bias.then(|| random(&[vocab], 1.0)).transpose()?;
        let padded = |classes: &Tensor| surround(classes, 0, 0, options.padding);
        let (weight, bias) = (padded(&classes)?, bias.as_ref().map(padded).transpose()?);
        let targets = (0..rows).map(|i| match i % 5 {
            4 => -100,
            _ => rng.random_range(0..vocab as i64),
        });
        let targets = Tensor::from_vec(targets.collect::<Vec<_>>(), shape.rows, cpu)?;
        let mut per_row = |range: std::ops::Range<f32>| {
            let values = (0..rows).map(|_| rng.random_range(range.clone()));
            Tensor::from_vec(values.collect::<Vec<_>>(), shape.rows, cpu)
        };
        let smoothing = options.per_row.then(|| per_row(0.0..1.0)).transpose()?;
        let weights = options.weights.then(|| per_row(0.1..3.0)).transpose()?;
        let mut loss = CrossEntropy::new()
            .z_loss(options.z_loss)
            .vocab_size(vocab)
            .reduction(reduction);
        if let Some(eps) = options.uniform {
            loss = loss.smoothing(eps);
        }
        if let Some(c) = options.softcap {
            loss = loss.softcap(c);
        }
        if let Some(s) = options.scale {
            loss = loss.logit_scale(s);
        }
        let with = if bias.is_some() { ", bias" } else { "" };
        Ok(Self {
            label: format!("{rows} rows, V {vocab}, D {depth}{with}, {reduction:?}"),
            shape,
            reduction,
            loss,
            smoothing,
            weights,
            hidden,
            weight,
            bias,
            given: Given::new(options.distribution, &targets, vocab, -100, &mut rng)?,
            classes: targets,
            scale: f64::from(options.scale.unwrap_or(1.0)).max(1.0),
        })
    }

    pub fn dtype(&self) -> DType {
        self.hidden.dtype()
    }

    /// Bytes of a logit in a tile: the CPU's are f32.
    pub fn logit_size(&self, device: &Device) -> usize {
        if device.is_cpu() {
            4
        } else {
            self.dtype().size_in_bytes()
        }
    }

    /// Replaces targets.
    pub fn with_targets(mut self, target: impl Fn(usize, i64) -> i64) -> Result<Self> {
        let targets = self.classes.flatten_all()?.to_vec1::<i64>()?;
        let targets = targets.into_iter().enumerate().map(|(i, y)| target(i, y));
        let targets = targets.collect::<Vec<_>>();
        self.classes = Tensor::from_vec(targets, self.shape.rows, &Device::Cpu)?;
        let rng = &mut StdRng::seed_from_u64(0); // one class a row takes nothing of it
        self.given = Given::new(None, &self.classes, self.shape.vocab, -100, rng)?;
        Ok(self)
    }

    /// What a rank of several has: a slice of the classes, the last with the padding.
    pub fn of_rank(&self, ranks: Arc<dyn Communicator>, classes: Range<usize>) -> Result<Self> {
        let (first, vocab) = (classes.start, self.shape.vocab);
        let end = match classes.end == vocab {
            true => self.weight.dims()[0],
            false => classes.end,
        };
        let slice = |of: &Tensor| of.narrow(0, first, end - first);
        Ok(Self {
            loss: (self.loss.clone())
                .vocab_size(classes.len())
                .vocab_shard(ranks, first, vocab),
            weight: slice(&self.weight)?,
            bias: self.bias.as_ref().map(slice).transpose()?,
            given: self.given.of_classes(classes)?,
            ..self.clone()
        })
    }

    pub fn targets_on(&self, device: &Device) -> Result<Targets> {
        targets_on(&self.given.targets, device)
    }

    /// `loss` with this problem's values of each row.
    pub fn on(&self, device: &Device, loss: &CrossEntropy) -> Result<CrossEntropy> {
        let mut loss = loss.clone();
        if let Some(smoothing) = &self.smoothing {
            loss = loss.smoothing(smoothing.to_device(device)?);
        }
        if let Some(weights) = &self.weights {
            loss = loss.row_weights(&weights.to_device(device)?);
        }
        self.given.on(device, loss)
    }

    /// Gradient of what `backward()` starts from with respect to a row's loss, or to the one loss.
    fn upstream(&self, row: usize) -> f64 {
        match self.reduction {
            Reduction::None => 0.5 + (row % 7) as f64,
            _ => 3.0,
        }
    }

    /// What `backward()` starts from.
    fn scalar(&self, loss: &Tensor) -> candle_core::Result<Tensor> {
        if self.reduction != Reduction::None {
            return loss * 3.0;
        }
        let factors: Vec<f32> = (0..self.shape.row_count())
            .map(|row| self.upstream(row) as f32)
            .collect();
        (loss * Tensor::from_vec(factors, self.shape.rows, loss.device())?)?.sum_all()
    }

    /// Results of `loss` on the device, and the gradients of variables for all arguments.
    pub fn run(
        &self,
        device: &Device,
        loss: &CrossEntropy,
        placement: Placement,
    ) -> Result<Outcome> {
        let var =
            |tensor: Tensor| -> Result<Var> { Ok(Var::from_tensor(&tensor.to_device(device)?)?) };
        let hidden = var(placement.around_hidden(&self.hidden)?)?;
        let weight = var(placement.around_weight(&self.weight)?)?;
        let bias = self.bias.clone().map(var).transpose()?;
        let weight_shape = [self.weight.dims()[0], self.shape.depth];
        let see_hidden = |whole: &Tensor| placement.hidden(whole, &self.shape);
        let see_weight = |whole: &Tensor| placement.weight(whole, weight_shape);
        let (loss, stats) = self.on(device, loss)?.forward_linear_with_stats(
            &see_hidden(&hidden)?,
            &see_weight(&weight)?,
            bias.as_deref(),
            self.targets_on(device)?,
        )?;
        let mut store = self.scalar(&loss)?.backward()?;
        let mut gradient = |var: &Var| store.remove(var).context("no gradient");
        let mut gradients = vec![
            see_hidden(&gradient(&hidden)?)?,
            see_weight(&gradient(&weight)?)?,
        ];
        if let Some(bias) = &bias {
            gradients.push(gradient(bias)?);
        }
        for (gradient, argument) in gradients.iter().zip([&self.hidden, &self.weight]) {
            ensure!(
                gradient.dtype() == self.dtype() && gradient.dims() == argument.dims(),
                "{}: a gradient is {gradient:?}",
                self.label
            );
        }
        Ok(Outcome {
            loss,
            stats,
            gradients,
        })
    }

    /// The same by candle's products of whole logits in the type under test. Without the padding.
    pub fn run_unfused(&self, device: &Device) -> Result<Vec<Tensor>> {
        let var = |tensor: &Tensor| -> Result<Var> {
            let classes = tensor.narrow(0, 0, self.shape.vocab)?;
            Ok(Var::from_tensor(&classes.to_device(device)?)?)
        };
        let (rows, depth) = (self.shape.row_count(), self.shape.depth);
        let hidden = Var::from_tensor(&self.hidden.to_device(device)?)?;
        let (weight, bias) = (var(&self.weight)?, self.bias.as_ref().map(var).transpose()?);
        let mut logits = hidden.reshape((rows, depth))?.matmul(&weight.t()?)?;
        if let Some(bias) = &bias {
            logits = logits.broadcast_add(bias)?;
        }
        let logits = logits.reshape([self.shape.rows, &[self.shape.vocab]].concat())?;
        let loss = (self.on(device, &self.loss)?).forward(&logits, self.targets_on(device)?)?;
        let mut store = self.scalar(&loss)?.backward()?;
        [Some(hidden), Some(weight), bias]
            .iter()
            .flatten()
            .map(|var| store.remove(var).context("no gradient"))
            .collect()
    }

    /// Everything in f64: logits, the reference, and the chain rule.
    pub fn exact(&self, device: &Device) -> Result<Exact> {
        let vocab = self.shape.vocab;
        let wide = |tensor: &Tensor| tensor.to_dtype(DType::F64);
        let (rows, depth) = (self.shape.row_count(), self.shape.depth);
        let hidden = wide(&self.hidden)?.reshape((rows, depth))?;
        let weight = wide(&self.weight.narrow(0, 0, vocab)?)?;
        let mut logits = hidden.matmul(&weight.t()?)?;
        if let Some(bias) = &self.bias {
            logits = logits.broadcast_add(&wide(&bias.narrow(0, 0, vocab)?)?)?;
        }
        let shaped = logits.reshape([self.shape.rows, &[vocab]].concat())?;
        let loss = self.on(&Device::Cpu, &self.loss)?;
        let LossAndGrad { loss, grad, stats } = loss.reference(&shaped, &self.given.targets)?;
        let upstream: Vec<f64> = (0..rows).map(|row| self.upstream(row)).collect();
        let upstream = Tensor::from_vec(upstream, (rows, 1), &Device::Cpu)?;
        let grad = grad.reshape((rows, vocab))?.broadcast_mul(&upstream)?;
        let padding = self.weight.dims()[0] - vocab;
        let padded = |gradient: Tensor| gradient.pad_with_zeros(0, 0, padding);
        let mut gradients = vec![
            grad.matmul(&weight)?.reshape(self.hidden.dims())?,
            padded(grad.t()?.matmul(&hidden)?)?,
        ];
        if self.bias.is_some() {
            gradients.push(padded(grad.sum(0)?)?);
        }
        let logits = logits.flatten_all()?.to_vec1::<f64>()?;
        let largest = logits.iter().fold(1.0, |m: f64, z| m.max(z.abs()));
        // A logit is rounded to its type on CUDA, and half a unit in the last place is this part of it at the most; on
        // the CPU and for f32 it is off by what a product in f32 is.
        let rounding = match self.dtype() {
            DType::BF16 if device.is_cuda() => 2f64.powi(-8),
            DType::F16 if device.is_cuda() => 2f64.powi(-11),
            _ => 0.0,
        };
        Ok(Exact {
            outcome: Outcome {
                loss,
                stats,
                gradients,
            },
            blur: self.given.magnitude * (self.scale * rounding * largest + 1e-5),
            shares: self.shares()?,
            logits,
        })
    }

    fn shares(&self) -> Result<Vec<f64>> {
        let mut shares = match &self.weights {
            Some(weights) => values(weights)?,
            None => vec![1.0; self.shape.row_count()],
        };
        for (share, count) in shares.iter_mut().zip(&self.given.counts) {
            if *count == 0.0 {
                *share = 0.0;
            }
        }
        let divisor = match self.reduction {
            Reduction::None | Reduction::Sum => 1.0,
            Reduction::SumOver(n) => n,
            Reduction::Mean => (shares.iter().zip(&self.given.counts))
                .map(|(share, count)| share * count)
                .sum::<f64>()
                .max(f64::MIN_POSITIVE),
        };
        Ok(shares.into_iter().map(|share| share / divisor).collect())
    }
}
