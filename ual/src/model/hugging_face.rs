//! Models in folders as Hugging Face has them: config.json, tokenizer.json and safetensors.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, bail, ensure};
use candle_core::{Device, Tensor};
use serde::Deserialize;
use serde_json::{Map, Value as Json, json};

use crate::{
    files::{self, refuse_pointer},
    model::{
        decoder::Config,
        names::HUGGING_FACE,
        weights::{Parts, Stored, Unread},
    },
};

const CONFIG: &str = "config.json";
const WEIGHTS: &str = "model.safetensors";
const MODEL_TYPES: [&str; 4] = ["llama", "mistral", "qwen2", "qwen3"];

/// What is read of config.json.
#[derive(Deserialize)]
struct Fields {
    model_type: String,
    vocab_size: usize,
    hidden_size: usize,
    num_hidden_layers: usize,
    num_attention_heads: usize,
    num_key_value_heads: Option<usize>,
    head_dim: Option<usize>,
    intermediate_size: usize,
    rms_norm_eps: f32,
    max_position_embeddings: Option<usize>,
    rope_theta: Option<f32>,
    rope_scaling: Option<RopeParameters>,
    /// Where transformers 5 has them.
    rope_parameters: Option<RopeParameters>,
    #[serde(default)]
    tie_word_embeddings: bool,
    #[serde(default)]
    attention_bias: bool,
    #[serde(default)]
    mlp_bias: bool,
    #[serde(default)]
    use_sliding_window: bool,
    layer_types: Option<Vec<String>>,
    /// All else.
    #[serde(flatten)]
    others: Map<String, Json>,
}

#[derive(Deserialize)]
struct RopeParameters {
    rope_theta: Option<f32>,
    rope_type: Option<String>,
    /// Its older name; some files have both.
    #[serde(rename = "type")]
    old_type: Option<String>,
    partial_rotary_factor: Option<f32>,
    factor: Option<f32>,
    low_freq_factor: Option<f32>,
    high_freq_factor: Option<f32>,
    original_max_position_embeddings: Option<f32>,
}

impl RopeParameters {
    /// By how much slower each element of half a head turns.
    fn factors(&self, base: f32, half: usize) -> Result<Option<Vec<f32>>> {
        let partial = self.partial_rotary_factor.unwrap_or(1.0);
        ensure!(
            partial == 1.0,
            "config.json: \"partial_rotary_factor\" is {partial}, which is not done here; it must be 1"
        );
        let kind = self.rope_type.as_ref().or(self.old_type.as_ref());
        match (kind.map_or("default", String::as_str), self.factor) {
            ("default", _) => Ok(None),
            ("linear", Some(factor)) => Ok(Some(vec![factor; half])),
            ("llama3", Some(factor)) => {
                let parameters = (|| {
                    let context = self.original_max_position_embeddings?;
                    Some((self.low_freq_factor?, self.high_freq_factor?, context))
                })();
                let (low, high, context) = parameters.context(
                    "config.json: its rotary positions lack a parameter of the type llama3",
                )?;
                Ok(Some(llama3(base, half, factor, (low, high), context)))
            }
            (kind, _) => bail!(
                "config.json: its rotary positions are of the type {kind}; they must be default, or linear or llama3 \
                 with all their parameters"
            ),
        }
    }
}

/// How Llama 3.1 stretches slow rotations: those that turn less than `low` times in the `context` of the pre-training by
/// `factor`, those that turn more than `high` times not, in between by interpolation.
fn llama3(base: f32, half: usize, factor: f32, (low, high): (f32, f32), context: f32) -> Vec<f32> {
    let factor = |i: usize| {
        let frequency = base.powf(-(i as f32) / half as f32);
        let turns = context * frequency / std::f32::consts::TAU;
        let kept = ((turns - low) / (high - low)).clamp(0.0, 1.0);
        ((1.0 - kept) / factor + kept).recip()
    };
    (0..half).map(factor).collect()
}

/// Fields that have no part in what a model predicts: those that transformers writes into every config.json, and some
/// tools' own.
const WITHOUT_EFFECT: &[&str] = &[
    "_attn_implementation_autoset",
    "_flash_attn_2_enabled",
    "_name_or_path",
    "architectures",
    "attention_dropout",
    "attn_implementation",
    "auto_map",
    "bad_words_ids",
    "begin_suppress_tokens",
    "bos_token_id",
    "chunk_size_feed_forward",
    "cross_attention_hidden_size",
    "decoder_start_token_id",
    "diversity_penalty",
    "do_sample",
    "dtype",
    "early_stopping",
    "encoder_no_repeat_ngram_size",
    "eos_token_id",
    "exponential_decay_length_penalty",
    "finetuning_task",
    "forced_bos_token_id",
    "forced_eos_token_id",
    "id2label",
    "initializer_range",
    "is_decoder",
    "is_llama_config",
    "label2id",
    "length_penalty",
    "max_length",
    "max_window_layers",
    "min_length",
    "model_max_length",
    "name_or_path",
    "no_repeat_ngram_size",
    "num_beam_groups",
    "num_beams",
    "num_return_sequences",
    "output_attentions",
    "output_hidden_states",
    "output_scores",
    "pad_token_id",
    "prefix",
    "pretraining_tp",
    "problem_type",
    "pruned_heads",
    "remove_invalid_values",
    "repetition_penalty",
    "return_dict",
    "return_dict_in_generate",
    "sep_token_id",
    "sliding_window",
    "suppress_tokens",
    "task_specific_params",
    "temperature",
    "tf_legacy_loss",
    "tie_encoder_decoder",
    "tokenizer_class",
    "top_k",
    "top_p",
    "torch_dtype",
    "torchscript",
    "transformers.js_config",
    "transformers_version",
    "typical_p",
    "unsloth_fixed",
    "unsloth_version",
    "use_bfloat16",
    "use_cache",
];

/// What a field must be that has a part in what a model predicts, and of which one value alone is done here. Empty
/// where it must be absent.
fn wanted(name: &str) -> Option<Json> {
    Some(match name {
        "hidden_act" | "hidden_activation" => json!(["silu", "swish"]),
        "partial_rotary_factor"
        | "embedding_multiplier"
        | "residual_multiplier"
        | "logits_scaling"
        | "logit_scale" => {
            json!([1.0])
        }
        "is_causal" => json!([true]),
        "rope_interleaved"
        | "use_qk_norm"
        | "qk_layernorm"
        | "is_encoder_decoder"
        | "add_cross_attention" => {
            json!([false])
        }
        "num_local_experts" | "num_experts" => json!([0, 1]),
        "quantization_config"
        | "attention_multiplier"
        | "clip_qkv"
        | "attn_logit_softcapping"
        | "final_logit_softcapping" => json!([]),
        _ => return None,
    })
}

fn is_empty(value: &Json) -> bool {
    match value {
        Json::Null => true,
        Json::Bool(value) => !value,
        Json::Array(values) => values.is_empty(),
        Json::Object(values) => values.is_empty(),
        _ => false,
    }
}

impl Fields {
    fn kv_heads(&self) -> usize {
        self.num_key_value_heads.unwrap_or(self.num_attention_heads)
    }

    fn head_size(&self) -> usize {
        let usual = match self.model_type.as_str() {
            "qwen3" => 128,
            _ => self.hidden_size / self.num_attention_heads.max(1),
        };
        self.head_dim.unwrap_or(usual)
    }

    /// Base and factors of rotary positions.
    fn rope(&self) -> Result<(f32, Option<Vec<f32>>)> {
        let parameters = self.rope_parameters.as_ref();
        let base = parameters.and_then(|parameters| parameters.rope_theta);
        let base = base.or(self.rope_theta).unwrap_or(10_000.0);
        let Some(rope) = parameters.or(self.rope_scaling.as_ref()) else {
            return Ok((base, None));
        };
        Ok((base, rope.factors(base, self.head_size() / 2)?))
    }

    /// How many tokens see each other, where that has a limit.
    fn window(&self) -> Option<usize> {
        let somewhere = match &self.layer_types {
            Some(kinds) => kinds.iter().any(|kind| kind == "sliding_attention"),
            None => true,
        };
        let has = match self.model_type.as_str() {
            "mistral" => true,
            "llama" => false,
            _ => self.use_sliding_window,
        };
        if !somewhere || !has {
            return None;
        }
        match self.others.get("sliding_window") {
            Some(window) => window.as_u64().map(|window| window as usize),
            None => (self.model_type == "mistral").then_some(4096),
        }
    }

    /// Fails at a field by which the model would predict otherwise than the one here does.
    fn check(&self) -> Result<()> {
        let known = MODEL_TYPES.contains(&self.model_type.as_str());
        ensure!(
            known,
            "config.json: \"model_type\" is {:?}; those known are {}",
            self.model_type,
            MODEL_TYPES.join(", ")
        );
        let mut unknown = Vec::new();
        for (name, value) in &self.others {
            if let Some(wanted) = wanted(name) {
                let wanted = wanted.as_array().map_or(&[][..], Vec::as_slice);
                let same = |wanted: &Json| match (wanted.as_f64(), value.as_f64()) {
                    (Some(wanted), Some(value)) => wanted == value,
                    _ => wanted == value,
                };
                let choices: Vec<String> = wanted.iter().map(Json::to_string).collect();
                ensure!(
                    value.is_null() || wanted.iter().any(same),
                    "config.json: {name:?} is {value}, which is not done here; it must be {}",
                    match choices.is_empty() {
                        true => "absent".to_string(),
                        false => choices.join(" or "),
                    }
                );
            } else if !WITHOUT_EFFECT.contains(&name.as_str()) && !is_empty(value) {
                unknown.push(format!("{name:?}"));
            }
        }
        ensure!(
            unknown.is_empty(),
            "config.json: what {} mean is not known here; if they have no part in what the model predicts, remove them \
             from the file",
            unknown.join(", ")
        );
        for kind in self.layer_types.iter().flatten() {
            ensure!(
                ["full_attention", "sliding_attention"].contains(&kind.as_str()),
                "config.json: \"layer_types\" has {kind:?}, which is not done here"
            );
        }
        Ok(())
    }
}

pub struct Folder {
    path: PathBuf,
    fields: Fields,
}

impl Folder {
    /// Fails where config.json says something that is not done here.
    pub fn open(path: &Path) -> Result<Self> {
        let config = path.join(CONFIG);
        ensure!(
            config.exists(),
            "it is a folder without config.json; a model is a GGUF file, or a folder with config.json, tokenizer.json \
             and safetensors"
        );
        let config = fs::read(config).context(CONFIG)?;
        refuse_pointer(&config).context(CONFIG)?;
        let fields: Fields = serde_json::from_slice(&config).context(CONFIG)?;
        fields.check()?;
        Ok(Self {
            path: path.to_path_buf(),
            fields,
        })
    }

    /// Most tokens that it was made for, where it says so, all of which see each other.
    pub fn context(&self) -> Option<usize> {
        let longest = [self.fields.max_position_embeddings, self.fields.window()];
        longest.into_iter().flatten().min()
    }

    /// Sizes, and by how much slower the elements of half a head turn.
    pub fn config(&self, max_tokens: usize) -> Result<(Config, Option<Vec<f32>>)> {
        let fields = &self.fields;
        let (rope_base, factors) = fields.rope()?;
        let config = Config {
            vocab: fields.vocab_size,
            dim: fields.hidden_size,
            layers: fields.num_hidden_layers,
            heads: fields.num_attention_heads,
            kv_heads: fields.kv_heads(),
            head_size: fields.head_size(),
            hidden: fields.intermediate_size,
            max_tokens,
            rope_base,
            rope_interleaved: false,
            norm_epsilon: fields.rms_norm_eps,
        };
        Ok((config, factors))
    }

    pub fn parts(&self) -> Parts {
        let fields = &self.fields;
        Parts {
            tied: fields.tie_word_embeddings,
            qk_norm: fields.model_type == "qwen3",
            qkv_bias: fields.attention_bias || fields.model_type == "qwen2",
            output_bias: fields.attention_bias && fields.model_type != "qwen2",
            mlp_bias: fields.mlp_bias,
        }
    }

    /// Those that the index names, else the one without number.
    fn weight_files(&self) -> Result<Vec<PathBuf>> {
        #[derive(Deserialize)]
        struct Index {
            weight_map: BTreeMap<String, String>,
        }
        let index = self.path.join("model.safetensors.index.json");
        if index.exists() {
            let index: Index =
                serde_json::from_slice(&fs::read(index)?).context("its index.json")?;
            let files: BTreeSet<String> = index.weight_map.into_values().collect();
            return Ok(files.iter().map(|name| self.path.join(name)).collect());
        }
        let file = self.path.join(WEIGHTS);
        ensure!(
            file.exists() || !self.path.join("pytorch_model.bin").exists(),
            "it has pytorch_model.bin and no {WEIGHTS}; save it again as safetensors"
        );
        ensure!(file.exists(), "it has no {WEIGHTS}");
        Ok(vec![file])
    }

    pub fn tensors(&self) -> Result<Tensors> {
        let mut all = HashMap::new();
        for file in self.weight_files()? {
            let name = || file.display().to_string();
            files::beginning(&file).with_context(name)?;
            let read = candle_core::safetensors::load(&file, &Device::Cpu);
            all.extend(read.with_context(name)?);
        }
        Ok(Tensors {
            all,
            tied: self.fields.tie_word_embeddings,
        })
    }

    /// All that predictions depend on but the tokenizer.
    pub fn files(&self) -> Result<Vec<PathBuf>> {
        let mut files = self.weight_files()?;
        files.push(self.path.join(CONFIG));
        Ok(files)
    }
}

pub struct Tensors {
    all: HashMap<String, Tensor>,
    tied: bool,
}

impl Tensors {
    pub fn read(&mut self, name: &str) -> Result<Stored> {
        let tensor = self.all.remove(name);
        Ok(Stored::Full(tensor.context("it is missing")?))
    }

    /// That everything was read.
    pub fn finish(self) -> Result<()> {
        let unread = self.all.keys().filter(|name| {
            let copy = self.tied && *name == HUGGING_FACE.projection;
            !copy && !name.ends_with("rotary_emb.inv_freq")
        });
        Unread::new(unread).check()
    }
}
