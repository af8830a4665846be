//! How tokens cluster in the last hidden layer: the states of one token in different contexts are a cluster.

use std::{
    cmp::Reverse,
    collections::{BTreeMap, HashSet},
};

use candle_core::Result;
use serde::Serialize;

use crate::{
    data::{batches::Batch, samples::Sample},
    model::decoder::Decoder,
};

/// A token needs so many states to be a cluster; of the most frequent so many tokens, each with so many states at most.
const LEAST: usize = 5;
const TOKENS: usize = 20;
const MOST: usize = 40;

/// States of tokens, and which cluster each belongs to.
#[derive(Default)]
pub struct Points {
    pub states: Vec<Vec<f64>>,
    pub labels: Vec<usize>,
    /// Which token each cluster is of.
    pub tokens: Vec<u32>,
}

/// Euclidean distances between states.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Clusters {
    pub clusters: usize,
    pub states: usize,
    /// Rousseeuw, "Silhouettes", Journal of Computational and Applied Mathematics 20, 1987: mean of (b − a) / max(a, b), a
    /// the mean distance to the own cluster, b to the nearest other. In [−1, 1], higher is tighter.
    pub silhouette: f64,
    /// Mean distance inside clusters over that between them: lower is tighter.
    pub within_over_between: f64,
}

/// The states of the held-out responses' tokens, but each response's last.
pub fn points(model: &Decoder, samples: &[Sample], batch: usize) -> Result<Points> {
    // Of each token, in how many contexts it stands, and its states.
    let mut by_token: BTreeMap<u32, (usize, Vec<Vec<f64>>)> = BTreeMap::new();
    let mut seen = HashSet::new();
    let samples: Vec<&Sample> = samples.iter().collect();
    for samples in samples.chunks(batch) {
        let batch = Batch::new(samples, model.device())?;
        let states = model.hidden(&batch.packing, None)?;
        let states = states.detach().to_vec2::<f32>()?;
        for (i, sample) in samples.iter().enumerate() {
            let inputs = &sample.tokens[..sample.tokens.len() - 1];
            for (t, token) in inputs.iter().enumerate() {
                let state = &states[batch.packing.spans().row(i, t)];
                if !sample.is_response(t) || !seen.insert(&inputs[..=t]) {
                    continue; // the same context gives the same state
                }
                let (contexts, states) = by_token.entry(*token).or_default();
                *contexts += 1;
                if states.len() < MOST {
                    states.push(state.iter().copied().map(f64::from).collect());
                }
            }
        }
    }
    let mut frequent: Vec<_> = by_token
        .into_iter()
        .filter(|(_, (contexts, _))| *contexts >= LEAST)
        .collect();
    frequent.sort_by_key(|(_, (contexts, _))| Reverse(*contexts)); // stable: equals in the tokens' order
    let mut points = Points::default();
    for (label, (token, (_, states))) in frequent.into_iter().take(TOKENS).enumerate() {
        points.labels.extend(states.iter().map(|_| label));
        points.states.extend(states);
        points.tokens.push(token);
    }
    Ok(points)
}

fn distance(a: &[f64], b: &[f64]) -> f64 {
    let squares = a.iter().zip(b).map(|(a, b)| (a - b).powi(2));
    squares.sum::<f64>().sqrt()
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

impl Points {
    /// None where there are not two clusters.
    pub fn clusters(&self) -> Option<Clusters> {
        let clusters = self.labels.iter().max()? + 1;
        if clusters < 2 {
            return None;
        }
        let mut sizes = vec![0.0; clusters];
        self.labels.iter().for_each(|&label| sizes[label] += 1.0);
        let (mut silhouette, mut within, mut between) = (0.0, (0.0, 0.0), (0.0, 0.0));
        for (i, (state, &own)) in self.states.iter().zip(&self.labels).enumerate() {
            let mut sums = vec![0.0; clusters];
            for (j, (other, &label)) in self.states.iter().zip(&self.labels).enumerate() {
                if i != j {
                    sums[label] += distance(state, other);
                }
            }
            within.0 += sums[own];
            within.1 += sizes[own] - 1.0;
            let others = (0..clusters).filter(|&label| label != own);
            between.0 += others.clone().map(|label| sums[label]).sum::<f64>();
            between.1 += others.clone().map(|label| sizes[label]).sum::<f64>();
            let a = sums[own] / (sizes[own] - 1.0);
            let b = others.map(|label| sums[label] / sizes[label]);
            let b = b.fold(f64::INFINITY, f64::min);
            let larger = a.max(b);
            silhouette += if larger > 0.0 { (b - a) / larger } else { 0.0 };
        }
        let states = self.states.len();
        Some(Clusters {
            clusters,
            states,
            silhouette: silhouette / states as f64,
            within_over_between: within.0 / within.1 / (between.0 / between.1),
        })
    }

    /// Onto the two directions of largest variance, by power iteration.
    pub fn projection(&self) -> Vec<(f64, f64)> {
        let Some(width) = self.states.first().map(Vec::len) else {
            return Vec::new();
        };
        let mut centred = self.states.clone();
        for k in 0..width {
            let mean = centred.iter().map(|x| x[k]).sum::<f64>() / centred.len() as f64;
            centred.iter_mut().for_each(|x| x[k] -= mean);
        }
        let mut axes = [Vec::new(), Vec::new()];
        for axis in &mut axes {
            let mut direction: Vec<f64> =
                (0..width).map(|k| 1.0 + k as f64 / width as f64).collect();
            for _ in 0..200 {
                let mut next = vec![0.0; width];
                for x in &centred {
                    let along = dot(x, &direction);
                    next.iter_mut().zip(x).for_each(|(n, x)| *n += along * x);
                }
                let norm = dot(&next, &next).sqrt().max(f64::MIN_POSITIVE);
                direction = next.into_iter().map(|n| n / norm).collect();
            }
            *axis = centred.iter().map(|x| dot(x, &direction)).collect();
            // What is left is at right angles to it.
            for (x, along) in centred.iter_mut().zip(&*axis) {
                x.iter_mut()
                    .zip(&direction)
                    .for_each(|(x, d)| *x -= along * d);
            }
        }
        let [first, second] = axes;
        first.into_iter().zip(second).collect()
    }
}
