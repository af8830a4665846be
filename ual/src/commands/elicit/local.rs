//! Scores without a server: the mean entropy of a local model's predictions over the response's tokens, given the prompt,
//! divided by the largest possible, log V.

use std::{collections::BTreeMap, path::Path, time::Instant};

use anyhow::{Context, Result, ensure};
use candle_core::{Device, Tensor};
use candle_cross_entropy::{CrossEntropy, Reduction};

use crate::{
    commands::elicit::{
        answers::Answers,
        progress::Progress,
        samples::{Cost, Sample},
    },
    data::{
        conversation::{Conversation, Conversations},
        form::Turn,
        packing::Packing,
    },
    model::{
        decoder::{Decoder, Trained},
        pretrained::{self, Overrides, Purpose},
    },
    text::chat::Encoder,
};

/// What the output calls the model: the name of its file or folder, and the beginning of its hash.
pub fn name(path: &Path) -> Result<String> {
    let name = path.file_name().and_then(|name| name.to_str());
    let name = name.context("not a file's name");
    let name = name.and_then(|name| {
        let hash = pretrained::digest(path)?;
        Ok(format!("{name} sha256:{}", &hash[..16]))
    });
    name.with_context(|| format!("--local {}", path.display()))
}

/// Scores every sample that has no score. Puts those that cannot have one into `missing`, by index, with the reason.
pub fn score(
    path: &Path,
    overrides: &Overrides,
    samples: &[Sample],
    answers: &mut Answers,
    missing: &mut BTreeMap<usize, String>,
) -> Result<()> {
    let model = Model::load(path, overrides)?;
    let mut progress = Progress::new(samples.len(), answers.done());
    let (start, mut tokens) = (Instant::now(), 0);
    let speed = |tokens: usize| {
        format!(
            "{:.1} tokens/s",
            tokens as f64 / start.elapsed().as_secs_f64()
        )
    };
    for (i, sample) in samples.iter().enumerate() {
        if answers.missing(i) == 0 {
            continue;
        }
        let named = || format!("sample {}", sample.id);
        let text = model.encode(&sample.turns);
        let text = text.with_context(named)?;
        let (length, context) = (text.tokens.len(), model.decoder.config().max_tokens);
        if length > context {
            missing.insert(
                i,
                format!("it has {length} tokens, and the model takes {context}"),
            );
            progress.gave_up();
            continue;
        }
        let uncertainty = model.uncertainty(&text).with_context(named)?;
        answers.add(i, uncertainty, Cost::default())?;
        tokens += text.tokens.len();
        progress.answered();
        progress.show(&speed(tokens));
    }
    progress.finish(&speed(tokens));
    Ok(())
}

struct Model {
    decoder: Decoder,
    encoder: Encoder,
}

struct Text {
    tokens: Vec<u32>,
    /// Where the response begins, above 0; it has a token at least.
    response: usize,
}

impl Model {
    fn load(path: &Path, overrides: &Overrides) -> Result<Self> {
        let loaded = pretrained::load(path, overrides, Purpose::Reading, &Device::Cpu)?;
        let (config, weights) = (loaded.config, loaded.weights);
        Ok(Self {
            decoder: Decoder::from_weights(config, weights, Trained::Nothing, 0, &Device::Cpu)?,
            encoder: loaded.encoder,
        })
    }

    /// The sample as `ual finetune` trains on it, less what ends it.
    fn encode(&self, turns: &[Turn]) -> Result<Text> {
        let Conversation {
            mut tokens,
            responses,
            ..
        } = Conversations::new(&self.encoder).encode(turns, usize::MAX)?;
        tokens.truncate(tokens.len() - self.encoder.ending.len());
        let response = responses.last().map_or(0, |last| last.start);
        ensure!(
            response < tokens.len(),
            "the tokenizer makes nothing of the response"
        );
        Ok(Text { tokens, response })
    }

    /// Mean entropy of the predictions of the response's tokens, divided by log V: in \[0, 1\].
    fn uncertainty(&self, text: &Text) -> Result<f64> {
        let length = text.tokens.len() - text.response;
        // A position predicts the next token.
        let positions = text.response as u32 - 1..text.tokens.len() as u32 - 1;
        let positions = Tensor::from_iter(positions, &Device::Cpu)?;
        let packing = Packing::new(vec![&text.tokens]);
        let hidden = self.decoder.hidden(&packing, Some(&positions))?;
        let targets = Tensor::new(&text.tokens[text.response..], &Device::Cpu)?;
        let loss = CrossEntropy::new().reduction(Reduction::None);
        let projection = self.decoder.output_projection();
        let (_, stats) = loss.forward_linear_with_stats(&hidden, &projection, None, &targets)?;
        let entropies = stats.entropy.to_vec1::<f32>()?;
        let sum: f64 = entropies.iter().map(|&entropy| f64::from(entropy)).sum();
        let vocab = projection.dim(0)?;
        let mean = sum / length as f64 / (vocab as f64).ln();
        ensure!(mean.is_finite(), "the model's predictions are not finite");
        Ok(mean.clamp(0.0, 1.0)) // rounding
    }
}
