//! Fine-tuning a model from files: a tiny one, written here as a GGUF file and as Hugging Face's folder. That training
//! goes on exactly where it was killed, that parts of a batch add up, and what is refused.

use std::{
    collections::{BTreeMap, HashMap},
    fs::{self, File},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::Duration,
};

use candle_core::{
    DType, Device, Tensor,
    quantized::{
        GgmlDType, QTensor,
        gguf_file::{self, Value as Metadata},
    },
};
use rand::{Rng, SeedableRng, rngs::StdRng};
use serde_json::{Value, json};
use tempfile::TempDir;

const DIM: usize = 16;
const HIDDEN: usize = 24;
const HEADS: usize = 2;
const KV_HEADS: usize = 1;
const HEAD: usize = DIM / HEADS;
const LAYERS: usize = 2;
const CONTROL: [&str; 3] = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"];

/// The characters that stand for the bytes 0 to 255 in a byte-level BPE.
fn byte_tokens() -> Vec<String> {
    let printable = |b: u32| (33..=126).contains(&b) || (161..=172).contains(&b) || b >= 174;
    let mut others = 0;
    let tokens = (0..256u32).map(|byte| {
        let code = if printable(byte) {
            byte
        } else {
            others += 1;
            255 + others
        };
        char::from_u32(code).expect("a character").to_string()
    });
    tokens.collect()
}

fn tokens() -> Vec<String> {
    let control = CONTROL.iter().map(|token| token.to_string());
    control
        .chain(byte_tokens())
        .chain(["th".into(), "Ġt".into()])
        .collect()
}

const MERGES: [&str; 2] = ["t h", "Ġ t"];

/// Weights by GGUF's names, matrices (out, in).
fn weights() -> BTreeMap<String, Tensor> {
    let mut rng = StdRng::seed_from_u64(3);
    let mut all = BTreeMap::new();
    let mut add = |name: String, shape: &[usize], mean: f32| {
        let count = shape.iter().product();
        let values: Vec<f32> = (0..count)
            .map(|_| mean + rng.random_range(-0.3..0.3))
            .collect();
        let tensor = Tensor::from_vec(values, shape, &Device::Cpu).unwrap();
        all.insert(name, tensor);
    };
    let vocab = tokens().len();
    add("token_embd.weight".into(), &[vocab, DIM], 0.0);
    add("output_norm.weight".into(), &[DIM], 1.0);
    for i in 0..LAYERS {
        let kv = KV_HEADS * HEAD;
        for (name, shape) in [
            ("attn_q", [DIM, DIM]),
            ("attn_k", [kv, DIM]),
            ("attn_v", [kv, DIM]),
            ("attn_output", [DIM, DIM]),
            ("ffn_gate", [HIDDEN, DIM]),
            ("ffn_up", [HIDDEN, DIM]),
            ("ffn_down", [DIM, HIDDEN]),
        ] {
            add(format!("blk.{i}.{name}.weight"), &shape, 0.0);
        }
        add(format!("blk.{i}.attn_norm.weight"), &[DIM], 1.0);
        add(format!("blk.{i}.ffn_norm.weight"), &[DIM], 1.0);
    }
    all
}

fn write_gguf(folder: &Path) -> PathBuf {
    write_gguf_with(folder, 500.0, None)
}

fn write_gguf_with(folder: &Path, rope_base: f32, more: Option<(&str, Tensor)>) -> PathBuf {
    let string = |text: &str| Metadata::String(text.into());
    let strings =
        |texts: &[String]| Metadata::Array(texts.iter().map(|text| string(text)).collect());
    let tokens = tokens();
    let merges = MERGES.map(String::from);
    let kinds = (0..tokens.len()).map(|i| Metadata::I32(if i < CONTROL.len() { 3 } else { 1 }));
    let metadata = [
        ("general.architecture", string("llama")),
        ("llama.embedding_length", Metadata::U32(DIM as u32)),
        ("llama.block_count", Metadata::U32(LAYERS as u32)),
        ("llama.attention.head_count", Metadata::U32(HEADS as u32)),
        (
            "llama.attention.head_count_kv",
            Metadata::U32(KV_HEADS as u32),
        ),
        ("llama.feed_forward_length", Metadata::U32(HIDDEN as u32)),
        ("llama.rope.freq_base", Metadata::F32(rope_base)),
        (
            "llama.attention.layer_norm_rms_epsilon",
            Metadata::F32(1e-5),
        ),
        ("tokenizer.ggml.model", string("gpt2")),
        ("tokenizer.ggml.pre", string("smollm")),
        ("tokenizer.ggml.tokens", strings(&tokens)),
        ("tokenizer.ggml.merges", strings(&merges)),
        (
            "tokenizer.ggml.token_type",
            Metadata::Array(kinds.collect()),
        ),
    ];
    let metadata: Vec<_> = metadata
        .iter()
        .map(|(name, value)| (*name, value))
        .collect();
    let quantized: Vec<(String, QTensor)> = weights()
        .into_iter()
        .chain(more.map(|(name, tensor)| (name.to_string(), tensor)))
        .map(|(name, tensor)| (name, QTensor::quantize(&tensor, GgmlDType::F32).unwrap()))
        .collect();
    let tensors: Vec<_> = quantized
        .iter()
        .map(|(name, t)| (name.as_str(), t))
        .collect();
    let path = folder.join("model.gguf");
    gguf_file::write(&mut File::create(&path).unwrap(), &metadata, &tensors).unwrap();
    path
}

/// Rows of a query or key matrix from neighbours that rotate together to halves that do.
fn halves(matrix: &Tensor) -> Tensor {
    let (rows, columns) = matrix.dims2().unwrap();
    let split = matrix.reshape((rows / HEAD, HEAD / 2, 2, columns)).unwrap();
    let halves = split.transpose(1, 2).unwrap().contiguous().unwrap();
    halves.reshape((rows, columns)).unwrap()
}

pub fn write_folder(folder: &Path) -> PathBuf {
    let folder = folder.join("model");
    fs::create_dir_all(&folder).unwrap();
    let config = json!({
        "model_type": "llama", "vocab_size": tokens().len(), "hidden_size": DIM, "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS, "intermediate_size": HIDDEN,
        "rms_norm_eps": 1e-5, "rope_theta": 500.0, "tie_word_embeddings": true,
    });
    fs::write(folder.join("config.json"), config.to_string()).unwrap();
    let tokens = tokens();
    let vocab: HashMap<_, _> = tokens.iter().zip(0..).collect();
    let added: Vec<Value> = (0..CONTROL.len())
        .map(|id| {
            json!({"id": id, "content": CONTROL[id], "single_word": false, "lstrip": false, "rstrip": false,
                   "normalized": false, "special": true})
        })
        .collect();
    let byte_level = json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true});
    let tokenizer = json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": added, "normalizer": null,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers":
            [{"type": "Digits", "individual_digits": true}, byte_level]},
        "post_processor": null, "decoder": byte_level,
        "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
                  "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "vocab": vocab, "merges": MERGES},
    });
    fs::write(folder.join("tokenizer.json"), tokenizer.to_string()).unwrap();
    let name = |gguf: &str| {
        let names = [
            ("token_embd", "model.embed_tokens"),
            ("output_norm", "model.norm"),
            ("blk.", "model.layers."),
            ("attn_norm", "input_layernorm"),
            ("ffn_norm", "post_attention_layernorm"),
            ("attn_q", "self_attn.q_proj"),
            ("attn_k", "self_attn.k_proj"),
            ("attn_v", "self_attn.v_proj"),
            ("attn_output", "self_attn.o_proj"),
            ("ffn_gate", "mlp.gate_proj"),
            ("ffn_up", "mlp.up_proj"),
            ("ffn_down", "mlp.down_proj"),
        ];
        names
            .iter()
            .fold(gguf.to_string(), |name, (from, to)| name.replace(from, to))
    };
    let tensors: HashMap<String, Tensor> = weights()
        .into_iter()
        .map(|(gguf, tensor)| {
            let rotates = gguf.contains("attn_q") || gguf.contains("attn_k");
            (name(&gguf), if rotates { halves(&tensor) } else { tensor })
        })
        .collect();
    candle_core::safetensors::save(&tensors, folder.join("model.safetensors")).unwrap();
    folder
}

fn write_data(folder: &Path, samples: usize) -> PathBuf {
    let line = |i: usize| {
        let (a, b) = (i % 7, i % 5);
        let uncertainty = i as f64 / samples as f64;
        json!({"prompt": format!("what is {a} + {b}?"), "response": format!("that is {}", a + b),
               "uncertainty": uncertainty})
    };
    let lines: Vec<String> = (0..samples).map(|i| line(i).to_string()).collect();
    let path = folder.join("data.jsonl");
    fs::write(&path, lines.join("\n")).unwrap();
    path
}

pub struct Setup {
    pub folder: TempDir,
    pub model: PathBuf,
    pub data: PathBuf,
}

impl Setup {
    pub fn new(samples: usize) -> Self {
        let folder = TempDir::new().unwrap();
        Self {
            model: write_gguf(folder.path()),
            data: write_data(folder.path(), samples),
            folder,
        }
    }

    pub fn command(&self, out: &str, more: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_ual"));
        command
            .arg("finetune")
            .env("RAYON_NUM_THREADS", "1") // how products round depends on it
            .arg("--data")
            .arg(&self.data)
            .arg("--model")
            .arg(&self.model)
            .arg("--out")
            .arg(self.folder.path().join(out))
            .args(["--max-tokens", "64"])
            .args(more)
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        for usual in [["--steps", "6"], ["--lr", "0.01"]] {
            if !more.contains(&usual[0]) {
                command.args(usual);
            }
        }
        command
    }

    pub fn run(&self, out: &str, more: &[&str]) -> Value {
        let output = self.command(out, more).output().unwrap();
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{stderr}");
        let metrics = self.folder.path().join(out).join("metrics.json");
        serde_json::from_slice(&fs::read(metrics).unwrap()).unwrap()
    }

    pub fn refusal(&self, out: &str, more: &[&str]) -> String {
        let output = self.command(out, more).output().unwrap();
        assert!(!output.status.success());
        let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(!stderr.contains("panicked"), "{stderr}");
        stderr
    }
}

/// What must be the same in two runs: the methods' results and loss curves, without times.
fn results(metrics: &Value) -> Vec<Value> {
    let runs = metrics["runs"].as_array().unwrap().iter();
    let of_run = |run: &Value| json!([run["method"], run["groups"], run["training"]["points"]]);
    runs.map(of_run).collect()
}

/// The loss curve of each method.
fn of_runs(metrics: &Value) -> Vec<Vec<f64>> {
    let nll = |point: &Value| point["held_out_nll"].as_f64().unwrap();
    let runs = metrics["runs"].as_array().unwrap().iter();
    let points = runs.map(|run| run["training"]["points"].as_array().unwrap());
    points
        .map(|points| points.iter().map(nll).collect())
        .collect()
}

fn held_out_nll(metrics: &Value) -> Vec<f64> {
    of_runs(metrics).concat()
}

#[track_caller]
fn assert_near(a: &[f64], b: &[f64], tolerance: f64) {
    assert!(!a.is_empty() && a.len() == b.len());
    for (a, b) in a.iter().zip(b) {
        assert!((a - b).abs() <= tolerance * b.abs(), "{a} and {b}");
    }
}

/// Training lowers the loss, of all weights and of adapters; both files of one model give the same.
#[test]
fn both_kinds_of_file_train_alike() {
    let mut setup = Setup::new(20);
    let kinds: [&[&str]; 2] = [&[], &["--lora", "4"]];
    let of_gguf = kinds.map(|more| setup.run("gguf", more));
    for metrics in &of_gguf {
        assert!(metrics["pretraining"].is_null());
        for points in of_runs(metrics) {
            assert!(points[points.len() - 1] < 0.95 * points[0], "{points:?}");
        }
    }
    let parameters = of_gguf
        .each_ref()
        .map(|metrics| metrics["parameters"].as_u64().unwrap());
    assert!(parameters[1] < parameters[0] / 2, "{parameters:?}");
    setup.model = write_folder(setup.folder.path());
    for (more, of_gguf) in kinds.iter().zip(&of_gguf) {
        let of_folder = setup.run("folder", more);
        assert_near(&held_out_nll(&of_folder), &held_out_nll(of_gguf), 1e-3);
    }
}

/// What was trained is saved in the form it came in, and predicts held-out samples as it did when it was trained.
#[test]
fn the_trained_model_is_a_model_to_begin_with() {
    let mut setup = Setup::new(20);
    let models = [setup.model.clone(), write_folder(setup.folder.path())];
    for (model, saved) in models.iter().zip(["model/model.gguf", "model"]) {
        for more in [&[][..], &["--lora", "4"]] {
            setup.model = model.clone();
            let trained = setup.run("out", more);
            let expected = *held_out_nll(&trained).last().unwrap();
            setup.model = setup.folder.path().join("out").join(saved);
            let text = setup.refusal("out", &[]);
            assert!(text.contains("choose another --out"), "{text}");
            let again = setup.run("again", &["--steps", "1", "--lr", "1e-9"]);
            assert_near(&held_out_nll(&again)[..1], &[expected], 1e-5);
        }
    }
}

/// Unscored data, scored by a model; that model trained on them; the study of both; and the trained model scores again.
#[test]
fn from_unscored_data_to_a_report() {
    let mut setup = Setup::new(20);
    let folder = setup.folder.path().to_path_buf();
    let lines: Vec<String> = fs::read_to_string(&setup.data)
        .unwrap()
        .lines()
        .map(|line| {
            let mut sample: Value = serde_json::from_str(line).unwrap();
            sample.as_object_mut().unwrap().remove("uncertainty");
            sample.to_string()
        })
        .collect();
    fs::write(&setup.data, lines.join("\n")).unwrap();
    let score = |out: &str, model: &Path| {
        let output = Command::new(env!("CARGO_BIN_EXE_ual"))
            .arg("elicit")
            .current_dir(&folder)
            .args(["--data", "data.jsonl", "--out", out, "--local"])
            .arg(model)
            .output()
            .unwrap();
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{stderr}");
        fs::read_to_string(folder.join(out)).unwrap()
    };
    let scored = score("scored.jsonl", &setup.model);
    // The same model as a folder.
    let of_folder = score("of_folder.jsonl", &write_folder(&folder));
    let uncertainties = |scored: &str| -> Vec<f64> {
        let lines = scored
            .lines()
            .map(|line| serde_json::from_str::<Value>(line).unwrap());
        lines
            .map(|line| line["uncertainty"].as_f64().unwrap())
            .collect()
    };
    assert_near(&uncertainties(&of_folder), &uncertainties(&scored), 1e-5);
    setup.data = folder.join("scored.jsonl");
    let more = ["--lora", "2", "--batch", "2"];
    let metrics = setup.run("out", &more);
    assert!(
        metrics["data"]
            .as_str()
            .unwrap()
            .contains("uncertainty: given")
    );

    let output = Command::new(env!("CARGO_BIN_EXE_ual"))
        .arg("study")
        .current_dir(&folder)
        .args([
            "--data",
            "scored.jsonl",
            "--model",
            "model.gguf",
            "--out",
            "study",
        ])
        .args(["--seeds", "2", "--steps", "3", "--train-last", "1"])
        .args(more)
        .output()
        .unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{stderr}");
    let report = fs::read_to_string(folder.join("study/report.md")).unwrap();
    for text in [
        "--data scored.jsonl",
        "over 2 seeds",
        "16 training samples, 4 held out",
        "| shuffled | ",
    ] {
        assert!(report.contains(text), "{report}");
    }

    let again = score("again.jsonl", &folder.join("out/model/model.gguf"));
    assert_ne!(again, scored);
    assert_eq!(again.lines().count(), 20);
}

/// The factors 4^(i/h), h being half a head, with the base 500/4 are the base 500.
#[test]
fn rotary_positions_are_those_of_the_file() {
    let mut setup = Setup::new(20);
    let run = |setup: &Setup| held_out_nll(&setup.run("out", &["--steps", "1"]));
    let expected = run(&setup);
    let half = HEAD / 2;
    let factors: Vec<f32> = (0..half)
        .map(|i| 4f32.powf(i as f32 / half as f32))
        .collect();
    let factors = Tensor::new(factors, &Device::Cpu).unwrap();
    setup.model = write_gguf_with(
        setup.folder.path(),
        125.0,
        Some(("rope_freqs.weight", factors)),
    );
    let stretched = run(&setup);
    assert_near(&stretched, &expected, 1e-4);
    setup.model = setup.folder.path().join("out/model/model.gguf");
    let saved = setup.run("again", &["--steps", "1", "--lr", "1e-9"]);
    assert_near(&held_out_nll(&saved)[..1], &stretched[2..], 1e-5);
    setup.model = write_gguf_with(setup.folder.path(), 125.0, None);
    let other = run(&setup);
    assert!(
        other
            .iter()
            .zip(&expected)
            .all(|(a, b)| (a - b).abs() > 1e-4 * b),
        "{other:?}"
    );

    // As transformers 5 writes them; and a kind that is not known.
    setup.model = write_folder(setup.folder.path());
    let config = setup.model.join("config.json");
    let text = fs::read_to_string(&config).unwrap();
    let with = |kind: &str| {
        let parameters =
            format!(r#""rope_parameters":{{"rope_theta":500.0,"rope_type":"{kind}"}}"#);
        text.replace(r#""rope_theta":500.0"#, &parameters)
    };
    fs::write(&config, with("default")).unwrap();
    assert_near(&run(&setup), &expected, 1e-3);
    let twice = with("default").replace("\"rope_type\"", "\"type\":\"default\",\"rope_type\"");
    fs::write(&config, twice).unwrap();
    assert_near(&run(&setup), &expected, 1e-3);
    for kind in ["llama3", "yarn"] {
        fs::write(&config, with(kind)).unwrap();
        let text = setup.refusal("out", &[]);
        assert!(text.contains(&format!("of the type {kind}")), "{text}");
    }

    // As in Llama 3.1's config.json, and as llama.cpp converts that. The four elements of half a head turn 178, 37.7, 7.97 and
    // 1.69 times in 1120 positions: kept, kept, between (1/(0.669/4 + 0.331), by hand), stretched.
    let scaling = r#""rope_theta":500.0,"rope_scaling":{"rope_type":"llama3","factor":4.0,"low_freq_factor":4.0,
        "high_freq_factor":16.0,"original_max_position_embeddings":1120}"#;
    fs::write(&config, text.replace(r#""rope_theta":500.0"#, scaling)).unwrap();
    let of_folder = run(&setup);
    let factors = Tensor::new(&[1f32, 1.0, 2.00709, 4.0], &Device::Cpu).unwrap();
    setup.model = write_gguf_with(
        setup.folder.path(),
        500.0,
        Some(("rope_freqs.weight", factors)),
    );
    assert_near(&of_folder, &run(&setup), 1e-5);
    assert!(
        of_folder
            .iter()
            .zip(&expected)
            .all(|(a, b)| (a - b).abs() > 1e-5 * b),
        "{of_folder:?}"
    );
}

/// Four samples in one batch, or in two whose gradients are added.
#[test]
fn accumulated_gradients_are_those_of_the_whole() {
    let setup = Setup::new(5);
    let whole = setup.run("whole", &["--batch", "4"]);
    let parts = setup.run("parts", &["--batch", "2", "--accumulate", "2"]);
    assert_near(&held_out_nll(&parts), &held_out_nll(&whole), 1e-3);
}

fn kill(mut child: Child, after: Duration) {
    std::thread::sleep(after);
    let _ = child.kill();
    child.wait().unwrap();
}

/// Fewer numbers are trained, the loss falls, the file has what was trained, and checkpoints of other layers do not fit.
#[test]
fn the_last_layers_train_alone() {
    let mut setup = Setup::new(20);
    let model = setup.model.clone();
    for kind in [&[][..], &["--lora", "4"]] {
        let run = |setup: &Setup, last: &str, more: &[&str]| {
            let arguments = [kind, &["--train-last", last], more].concat();
            setup.run("out", &arguments)
        };
        let all = setup.run("all", kind);
        let one = run(&setup, "1", &["--checkpoint-every", "3"]);
        let parameters = |metrics: &Value| metrics["parameters"].as_u64().unwrap();
        assert!(parameters(&one) < parameters(&all));
        assert!(one["kept_state_bytes"].as_u64().unwrap() > 0);
        assert!(all["kept_state_bytes"].is_null());
        for points in of_runs(&one) {
            assert!(points[points.len() - 1] < points[0], "{points:?}");
        }
        let other = [
            kind,
            &["--train-last", "2", "--checkpoint-every", "3", "--resume"],
        ]
        .concat();
        let text = setup.refusal("out", &other);
        assert!(text.contains("other arguments or data"), "{text}");
        let expected = *held_out_nll(&one).last().unwrap();
        setup.model = setup.folder.path().join("out/model/model.gguf");
        let again = setup.run("again", &["--steps", "1", "--lr", "1e-9"]);
        assert_near(&held_out_nll(&again)[..1], &[expected], 1e-5);
        setup.model = model.clone();
    }
    // Of adapters all is trained where no layer is frozen.
    let lora = ["--lora", "4"];
    let expected = setup.run("all", &lora);
    let last = setup.run("out", &[&lora[..], &["--train-last", "2"]].concat());
    assert_near(&held_out_nll(&last), &held_out_nll(&expected), 1e-4);
}

/// Killed again and again, at any moment, a training ends as if nothing had happened.
#[test]
fn a_killed_training_goes_on_exactly() {
    let setup = Setup::new(20);
    for more in [
        &["--checkpoint-every", "1"][..],
        &["--checkpoint-every", "2", "--lora", "2"],
        &[
            "--checkpoint-every",
            "1",
            "--lora",
            "2",
            "--train-last",
            "1",
        ],
    ] {
        let expected = setup.run("whole", more);
        let resume = [more, &["--resume"]].concat();
        let out = format!("killed{}", more.len());
        let mut rng = StdRng::seed_from_u64(1);
        for _ in 0..6 {
            let child = setup.command(&out, &resume).spawn().unwrap();
            kill(child, Duration::from_millis(rng.random_range(20..400)));
        }
        let resumed = setup.run(&out, &resume);
        assert_eq!(results(&resumed), results(&expected));
        // Once more, with nothing left to train.
        assert_eq!(results(&setup.run(&out, &resume)), results(&expected));
    }
}

#[test]
fn what_does_not_fit_is_refused() {
    let setup = Setup::new(20);
    setup.run("out", &["--checkpoint-every", "3"]);
    let text = setup.refusal(
        "out",
        &["--checkpoint-every", "3", "--resume", "--seed", "2"],
    );
    assert!(text.contains("other arguments or data"), "{text}");
    // Another uncertainty of one sample; another model under the same name.
    let data = fs::read_to_string(&setup.data).unwrap();
    fs::write(&setup.data, data.replacen("0.5", "0.51", 1)).unwrap();
    let text = setup.refusal("out", &["--checkpoint-every", "3", "--resume"]);
    assert!(text.contains("other arguments or data"), "{text}");
    fs::write(&setup.data, data).unwrap();
    setup.run("out", &["--checkpoint-every", "3", "--resume"]);
    let model = fs::read(&setup.model).unwrap();
    fs::write(
        &setup.model,
        [&model[..model.len() - 1], &[model[model.len() - 1] ^ 1]].concat(),
    )
    .unwrap();
    let text = setup.refusal("out", &["--checkpoint-every", "3", "--resume"]);
    assert!(text.contains("other arguments or data"), "{text}");
    fs::write(&setup.model, model).unwrap();
    let text = setup.refusal("out", &["--lora", "0"]);
    assert!(text.contains("--lora is 0"), "{text}");
    for last in ["0", "3"] {
        let text = setup.refusal("out", &["--train-last", last]);
        let message = format!(
            "--train-last is {last}; it must be at least 1 and at most {LAYERS}, the model's"
        );
        assert!(text.contains(&message), "{text}");
    }
    let text = setup.refusal("out", &["--dim", "8"]);
    assert!(text.contains("--dim"), "{text}");
    let checkpoint = setup.folder.path().join("out/checkpoint-SFT.safetensors");
    let bytes = fs::read(&checkpoint).unwrap();
    fs::write(&checkpoint, &bytes[..bytes.len() / 2]).unwrap();
    let text = setup.refusal("out", &["--checkpoint-every", "3", "--resume"]);
    assert!(text.contains("cannot resume from"), "{text}");
    let mut broken = Setup::new(20);
    fs::write(&broken.model, b"GGUF").unwrap();
    let text = broken.refusal("out", &[]);
    assert!(text.contains("cannot load the model"), "{text}");
    let sinks = Tensor::zeros(DIM, DType::F32, &Device::Cpu).unwrap();
    broken.model = write_gguf_with(
        broken.folder.path(),
        500.0,
        Some(("blk.0.attn_sinks.weight", sinks)),
    );
    let text = broken.refusal("out", &[]);
    assert!(
        text.contains("1 of its tensors have no place in such a model, blk.0.attn_sinks.weight"),
        "{text}"
    );
    broken.model = broken.folder.path().join("nothing");
    let text = broken.refusal("out", &[]);
    assert!(text.contains("nothing"), "{text}");
}

/// candle's errors carry frames in their text; the message comes first, as without them.
#[test]
fn a_backtrace_comes_after_the_message() {
    let setup = Setup::new(20);
    let model = fs::read(&setup.model).unwrap();
    fs::write(&setup.model, &model[..model.len() - 100]).unwrap();
    let told = |backtrace: &str| {
        let mut command = setup.command("out", &[]);
        let output = command.env("RUST_BACKTRACE", backtrace).output().unwrap();
        assert_eq!(output.status.code(), Some(1));
        String::from_utf8_lossy(&output.stderr).into_owned()
    };
    let plain = told("0");
    assert!(
        !plain.contains("backtrace") && plain.contains("Caused by:"),
        "{plain}"
    );
    let (message, frames) = {
        let text = told("1");
        let (message, frames) = text.split_once("\n\nStack backtrace:\n").expect("frames");
        (message.to_string(), frames.to_string())
    };
    assert_eq!(message.trim(), plain.trim());
    assert!(
        frames.contains("candle_core::") && frames.contains("ual::main"),
        "{frames}"
    );
}
