//! Models of every kind that is supported, from Hugging Face's folders and from GGUF files, against transformers' logits;
//! and what is refused. `models/make.py` makes the folders.

use std::{
    collections::{BTreeMap, HashMap},
    fs::{self, File},
    path::{Path, PathBuf},
};

use candle_core::{
    DType, Device, Tensor,
    quantized::{
        GgmlDType, QTensor,
        gguf_file::{self, Value as Metadata},
    },
};
use candle_ual::{
    data::packing::Packing,
    model::{
        decoder::{Decoder, Last, Trained},
        export,
        pretrained::{self, Overrides, Pretrained, Purpose},
    },
};
use serde::Deserialize;
use serde_json::{Value, json};
use tempfile::TempDir;

const KINDS: [&str; 5] = ["llama", "llama3", "mistral", "qwen2", "qwen3"];

#[derive(Deserialize)]
struct Expected {
    tokens: Vec<u32>,
    logits: Vec<Vec<f64>>,
}

impl Expected {
    fn of(kind: &str) -> Self {
        let text = fs::read_to_string(made(kind).join("expected.json")).unwrap();
        serde_json::from_str(&text).unwrap()
    }

    #[track_caller]
    fn assert_near(&self, what: &str, logits: &Tensor, tolerance: f64) {
        let found = logits.squeeze(0).unwrap().to_vec2::<f32>().unwrap();
        assert_eq!(found.len(), self.logits.len());
        for (found, expected) in found.iter().flatten().zip(self.logits.iter().flatten()) {
            let error = (f64::from(*found) - expected).abs();
            assert!(error <= tolerance, "{what}: {found} and {expected}");
        }
    }
}

fn made(kind: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/models")
        .join(kind)
}

fn texts() -> Vec<String> {
    let letters = (0..46).map(|i| char::from_u32('A' as u32 + i).unwrap().to_string());
    ["<s>", "</s>"]
        .map(String::from)
        .into_iter()
        .chain(letters)
        .collect()
}

/// 48 tokens, of which two are control tokens.
fn tokenizer() -> Value {
    let vocab: BTreeMap<_, _> = texts().into_iter().zip(0..).collect();
    let added = |id: usize, content: &str| {
        json!({"id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false,
               "normalized": false, "special": true})
    };
    json!({
        "version": "1.0", "truncation": null, "padding": null, "normalizer": null, "pre_tokenizer": null,
        "post_processor": null, "decoder": null, "added_tokens": [added(0, "<s>"), added(1, "</s>")],
        "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
                  "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "vocab": vocab, "merges": []},
    })
}

const TEMPLATE: &str =
    "{{ bos_token }}{% for m in messages %}{{ m.content + eos_token }}{% endfor %}";

/// A copy of a made folder, with a tokenizer.
fn folder(at: &TempDir, kind: &str) -> PathBuf {
    let folder = at.path().join(kind);
    fs::create_dir_all(&folder).unwrap();
    for name in ["config.json", "model.safetensors"] {
        fs::copy(made(kind).join(name), folder.join(name)).unwrap();
    }
    fs::write(folder.join("tokenizer.json"), tokenizer().to_string()).unwrap();
    let config = json!({"bos_token": "<s>", "eos_token": "</s>", "chat_template": TEMPLATE});
    fs::write(folder.join("tokenizer_config.json"), config.to_string()).unwrap();
    folder
}

fn tensors(kind: &str) -> HashMap<String, Tensor> {
    candle_core::safetensors::load(made(kind).join("model.safetensors"), &Device::Cpu).unwrap()
}

/// Rows of queries or keys from halves that rotate together to neighbours that do, as llama.cpp has them for a Llama.
fn neighbours(rows: &Tensor, head: usize) -> Tensor {
    let mut split = vec![rows.dim(0).unwrap() / head, 2, head / 2];
    split.extend(&rows.dims()[1..]);
    let split = rows.reshape(split).unwrap().transpose(1, 2).unwrap();
    split.contiguous().unwrap().reshape(rows.shape()).unwrap()
}

fn of_tokenizer() -> Vec<(String, Metadata)> {
    let strings =
        |texts: Vec<String>| Metadata::Array(texts.into_iter().map(Metadata::String).collect());
    let kinds = (0..48).map(|id| Metadata::I32(if id < 2 { 3 } else { 1 }));
    vec![
        (
            "tokenizer.ggml.model".into(),
            Metadata::String("gpt2".into()),
        ),
        (
            "tokenizer.ggml.pre".into(),
            Metadata::String("smollm".into()),
        ),
        ("tokenizer.ggml.tokens".into(), strings(texts())),
        ("tokenizer.ggml.merges".into(), strings(vec![])),
        (
            "tokenizer.ggml.token_type".into(),
            Metadata::Array(kinds.collect()),
        ),
        ("tokenizer.ggml.bos_token_id".into(), Metadata::U32(0)),
        ("tokenizer.ggml.eos_token_id".into(), Metadata::U32(1)),
        (
            "tokenizer.chat_template".into(),
            Metadata::String(TEMPLATE.into()),
        ),
    ]
}

/// Matrices quantised to `dtype`, where their rows allow.
fn write_gguf(
    path: &Path,
    metadata: &[(String, Metadata)],
    tensors: BTreeMap<String, Tensor>,
    dtype: GgmlDType,
) {
    let stored: Vec<(String, QTensor)> = tensors
        .into_iter()
        .map(|(name, tensor)| {
            let rows = tensor.dims();
            let fits = rows.len() == 2 && rows[1].is_multiple_of(dtype.block_size());
            let dtype = if fits { dtype } else { GgmlDType::F32 };
            (name, QTensor::quantize(&tensor, dtype).unwrap())
        })
        .collect();
    let metadata: Vec<_> = metadata
        .iter()
        .map(|(key, value)| (key.as_str(), value))
        .collect();
    let tensors: Vec<_> = stored
        .iter()
        .map(|(name, tensor)| (name.as_str(), tensor))
        .collect();
    gguf_file::write(&mut File::create(path).unwrap(), &metadata, &tensors).unwrap();
}

/// What llama.cpp's converter makes of a made folder.
fn gguf(at: &TempDir, kind: &str, more: &[(&str, Metadata)]) -> PathBuf {
    let config = fs::read_to_string(made(kind).join("config.json")).unwrap();
    let config: Value = serde_json::from_str(&config).unwrap();
    let architecture = if kind.starts_with("qwen") {
        kind
    } else {
        "llama"
    };
    let head = config["head_dim"].as_u64().unwrap_or(4) as usize;
    let key = |key: &str| format!("{architecture}.{key}");
    let size = |name: &str| Metadata::U32(config[name].as_u64().unwrap() as u32);
    let rope = &config["rope_parameters"];
    let number = |value: &Value| value.as_f64().unwrap() as f32;
    let mut metadata = vec![
        (
            "general.architecture".to_string(),
            Metadata::String(architecture.into()),
        ),
        (key("embedding_length"), size("hidden_size")),
        (key("block_count"), size("num_hidden_layers")),
        (key("attention.head_count"), size("num_attention_heads")),
        (key("attention.head_count_kv"), size("num_key_value_heads")),
        (key("attention.key_length"), Metadata::U32(head as u32)),
        (key("attention.value_length"), Metadata::U32(head as u32)),
        (key("feed_forward_length"), size("intermediate_size")),
        (key("context_length"), size("max_position_embeddings")),
        (
            key("rope.freq_base"),
            Metadata::F32(number(&rope["rope_theta"])),
        ),
        (
            key("attention.layer_norm_rms_epsilon"),
            Metadata::F32(number(&config["rms_norm_eps"])),
        ),
    ];
    metadata.extend(of_tokenizer());
    metadata.extend(
        more.iter()
            .map(|(key, value)| (key.to_string(), value.clone())),
    );
    let mut all = BTreeMap::new();
    if rope["rope_type"] == "linear" {
        metadata.push((key("rope.scaling.type"), Metadata::String("linear".into())));
        metadata.push((
            key("rope.scaling.factor"),
            Metadata::F32(number(&rope["factor"])),
        ));
    }
    if rope["rope_type"] == "llama3" {
        // Of 4, 1 and 4 turns in 32 positions at the base 500, by the formula of the converter in plain numbers.
        let factors = [0, 1].map(|i| {
            let length = std::f64::consts::TAU * 500f64.powf(f64::from(i) / 2.0);
            match 32.0 / length {
                turns if turns > 4.0 => 1.0,
                turns if turns < 1.0 => 4.0,
                turns => {
                    let smooth = (turns - 1.0) / 3.0;
                    1.0 / ((1.0 - smooth) / 4.0 + smooth)
                }
            }
        });
        let factors = Tensor::new(&factors.map(|factor| factor as f32), &Device::Cpu).unwrap();
        all.insert("rope_freqs.weight".to_string(), factors);
    }
    for (name, tensor) in tensors(kind) {
        let tensor = tensor.to_dtype(DType::F32).unwrap();
        let rotates = name.contains("q_proj") || name.contains("k_proj");
        let tensor = match rotates && architecture == "llama" {
            true => neighbours(&tensor, head),
            false => tensor,
        };
        let names = [
            ("model.embed_tokens", "token_embd"),
            ("lm_head", "output"),
            ("model.norm", "output_norm"),
            ("model.layers.", "blk."),
            ("input_layernorm", "attn_norm"),
            ("post_attention_layernorm", "ffn_norm"),
            ("self_attn.o_proj", "attn_output"),
            ("self_attn.q_norm", "attn_q_norm"),
            ("self_attn.k_norm", "attn_k_norm"),
            ("self_attn.q_proj", "attn_q"),
            ("self_attn.k_proj", "attn_k"),
            ("self_attn.v_proj", "attn_v"),
            ("mlp.gate_proj", "ffn_gate"),
            ("mlp.up_proj", "ffn_up"),
            ("mlp.down_proj", "ffn_down"),
        ];
        let name = names
            .iter()
            .fold(name, |name, (from, to)| name.replace(from, to));
        all.insert(name, tensor);
    }
    let path = at.path().join(format!("{kind}.gguf"));
    write_gguf(&path, &metadata, all, GgmlDType::F32);
    path
}

fn load(path: &Path, purpose: Purpose) -> anyhow::Result<Pretrained> {
    pretrained::load(path, &Overrides::default(), purpose, &Device::Cpu)
}

fn decoder(path: &Path, purpose: Purpose, trained: Trained) -> Decoder {
    let Pretrained {
        config, weights, ..
    } = load(path, purpose).unwrap();
    Decoder::from_weights(config, weights, trained, 0, &Device::Cpu).unwrap()
}

/// (1, T, V)
fn logits(decoder: &Decoder, tokens: &[u32]) -> Tensor {
    let hidden = decoder.hidden(&Packing::new(vec![tokens]), None).unwrap();
    let projection = decoder.output_projection().t().unwrap();
    hidden.matmul(&projection).unwrap().unsqueeze(0).unwrap()
}

/// From both kinds of file, for training, with an adapter that is still nothing, for reading, and after saving.
#[test]
fn every_kind_predicts_what_transformers_does() {
    let at = TempDir::new().unwrap();
    let lora = Trained::Lora {
        rank: 2,
        scale: 1.0,
    };
    for kind in KINDS {
        let expected = Expected::of(kind);
        for source in [folder(&at, kind), gguf(&at, kind, &[])] {
            for (purpose, trained) in [
                (Purpose::Training(12), Trained::All),
                (Purpose::Training(12), lora),
                (Purpose::Reading, Trained::Nothing),
            ] {
                let what = format!("{} {trained:?}", source.display());
                let decoder = decoder(&source, purpose, trained);
                expected.assert_near(&what, &logits(&decoder, &expected.tokens), 2e-5);
                if trained == Trained::Nothing {
                    assert!(decoder.vars().is_empty());
                    continue;
                }
                let out = at.path().join("out");
                let weights = decoder.merged().unwrap();
                let none = Overrides::default();
                let saved =
                    export::save(&source, &none, &decoder.config(), &weights, &out).unwrap();
                let again = self::decoder(&saved, Purpose::Reading, Trained::Nothing);
                expected.assert_near(&what, &logits(&again, &expected.tokens), 2e-5);
                fs::remove_dir_all(&out).unwrap();
            }
        }
    }
}

/// Every weight has a part: with one changed the logits are others.
#[test]
fn every_tensor_is_read() {
    let at = TempDir::new().unwrap();
    for kind in KINDS {
        let expected = Expected::of(kind);
        let source = folder(&at, kind);
        let plain = logits(
            &decoder(&source, Purpose::Reading, Trained::Nothing),
            &expected.tokens,
        );
        for name in tensors(kind).keys() {
            let mut changed = tensors(kind);
            let tensor = &changed[name];
            // Not by one number for all of a row: softmax does not see what all keys have in common.
            let count = tensor.elem_count() as u32;
            let waves = Tensor::arange(0, count, &Device::Cpu)
                .unwrap()
                .to_dtype(DType::F32)
                .unwrap();
            let waves = waves.sin().unwrap().reshape(tensor.shape()).unwrap();
            let tensor = (tensor.to_dtype(DType::F32).unwrap() + waves).unwrap();
            changed.insert(name.clone(), tensor);
            candle_core::safetensors::save(&changed, source.join("model.safetensors")).unwrap();
            let decoder = decoder(&source, Purpose::Reading, Trained::Nothing);
            let other = logits(&decoder, &expected.tokens);
            let distance = (other - &plain).unwrap().abs().unwrap().max_all().unwrap();
            let distance = distance.to_scalar::<f32>().unwrap();
            assert!(
                distance > 1e-3,
                "{kind}: {name} changes logits by {distance}"
            );
        }
    }
}

/// Gradients of all that is trained, against differences of the loss.
#[test]
fn biases_and_norms_of_queries_and_keys_are_trained() {
    let at = TempDir::new().unwrap();
    for kind in ["llama", "qwen2", "qwen3"] {
        let expected = Expected::of(kind);
        let decoder = decoder(&folder(&at, kind), Purpose::Training(12), Trained::All);
        let targets = Tensor::new(&expected.tokens[..], &Device::Cpu).unwrap();
        let loss = || {
            let logits = logits(&decoder, &expected.tokens).squeeze(0).unwrap();
            candle_nn::loss::cross_entropy(&logits, &targets).unwrap()
        };
        let gradients = loss().backward().unwrap();
        for (i, var) in decoder.vars().iter().enumerate() {
            let gradient = gradients
                .get(var)
                .unwrap_or_else(|| panic!("{kind}: {i} has none"));
            let square = gradient
                .sqr()
                .unwrap()
                .sum_all()
                .unwrap()
                .to_scalar::<f32>()
                .unwrap();
            let before = var.as_detached_tensor().copy().unwrap();
            let step = 1e-3 / f64::from(square).sqrt();
            let along = |sign: f64| {
                var.set(&(&before + (gradient * (sign * step)).unwrap()).unwrap())
                    .unwrap();
                f64::from(loss().to_scalar::<f32>().unwrap())
            };
            let difference = (along(1.0) - along(-1.0)) / (2.0 * step);
            var.set(&before).unwrap();
            let expected = f64::from(square);
            assert!(
                (difference - expected).abs() < 0.02 * expected + 1e-3,
                "{kind}: {i}, {:?}: {difference} and {expected}",
                var.shape()
            );
        }
    }
}

/// Of every kind: what is kept of frozen layers, and chosen rows, give the states of the whole model; and what is frozen is
/// no variable.
#[test]
fn the_last_layers_of_every_kind_can_be_trained_alone() {
    let at = TempDir::new().unwrap();
    let lora = Trained::Lora {
        rank: 2,
        scale: 1.0,
    };
    for kind in KINDS {
        let expected = Expected::of(kind);
        let source = folder(&at, kind);
        for trained in [Trained::All, lora] {
            let whole = decoder(&source, Purpose::Training(12), trained);
            let loaded = load(&source, Purpose::Training(12)).unwrap();
            let last = Last {
                layers: 1,
                states: Some(Default::default()),
            };
            let (config, weights) = (loaded.config, loaded.weights);
            let last =
                Decoder::training_last(config, weights, (trained, last), 0, &Device::Cpu).unwrap();
            assert!(last.vars().len() < whole.vars().len());
            assert!(last.trained_projection().is_none());
            let tokens = &expected.tokens[..];
            let short = &tokens[..tokens.len() / 2];
            let long = [short, &[7; 2]].concat(); // begins as the others do
            let packing = Packing::new(vec![tokens, short, &long]);
            let rows = [
                (0, 1),
                (0, tokens.len() - 1),
                (1, short.len() - 1),
                (2, long.len() - 1),
            ];
            let chosen = rows.map(|(i, token)| packing.spans().row(i, token) as u32);
            let chosen = Tensor::new(&chosen, &Device::Cpu).unwrap();
            let sequences = [tokens, short, &long];
            let all = rows.map(|(i, token)| {
                let alone = whole
                    .hidden(&Packing::new(vec![sequences[i]]), None)
                    .unwrap();
                alone.get(token).unwrap()
            });
            let all = Tensor::stack(&all, 0).unwrap();
            for _ in 0..2 {
                let states = last.hidden(&packing, Some(&chosen)).unwrap();
                let distance = (states - &all).unwrap().abs().unwrap().max_all().unwrap();
                let distance = distance.to_scalar::<f32>().unwrap();
                assert!(distance < 2e-5, "{kind}: {distance}");
            }
            let tokens = tokens.len() + short.len() + long.len();
            assert_eq!(last.kept_bytes(), Some(tokens * config.dim * 4));
        }
    }
}

/// Older files say it by another key.
#[test]
fn linear_scaling_has_two_names() {
    let at = TempDir::new().unwrap();
    let told = |more: &[(&str, Metadata)]| {
        let file = gguf(&at, "mistral", more);
        let decoder = decoder(&file, Purpose::Reading, Trained::Nothing);
        logits(&decoder, &[3, 1, 4, 1, 5])
            .flatten_all()
            .unwrap()
            .to_vec1::<f32>()
            .unwrap()
    };
    let old = told(&[("llama.rope.scale_linear", Metadata::F32(2.5))]);
    let kind = ("llama.rope.scaling.type", Metadata::String("linear".into()));
    let new = told(&[kind, ("llama.rope.scaling.factor", Metadata::F32(2.5))]);
    assert_eq!(old, new);
    assert_ne!(old, told(&[]));
}

/// A field of config.json with another value, or none.
fn with(source: &Path, changes: Value) {
    let path = source.join("config.json");
    let mut config: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    for (name, value) in changes.as_object().unwrap() {
        config[name] = value.clone();
    }
    fs::write(path, config.to_string()).unwrap();
}

#[test]
fn what_a_config_says_and_the_model_does_not_do_is_refused_by_name() {
    let at = TempDir::new().unwrap();
    let refusal = |kind: &str, changes: Value| {
        let source = folder(&at, kind);
        with(&source, changes);
        let error = load(&source, Purpose::Training(12))
            .err()
            .expect("a refusal");
        format!("{error:#}")
    };
    for (kind, changes, named) in [
        (
            "llama",
            json!({"hidden_act": "gelu"}),
            r#""hidden_act" is "gelu""#,
        ),
        (
            "llama",
            json!({"model_type": "gemma2"}),
            r#""model_type" is "gemma2""#,
        ),
        (
            "llama",
            json!({"num_local_experts": 8}),
            r#""num_local_experts" is 8"#,
        ),
        (
            "qwen3",
            json!({"final_logit_softcapping": 30.0}),
            r#""final_logit_softcapping" is 30"#,
        ),
        (
            "qwen3",
            json!({"quantization_config": {"bits": 4}}),
            r#""quantization_config""#,
        ),
        (
            "qwen3",
            json!({"no_rope_layers": [1, 0]}),
            r#""no_rope_layers""#,
        ),
        (
            "qwen3",
            json!({"layer_types": ["full_attention", "linear_attention"]}),
            "linear_attention",
        ),
        (
            "llama",
            json!({"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}),
            "of the type yarn",
        ),
        (
            "llama",
            json!({"rope_parameters": {"rope_type": "linear"}}),
            "of the type linear",
        ),
        (
            "llama",
            json!({"rope_parameters": {"partial_rotary_factor": 0.5}}),
            r#""partial_rotary_factor" is 0.5"#,
        ),
        ("llama", json!({"attention_bias": false}), "k_proj.bias"),
        (
            "llama3",
            json!({"attention_bias": true}),
            "q_proj.bias: it is missing",
        ),
        ("mistral", json!({"sliding_window": 8}), "it takes 8 tokens"),
        (
            "qwen2",
            json!({"use_sliding_window": true, "sliding_window": 8, "layer_types": null}),
            "it takes 8 tokens",
        ),
        ("qwen3", json!({"head_dim": 4}), "norm of queries or keys"),
    ] {
        let text = refusal(kind, changes.clone());
        assert!(text.contains(named), "{changes}: {text}");
    }
    // What has no part in predictions may be anything.
    let source = folder(&at, "qwen2");
    with(
        &source,
        json!({"initializer_range": 7, "use_sliding_window": false, "sliding_window": 8, "unheard_of": null}),
    );
    load(&source, Purpose::Training(12)).unwrap();
    // The same of GGUF files.
    for (key, value, named) in [
        ("llama.expert_count", Metadata::U32(8), "llama.expert_count"),
        (
            "llama.attn_logit_softcapping",
            Metadata::F32(50.0),
            "llama.attn_logit_softcapping",
        ),
        (
            "llama.rope.scaling.type",
            Metadata::String("yarn".into()),
            "of the type yarn",
        ),
        (
            "llama.attention.sliding_window",
            Metadata::U32(8),
            "it takes 8 tokens",
        ),
    ] {
        let path = gguf(&at, "mistral", &[(key, value)]);
        let error = load(&path, Purpose::Training(12)).err().expect("a refusal");
        assert!(format!("{error:#}").contains(named), "{error:#}");
    }
    let path = gguf(&at, "mistral", &[("llama.expert_count", Metadata::U32(0))]);
    load(&path, Purpose::Training(12)).unwrap();
}

#[test]
fn a_tokenizer_of_another_model_is_refused() {
    let at = TempDir::new().unwrap();
    let of = |source: &Path, change: fn(&mut Value)| {
        let mut other = tokenizer();
        change(&mut other);
        let path = at.path().join("other.json");
        fs::write(&path, other.to_string()).unwrap();
        let overrides = Overrides {
            tokenizer: Some(path),
            ..Overrides::default()
        };
        let loaded = pretrained::load(source, &overrides, Purpose::Training(12), &Device::Cpu);
        loaded.map(|_| ()).map_err(|error| format!("{error:#}"))
    };
    let exchange = |tokenizer: &mut Value| {
        let vocab = &mut tokenizer["model"]["vocab"];
        (vocab["A"], vocab["B"]) = (3.into(), 2.into());
    };
    let more = |tokenizer: &mut Value| tokenizer["model"]["vocab"]["AB"] = 48.into();
    let path = gguf(&at, "llama", &[]);
    assert_eq!(of(&path, |_| ()), Ok(()));
    let text = of(&path, exchange).unwrap_err();
    for part in [
        "another model",
        "2 are not in it",
        r#"number 2 is "A" here, and "B""#,
    ] {
        assert!(text.contains(part), "{text}");
    }
    let source = folder(&at, "llama");
    assert_eq!(of(&source, |_| ()), Ok(()));
    for source in [&path, &source] {
        let text = of(source, more).unwrap_err();
        assert!(
            text.contains("a token of number 48") && text.contains("48 rows"),
            "{text}"
        );
    }
}

#[test]
fn what_is_no_model_is_named_with_what_to_do() {
    let at = TempDir::new().unwrap();
    let refused = |path: &Path| {
        let error = load(path, Purpose::Reading).err().expect("a refusal");
        format!("{error:#}")
    };
    let pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n";
    let file = at.path().join("file");
    for (content, parts) in [
        (pointer, ["git-lfs", "git lfs pull"]),
        (
            "{\"prompt\": 1}",
            [
                "no GGUF file (it begins with \"{\\\"prompt",
                "a folder with config.json",
            ],
        ),
        ("", ["it is empty", ""]),
        ("GGUF", ["damaged", ""]),
    ] {
        fs::write(&file, content).unwrap();
        let text = refused(&file);
        assert!(parts.iter().all(|part| text.contains(part)), "{text}");
    }
    let text = refused(at.path());
    assert!(text.contains("a folder without config.json"), "{text}");
    for name in ["model.safetensors", "tokenizer.json", "config.json"] {
        let source = folder(&at, "llama");
        fs::write(source.join(name), pointer).unwrap();
        let text = refused(&source);
        assert!(
            text.contains(name) && text.contains("git lfs pull"),
            "{text}"
        );
        fs::remove_file(source.join(name)).unwrap();
        let text = refused(&source);
        assert!(text.contains(name), "{text}");
    }
    let source = folder(&at, "llama");
    fs::rename(
        source.join("model.safetensors"),
        source.join("pytorch_model.bin"),
    )
    .unwrap();
    let text = refused(&source);
    assert!(
        text.contains("pytorch_model.bin") && text.contains("as safetensors"),
        "{text}"
    );

    for bad in [f32::NAN, f32::INFINITY] {
        let source = folder(&at, "qwen2");
        let name = "model.layers.1.mlp.up_proj.weight";
        let mut changed = tensors("qwen2");
        let tensor = changed[name].to_dtype(DType::F32).unwrap();
        let mut values = tensor.flatten_all().unwrap().to_vec1::<f32>().unwrap();
        values[7] = bad;
        changed.insert(
            name.into(),
            Tensor::from_vec(values, tensor.shape(), &Device::Cpu).unwrap(),
        );
        candle_core::safetensors::save(&changed, source.join("model.safetensors")).unwrap();
        let text = refused(&source);
        assert!(text.contains(name) && text.contains("not finite"), "{text}");
    }
}

/// A template of the user's is used, and saved with what was trained by it.
#[test]
fn a_chat_template_can_be_replaced() {
    let at = TempDir::new().unwrap();
    let template = at.path().join("own.jinja");
    fs::write(
        &template,
        "{{ bos_token }}Q{{ messages[0].content }}A{{ messages[1].content }}{{ eos_token }}",
    )
    .unwrap();
    for source in [folder(&at, "llama"), gguf(&at, "llama", &[])] {
        let broken = "{% unheard_of %}";
        let unusable = match source.is_dir() {
            true => {
                let config =
                    json!({"bos_token": "<s>", "eos_token": "</s>", "chat_template": broken});
                fs::write(source.join("tokenizer_config.json"), config.to_string()).unwrap();
                source
            }
            false => gguf(
                &at,
                "llama",
                &[("tokenizer.chat_template", Metadata::String(broken.into()))],
            ),
        };
        let text = load(&unusable, Purpose::Reading).err().expect("a refusal");
        assert!(format!("{text:#}").contains("--chat-template"), "{text:#}");
        let overrides = Overrides {
            chat_template: Some(template.clone()),
            ..Overrides::default()
        };
        let loaded =
            pretrained::load(&unusable, &overrides, Purpose::Training(12), &Device::Cpu).unwrap();
        let (before, between) = (&loaded.encoder.before, &loaded.encoder.between);
        assert_eq!((&before[..], &between[..]), (&[0, 18][..], &[2][..])); // <s>Q, A
        let out = at.path().join("out");
        let weights = loaded.weights;
        let saved = export::save(&unusable, &overrides, &loaded.config, &weights, &out).unwrap();
        let again = load(&saved, Purpose::Reading).unwrap();
        assert_eq!(
            (&again.encoder.before, &again.encoder.between),
            (before, between)
        );
        fs::remove_dir_all(&out).unwrap();
    }
}

const QUANTISED: [(&str, GgmlDType); 11] = [
    ("Q4_0", GgmlDType::Q4_0),
    ("Q4_1", GgmlDType::Q4_1),
    ("Q5_0", GgmlDType::Q5_0),
    ("Q5_1", GgmlDType::Q5_1),
    ("Q8_0", GgmlDType::Q8_0),
    ("F16", GgmlDType::F16),
    ("Q2_K", GgmlDType::Q2K),
    ("Q3_K", GgmlDType::Q3K),
    ("Q4_K", GgmlDType::Q4K),
    ("Q5_K", GgmlDType::Q5K),
    ("Q6_K", GgmlDType::Q6K),
];

/// `models/make_quantised.py` makes the file.
#[test]
fn quantised_blocks_are_read_as_llama_cpp_reads_them() {
    let mut file = File::open(made("quantised.gguf")).unwrap();
    let content = gguf_file::Content::read(&mut file).unwrap();
    let mut read = |name: &str| {
        let tensor = content.tensor(&mut file, name, &Device::Cpu).unwrap();
        tensor
            .dequantize(&Device::Cpu)
            .unwrap()
            .to_dtype(DType::F32)
            .unwrap()
            .to_vec2::<f32>()
            .unwrap()
    };
    for (name, _) in QUANTISED.iter().chain(&[("BF16", GgmlDType::BF16)]) {
        assert_eq!(read(name), read(&format!("{name} read")), "{name}");
    }
}

/// A model with quantised matrices predicts the same whether they stay so, for reading, or become f32, for training.
#[test]
fn matrices_that_stay_quantised_predict_the_same() {
    let at = TempDir::new().unwrap();
    let mut tensors = BTreeMap::new();
    let mut add = |name: String, shape: &[usize], mean: f32| {
        let count: usize = shape.iter().product();
        let values = (0..count).map(|i| mean + 0.1 * ((i * i % 7919) as f32 / 7919.0 - 0.5));
        tensors.insert(
            name,
            Tensor::from_iter(values, &Device::Cpu)
                .unwrap()
                .reshape(shape)
                .unwrap(),
        );
    };
    add("token_embd.weight".into(), &[48, 256], 0.0);
    add("output.weight".into(), &[48, 256], 0.0);
    add("output_norm.weight".into(), &[256], 1.0);
    for norm in ["attn_norm", "ffn_norm"] {
        add(format!("blk.0.{norm}.weight"), &[256], 1.0);
    }
    for (name, rows) in [
        ("attn_q", 256),
        ("attn_k", 128),
        ("attn_v", 128),
        ("attn_output", 256),
        ("ffn_gate", 256),
        ("ffn_up", 256),
        ("ffn_down", 256),
    ] {
        add(format!("blk.0.{name}.weight"), &[rows, 256], 0.0);
    }
    let size = |key: &str, value: u32| (format!("llama.{key}"), Metadata::U32(value));
    let mut metadata = of_tokenizer();
    metadata.extend([
        (
            "general.architecture".into(),
            Metadata::String("llama".into()),
        ),
        (
            "llama.attention.layer_norm_rms_epsilon".into(),
            Metadata::F32(1e-5),
        ),
        size("embedding_length", 256),
        size("block_count", 1),
        size("attention.head_count", 4),
        size("attention.head_count_kv", 2),
        size("feed_forward_length", 256),
    ]);
    for (name, dtype) in QUANTISED {
        let file = at.path().join(name);
        write_gguf(&file, &metadata, tensors.clone(), dtype);
        let tokens = [3, 1, 4, 1, 5, 9];
        let kept = logits(&decoder(&file, Purpose::Reading, Trained::Nothing), &tokens);
        let full = logits(&decoder(&file, Purpose::Training(6), Trained::All), &tokens);
        let distance = (kept - full).unwrap().abs().unwrap().max_all().unwrap();
        let distance = distance.to_scalar::<f32>().unwrap();
        assert!(distance < 1e-5, "{name}: {distance}");
    }
}
