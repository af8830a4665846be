//! Uncertainty of real samples that come without one: how badly a trigram model of the other training samples predicts
//! the response, in nats a token, as a rank among the training samples.
//!
//! It is a cheap stand-in for the judgement of a stronger model, which the paper asks for: responses in a common,
//! regular form score low, free and unusual ones high. It knows nothing of whether an answer is right.

use std::collections::HashMap;

use crate::data::samples::Sample;

/// Tokens before the predicted one.
const ORDER: usize = 2;

/// Weight of the shorter context's prediction, in observations: Dirichlet smoothing (MacKay & Peto, 1995).
const PRIOR: f64 = 2.0;

/// Interpolated n-gram model: p_n(w | h) = (c(h w) + PRIOR·p_{n−1}(w | h')) / (c(h) + PRIOR), down to the uniform
/// distribution. It counts prompts as well, so that a response in its prompt's style is no surprise.
pub struct NGram {
    vocab: usize,
    /// By context and token.
    pairs: HashMap<Vec<u32>, u32>,
    /// By context.
    contexts: HashMap<Vec<u32>, u32>,
}

impl NGram {
    pub fn new(vocab: usize) -> Self {
        Self {
            vocab,
            pairs: HashMap::new(),
            contexts: HashMap::new(),
        }
    }

    pub fn add(&mut self, sample: &Sample) {
        self.count(sample, |count| *count += 1);
    }

    fn remove(&mut self, sample: &Sample) {
        self.count(sample, |count| *count -= 1);
    }

    fn count(&mut self, sample: &Sample, change: fn(&mut u32)) {
        for at in 1..sample.tokens.len() {
            for length in 0..=ORDER.min(at) {
                change(
                    self.pairs
                        .entry(sample.tokens[at - length..=at].to_vec())
                        .or_default(),
                );
                change(
                    self.contexts
                        .entry(sample.tokens[at - length..at].to_vec())
                        .or_default(),
                );
            }
        }
    }

    /// Mean −log p of the responses' tokens.
    pub fn cross_entropy(&self, sample: &Sample) -> f64 {
        (sample.prompt..sample.tokens.len())
            .filter(|&at| sample.is_response(at))
            .map(|at| -self.probability(&sample.tokens[..=at]).ln())
            .sum::<f64>()
            / sample.rows() as f64
    }

    /// The same, for a sample that was added, by the model of all the others.
    pub fn cross_entropy_without(&mut self, sample: &Sample) -> f64 {
        self.remove(sample);
        let value = self.cross_entropy(sample);
        self.add(sample);
        value
    }

    /// Of the last token after the others.
    fn probability(&self, tokens: &[u32]) -> f64 {
        let at = tokens.len() - 1;
        let count = |counts: &HashMap<Vec<u32>, u32>, key: &[u32]| {
            counts.get(key).copied().map_or(0.0, f64::from)
        };
        (0..=ORDER.min(at)).fold(1.0 / self.vocab as f64, |shorter, length| {
            let (pair, context) = (&tokens[at - length..], &tokens[at - length..at]);
            (count(&self.pairs, pair) + PRIOR * shorter) / (count(&self.contexts, context) + PRIOR)
        })
    }
}

/// Scores, in order.
pub struct Ranks(Vec<f64>);

impl Ranks {
    pub fn new(mut scores: Vec<f64>) -> Self {
        scores.sort_by(f64::total_cmp);
        Self(scores)
    }

    /// Share of the scores below `score`, ties counting half: uniform in (0, 1) over the scores themselves.
    pub fn of(&self, score: f64) -> f32 {
        let below = self.0.partition_point(|&other| other < score);
        let equal = self.0[below..].partition_point(|&other| other == score);
        ((below as f64 + equal as f64 / 2.0) / self.0.len() as f64) as f32
    }
}
