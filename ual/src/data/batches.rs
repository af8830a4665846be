//! Batches of samples, as tensors and in random order.

use std::sync::Arc;

use candle_core::{Device, Result, Tensor};
use candle_cross_entropy::ual::Layout;
use rand::{SeedableRng, rngs::StdRng, seq::SliceRandom};

use crate::data::{packing::Packing, samples::Sample};

/// Target of rows that take no part in the loss: their next token is the prompt's, or there is none.
pub const IGNORED: i64 = -100;

#[derive(Clone)]
pub struct Batch<'a> {
    /// Of the B samples.
    pub packing: Arc<Packing<'a>>,
    /// Of the targets: (B, T), one a token, with padding after the shorter samples.
    pub layout: Layout,
    /// (B, T) i64, `IGNORED` for tokens whose next is the prompt's, or which have none.
    pub targets: Tensor,
    /// The packing's row of each token, (B·T) u32; 0 in padding.
    pub padded: Tensor,
    /// Of the B samples.
    pub uncertainties: Vec<f32>,
    /// The packing's row of each target that is not ignored, (n) u32. Where several samples share a row it is there several
    /// times.
    pub chosen: Tensor,
    /// And that target, (n) i64.
    pub learned: Tensor,
    /// How many these are, of all samples.
    pub rows: usize,
    /// And of each.
    pub of_sample: Vec<usize>,
}

impl<'a> Batch<'a> {
    pub fn new(samples: &[&'a Sample], device: &Device) -> Result<Self> {
        let sequences: Vec<&[u32]> = samples.iter().map(|s| s.tokens.as_slice()).collect();
        let lengths: Vec<usize> = sequences.iter().map(|tokens| tokens.len()).collect();
        let layout = Layout::padded(&lengths)?;
        let width = lengths.iter().max().copied().unwrap_or(0);
        let packing = Packing::new(sequences);
        let (mut targets, mut chosen, mut learned) = (Vec::new(), Vec::new(), Vec::new());
        for (i, sample) in samples.iter().enumerate() {
            // Not the layout's own targets: it knows one prompt a sample.
            for next in 1..=width {
                if !sample.is_response(next) {
                    targets.push(IGNORED);
                    continue;
                }
                let target = i64::from(sample.tokens[next]);
                targets.push(target);
                chosen.push(packing.spans().row(i, next - 1) as u32);
                learned.push(target);
            }
        }
        Ok(Self {
            padded: Tensor::new(packing.spans().padded_rows(), device)?,
            packing: Arc::new(packing),
            targets: Tensor::from_vec(targets, layout.shape(), device)?,
            chosen: Tensor::new(chosen, device)?,
            learned: Tensor::new(learned, device)?,
            layout,
            uncertainties: samples.iter().map(|s| s.uncertainty).collect(),
            rows: samples.iter().map(|s| s.rows()).sum(),
            of_sample: samples.iter().map(|s| s.rows()).collect(),
        })
    }

    /// For a loss of the chosen rows alone: `layout` and `targets` are theirs, (n), sample after sample.
    pub fn compact(&self) -> Result<Self> {
        Ok(Self {
            layout: Layout::packed(&self.of_sample)?,
            targets: self.learned.clone(),
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
            // Samples of about one length share a batch: less padding, where there is any, and they begin with more tokens
            // alike. Sorting only stretches of 8 batches keeps most of the order random.
            for stretch in order.chunks_mut(8 * self.size) {
                stretch.sort_by_key(|sample| sample.tokens.len());
            }
            self.queue = order.chunks(self.size).map(<[_]>::to_vec).collect();
            self.queue.shuffle(&mut self.rng);
        }
        self.queue.pop().expect("a data set is not empty")
    }
}
