//! Batches of samples, as tensors and in random order.

use candle_core::{Device, Result, Tensor};
use candle_cross_entropy::ual::Layout;
use rand::{SeedableRng, rngs::StdRng, seq::SliceRandom};

use crate::data::samples::Sample;

/// Target of rows that take no part in the loss: their next token is the prompt's, or there is none.
pub const IGNORED: i64 = -100;

#[derive(Clone)]
pub struct Batch<'a> {
    /// Tokens of the B samples.
    pub sequences: Vec<&'a [u32]>,
    /// Of the targets: (B, T), one a token.
    pub layout: Layout,
    /// (B, T) u32.
    pub inputs: Tensor,
    /// (B, T) i64, `IGNORED` for rows whose next token is the prompt's, or which have none.
    pub targets: Tensor,
    /// Of the B samples.
    pub uncertainties: Vec<f32>,
    /// Which of the B·T rows have a target that is not ignored, (n) u32.
    pub chosen: Tensor,
    /// How many these are, of all samples.
    pub rows: usize,
    /// And of each.
    pub of_sample: Vec<usize>,
    /// How many inputs are not padding.
    pub tokens: usize,
}

impl<'a> Batch<'a> {
    pub fn new(samples: &[&'a Sample], device: &Device) -> Result<Self> {
        let sequences: Vec<&[u32]> = samples.iter().map(|s| s.tokens.as_slice()).collect();
        let lengths: Vec<usize> = sequences.iter().map(|tokens| tokens.len()).collect();
        let layout = Layout::padded(&lengths)?;
        // Not the layout's own: it knows one prompt a sample.
        let width = lengths.iter().max().copied().unwrap_or(0);
        let targets = samples.iter().flat_map(|sample| {
            (1..=width).map(|next| match sample.is_response(next) {
                true => i64::from(sample.tokens[next]),
                false => IGNORED,
            })
        });
        let targets: Vec<i64> = targets.collect();
        let chosen = (0u32..).zip(&targets);
        let chosen = chosen.filter(|(_, target)| **target != IGNORED);
        let chosen: Vec<u32> = chosen.map(|(row, _)| row).collect();
        Ok(Self {
            inputs: layout.tokens(&sequences, 0, device)?,
            targets: Tensor::from_vec(targets, layout.shape(), device)?,
            chosen: Tensor::new(chosen, device)?,
            layout,
            uncertainties: samples.iter().map(|s| s.uncertainty).collect(),
            rows: samples.iter().map(|s| s.rows()).sum(),
            of_sample: samples.iter().map(|s| s.rows()).collect(),
            tokens: lengths.iter().sum(),
            sequences,
        })
    }

    /// For a loss of the chosen rows alone: `layout` and `targets` are theirs, (n), sample after sample.
    pub fn compact(&self) -> Result<Self> {
        Ok(Self {
            layout: Layout::packed(&self.of_sample)?,
            targets: self.targets.flatten_all()?.index_select(&self.chosen, 0)?,
            ..self.clone()
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
