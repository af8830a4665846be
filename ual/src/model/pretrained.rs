//! A model of the Llama family from files: a GGUF file, or a folder with config.json, tokenizer.json and safetensors, as
//! Hugging Face has them.

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, anyhow, ensure};
use candle_core::{Device, Tensor};
use tokenizers::Tokenizer;

use crate::{
    digest,
    files::refuse_pointer,
    model::{
        decoder::{Config, Weights},
        gguf::Gguf,
        hugging_face::Folder,
        linear::Affine,
        names::{GGUF, HUGGING_FACE},
        vocabulary, weights,
    },
    text::{
        chat::{Encoder, TOKENIZER},
        gguf_tokenizer,
    },
};

/// Most tokens of a text that is only read, whatever the model's context: attention takes their square.
const LONGEST: usize = 4096;

/// What may stand in place of the model's own.
#[derive(clap::Args, Clone, Debug, Default, serde::Serialize)]
pub struct Overrides {
    /// Tokenizer of the model, in place of its own
    #[arg(long, value_name = "tokenizer.json")]
    pub tokenizer: Option<PathBuf>,
    /// Chat template of the model, in Jinja, in place of its own
    #[arg(long, value_name = "FILE.jinja")]
    pub chat_template: Option<PathBuf>,
}

#[derive(Clone, Copy)]
pub enum Purpose {
    /// Samples of so many tokens. Weights become f32.
    Training(usize),
    /// Of texts as long as they may be, on the CPU. A GGUF file's matrices stay as they are.
    Reading,
}

#[derive(Clone)]
pub struct Pretrained {
    pub config: Config,
    pub weights: Weights,
    pub encoder: Encoder,
}

pub fn load(
    path: &Path,
    overrides: &Overrides,
    purpose: Purpose,
    device: &Device,
) -> Result<Pretrained> {
    let loaded = || -> Result<Pretrained> {
        let template = overrides.chat_template()?;
        let tokenizer = overrides
            .tokenizer
            .as_deref()
            .map(|path| tokenizer(path).with_context(|| format!("--tokenizer {}", path.display())));
        let replaced = (tokenizer.transpose()?, template);
        let loaded = match path.is_dir() {
            true => load_folder(path, replaced, purpose, device)?,
            false => load_gguf(path, replaced, purpose, device)?,
        };
        check(&loaded.config, &loaded.weights)?;
        vocabulary::check_rows(&loaded.encoder, loaded.config.vocab)?;
        Ok(loaded)
    };
    loaded().with_context(|| format!("cannot load the model {}", path.display()))
}

impl Overrides {
    pub fn are_none(&self) -> bool {
        self.tokenizer.is_none() && self.chat_template.is_none()
    }

    pub fn chat_template(&self) -> Result<Option<String>> {
        let read = |path: &PathBuf| {
            let text = fs::read_to_string(path);
            text.with_context(|| format!("--chat-template {}", path.display()))
        };
        self.chat_template.as_ref().map(read).transpose()
    }
}

/// A hash of the files with weights of the model at `path`.
pub fn digest(path: &Path) -> Result<String> {
    let hash = match path.is_dir() {
        true => Folder::open(path).and_then(|folder| digest::of_files(&folder.files()?)),
        false => digest::of_files(&[path]),
    };
    hash.with_context(|| format!("cannot load the model {}", path.display()))
}

impl Purpose {
    /// Positions that are needed of those that the model was made for.
    fn tokens(self, context: Option<usize>) -> Result<usize> {
        let longest = context.unwrap_or(usize::MAX);
        match self {
            Self::Training(tokens) => {
                ensure!(
                    tokens <= longest,
                    "it takes {longest} tokens, and --max-tokens is {tokens}"
                );
                Ok(tokens)
            }
            Self::Reading => Ok(longest.min(LONGEST)),
        }
    }

    fn keeps_quantised(self) -> bool {
        matches!(self, Self::Reading)
    }
}

/// That sizes and shapes go together.
fn check(config: &Config, weights: &Weights) -> Result<()> {
    let &Config {
        vocab,
        dim,
        heads,
        kv_heads,
        head_size,
        hidden,
        ..
    } = config;
    let even = heads > 0 && kv_heads > 0 && heads.is_multiple_of(kv_heads);
    ensure!(
        even && head_size > 0 && head_size.is_multiple_of(2),
        "width {dim}, {heads} heads of {head_size} and {kv_heads} of keys and values do not go together"
    );
    let same = |name: &str, found: &[usize], expected: &[usize]| {
        ensure!(
            found == expected,
            "{name} is {found:?}; by the model's sizes it must be {expected:?}"
        );
        Ok(())
    };
    let shape =
        |name: &str, tensor: &Tensor, expected: &[usize]| same(name, tensor.dims(), expected);
    let map = |name: &str, map: &Affine, (input, output): (usize, usize)| {
        let dims = map.matrix.dims()?;
        same(name, &[dims.0, dims.1], &[input, output])?;
        match &map.bias {
            Some(bias) => shape(&format!("the bias of {name}"), bias, &[output]),
            None => Ok(()),
        }
    };
    shape("the embedding", &weights.embedding, &[vocab, dim])?;
    shape("the last norm", &weights.norm, &[dim])?;
    if let Some(projection) = &weights.projection {
        shape("the output projection", projection, &[vocab, dim])?;
    }
    let (q, kv) = (config.q_dim(), config.kv_dim());
    for layer in &weights.layers {
        shape("a layer's first norm", &layer.attention_norm, &[dim])?;
        shape("a layer's second norm", &layer.mlp_norm, &[dim])?;
        for norm in layer.qk_norm.iter().flatten() {
            shape("a layer's norm of queries or keys", norm, &[head_size])?;
        }
        map(
            "a layer's queries, keys and values",
            &layer.qkv,
            (dim, q + 2 * kv),
        )?;
        map("a layer's attention output", &layer.output, (q, dim))?;
        map("a layer's gate and up", &layer.gate_up, (dim, 2 * hidden))?;
        map("a layer's down", &layer.down, (hidden, dim))?;
    }
    if let Some(factors) = &weights.rope_factors {
        let half = head_size / 2;
        ensure!(
            factors.len() == half,
            "{} factors of rotary positions; there must be {half}",
            factors.len()
        );
        ensure!(
            factors
                .iter()
                .all(|&factor| factor > 0.0 && factor.is_finite()),
            "its rotary positions have factors of {factors:?}; they must be above 0"
        );
    }
    Ok(())
}

/// A tokenizer and a template that replace the model's.
type Replaced = (Option<Tokenizer>, Option<String>);

fn tokenizer(path: &Path) -> Result<Tokenizer> {
    let bytes = fs::read(path)?;
    refuse_pointer(&bytes)?;
    Tokenizer::from_bytes(bytes).map_err(|error| anyhow!("it is no tokenizer.json: {error}"))
}

fn load_gguf(
    path: &Path,
    (tokenizer, template): Replaced,
    purpose: Purpose,
    device: &Device,
) -> Result<Pretrained> {
    let mut file = Gguf::open(path)?;
    let (config, factors) = file.config(purpose.tokens(file.context())?)?;
    let tokenizer = match tokenizer {
        Some(tokenizer) => tokenizer,
        None => gguf_tokenizer::tokenizer(&file.content).context(
            "its tokenizer cannot be used; --tokenizer takes the tokenizer.json of the same model",
        )?,
    };
    vocabulary::check_list(&file.content, &tokenizer)?;
    let encoder = Encoder::from_gguf(&file.content, tokenizer, template)?;
    let (parts, quantised) = (file.parts(), purpose.keeps_quantised());
    let read = |name: &str| file.read(name);
    let mut weights = weights::collect(&GGUF, config.layers, &parts, quantised, device, read)?;
    weights.rope_factors = factors;
    file.finish()?;
    Ok(Pretrained {
        config,
        weights,
        encoder,
    })
}

fn load_folder(
    path: &Path,
    (replaced, template): Replaced,
    purpose: Purpose,
    device: &Device,
) -> Result<Pretrained> {
    let folder = Folder::open(path)?;
    let (config, factors) = folder.config(purpose.tokens(folder.context())?)?;
    let tokenizer = match replaced {
        Some(tokenizer) => tokenizer,
        None => tokenizer(&path.join(TOKENIZER)).with_context(|| {
            format!("{TOKENIZER} cannot be used; --tokenizer takes another of the same model")
        })?,
    };
    let encoder = Encoder::from_folder(path, tokenizer, template)?;
    let mut tensors = folder.tensors()?;
    let parts = folder.parts();
    let read = |name: &str| tensors.read(name);
    let mut weights = weights::collect(&HUGGING_FACE, config.layers, &parts, false, device, read)?;
    weights.rope_factors = factors;
    tensors.finish()?;
    Ok(Pretrained {
        config,
        weights,
        encoder,
    })
}
