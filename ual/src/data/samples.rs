//! Samples, and batches of them as tensors.

use candle_core::{Device, Result, Tensor};
use candle_cross_entropy::ual::Layout;
use rand::{SeedableRng, rngs::StdRng, seq::SliceRandom};
use sha2::{Digest, Sha256};

use crate::digest;

/// Target of rows that take no part in the loss: their next token is the prompt's, or there is none.
pub const IGNORED: i64 = -100;

/// The true distribution of a response token: (token, probability), the probabilities above 0.
pub type Distribution = Vec<(u32, f32)>;

#[derive(Clone)]
pub struct Sample {
    /// Prompt and response.
    pub tokens: Vec<u32>,
    /// How many of the tokens are the prompt; at least 1.
    pub prompt: usize,
    /// In [0, 1].
    pub uncertainty: f32,
    /// Which of the data set's groups it is in; 0 where there are none.
    pub group: usize,
    /// Of every response token where it is known, else empty.
    pub truth: Vec<Distribution>,
}

impl Sample {
    /// How many rows of a loss are its response's.
    pub fn rows(&self) -> usize {
        self.tokens.len() - self.prompt
    }

    /// Its uncertainty for each of those.
    pub fn of_rows(&self) -> impl Iterator<Item = f32> {
        std::iter::repeat_n(self.uncertainty, self.rows())
    }
}

pub struct Dataset {
    pub vocab: usize,
    /// What the model learns before any fine-tuning: plain next-token prediction.
    pub pretrain: Vec<Sample>,
    pub train: Vec<Sample>,
    pub held_out: Vec<Sample>,
    /// Names of the kinds of samples, where they are told apart.
    pub groups: Vec<String>,
    /// One or two lines for the reader of the output.
    pub description: String,
}

impl Dataset {
    /// A hash of all samples.
    pub fn digest(&self) -> String {
        let mut hash = Sha256::new();
        for sample in [&self.pretrain, &self.train, &self.held_out]
            .into_iter()
            .flatten()
        {
            for number in [
                sample.tokens.len() as u32,
                sample.prompt as u32,
                sample.uncertainty.to_bits(),
                sample.group as u32,
            ] {
                hash.update(number.to_le_bytes());
            }
            for token in &sample.tokens {
                hash.update(token.to_le_bytes());
            }
        }
        digest::hex(&hash.finalize())
    }

    pub fn longest(&self) -> usize {
        let all = [&self.pretrain, &self.train, &self.held_out];
        all.into_iter()
            .flatten()
            .map(|sample| sample.tokens.len())
            .max()
            .unwrap_or(0)
    }
}

pub struct Batch {
    /// Rows (B, T), one a token.
    pub layout: Layout,
    /// (B, T) u32.
    pub inputs: Tensor,
    /// (B, T) i64, `IGNORED` for rows whose next token is the prompt's, or which have none.
    pub targets: Tensor,
    /// Of the B samples.
    pub uncertainties: Vec<f32>,
    /// How many targets are not ignored.
    pub rows: usize,
    /// How many inputs are not padding.
    pub tokens: usize,
}

impl Batch {
    pub fn new(samples: &[&Sample], device: &Device) -> Result<Self> {
        let tokens: Vec<&[u32]> = samples.iter().map(|s| s.tokens.as_slice()).collect();
        let lengths: Vec<usize> = tokens.iter().map(|tokens| tokens.len()).collect();
        let prompts: Vec<usize> = samples.iter().map(|s| s.prompt).collect();
        let layout = Layout::padded(&lengths)?;
        Ok(Self {
            inputs: layout.tokens(&tokens, 0, device)?,
            targets: layout.targets(&tokens, &prompts, IGNORED, device)?,
            layout,
            uncertainties: samples.iter().map(|s| s.uncertainty).collect(),
            rows: samples.iter().map(|s| s.rows()).sum(),
            tokens: lengths.iter().sum(),
        })
    }
}

/// Endless batches: every epoch each sample once, in an order that depends on the seed alone.
pub struct Batches<'a> {
    samples: &'a [Sample],
    size: usize,
    rng: StdRng,
    queue: Vec<Vec<&'a Sample>>,
}

impl<'a> Batches<'a> {
    pub fn new(samples: &'a [Sample], size: usize, seed: u64) -> Self {
        Self {
            samples,
            size,
            rng: StdRng::seed_from_u64(seed),
            queue: Vec::new(),
        }
    }

    pub fn next(&mut self) -> Vec<&'a Sample> {
        if self.queue.is_empty() {
            let mut order: Vec<&Sample> = self.samples.iter().collect();
            order.shuffle(&mut self.rng);
            // Samples of about one length share a batch: less padding. Sorting only stretches of 8 batches keeps
            // most of the order random.
            for stretch in order.chunks_mut(8 * self.size) {
                stretch.sort_by_key(|sample| sample.tokens.len());
            }
            self.queue = order.chunks(self.size).map(<[_]>::to_vec).collect();
            self.queue.shuffle(&mut self.rng);
        }
        self.queue.pop().expect("a data set is not empty")
    }
}
