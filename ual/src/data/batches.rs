//! Batches of samples, as tensors and in random order.

use candle_core::{Device, Result, Tensor};
use candle_cross_entropy::ual::Layout;
use rand::{SeedableRng, rngs::StdRng, seq::SliceRandom};

use crate::data::samples::Sample;

/// Target of rows that take no part in the loss: their next token is the prompt's, or there is none.
pub const IGNORED: i64 = -100;

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
        let layout = Layout::padded(&lengths)?;
        // Not the layout's own: it knows one prompt a sample.
        let width = lengths.iter().max().copied().unwrap_or(0);
        let targets = samples.iter().flat_map(|sample| {
            (1..=width).map(|next| match sample.is_response(next) {
                true => i64::from(sample.tokens[next]),
                false => IGNORED,
            })
        });
        let targets = Tensor::from_vec(targets.collect(), layout.shape(), device)?;
        Ok(Self {
            inputs: layout.tokens(&tokens, 0, device)?,
            targets,
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

    pub fn next_batch(&mut self) -> Vec<&'a Sample> {
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
