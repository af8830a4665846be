//! States of token sequences, kept: those that frozen layers give depend on the tokens alone.

use std::{
    collections::{HashMap, HashSet},
    sync::{Mutex, MutexGuard},
};

use candle_core::{Result, Tensor};

/// Of each sequence (T, dim), without padding, on the model's device. Of one model, and of one of its layers.
#[derive(Default)]
pub struct States(Mutex<HashMap<Vec<u32>, Tensor>>);

impl States {
    fn kept(&self) -> MutexGuard<'_, HashMap<Vec<u32>, Tensor>> {
        self.0.lock().expect("nothing panics while it holds them")
    }

    /// Those of the sequence, which `compute` gives the first time.
    pub fn of(&self, tokens: &[u32], compute: impl FnOnce() -> Result<Tensor>) -> Result<Tensor> {
        if let Some(states) = self.kept().get(tokens) {
            return Ok(states.clone());
        }
        let states = compute()?.detach();
        self.kept().insert(tokens.to_vec(), states.clone());
        Ok(states)
    }

    /// Forgets those of other sequences.
    pub fn retain(&self, sequences: &HashSet<&[u32]>) {
        self.kept()
            .retain(|tokens, _| sequences.contains(tokens.as_slice()));
    }

    /// What they take in memory.
    pub fn bytes(&self) -> usize {
        let bytes = |states: &Tensor| states.elem_count() * states.dtype().size_in_bytes();
        self.kept().values().map(bytes).sum()
    }
}
