//! A model of the Llama family from files: a GGUF file, or a folder with config.json, tokenizer.json and safetensors, as
//! Hugging Face has them. Weights become f32.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    fs::{self, File},
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, anyhow, bail, ensure};
use candle_core::{DType, Device, Tensor, quantized::gguf_file::Content};
use serde::Deserialize;
use tokenizers::Tokenizer;

use crate::{
    digest,
    model::{
        decoder::{Config, LayerWeights, Weights},
        gguf::{self, Unread},
        names::{GGUF, HUGGING_FACE, Names},
    },
    text::{chat::Encoder, gguf_tokenizer},
};

#[derive(Clone)]
pub struct Pretrained {
    pub config: Config,
    pub weights: Weights,
    pub encoder: Encoder,
    /// A hash of the files with weights.
    pub digest: String,
}

/// A model whose rotary positions reach `max_tokens`.
pub fn load(path: &Path, max_tokens: usize, device: &Device) -> Result<Pretrained> {
    let loaded = if path.is_dir() {
        load_folder(path, max_tokens, device)
    } else {
        load_gguf(path, max_tokens, device)
    };
    let checked = loaded.and_then(|loaded| {
        check(&loaded.config, &loaded.weights)?;
        Ok(loaded)
    });
    checked.with_context(|| format!("cannot load the model {}", path.display()))
}

/// That sizes and shapes go together.
fn check(config: &Config, weights: &Weights) -> Result<()> {
    let &Config {
        vocab,
        dim,
        heads,
        kv_heads,
        hidden,
        ..
    } = config;
    let even = heads > 0 && kv_heads > 0 && heads.is_multiple_of(kv_heads);
    ensure!(
        even && dim.is_multiple_of(2 * heads),
        "width {dim}, {heads} heads and {kv_heads} of keys and values do not go together"
    );
    let shape = |name: &str, tensor: &Tensor, expected: &[usize]| {
        let found = tensor.dims();
        ensure!(
            found == expected,
            "{name} is {found:?}; by the model's sizes it must be {expected:?}"
        );
        Ok(())
    };
    shape("the embedding", &weights.embedding, &[vocab, dim])?;
    shape("the last norm", &weights.norm, &[dim])?;
    if let Some(projection) = &weights.projection {
        shape("the output projection", projection, &[vocab, dim])?;
    }
    for layer in &weights.layers {
        shape("a layer's first norm", &layer.attention_norm, &[dim])?;
        shape("a layer's second norm", &layer.mlp_norm, &[dim])?;
        let qkv = [dim, dim + 2 * config.kv_dim()];
        shape("a layer's queries, keys and values", &layer.qkv, &qkv)?;
        shape("a layer's attention output", &layer.output, &[dim, dim])?;
        shape("a layer's gate and up", &layer.gate_up, &[dim, 2 * hidden])?;
        shape("a layer's down", &layer.down, &[hidden, dim])?;
    }
    if let Some(factors) = &weights.rope_factors {
        let half = config.head_size() / 2;
        ensure!(
            factors.len() == half,
            "{} factors of rotary positions; there must be {half}",
            factors.len()
        );
    }
    Ok(())
}

fn check_context(context: Option<usize>, max_tokens: usize) -> Result<()> {
    let longest = context.unwrap_or(usize::MAX);
    ensure!(
        max_tokens <= longest,
        "it takes {longest} tokens, and --max-tokens is {max_tokens}"
    );
    Ok(())
}

/// Collects the weights by name; `read` gives a tensor as it is stored, matrices (out, in).
fn weights(
    names: &Names,
    layers: usize,
    tied: bool,
    mut read: impl FnMut(&str) -> Result<Tensor>,
) -> Result<Weights> {
    let mut layer = |i: usize| -> Result<LayerWeights> {
        let prefix = (names.layer)(i);
        let mut vector = |name: &str| read(&format!("{prefix}{name}"));
        let (attention_norm, mlp_norm) = (vector(names.attention_norm)?, vector(names.mlp_norm)?);
        // (out, in) parts, one below another, to (in, out).
        let mut matrix = |parts: &[&str]| -> Result<Tensor> {
            let parts = parts.iter().map(|name| vector(name));
            let stacked = Tensor::cat(&parts.collect::<Result<Vec<_>>>()?, 0)?;
            Ok(stacked.t()?.contiguous()?)
        };
        Ok(LayerWeights {
            attention_norm,
            qkv: matrix(&names.qkv)?,
            output: matrix(&[names.output])?,
            mlp_norm,
            gate_up: matrix(&names.gate_up)?,
            down: matrix(&[names.down])?,
        })
    };
    let layers = (0..layers).map(&mut layer).collect::<Result<_>>()?;
    Ok(Weights {
        layers,
        embedding: read(names.embedding)?,
        norm: read(names.norm)?,
        projection: if tied {
            None
        } else {
            Some(read(names.projection)?)
        },
        rope_factors: None,
    })
}

fn load_gguf(path: &Path, max_tokens: usize, device: &Device) -> Result<Pretrained> {
    let mut file = File::open(path)?;
    let content = Content::read(&mut file)?;
    let value = |key: &str| {
        let value = content.metadata.get(key);
        value.with_context(|| format!("no {key} in the file"))
    };
    let architecture = value("general.architecture")?.to_string()?;
    ensure!(
        architecture == "llama",
        "its architecture is {architecture}; it must be llama"
    );
    let size = |key: &str| Ok::<_, anyhow::Error>(value(key)?.to_u32()? as usize);
    gguf::check_rope(&content)?;
    check_context(size("llama.context_length").ok(), max_tokens)?;
    let heads = size("llama.attention.head_count")?;
    ensure!(heads > 0, "it has no heads of attention");
    let embedding = content.tensor_infos.get(GGUF.embedding);
    let config = Config {
        vocab: embedding
            .with_context(|| format!("no {}", GGUF.embedding))?
            .shape
            .dims()[0],
        dim: size("llama.embedding_length")?,
        layers: size("llama.block_count")?,
        heads,
        kv_heads: size("llama.attention.head_count_kv").unwrap_or(heads),
        hidden: size("llama.feed_forward_length")?,
        max_tokens,
        rope_base: match content.metadata.get("llama.rope.freq_base") {
            Some(base) => base.to_f32()?,
            None => 10_000.0,
        },
        rope_interleaved: true,
        norm_epsilon: value("llama.attention.layer_norm_rms_epsilon")?.to_f32()?,
    };
    let tied = !content.tensor_infos.contains_key(GGUF.projection);
    let rotated = size("llama.rope.dimension_count").unwrap_or(config.head_size());
    ensure!(
        rotated == config.head_size(),
        "{rotated} elements of a head of {} are rotated; it must be all",
        config.head_size()
    );
    let mut unread = Unread::new(content.tensor_infos.keys());
    let mut read = |name: &str| {
        unread.read(name);
        let tensor = content.tensor(&mut file, name, device);
        Ok(tensor
            .with_context(|| name.to_string())?
            .dequantize(device)?)
    };
    let mut weights = weights(&GGUF, config.layers, tied, &mut read)?;
    if content.tensor_infos.contains_key(gguf::ROPE_FACTORS) {
        weights.rope_factors = Some(read(gguf::ROPE_FACTORS)?.to_vec1()?);
    }
    unread.check()?;
    Ok(Pretrained {
        digest: digest::of_files(&[path])?,
        config,
        weights,
        encoder: Encoder::from_gguf(&content, gguf_tokenizer::tokenizer(&content)?)?,
    })
}

/// What is read of Hugging Face's config.json.
#[derive(Deserialize)]
struct HuggingFace {
    model_type: String,
    vocab_size: usize,
    hidden_size: usize,
    num_hidden_layers: usize,
    num_attention_heads: usize,
    num_key_value_heads: Option<usize>,
    intermediate_size: usize,
    rms_norm_eps: f32,
    max_position_embeddings: Option<usize>,
    rope_theta: Option<f32>,
    rope_scaling: Option<RopeParameters>,
    /// Where transformers 5 has them.
    rope_parameters: Option<RopeParameters>,
    #[serde(default)]
    tie_word_embeddings: bool,
}

#[derive(Deserialize)]
struct RopeParameters {
    rope_theta: Option<f32>,
    rope_type: Option<String>,
    /// Its older name; some files have both.
    #[serde(rename = "type")]
    old_type: Option<String>,
    #[serde(flatten)]
    stretch: Option<Stretch>,
}

/// How Llama 3.1 stretches slow rotations: those that turn less than `low_freq_factor` times in the context of the
/// pre-training by `factor`, those that turn more than `high_freq_factor` times not, in between by interpolation.
#[derive(Deserialize)]
struct Stretch {
    factor: f32,
    low_freq_factor: f32,
    high_freq_factor: f32,
    original_max_position_embeddings: f32,
}

impl Stretch {
    /// By how much slower each element of half a head turns.
    fn factors(&self, base: f32, half: usize) -> Vec<f32> {
        let factor = |i: usize| {
            let frequency = base.powf(-(i as f32) / half as f32);
            let turns = self.original_max_position_embeddings * frequency / std::f32::consts::TAU;
            let (low, high) = (self.low_freq_factor, self.high_freq_factor);
            let kept = ((turns - low) / (high - low)).clamp(0.0, 1.0);
            ((1.0 - kept) / self.factor + kept).recip()
        };
        (0..half).map(factor).collect()
    }
}

impl HuggingFace {
    fn head_size(&self) -> usize {
        self.hidden_size / self.num_attention_heads.max(1)
    }

    /// Base and factors of rotary positions.
    fn rope(&self) -> Result<(f32, Option<Vec<f32>>)> {
        let parameters = self.rope_parameters.as_ref();
        let base = parameters.and_then(|parameters| parameters.rope_theta);
        let base = base.or(self.rope_theta).unwrap_or(10_000.0);
        let Some(rope) = parameters.or(self.rope_scaling.as_ref()) else {
            return Ok((base, None));
        };
        let kind = rope.rope_type.as_ref().or(rope.old_type.as_ref());
        match (kind.map_or("default", String::as_str), &rope.stretch) {
            ("default", _) => Ok((base, None)),
            ("llama3", Some(stretch)) => {
                Ok((base, Some(stretch.factors(base, self.head_size() / 2))))
            }
            (kind, _) => bail!(
                "its rotary positions are of the type {kind}; they must be default, or llama3 with all its parameters"
            ),
        }
    }
}

/// Those that the index names, else the one without number.
fn weight_files(folder: &Path) -> Result<Vec<PathBuf>> {
    #[derive(Deserialize)]
    struct Index {
        weight_map: BTreeMap<String, String>,
    }
    let index = folder.join("model.safetensors.index.json");
    if !index.exists() {
        return Ok(vec![folder.join("model.safetensors")]);
    }
    let index: Index = serde_json::from_slice(&fs::read(index)?).context("its index.json")?;
    let files: BTreeSet<String> = index.weight_map.into_values().collect();
    Ok(files.iter().map(|name| folder.join(name)).collect())
}

fn load_folder(folder: &Path, max_tokens: usize, device: &Device) -> Result<Pretrained> {
    let config = fs::read(folder.join("config.json")).context("config.json")?;
    let config: HuggingFace = serde_json::from_slice(&config).context("config.json")?;
    ensure!(
        config.model_type == "llama",
        "it is a {} model; it must be llama",
        config.model_type
    );
    check_context(config.max_position_embeddings, max_tokens)?;
    let (rope_base, rope_factors) = config.rope()?;
    let tokenizer = Tokenizer::from_file(folder.join("tokenizer.json"))
        .map_err(|error| anyhow!("tokenizer.json: {error}"))?;
    let mut files = weight_files(folder)?;
    let mut tensors = HashMap::new();
    for file in &files {
        let read = candle_core::safetensors::load(file, device);
        tensors.extend(read.with_context(|| file.display().to_string())?);
    }
    let mut weights = weights(
        &HUGGING_FACE,
        config.num_hidden_layers,
        config.tie_word_embeddings,
        |name| {
            let tensor = tensors.remove(name);
            let tensor = tensor.with_context(|| format!("no {name} in its safetensors"))?;
            Ok(tensor.to_dtype(DType::F32)?)
        },
    )?;
    weights.rope_factors = rope_factors;
    let unread = tensors.keys().filter(|name| {
        let copy = config.tie_word_embeddings && *name == HUGGING_FACE.projection;
        !copy && !name.ends_with("rotary_emb.inv_freq")
    });
    Unread::new(unread).check()?;
    Ok(Pretrained {
        config: Config {
            vocab: config.vocab_size,
            dim: config.hidden_size,
            layers: config.num_hidden_layers,
            heads: config.num_attention_heads,
            kv_heads: config
                .num_key_value_heads
                .unwrap_or(config.num_attention_heads),
            hidden: config.intermediate_size,
            max_tokens,
            rope_base,
            rope_interleaved: false,
            norm_epsilon: config.rms_norm_eps,
        },
        weights,
        encoder: Encoder::from_folder(folder, tokenizer)?,
        digest: {
            files.push(folder.join("config.json"));
            digest::of_files(&files)?
        },
    })
}
