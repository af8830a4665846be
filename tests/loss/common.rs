//! What the tests share: random problems, and small comparisons.

use candle_core::{CpuStorage, DType, Device, Result, Storage, Tensor};
use candle_cross_entropy::{CrossEntropy, LossAndGrad, Reduction, RowStats, Targets};
use half::{bf16, f16};
use rand::{Rng, SeedableRng, rngs::StdRng};
use rand_distr::{Distribution, StandardNormal};

pub const FLOATS: [DType; 4] = [DType::F32, DType::F64, DType::F16, DType::BF16];
pub const CPU: &Device = &Device::Cpu;

pub fn rng(seed: u64) -> StdRng {
    StdRng::seed_from_u64(seed)
}

pub fn normal(rng: &mut StdRng, count: usize, deviation: f64) -> Vec<f64> {
    (0..count)
        .map(|_| deviation * <StandardNormal as Distribution<f64>>::sample(&StandardNormal, rng))
        .collect()
}

pub fn tensor(values: Vec<f64>, shape: &[usize], dtype: DType) -> Tensor {
    Tensor::from_vec(values, shape, CPU)
        .unwrap()
        .to_dtype(dtype)
        .unwrap()
}

pub fn targets(values: Vec<i64>, shape: &[usize], dtype: DType) -> Tensor {
    match dtype {
        DType::U32 => Tensor::from_vec(
            values.into_iter().map(|v| v as u32).collect::<Vec<_>>(),
            shape,
            CPU,
        ),
        _ => Tensor::from_vec(values, shape, CPU),
    }
    .unwrap()
}

pub fn values(tensor: &Tensor) -> Vec<f64> {
    tensor
        .to_dtype(DType::F64)
        .unwrap()
        .flatten_all()
        .unwrap()
        .to_vec1()
        .unwrap()
}

pub fn scalar(tensor: &Tensor) -> f64 {
    assert_eq!(tensor.rank(), 0, "a scalar");
    values(tensor)[0]
}

/// The exact representation, in which 0 and −0 differ.
pub fn bits(tensor: &Tensor) -> Vec<u64> {
    let tensor = tensor.flatten_all().unwrap();
    match tensor.dtype() {
        DType::F32 => tensor
            .to_vec1::<f32>()
            .unwrap()
            .into_iter()
            .map(|v| v.to_bits().into())
            .collect(),
        DType::F64 => tensor
            .to_vec1::<f64>()
            .unwrap()
            .into_iter()
            .map(f64::to_bits)
            .collect(),
        DType::F16 => tensor
            .to_vec1::<f16>()
            .unwrap()
            .into_iter()
            .map(|v| v.to_bits().into())
            .collect(),
        DType::BF16 => tensor
            .to_vec1::<bf16>()
            .unwrap()
            .into_iter()
            .map(|v| v.to_bits().into())
            .collect(),
        DType::U32 => tensor
            .to_vec1::<u32>()
            .unwrap()
            .into_iter()
            .map(u64::from)
            .collect(),
        other => panic!("no bits of {other:?}"),
    }
}

pub fn stats_bits(stats: &RowStats) -> Vec<Vec<u64>> {
    let RowStats {
        nll,
        lse,
        entropy,
        max_prob,
        grad_norm_sq,
        predicted,
    } = stats;
    [nll, lse, entropy, max_prob, grad_norm_sq, predicted]
        .map(bits)
        .to_vec()
}

/// Address of a tensor's first element.
pub fn address(tensor: &Tensor) -> usize {
    let (storage, layout) = tensor.storage_and_layout();
    let Storage::Cpu(storage) = &*storage else {
        panic!("on the CPU")
    };
    let (start, size) = match storage {
        CpuStorage::F32(v) => (v.as_ptr() as usize, 4),
        CpuStorage::F64(v) => (v.as_ptr() as usize, 8),
        CpuStorage::F16(v) => (v.as_ptr() as usize, 2),
        CpuStorage::BF16(v) => (v.as_ptr() as usize, 2),
        _ => panic!("a float type"),
    };
    start + layout.start_offset() * size
}

/// The result's type for logits of `dtype`.
pub fn loss_dtype(dtype: DType) -> DType {
    if dtype == DType::F64 {
        DType::F64
    } else {
        DType::F32
    }
}

#[derive(Clone, Debug)]
pub enum Eps {
    Uniform(f32),
    PerRow(Vec<f32>),
}

/// Options of the loss whose values a test can read back.
#[derive(Clone, Debug)]
pub struct Setup {
    pub eps: Eps,
    pub weights: Option<Vec<f32>>,
    pub class_weights: Option<Vec<f32>>,
    pub prior: Option<Vec<f32>>,
    pub entropy: Eps,
    pub ignore: i64,
    pub z_loss: f32,
    pub softcap: Option<f32>,
    pub scale: f32,
    pub vocab: Option<usize>,
    pub reduction: Reduction,
}

impl Default for Setup {
    fn default() -> Self {
        Self {
            eps: Eps::Uniform(0.0),
            weights: None,
            class_weights: None,
            prior: None,
            entropy: Eps::Uniform(0.0),
            ignore: -100,
            z_loss: 0.0,
            softcap: None,
            scale: 1.0,
            vocab: None,
            reduction: Reduction::Mean,
        }
    }
}

impl Setup {
    pub fn build(&self, shape: &[usize]) -> CrossEntropy {
        let per_row = |values: &Vec<f32>| Tensor::from_vec(values.clone(), shape, CPU).unwrap();
        let mut loss = CrossEntropy::new()
            .ignore_index(self.ignore)
            .z_loss(self.z_loss)
            .reduction(self.reduction);
        loss = match &self.eps {
            Eps::Uniform(value) => loss.smoothing(*value),
            Eps::PerRow(values) => loss.smoothing(per_row(values)),
        };
        if self.scale != 1.0 {
            loss = loss.logit_scale(self.scale);
        }
        if let Some(weights) = &self.weights {
            loss = loss.row_weights(&per_row(weights));
        }
        let per_class = |values: &Vec<f32>| Tensor::new(values.as_slice(), CPU).unwrap();
        if let Some(weights) = &self.class_weights {
            loss = loss.class_weights(&per_class(weights));
        }
        if let Some(prior) = &self.prior {
            loss = loss.smoothing_prior(&per_class(prior));
        }
        loss = match &self.entropy {
            Eps::Uniform(value) => loss.entropy_weight(*value),
            Eps::PerRow(values) => loss.entropy_weight(per_row(values)),
        };
        if let Some(c) = self.softcap {
            loss = loss.softcap(c);
        }
        if let Some(vocab) = self.vocab {
            loss = loss.vocab_size(vocab);
        }
        loss
    }
}

/// A setup, logits and targets.
#[derive(Clone, Debug)]
pub struct Problem {
    pub setup: Setup,
    pub logits: Tensor,
    pub targets: Tensor,
    /// What takes the place of `targets`, whose shape it shares.
    pub distribution: Option<Targets>,
}

/// Kinds of targets other than one class a row.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Kind {
    Probabilities(DType),
    TopK(usize),
}

impl Problem {
    /// Logits like a language model's, targets half the time the largest logit.
    pub fn random(seed: u64, shape: &[usize], dtype: DType, setup: Setup) -> Self {
        let mut rng = rng(seed);
        let (&width, rows) = shape.split_last().unwrap();
        let count: usize = rows.iter().product();
        let vocab = setup.vocab.unwrap_or(width);
        let mut x = normal(&mut rng, count * width, 4.0);
        let mut y = Vec::with_capacity(count);
        for row in x.chunks_mut(width) {
            row[vocab..].fill(f64::NAN); // padding is never read
            let largest = (0..vocab)
                .max_by(|&a, &b| row[a].total_cmp(&row[b]))
                .unwrap();
            y.push(if rng.random() {
                largest
            } else {
                rng.random_range(0..vocab)
            } as i64);
        }
        Self {
            setup,
            logits: tensor(x, shape, dtype),
            targets: targets(y, rows, DType::I64),
            distribution: None,
        }
    }

    /// Values for all classes and a weight of the entropy.
    pub fn general(mut self, seed: u64) -> Self {
        let mut rng = rng(seed ^ 0x9e4e);
        let width = self.logits.dims().last().copied().unwrap();
        let vocab = self.setup.vocab.unwrap_or(width);
        let rows = self.targets.elem_count();
        let mut values = |least: f32| -> Vec<f32> {
            let value = |k: usize| {
                if k % 7 == 3 {
                    0.0
                } else {
                    least + rng.random::<f32>()
                }
            };
            (0..vocab.max(2)).map(value).take(vocab).collect()
        };
        self.setup.class_weights = Some(values(0.5));
        self.setup.prior = Some(values(0.0));
        let beta = |i: usize| [0.3, -0.2, 0.0, 1.0][i % 4];
        self.setup.entropy = Eps::PerRow((0..rows).map(beta).collect());
        self
    }

    /// Targets of another kind: near the model's own distribution, far from it, sure of one class, and not summing to 1; of
    /// a few classes with some that are absent, named twice, or all absent.
    pub fn with(mut self, kind: Kind, seed: u64) -> Self {
        let mut rng = rng(seed ^ 0x7a26);
        let (&width, dims) = self.logits.dims().split_last().unwrap();
        let dims = dims.to_vec();
        let rows: usize = dims.iter().product();
        let vocab = self.setup.vocab.unwrap_or(width);
        if matches!(kind, Kind::Probabilities(_)) {
            // No row is ignored.
            let mut x = values(&self.logits);
            let mut y = values(&self.targets);
            for (i, y) in y.iter_mut().enumerate().filter(|(_, y)| **y < 0.0) {
                *y = 0.0;
                let fresh = normal(&mut rng, vocab, 4.0);
                x[i * width..][..vocab].copy_from_slice(&fresh);
            }
            self.logits = tensor(x, self.logits.dims(), self.logits.dtype());
            let y = y.into_iter().map(|y| y as i64).collect();
            self.targets = targets(y, &dims, DType::I64);
        }
        let x = values(&self.logits);
        let y = values(&self.targets);
        self.distribution = Some(match kind {
            Kind::Probabilities(dtype) => {
                let mut t = vec![f64::NAN; rows * width]; // padding is never read
                for i in 0..rows {
                    let row = &x[i * width..][..vocab];
                    let largest = row.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                    let distance = |k: usize| match i % 4 {
                        _ if !row[k].is_finite() || !largest.is_finite() => -1e3,
                        0 => row[k] - largest,
                        1 => 0.3 * (k % 11) as f64,
                        2 => 0.9 * (row[k] - largest) + 0.1 * (k % 3) as f64,
                        _ => 0.0,
                    };
                    let powers: Vec<f64> = (0..vocab).map(|k| distance(k).exp()).collect();
                    let sum = powers.iter().sum::<f64>().max(1e-300); // all may be out of reach
                    for k in 0..vocab {
                        t[i * width + k] = match i % 4 {
                            3 => f64::from(k as f64 == y[i]),
                            2 => 0.7 * powers[k] / sum,
                            _ => powers[k] / sum,
                        };
                    }
                }
                Targets::Probabilities(tensor(t, &[&dims[..], &[width]].concat(), dtype))
            }
            Kind::TopK(k) => {
                let (mut classes, mut t) = (Vec::new(), Vec::new());
                for (i, &y) in y.iter().enumerate() {
                    for j in 0..k {
                        let absent = j % 5 == 4 || (rows > 2 && i == rows / 2) || y < 0.0;
                        let class = match j {
                            _ if absent => self.setup.ignore,
                            0 => y as i64,
                            3 => *classes.last().unwrap(), // named twice
                            _ => rng.random_range(0..vocab) as i64,
                        };
                        classes.push(class);
                        t.push(match absent {
                            true => f64::NAN, // not read
                            false => rng.random::<f64>() * 1.5 / k as f64,
                        });
                    }
                }
                let shape = [&dims[..], &[k]].concat();
                Targets::top_k(
                    &targets(classes, &shape, DType::I64),
                    &tensor(t, &shape, DType::F32),
                )
            }
        });
        self
    }

    /// What the entry points are given.
    pub fn given(&self) -> Targets {
        let classes = || Targets::Classes(self.targets.clone());
        self.distribution.clone().unwrap_or_else(classes)
    }

    /// The factor of each row in the gradient, w·s and the largest c over the divisor: what its absolute tolerance grows
    /// with.
    pub fn row_factors(&self) -> Vec<f64> {
        let (setup, y) = (&self.setup, values(&self.targets));
        let class_weight = |k: usize| {
            setup
                .class_weights
                .as_ref()
                .map_or(1.0, |c| f64::from(c[k]))
        };
        let counted = |i: usize| match &self.distribution {
            None => y[i] != setup.ignore as f64,
            Some(Targets::TopK { classes, .. }) => {
                let k = classes.elem_count() / y.len();
                let ignored = |&class: &f64| class == setup.ignore as f64;
                !values(classes)[i * k..(i + 1) * k].iter().all(ignored)
            }
            Some(_) => true,
        };
        let weight = |i: usize| setup.weights.as_ref().map_or(1.0, |w| f64::from(w[i]));
        let count = |i: usize| match &self.distribution {
            None if (0.0..1e9).contains(&y[i]) => weight(i) * class_weight(y[i] as usize),
            _ => weight(i),
        };
        let rows = y.len();
        let total: f64 = (0..rows).filter(|&i| counted(i)).map(count).sum();
        let divisor = match setup.reduction {
            Reduction::None | Reduction::Sum => 1.0,
            Reduction::Mean if total == 0.0 => 1.0,
            Reduction::Mean => total,
            Reduction::SumOver(n) => n,
        };
        let classes = setup.class_weights.iter().flatten();
        let largest = classes.fold(1.0, |most: f64, &c| most.max(c.into()));
        let factor = |i| weight(i) * f64::from(setup.scale) * largest / divisor;
        (0..rows).map(factor).collect()
    }

    /// Every option at once, with rows of ε 0 and 1, rows of weight 0, ignored first and last rows.
    pub fn everything(seed: u64, shape: &[usize], dtype: DType, reduction: Reduction) -> Self {
        let mut rng = rng(seed ^ 0x5eed);
        let (&width, dims) = shape.split_last().unwrap();
        let rows: usize = dims.iter().product();
        let eps = (0..rows)
            .map(|i| [rng.random::<f32>(), 0.1, 0.0, 0.3, 1.0][i % 5])
            .collect();
        let weights = (0..rows)
            .map(|i| [1.5, 0.25 + rng.random::<f32>(), 1.0, 0.0][i % 4])
            .collect();
        let setup = Setup {
            eps: Eps::PerRow(eps),
            weights: Some(weights),
            ignore: -7,
            z_loss: 1e-3,
            softcap: Some(30.0),
            scale: 0.75,
            vocab: Some(width - width / 8),
            reduction,
            ..Setup::default()
        };
        let mut problem = Self::random(seed, shape, dtype, setup);
        if rows >= 3 {
            problem.ignore(|i| i == 0 || i == rows - 1);
        }
        problem
    }

    /// Makes rows ignored and their logits NaN.
    pub fn ignore(&mut self, which: impl Fn(usize) -> bool) {
        let mut y: Vec<i64> = self.targets.flatten_all().unwrap().to_vec1().unwrap();
        let width = self.logits.dims().last().copied().unwrap();
        let mut x = values(&self.logits);
        for i in (0..y.len()).filter(|&i| which(i)) {
            y[i] = self.setup.ignore;
            x[i * width..(i + 1) * width].fill(f64::NAN);
        }
        self.targets = targets(y, self.targets.dims(), DType::I64);
        self.logits = tensor(x, self.logits.dims(), self.logits.dtype());
    }

    pub fn loss(&self) -> CrossEntropy {
        self.setup.build(self.targets.dims())
    }

    pub fn reference(&self) -> LossAndGrad {
        self.loss().reference(&self.logits, self.given()).unwrap()
    }
}

#[track_caller]
pub fn assert_close(actual: f64, expected: f64, tolerance: f64) {
    let close =
        actual == expected || (actual - expected).abs() <= tolerance * expected.abs().max(1.0);
    assert!(close, "{actual} is not within {tolerance:e} of {expected}");
}

#[track_caller]
pub fn assert_all_close(actual: &Tensor, expected: &Tensor, tolerance: f64) {
    assert_eq!(actual.dims(), expected.dims());
    for (a, e) in values(actual).into_iter().zip(values(expected)) {
        assert_close(a, e, tolerance);
    }
}

#[track_caller]
pub fn assert_error<T>(result: Result<T>, parts: &[&str]) {
    let Err(error) = result else {
        panic!("no error, must say {parts:?}")
    };
    let message = error.to_string();
    for part in parts {
        assert!(message.contains(part), "{message:?} must contain {part:?}");
    }
}

/// Runs a test on random generators, and names the seed of one that fails.
pub fn cases(test: impl Fn(&mut StdRng)) {
    for seed in 0..1000 {
        let case = std::panic::AssertUnwindSafe(|| test(&mut rng(seed)));
        if let Err(panic) = std::panic::catch_unwind(case) {
            eprintln!("the case of seed {seed} failed");
            std::panic::resume_unwind(panic);
        }
    }
}

/// Uniform, with all of f32's digits near 0 too: rand's own f32 are multiples of 2⁻²³ of the range.
pub fn uniform(rng: &mut StdRng, range: impl rand::distr::uniform::SampleRange<f64>) -> f32 {
    rng.random_range(range) as f32
}
