//! The frozen model's last hidden states where it would give a response, and how uncertain it is itself; computed once and
//! kept in a file.

use std::{
    collections::HashMap,
    fs,
    path::{Path, PathBuf},
    time::Instant,
};

use anyhow::{Context, Result, ensure};
use candle_core::{Device, Tensor};
use candle_cross_entropy::{CrossEntropy, Reduction};
use safetensors::SafeTensors;
use sha2::{Digest, Sha256};

use crate::{
    commands::probe::questions::Question,
    data::{conversation::Conversations, packing::Packing},
    digest, files,
    model::{
        decoder::{Decoder, Trained},
        pretrained::{self, Overrides, Purpose},
    },
};

/// In the folder --out.
const FILE: &str = "hidden.safetensors";
const FINGERPRINT: &str = "fingerprint";
const STATES: &str = "states";
const ENTROPIES: &str = "entropies";

/// Prompts in a batch.
const BATCH: usize = 16;
/// The file is written every so many batches.
const KEPT_EVERY: usize = 64;

pub struct Hidden {
    /// (N, D) f32.
    pub states: Tensor,
    /// Of the model's own prediction of the response's first token, over log V: N values in [0, 1].
    pub entropies: Vec<f32>,
}

/// Of `questions`, in their order.
pub fn of(
    questions: &[&Question],
    (path, overrides): (&Path, &Overrides),
    folder: &Path,
) -> Result<Hidden> {
    let device = &Device::Cpu;
    // The largest that it reads; weights are f32, which many rows at a time are faster with than with quantised ones.
    let reading = pretrained::load(path, overrides, Purpose::Reading, device)?;
    let longest = reading.config.max_tokens;
    let conversations = Conversations::new(&reading.encoder);
    let prompt = |question: &&Question| -> Result<Vec<u32>> {
        let mut whole = conversations.encode(&question.turns, longest)?;
        whole.tokens.truncate(whole.responses[0].start);
        Ok(whole.tokens)
    };
    let prompts: Vec<Vec<u32>> = questions.iter().map(prompt).collect::<Result<_>>()?;
    let mut order: Vec<usize> = (0..prompts.len()).collect();
    order.sort_by(|&a, &b| prompts[a].cmp(&prompts[b])); // what a batch begins with alike is read once
    let in_order: Vec<&[u32]> = order.iter().map(|&i| &prompts[i][..]).collect();
    let fingerprint = fingerprint(&in_order, &pretrained::digest(path)?);

    let file = folder.join(FILE);
    let mut kept = Kept::load(&file, &fingerprint)?;
    let done = kept.entropies.len();
    if done < order.len() {
        let longest = prompts.iter().map(Vec::len).max().unwrap_or(0);
        let purpose = Purpose::Training(longest);
        let loaded = pretrained::load(path, overrides, purpose, device)?;
        let (config, weights) = (loaded.config, loaded.weights);
        let model = Decoder::from_weights(config, weights, Trained::Nothing, 0, device)?;
        let start = Instant::now();
        for (number, batch) in (1..).zip(in_order[done..].chunks(BATCH)) {
            kept.add(&model, batch)?;
            let now = kept.entropies.len();
            if number % KEPT_EVERY == 0 || now == order.len() {
                kept.save(&file, &fingerprint)?;
                let rate = (now - done) as f64 / start.elapsed().as_secs_f64();
                eprintln!("{now} of {} prompts read, {rate:.1} a second", order.len());
            }
        }
    }
    kept.in_order(&order)
}

/// What the states depend on.
fn fingerprint(prompts: &[&[u32]], model: &str) -> String {
    let mut hash = Sha256::new();
    for prompt in prompts {
        hash.update((prompt.len() as u32).to_le_bytes());
        for token in *prompt {
            hash.update(token.to_le_bytes());
        }
    }
    format!(
        "prompts {} and model {model}",
        digest::hex(&hash.finalize())
    )
}

/// States of the first prompts, in the order that they are read in.
#[derive(Default)]
struct Kept {
    states: Vec<Tensor>,
    entropies: Vec<f32>,
}

impl Kept {
    fn load(file: &PathBuf, fingerprint: &str) -> Result<Self> {
        if !file.exists() {
            return Ok(Self::default());
        }
        let load = || -> Result<Self> {
            let bytes = fs::read(file)?;
            let (_, metadata) = SafeTensors::read_metadata(&bytes)?;
            let found = metadata.metadata().as_ref();
            let found = found.and_then(|metadata| metadata.get(FINGERPRINT));
            if found.map(String::as_str) != Some(fingerprint) {
                return Ok(Self::default()); // of other data or another model
            }
            let tensors = candle_core::safetensors::load_buffer(&bytes, &Device::Cpu)?;
            let tensor = |name: &str| tensors.get(name).with_context(|| format!("no {name}"));
            Ok(Self {
                states: vec![tensor(STATES)?.clone()],
                entropies: tensor(ENTROPIES)?.to_vec1()?,
            })
        };
        load().with_context(|| format!("cannot read {}", file.display()))
    }

    fn save(&mut self, file: &Path, fingerprint: &str) -> Result<()> {
        self.states = vec![Tensor::cat(&self.states, 0)?];
        let tensors = [
            (STATES.to_string(), self.states[0].clone()),
            (
                ENTROPIES.to_string(),
                Tensor::new(&self.entropies[..], &Device::Cpu)?,
            ),
        ];
        let metadata = HashMap::from([(FINGERPRINT.to_string(), fingerprint.to_string())]);
        files::replace(file, |out| {
            files::write_safetensors(out, &tensors, metadata)
        })
        .with_context(|| format!("cannot write {}", file.display()))
    }

    fn add(&mut self, model: &Decoder, prompts: &[&[u32]]) -> Result<()> {
        let packing = Packing::new(prompts.to_vec());
        let end = |(i, prompt): (usize, &&[u32])| packing.spans().row(i, prompt.len() - 1) as u32;
        let ends = Tensor::from_iter(prompts.iter().enumerate().map(end), &Device::Cpu)?;
        let states = model.hidden(&packing, Some(&ends))?;

        let projection = model.output_projection();
        let targets = Tensor::zeros(prompts.len(), candle_core::DType::U32, &Device::Cpu)?;
        let loss = CrossEntropy::new().reduction(Reduction::None);
        let (_, stats) = loss.forward_linear_with_stats(&states, &projection, None, &targets)?;
        let largest = (projection.dim(0)? as f32).ln();
        let entropies = stats.entropy.to_vec1::<f32>()?;
        ensure!(
            entropies.iter().all(|entropy| entropy.is_finite()),
            "the model's predictions are not finite"
        );
        let shares = entropies.iter().map(|e| (e / largest).clamp(0.0, 1.0));
        self.entropies.extend(shares);
        self.states.push(states);
        Ok(())
    }

    /// `order[i]` is where the i-th stands among the questions.
    fn in_order(self, order: &[usize]) -> Result<Hidden> {
        let mut place = vec![0u32; order.len()];
        let mut entropies = vec![0.0; order.len()];
        for (i, &question) in order.iter().enumerate() {
            place[question] = i as u32;
            entropies[question] = self.entropies[i];
        }
        let place = Tensor::from_vec(place, order.len(), &Device::Cpu)?;
        Ok(Hidden {
            states: Tensor::cat(&self.states, 0)?.index_select(&place, 0)?,
            entropies,
        })
    }
}
