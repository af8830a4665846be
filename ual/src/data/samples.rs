//! Samples as tokens, and a data set of them.

use std::{
    collections::{BTreeMap, BTreeSet, HashSet},
    ops::Range,
};

use anyhow::{Result, ensure};
use rand::{SeedableRng, rngs::StdRng, seq::SliceRandom};
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

    /// The tokens of its prompt, in a conversation those before the first response.
    pub fn prompt_tokens(&self) -> &[u32] {
        &self.tokens[..self.prompt]
    }

    /// Its uncertainty for each row.
    pub fn of_rows(&self) -> impl Iterator<Item = f32> {
        std::iter::repeat_n(self.uncertainty, self.rows())
    }
}

pub struct Dataset {
    pub vocab: usize,
    /// What the model learns before any fine-tuning: plain next-token prediction.
    pub pretrain: Vec<Sample>,
    pub train: Vec<Sample>,
    /// [Set aside](Self::set_aside) from the training samples, to choose by; none at first.
    pub validation: Vec<Sample>,
    pub held_out: Vec<Sample>,
    /// Names of the kinds of samples, where they are told apart.
    pub groups: Vec<String>,
    /// One or two lines for the reader of the output.
    pub description: String,
}

impl Dataset {
    /// Moves a share of the training samples, at random, to those of the validation. The samples of one prompt stay together.
    /// None of them is left in what the model learns before.
    pub fn set_aside(&mut self, share: f64, seed: u64) -> Result<()> {
        let wanted = (self.train.len() as f64 * share).round() as usize;
        let mut prompts: BTreeMap<Vec<u32>, Vec<usize>> = BTreeMap::new();
        for (i, sample) in self.train.iter().enumerate() {
            let prompt = sample.prompt_tokens().to_vec();
            prompts.entry(prompt).or_default().push(i);
        }
        let mut prompts: Vec<Vec<usize>> = prompts.into_values().collect();
        prompts.shuffle(&mut StdRng::seed_from_u64(seed ^ 0x7a11d));
        let mut chosen = BTreeSet::new();
        for prompt in prompts {
            if chosen.len() + prompt.len() <= wanted {
                chosen.extend(prompt);
            }
        }
        ensure!(
            !chosen.is_empty() && chosen.len() < self.train.len(),
            "of {} training samples {} would be for validation; there must be some, and some to train on",
            self.train.len(),
            chosen.len()
        );
        let parted = std::mem::take(&mut self.train).into_iter().enumerate();
        for (i, sample) in parted {
            match chosen.contains(&i) {
                true => self.validation.push(sample),
                false => self.train.push(sample),
            }
        }
        let tokens: BTreeSet<&[u32]> = self.validation.iter().map(|s| &s.tokens[..]).collect();
        self.pretrain.retain(|s| !tokens.contains(&s.tokens[..]));
        Ok(())
    }

    /// A hash of all samples.
    pub fn digest(&self) -> String {
        let mut hash = Sha256::new();
        for sample in [
            &self.pretrain,
            &self.train,
            &self.validation,
            &self.held_out,
        ]
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

    /// The tokens of the samples for training, for validation and of those held out, each once.
    pub fn sequences(&self) -> HashSet<&[u32]> {
        let all = [&self.train, &self.validation, &self.held_out];
        let all = all.into_iter().flatten();
        all.map(|sample| sample.tokens.as_slice()).collect()
    }

    pub fn longest(&self) -> usize {
        let all = [
            &self.pretrain,
            &self.train,
            &self.validation,
            &self.held_out,
        ];
        all.into_iter()
            .flatten()
            .map(|sample| sample.tokens.len())
            .max()
            .unwrap_or(0)
    }
}
