//! Models in GGUF files.

use std::{fs::File, io::BufReader, path::Path};

use anyhow::{Context, Result, bail, ensure};
use candle_core::{
    Device,
    quantized::{
        QTensor,
        gguf_file::{Content, Value},
    },
};

use crate::{
    files,
    model::{
        decoder::Config,
        names::{GGUF, bias},
        weights::{Parts, Stored, Unread},
    },
    text::gguf_tokenizer::integer,
};

/// By how much slower each element of half a head turns, where Llama 3.1 and later say so.
pub const ROPE_FACTORS: &str = "rope_freqs.weight";

/// Of the Llama family, and whether neighbours in a head rotate together: llama.cpp moves them there for the first.
const ARCHITECTURES: [(&str, bool); 3] = [("llama", true), ("qwen2", false), ("qwen3", false)];

/// What follows the architecture's name in the keys of what is read, and of what has no part in predictions here.
const KNOWN: &[&str] = &[
    "attention.head_count",
    "attention.head_count_kv",
    "attention.key_length",
    "attention.layer_norm_rms_epsilon",
    "attention.sliding_window",
    "attention.value_length",
    "block_count",
    "context_length",
    "embedding_length",
    "feed_forward_length",
    "rope.dimension_count",
    "rope.freq_base",
    "rope.scale_linear",
    "rope.scaling.factor",
    "rope.scaling.finetuned",
    "rope.scaling.original_context_length",
    "rope.scaling.type",
    "tensor_data_layout",
    "vocab_size",
];

/// An open file, of which everything but the tensors was read.
pub struct Gguf {
    pub content: Content,
    file: BufReader<File>,
    architecture: &'static str,
    interleaved: bool,
    unread: Unread,
}

impl Gguf {
    /// Fails for what is no GGUF file, and for other architectures.
    pub fn open(path: &Path) -> Result<Self> {
        let beginning = files::beginning(path)?;
        ensure!(!beginning.is_empty(), "it is empty");
        ensure!(
            beginning.starts_with(b"GGUF"),
            "it is no GGUF file (it begins with {:?}); a model is a GGUF file, or a folder with config.json, \
             tokenizer.json and safetensors",
            String::from_utf8_lossy(&beginning[..beginning.len().min(16)])
        );
        let mut file = BufReader::new(File::open(path)?);
        let content = Content::read(&mut file).context("it is a damaged GGUF file")?;
        let name = content.metadata.get("general.architecture");
        let name = name.context("general.architecture is missing")?;
        let name = name.to_string()?;
        let known = ARCHITECTURES.iter().find(|(known, _)| known == name);
        let Some(&(architecture, interleaved)) = known else {
            let known = ARCHITECTURES.map(|(known, _)| known).join(", ");
            bail!("its architecture is {name:?}; those known are {known}");
        };
        let unread = Unread::new(content.tensor_infos.keys());
        Ok(Self {
            content,
            file,
            architecture,
            interleaved,
            unread,
        })
    }

    fn value(&self, key: &str) -> Option<&Value> {
        let key = format!("{}.{key}", self.architecture);
        self.content.metadata.get(&key)
    }

    fn size(&self, key: &str) -> Result<usize> {
        let value = self.value(key);
        let value = value.with_context(|| format!("{}.{key} is missing", self.architecture))?;
        Ok(integer(value)? as usize)
    }

    fn has(&self, tensor: &str) -> bool {
        self.content.tensor_infos.contains_key(tensor)
    }

    /// Most tokens that it was made for, where the file says so, all of which see each other.
    pub fn context(&self) -> Option<usize> {
        let sizes = ["context_length", "attention.sliding_window"].map(|key| self.size(key).ok());
        sizes.into_iter().flatten().filter(|&size| size > 0).min()
    }

    /// Fails at what the model here would do otherwise.
    fn check(&self, head_size: usize) -> Result<()> {
        let prefix = format!("{}.", self.architecture);
        let mut unknown = Vec::new();
        for (key, value) in &self.content.metadata {
            let Some(name) = key.strip_prefix(&prefix) else {
                continue;
            };
            let nothing = integer(value).is_ok_and(|value| value == 0);
            if !KNOWN.contains(&name) && !nothing {
                unknown.push(key.as_str());
            }
        }
        unknown.sort_unstable();
        ensure!(
            unknown.is_empty(),
            "what {} mean is not known here; other models of the architecture {} have none",
            unknown.join(", "),
            self.architecture
        );
        for key in [
            "rope.dimension_count",
            "attention.key_length",
            "attention.value_length",
        ] {
            let size = self.size(key).unwrap_or(head_size);
            ensure!(
                size == head_size,
                "{}.{key} is {size}; it must be {head_size}, all elements of a head",
                self.architecture
            );
        }
        Ok(())
    }

    /// Sizes, and by how much slower the elements of half a head turn.
    pub fn config(&mut self, max_tokens: usize) -> Result<(Config, Option<Vec<f32>>)> {
        let heads = self.size("attention.head_count")?;
        ensure!(heads > 0, "it has no heads of attention");
        let dim = self.size("embedding_length")?;
        let head_size = self.size("attention.key_length").unwrap_or(dim / heads);
        self.check(head_size)?;
        let embedding = self.content.tensor_infos.get(GGUF.embedding);
        let embedding = embedding.with_context(|| format!("{} is missing", GGUF.embedding))?;
        let number = |key: &str| self.value(key).map(Value::to_f32).transpose();
        let epsilon = number("attention.layer_norm_rms_epsilon")?;
        let config = Config {
            vocab: embedding.shape.dims2().context("the embedding")?.0,
            dim,
            layers: self.size("block_count")?,
            heads,
            kv_heads: self.size("attention.head_count_kv").unwrap_or(heads),
            head_size,
            hidden: self.size("feed_forward_length")?,
            max_tokens,
            rope_base: number("rope.freq_base")?.unwrap_or(10_000.0),
            rope_interleaved: self.interleaved,
            norm_epsilon: epsilon.context("the norms' epsilon is missing")?,
        };
        let scale = match self.value("rope.scaling.type") {
            None => number("rope.scale_linear")?,
            Some(kind) => match kind.to_string()?.as_str() {
                "none" => None,
                "linear" => Some(
                    number("rope.scaling.factor")?
                        .context("its rotary positions are scaled, it does not say by how much")?,
                ),
                kind => bail!(
                    "its rotary positions are of the type {kind}; they must be none or linear"
                ),
            },
        };
        let mut factors = match self.has(ROPE_FACTORS) {
            true => Some(
                self.tensor(ROPE_FACTORS)?
                    .dequantize(&Device::Cpu)?
                    .to_vec1()?,
            ),
            false => None,
        };
        if let Some(scale) = scale.filter(|scale| *scale != 1.0) {
            let factors = factors.get_or_insert_with(|| vec![1.0; head_size / 2]);
            factors
                .iter_mut()
                .for_each(|factor: &mut f32| *factor *= scale);
        }
        Ok((config, factors))
    }

    /// What there is beside what every model has.
    pub fn parts(&self) -> Parts {
        let first = (GGUF.layer)(0);
        let has = |name: &str| self.has(&format!("{first}{name}"));
        Parts {
            tied: !self.has(GGUF.projection),
            qk_norm: has(GGUF.qk_norm[0]),
            // Without them the file is damaged.
            qkv_bias: has(&bias(GGUF.qkv[0])) || self.architecture == "qwen2",
            output_bias: has(&bias(GGUF.output)),
            mlp_bias: has(&bias(GGUF.down)),
        }
    }

    fn tensor(&mut self, name: &str) -> Result<QTensor> {
        self.unread.read(name);
        Ok(self.content.tensor(&mut self.file, name, &Device::Cpu)?)
    }

    pub fn read(&mut self, name: &str) -> Result<Stored> {
        ensure!(self.has(name), "it is missing");
        Ok(Stored::Quantised(self.tensor(name)?.into()))
    }

    /// That everything was read.
    pub fn finish(self) -> Result<Content> {
        self.unread.check()?;
        Ok(self.content)
    }
}
