//! Scores without a server: the mean entropy of a local model's predictions over the response's tokens, given the prompt,
//! divided by the largest possible, log V.

use std::{collections::BTreeMap, fs::File, io::BufReader, path::Path, time::Instant};

use anyhow::{Context, Result, anyhow, ensure};
use candle_core::{Device, Tensor, quantized::gguf_file::Content};
use candle_cross_entropy::{CrossEntropy, Reduction};
use tokenizers::Tokenizer;

use crate::{
    answers::Answers, gguf_tokenizer::tokenizer, llama::Llama, progress::Progress, samples::Sample,
};

/// What the output calls the model: the name of its file.
pub fn name(path: &Path) -> Result<String> {
    let name = path.file_name().and_then(|name| name.to_str());
    Ok(name
        .with_context(|| format!("--local {}: not a file's name", path.display()))?
        .to_string())
}

/// Scores every sample that has no score. Returns those that cannot have one, by index, with the reason.
pub fn score(
    path: &Path,
    tokenizer: Option<&Path>,
    samples: &[Sample],
    answers: &mut Answers,
) -> Result<BTreeMap<usize, String>> {
    let model =
        Model::load(path, tokenizer).with_context(|| format!("--local {}", path.display()))?;
    let mut progress = Progress::new(samples.len(), answers.done());
    let mut missing = BTreeMap::new();
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
        let text = model.encode(&sample.prompt, &sample.response)?;
        let (length, context) = (text.tokens.len(), model.llama.context);
        if length > context {
            missing.insert(
                i,
                format!("it has {length} tokens, and the model takes {context}"),
            );
            continue;
        }
        let uncertainty = model
            .uncertainty(&text)
            .with_context(|| format!("sample {}", sample.id))?;
        answers.add(i, uncertainty)?;
        tokens += text.tokens.len();
        progress.answered();
        progress.show(&speed(tokens));
    }
    progress.finish(&speed(tokens));
    Ok(missing)
}

struct Model {
    llama: Llama,
    tokenizer: Tokenizer,
    begin: Option<u32>,
    /// Tokens that begin and end a message in the ChatML format, where the model knows them.
    message: Option<(u32, u32)>,
}

struct Text {
    tokens: Vec<u32>,
    /// Where the response begins, above 0; it has a token at least.
    response: usize,
}

impl Model {
    fn load(path: &Path, tokenizer_file: Option<&Path>) -> Result<Self> {
        let mut file = BufReader::new(File::open(path)?);
        let content = Content::read(&mut file).context("not a GGUF file")?;
        let mut tokenizer = match tokenizer_file {
            Some(path) => Tokenizer::from_file(path)
                .map_err(|e| anyhow!(e))
                .with_context(|| format!("--tokenizer {}", path.display()))?,
            None => tokenizer(&content)
                .context("its tokenizer cannot be used; give one with --tokenizer")?,
        };
        // A sample's text is text, also where it looks like a control token.
        tokenizer.set_encode_special_tokens(true);
        let number = |key: &str| {
            content
                .metadata
                .get(key)
                .and_then(|value| value.to_u32().ok())
        };
        let add_begin = content.metadata.get("tokenizer.ggml.add_bos_token");
        let add_begin = add_begin.is_some_and(|value| value.to_bool().unwrap_or(false));
        let begin = number("tokenizer.ggml.bos_token_id").filter(|_| add_begin);
        let id = |token| tokenizer.token_to_id(token);
        Ok(Self {
            begin,
            message: id("<|im_start|>").zip(id("<|im_end|>")),
            llama: Llama::load(&content, &mut file)?,
            tokenizer,
        })
    }

    /// The sample as the model is used to see it: as messages of a user and an assistant in ChatML, else as the prompt, a
    /// blank line and the response.
    fn encode(&self, prompt: &str, response: &str) -> Result<Text> {
        let ids = |text: &str| -> Result<Vec<u32>> {
            let encoding = self.tokenizer.encode(text, false);
            Ok(encoding
                .map_err(|e| anyhow!("tokenizer: {e}"))?
                .get_ids()
                .to_vec())
        };
        let mut tokens = Vec::from_iter(self.begin);
        match self.message {
            Some((start, end)) => {
                tokens.push(start);
                tokens.extend(ids(&format!("user\n{prompt}"))?);
                tokens.push(end);
                tokens.extend(ids("\n")?);
                tokens.push(start);
                tokens.extend(ids("assistant\n")?);
            }
            None => tokens.extend(ids(&format!("{prompt}\n\n"))?),
        }
        let begin = tokens.len();
        tokens.extend(ids(response)?);
        ensure!(
            begin > 0 && tokens.len() > begin,
            "the tokenizer makes nothing of the text"
        );
        Ok(Text {
            tokens,
            response: begin,
        })
    }

    /// Mean entropy of the predictions of the response's tokens, divided by log V: in \[0, 1\].
    fn uncertainty(&self, text: &Text) -> Result<f64> {
        let length = text.tokens.len() - text.response;
        let hidden = self.llama.hidden(&text.tokens)?;
        let hidden = hidden.narrow(0, text.response - 1, length)?; // a position predicts the next token
        let targets = Tensor::new(&text.tokens[text.response..], &Device::Cpu)?;
        let loss = CrossEntropy::new().reduction(Reduction::None);
        let (_, stats) =
            loss.forward_linear_with_stats(&hidden, &self.llama.projection, None, &targets)?;
        let entropies = stats.entropy.to_vec1::<f32>()?;
        let sum: f64 = entropies.iter().map(|&entropy| f64::from(entropy)).sum();
        let vocab = self.llama.projection.dim(0)?;
        let mean = sum / length as f64 / (vocab as f64).ln();
        ensure!(mean.is_finite(), "the model's predictions are not finite");
        Ok(mean.clamp(0.0, 1.0)) // rounding
    }
}
