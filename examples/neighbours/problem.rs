//! The problem that the methods are shown on: classes as clusters in a plane, and a small network.

use candle_core::{Device, Result, Tensor, Var};
use rand::{Rng, SeedableRng, rngs::StdRng};
use rand_distr::{Distribution, StandardNormal};

pub const CLASSES: usize = 4;
pub const DEVICE: &Device = &Device::Cpu;

/// Samples: inputs (N, 2) and true classes.
pub struct Data {
    pub inputs: Tensor,
    pub classes: Vec<u32>,
}

impl Data {
    /// `count` samples around the points (±1, ±1), a class each, with this deviation; turned by `angle` radians.
    pub fn clusters(count: usize, deviation: f64, angle: f64, seed: u64) -> Result<Self> {
        let rng = &mut StdRng::seed_from_u64(seed);
        let (sin, cos) = angle.sin_cos();
        let (mut inputs, mut classes) = (Vec::new(), Vec::new());
        for i in 0..count {
            let class = i % CLASSES;
            let centre = [[1.0, 1.0], [-1.0, 1.0], [-1.0, -1.0], [1.0, -1.0]][class];
            let [x, y] = centre.map(|c: f64| c + deviation * normal(rng));
            inputs.extend([cos * x - sin * y, sin * x + cos * y].map(|v| v as f32));
            classes.push(class as u32);
        }
        Ok(Self {
            inputs: Tensor::from_vec(inputs, (count, 2), DEVICE)?,
            classes,
        })
    }

    /// This and other samples after it.
    pub fn and(&self, other: &Self) -> Result<Self> {
        Ok(Self {
            inputs: Tensor::cat(&[&self.inputs, &other.inputs], 0)?,
            classes: [&self.classes[..], &other.classes].concat(),
        })
    }

    /// The samples of these numbers.
    pub fn select(&self, chosen: &[u32]) -> Result<Self> {
        Ok(Self {
            inputs: self.inputs.index_select(&Tensor::new(chosen, DEVICE)?, 0)?,
            classes: chosen.iter().map(|&i| self.classes[i as usize]).collect(),
        })
    }

    /// The first so many samples of each class.
    pub fn first_of_each(&self, mut counts: [u32; CLASSES]) -> Result<Self> {
        let mut chosen = Vec::new();
        for (i, &class) in self.classes.iter().enumerate() {
            let left = &mut counts[class as usize];
            if *left > 0 {
                *left -= 1;
                chosen.push(i as u32);
            }
        }
        self.select(&chosen)
    }

    pub fn targets(&self) -> Result<Tensor> {
        Tensor::new(&self.classes[..], DEVICE)
    }

    /// Share of samples whose predicted class is the true one.
    pub fn accuracy(&self, logits: &Tensor) -> Result<f64> {
        let predicted = logits.argmax(1)?.to_vec1::<u32>()?;
        let right = predicted.iter().zip(&self.classes).filter(|(p, c)| p == c);
        Ok(right.count() as f64 / self.classes.len() as f64)
    }
}

/// Two layers: hidden states (N, D), with a constant 1 among them for the bias, and logits (N, V).
pub struct Model {
    input: Var,
    bias: Var,
    output: Var,
}

impl Model {
    pub fn new(width: usize, seed: u64) -> Result<Self> {
        let rng = &mut StdRng::seed_from_u64(seed);
        let mut matrix = |rows: usize, columns: usize, deviation: f64| {
            let values = (0..rows * columns).map(|_| (deviation * normal(rng)) as f32);
            Var::from_tensor(&Tensor::from_iter(values, DEVICE)?.reshape((rows, columns))?)
        };
        Ok(Self {
            input: matrix(2, width, 1.0)?,
            bias: matrix(1, width, 1.0)?,
            output: matrix(CLASSES, width + 1, 0.1)?,
        })
    }

    pub fn parameters(&self) -> Vec<Var> {
        vec![self.input.clone(), self.bias.clone(), self.output.clone()]
    }

    /// Of the first layer.
    pub fn first(&self) -> Vec<Var> {
        vec![self.input.clone(), self.bias.clone()]
    }

    pub fn output(&self) -> &Tensor {
        &self.output
    }

    pub fn hidden(&self, inputs: &Tensor) -> Result<Tensor> {
        let hidden = inputs
            .matmul(&self.input)?
            .broadcast_add(&self.bias)?
            .tanh()?;
        Tensor::cat(&[&hidden, &hidden.narrow(1, 0, 1)?.ones_like()?], 1)
    }

    pub fn logits(&self, inputs: &Tensor) -> Result<Tensor> {
        self.hidden(inputs)?.matmul(&self.output.t()?)
    }

    /// Logits with hidden units dropped at this rate.
    pub fn logits_dropped(&self, inputs: &Tensor, rate: f64, rng: &mut StdRng) -> Result<Tensor> {
        let hidden = self.hidden(inputs)?;
        let kept = (1.0 / (1.0 - rate)) as f32;
        let mask = (0..hidden.elem_count()).map(|_| if rng.random_bool(rate) { 0.0 } else { kept });
        let mask = Tensor::from_iter(mask, DEVICE)?.reshape(hidden.shape())?;
        (hidden * mask)?.matmul(&self.output.t()?)
    }
}

fn normal(rng: &mut StdRng) -> f64 {
    StandardNormal.sample(rng)
}
