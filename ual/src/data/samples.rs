//! Samples as tokens, and a data set of them.

use std::{collections::HashSet, ops::Range};

use sha2::{Digest, Sha256};

use crate::digest;

/// The true distribution of a response token: (token, probability), the probabilities above 0.
pub type Distribution = Vec<(u32, f32)>;

#[derive(Clone)]
pub struct Sample {
    /// Prompt and response.
    pub tokens: Vec<u32>,
    /// How many of the tokens are the prompt; at least 1.
    pub prompt: usize,
    /// Of a conversation the tokens between one response and the next, which are not learned either.
    pub between: Vec<Range<usize>>,
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
        let between: usize = self.between.iter().map(Range::len).sum();
        self.tokens.len() - self.prompt - between
    }

    /// Whether the token of this number is a response's: is learned.
    pub fn is_response(&self, token: usize) -> bool {
        (self.prompt..self.tokens.len()).contains(&token)
            && !self.between.iter().any(|range| range.contains(&token))
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
            for end in sample.between.iter().flat_map(|r| [r.start, r.end]) {
                hash.update((end as u32).to_le_bytes());
            }
            for token in &sample.tokens {
                hash.update(token.to_le_bytes());
            }
        }
        digest::hex(&hash.finalize())
    }

    /// The tokens of the samples for training and of those held out, each once.
    pub fn sequences(&self) -> HashSet<&[u32]> {
        let all = self.train.iter().chain(&self.held_out);
        all.map(|sample| sample.tokens.as_slice()).collect()
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
