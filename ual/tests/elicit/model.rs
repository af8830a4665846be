//! A small Llama in a GGUF file, and the same by plain loops.

use std::{collections::BTreeMap, fs, path::Path};

use candle_core::{
    Device, Tensor,
    quantized::{
        GgmlDType, QTensor,
        gguf_file::{self, Value as Meta},
    },
};
use rand::{Rng, SeedableRng, rngs::StdRng};

const WIDTH: usize = 8; // of a head
const HEADS: usize = 4;
const KV_HEADS: usize = 2;
const DIM: usize = WIDTH * HEADS;

/// Writes a Llama with random weights and a vocabulary of bytes, for texts of 64 tokens. Returns the weights, row by row.
pub fn write_model(path: &Path) -> BTreeMap<String, Vec<f32>> {
    write_model_for(path, 64)
}

pub fn write_model_for(path: &Path, context: u32) -> BTreeMap<String, Vec<f32>> {
    let (hidden, mut rng) = (48, StdRng::seed_from_u64(5));
    // GPT-2's letters for the bytes: printable ones stand for themselves, the others follow from 256 on.
    let mut next = 256;
    let mut tokens: Vec<String> = (0..=255u8)
        .map(|byte| match byte {
            b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff => char::from(byte).to_string(),
            _ => {
                next += 1;
                char::from_u32(next - 1).unwrap().to_string()
            }
        })
        .collect();
    let mut kinds = vec![Meta::I32(1); 256];
    tokens.push("qu".into());
    kinds.push(Meta::I32(1));
    for name in ["<|im_start|>", "<|im_end|>"] {
        tokens.push(name.into());
        kinds.push(Meta::I32(3));
    }
    let vocab = tokens.len();
    let metadata = [
        ("general.architecture", Meta::String("llama".into())),
        ("llama.attention.head_count", Meta::U32(HEADS as u32)),
        ("llama.attention.head_count_kv", Meta::U32(KV_HEADS as u32)),
        ("llama.block_count", Meta::U32(2)),
        ("llama.context_length", Meta::U32(context)),
        ("llama.embedding_length", Meta::U32(DIM as u32)),
        ("llama.feed_forward_length", Meta::U32(hidden as u32)),
        ("llama.rope.dimension_count", Meta::U32(WIDTH as u32)),
        ("llama.attention.layer_norm_rms_epsilon", Meta::F32(1e-5)),
        ("tokenizer.ggml.model", Meta::String("gpt2".into())),
        ("tokenizer.ggml.pre", Meta::String("smollm".into())),
        (
            "tokenizer.ggml.tokens",
            Meta::Array(tokens.into_iter().map(Meta::String).collect()),
        ),
        ("tokenizer.ggml.token_type", Meta::Array(kinds)),
        (
            "tokenizer.ggml.merges",
            Meta::Array(vec![Meta::String("q u".into())]),
        ),
    ];
    let mut weights = BTreeMap::new();
    let mut tensors = Vec::new();
    let mut add = |name: String, shape: &[usize], from: f32, to: f32| {
        let values: Vec<f32> = (0..shape.iter().product())
            .map(|_| rng.random_range(from..to))
            .collect();
        let tensor = Tensor::from_slice(&values, shape, &Device::Cpu).unwrap();
        let tensor = QTensor::quantize(&tensor, GgmlDType::F32).unwrap();
        tensors.push((format!("{name}.weight"), tensor));
        weights.insert(name, values);
    };
    add("token_embd".into(), &[vocab, DIM], -1.0, 1.0);
    add("output".into(), &[vocab, DIM], -0.5, 0.5);
    add("output_norm".into(), &[DIM], 0.5, 1.5);
    let kv = KV_HEADS * WIDTH;
    for block in 0..2 {
        for (name, rows, columns) in [
            ("attn_q", DIM, DIM),
            ("attn_k", kv, DIM),
            ("attn_v", kv, DIM),
            ("attn_output", DIM, DIM),
            ("ffn_gate", hidden, DIM),
            ("ffn_up", hidden, DIM),
            ("ffn_down", DIM, hidden),
        ] {
            add(format!("blk.{block}.{name}"), &[rows, columns], -0.5, 0.5);
        }
        for name in ["attn_norm", "ffn_norm"] {
            add(format!("blk.{block}.{name}"), &[DIM], 0.5, 1.5);
        }
    }
    let metadata: Vec<_> = metadata
        .iter()
        .map(|(name, value)| (*name, value))
        .collect();
    let tensors: Vec<_> = tensors
        .iter()
        .map(|(name, tensor)| (name.as_str(), tensor))
        .collect();
    gguf_file::write(&mut fs::File::create(path).unwrap(), &metadata, &tensors).unwrap();
    weights
}

/// The model's last hidden states, a row a token, by plain loops in f64.
fn hidden_states(weights: &BTreeMap<String, Vec<f32>>, tokens: &[usize]) -> Vec<Vec<f64>> {
    let product = |name: &str, x: &[f64]| -> Vec<f64> {
        let rows = weights[name].chunks(x.len());
        rows.map(|row| row.iter().zip(x).map(|(&w, x)| f64::from(w) * x).sum())
            .collect()
    };
    let norm = |name: &str, x: &[f64]| -> Vec<f64> {
        let scale = (x.iter().map(|x| x * x).sum::<f64>() / x.len() as f64 + 1e-5).sqrt();
        x.iter()
            .zip(&weights[name])
            .map(|(x, &w)| x / scale * f64::from(w))
            .collect()
    };
    // Neighbours are turned together, the later pairs of a head slower.
    let rotate = |x: &mut [f64], position: usize| {
        for (i, pair) in x.chunks_mut(2).enumerate() {
            let frequency = 10_000f64.powf(-((2 * i % WIDTH) as f64) / WIDTH as f64);
            let (sin, cos) = (position as f64 * frequency).sin_cos();
            (pair[0], pair[1]) = (pair[0] * cos - pair[1] * sin, pair[0] * sin + pair[1] * cos);
        }
    };
    let embedding = |&token: &usize| -> Vec<f64> {
        weights["token_embd"][token * DIM..][..DIM]
            .iter()
            .map(|&w| w.into())
            .collect()
    };
    let mut states: Vec<Vec<f64>> = tokens.iter().map(embedding).collect();
    for block in 0..2 {
        let name = |part: &str| format!("blk.{block}.{part}");
        let (mut keys, mut values) = (Vec::new(), Vec::new());
        for (position, state) in states.iter_mut().enumerate() {
            let x = norm(&name("attn_norm"), state);
            let (mut q, mut k) = (product(&name("attn_q"), &x), product(&name("attn_k"), &x));
            rotate(&mut q, position);
            rotate(&mut k, position);
            keys.push(k);
            values.push(product(&name("attn_v"), &x));
            let mut mixed = vec![0.0; DIM];
            for head in 0..HEADS {
                let own = head * WIDTH;
                let shared = head * KV_HEADS / HEADS * WIDTH;
                let dot =
                    |k: &Vec<f64>| (0..WIDTH).map(|i| q[own + i] * k[shared + i]).sum::<f64>();
                let scores: Vec<f64> = keys
                    .iter()
                    .map(|k| (dot(k) / (WIDTH as f64).sqrt()).exp())
                    .collect();
                let total: f64 = scores.iter().sum();
                for (score, value) in scores.iter().zip(&values) {
                    (0..WIDTH).for_each(|i| mixed[own + i] += score / total * value[shared + i]);
                }
            }
            let add = |state: &mut Vec<f64>, y: Vec<f64>| {
                state.iter_mut().zip(y).for_each(|(x, y)| *x += y)
            };
            add(state, product(&name("attn_output"), &mixed));
            let x = norm(&name("ffn_norm"), state);
            let gate = product(&name("ffn_gate"), &x)
                .into_iter()
                .map(|g| g / (1.0 + (-g).exp()));
            let inner: Vec<f64> = gate
                .zip(product(&name("ffn_up"), &x))
                .map(|(g, u)| g * u)
                .collect();
            add(state, product(&name("ffn_down"), &inner));
        }
    }
    states
        .iter()
        .map(|state| norm("output_norm", state))
        .collect()
}

pub fn expected_uncertainty(weights: &BTreeMap<String, Vec<f32>>, sample: usize) -> f64 {
    let bytes = |text: &str| -> Vec<usize> { text.bytes().map(usize::from).collect() };
    let mut tokens = vec![257];
    tokens.extend(bytes("user\n"));
    tokens.push(256); // "qu"
    tokens.extend(bytes(&format!("estion {sample}?")));
    tokens.extend([258, 10, 257]);
    tokens.extend(bytes("assistant\n"));
    let response = tokens.len();
    tokens.extend(bytes(&format!("é {sample}")));
    let states = hidden_states(weights, &tokens);
    let predictions = &states[response - 1..tokens.len() - 1];
    let relative_entropy = |state: &Vec<f64>| {
        let rows = weights["output"].chunks(DIM);
        let logits = rows.map(|row| {
            row.iter()
                .zip(state)
                .map(|(&w, x)| f64::from(w) * x)
                .sum::<f64>()
        });
        let exponentials: Vec<f64> = logits.map(f64::exp).collect();
        let total: f64 = exponentials.iter().sum();
        let entropy: f64 = exponentials
            .iter()
            .map(|e| e / total)
            .map(|p| -p * p.ln())
            .sum();
        entropy / (exponentials.len() as f64).ln()
    };
    predictions.iter().map(relative_entropy).sum::<f64>() / predictions.len() as f64
}
