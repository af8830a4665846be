//! Heads with one hidden layer that are trained side by side, each with smoothing of its own: what the loss takes a value a
//! row for.

use anyhow::Result;
use candle_core::{DType, Device, Tensor, Var};
use candle_cross_entropy::{CrossEntropy, Reduction};
use rand::{SeedableRng, rngs::StdRng, seq::SliceRandom};
use rand_distr::{Distribution, Normal};

use crate::training::optimizer::AdamW;

/// Sizes of a stack of heads.
#[derive(Clone, Copy, Debug)]
pub struct Shape {
    /// A heads.
    pub heads: usize,
    /// D, of the states that they take.
    pub input: usize,
    /// H.
    pub hidden: usize,
    /// K.
    pub outputs: usize,
}

/// What a training does.
#[derive(Clone, Copy, Debug)]
pub struct Plan {
    pub epochs: usize,
    pub batch: usize,
    pub learning_rate: f64,
    pub weight_decay: f64,
    pub seed: u64,
}

impl Plan {
    /// Whether what an epoch came to is measured: about twice for each doubling, 1, 2, 3, 4, 6, 8, 11, 16, …, and the last.
    pub fn is_measured(&self, epoch: usize) -> bool {
        let halves = (2.0 * (epoch as f64).log2()).round();
        epoch == self.epochs || (halves / 2.0).exp2().round() as usize == epoch
    }
}

/// N samples: what heads are trained on.
pub struct Samples {
    /// (N, D) f32.
    pub states: Tensor,
    /// Which output is each one's response.
    pub answers: Vec<u32>,
    /// A values each.
    pub smoothing: Vec<Vec<f32>>,
    /// (K) f32: what smoothing is spread by; evenly where there is none.
    pub prior: Option<Tensor>,
}

/// A perceptrons from D over H to K, relu between them.
pub struct Heads {
    shape: Shape,
    /// (D, A·H), (A·H), (A, H, K), (A, 1, K).
    vars: [Var; 4],
}

impl Heads {
    /// All begin with the same weights.
    pub fn new(shape: Shape, seed: u64, device: &Device) -> Result<Self> {
        let Shape {
            heads,
            input,
            hidden,
            outputs,
        } = shape;
        let mut rng = StdRng::seed_from_u64(seed);
        let mut normal = |rows: usize, columns: usize| -> Result<Tensor> {
            let normal = Normal::new(0.0, (rows as f64).powf(-0.5))?;
            let values = (0..rows * columns).map(|_| normal.sample(&mut rng) as f32);
            Ok(Tensor::from_vec(values.collect(), (rows, columns), device)?)
        };
        let (first, second) = (normal(input, hidden)?, normal(hidden, outputs)?);
        let zeros = |shape: &[usize]| Tensor::zeros(shape, DType::F32, device);
        let vars = [
            first.repeat((1, heads))?,
            zeros(&[heads * hidden])?,
            second.unsqueeze(0)?.repeat((heads, 1, 1))?,
            zeros(&[heads, 1, outputs])?,
        ];
        let [first, first_bias, second, second_bias] = vars.map(|values| Var::from_tensor(&values));
        Ok(Self {
            shape,
            vars: [first?, first_bias?, second?, second_bias?],
        })
    }

    /// States (N, D) to logits (A, N, K).
    pub fn logits(&self, states: &Tensor) -> Result<Tensor> {
        let [first, first_bias, second, second_bias] = &self.vars;
        let Shape { heads, hidden, .. } = self.shape;
        let inner = states.matmul(first)?.broadcast_add(first_bias)?.relu()?;
        let inner = inner.reshape((states.dim(0)?, heads, hidden))?;
        let inner = inner.transpose(0, 1)?.contiguous()?;
        Ok(inner.matmul(second)?.broadcast_add(second_bias)?)
    }

    /// Calls `measure` after the epochs that the plan says.
    pub fn train(
        &self,
        samples: &Samples,
        plan: &Plan,
        mut measure: impl FnMut(usize) -> Result<()>,
    ) -> Result<()> {
        let device = samples.states.device();
        let mut optimizer = AdamW::new(&self.vars, plan.weight_decay)?;
        let mut rng = StdRng::seed_from_u64(plan.seed);
        let mut order: Vec<u32> = (0..samples.answers.len() as u32).collect();
        for epoch in 1..=plan.epochs {
            order.shuffle(&mut rng);
            for batch in order.chunks(plan.batch) {
                let indices = Tensor::new(batch, device)?;
                let logits = self.logits(&samples.states.index_select(&indices, 0)?)?;
                let loss = self.loss(&logits, samples, batch)?;
                optimizer.step(&loss.backward()?, plan.learning_rate)?;
            }
            if plan.is_measured(epoch) {
                measure(epoch)?;
            }
        }
        Ok(())
    }

    /// The sum over heads of the mean over the batch, so that a head's gradient is what it would be alone.
    fn loss(&self, logits: &Tensor, samples: &Samples, batch: &[u32]) -> Result<Tensor> {
        let (heads, device) = (self.shape.heads, logits.device());
        let rows = || batch.iter().map(|&i| i as usize);
        let answers = (0..heads).flat_map(|_| rows().map(|i| samples.answers[i]));
        let smoothing = (0..heads).flat_map(|head| rows().map(move |i| samples.smoothing[i][head]));
        let shape = (heads, batch.len());
        let answers = Tensor::from_vec(answers.collect::<Vec<_>>(), shape, device)?;
        let smoothing = Tensor::from_vec(smoothing.collect::<Vec<_>>(), shape, device)?;
        let mut loss = CrossEntropy::new()
            .smoothing(smoothing)
            .reduction(Reduction::SumOver(batch.len() as f64));
        if let Some(prior) = &samples.prior {
            loss = loss.smoothing_prior(prior);
        }
        Ok(loss.forward(logits, &answers)?)
    }
}
