//! A trained model as files, in the form that the one it began with has: what reads that reads this. Weights are f32,
//! adapters merged.

use std::{
    collections::HashMap,
    fs::{self, File},
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, ensure};
use candle_core::{
    Device, Tensor,
    quantized::{GgmlDType, QTensor, gguf_file},
};
use serde_json::Value;

use crate::{
    files::{replace, write_safetensors},
    model::{
        decoder::{Config, Weights},
        gguf,
        linear::Affine,
        names::{GGUF, HUGGING_FACE, Names, bias},
        pretrained::Overrides,
    },
    text::chat::{CHAT_TEMPLATE, TOKENIZER},
};

/// How the names of files end that stand beside the weights: configuration and tokenizer.
const BESIDE: [&str; 4] = [".json", ".txt", ".model", ".jinja"];

/// Fails where [`save`] would write over what it reads.
pub fn check(source: &Path, out: &Path) -> Result<()> {
    if let (Ok(source), Ok(out)) = (source.canonicalize(), out.canonicalize()) {
        ensure!(
            !source.starts_with(&out),
            "--model is in {}, where the trained model goes; choose another --out",
            out.display()
        );
    }
    Ok(())
}

/// Writes `weights` into the folder `out`, with all else from the model at `source` or, where a file can hold it, from
/// `overrides`. Returns where: the GGUF file, or the folder.
pub fn save(
    source: &Path,
    overrides: &Overrides,
    config: &Config,
    weights: &Weights,
    out: &Path,
) -> Result<PathBuf> {
    let write = || -> Result<PathBuf> {
        fs::create_dir_all(out)?;
        let template = overrides.chat_template()?;
        if source.is_dir() {
            save_folder(source, config, weights, out)?;
            if let Some(template) = template {
                fs::write(out.join(CHAT_TEMPLATE), template)?;
            }
            if let Some(tokenizer) = &overrides.tokenizer {
                fs::write(out.join(TOKENIZER), fs::read(tokenizer)?)?;
            }
            return Ok(out.to_path_buf());
        }
        let path = out.join("model.gguf");
        save_gguf(source, template, config, weights, &path)?;
        Ok(path)
    };
    write().with_context(|| format!("cannot write the trained model into {}", out.display()))
}

/// By the names of the file, matrices (out, in) each.
fn named(names: &Names, config: &Config, weights: &Weights) -> Result<Vec<(String, Tensor)>> {
    let mut all = vec![
        (names.embedding.to_string(), weights.embedding.clone()),
        (names.norm.to_string(), weights.norm.clone()),
    ];
    if let Some(projection) = &weights.projection {
        all.push((names.projection.to_string(), projection.clone()));
    }
    let (dim, q, kv, hidden) = (config.dim, config.q_dim(), config.kv_dim(), config.hidden);
    for (i, layer) in weights.layers.iter().enumerate() {
        let prefix = (names.layer)(i);
        let mut add = |name: &str, tensor: Tensor| all.push((format!("{prefix}{name}"), tensor));
        add(names.attention_norm, layer.attention_norm.clone());
        add(names.mlp_norm, layer.mlp_norm.clone());
        for (name, norm) in names.qk_norm.iter().zip(layer.qk_norm.iter().flatten()) {
            add(name, norm.clone());
        }
        // Parts with storage of their own: candle quantises all of a tensor's.
        let mut parts = |names: &[&str], map: &Affine, sizes: &[usize]| -> Result<()> {
            let (stacked, mut start) = (map.matrix.full()?.t()?, 0);
            for (name, &size) in names.iter().zip(sizes) {
                add(name, stacked.narrow(0, start, size)?.force_contiguous()?);
                if let Some(all) = &map.bias {
                    add(&bias(name), all.narrow(0, start, size)?.force_contiguous()?);
                }
                start += size;
            }
            Ok(())
        };
        parts(&names.qkv, &layer.qkv, &[q, kv, kv])?;
        parts(&[names.output], &layer.output, &[dim])?;
        parts(&names.gate_up, &layer.gate_up, &[hidden, hidden])?;
        parts(&[names.down], &layer.down, &[dim])?;
    }
    let to_host =
        |(name, tensor): (String, Tensor)| Ok((name, tensor.detach().to_device(&Device::Cpu)?));
    all.into_iter().map(to_host).collect()
}

fn save_gguf(
    source: &Path,
    template: Option<String>,
    config: &Config,
    weights: &Weights,
    path: &Path,
) -> Result<()> {
    let mut file = File::open(source)?;
    let mut content = gguf_file::Content::read(&mut file)?;
    if let Some(template) = template {
        let template = gguf_file::Value::String(template);
        content
            .metadata
            .insert("tokenizer.chat_template".to_string(), template);
    }
    let mut tensors = Vec::new();
    for (name, tensor) in named(&GGUF, config, weights)? {
        tensors.push((name, QTensor::quantize(&tensor, GgmlDType::F32)?));
    }
    if content.tensor_infos.contains_key(gguf::ROPE_FACTORS) {
        let factors = content.tensor(&mut file, gguf::ROPE_FACTORS, &Device::Cpu)?;
        tensors.push((gguf::ROPE_FACTORS.to_string(), factors));
    }
    let all_f32 = gguf_file::Value::U32(0);
    // Sorted, that the same model gives the same file; the writer aligns as if nothing were said of it.
    let mut metadata: Vec<_> = content
        .metadata
        .iter()
        .filter(|(key, _)| *key != "general.alignment")
        .map(|(key, value)| match key.as_str() {
            "general.file_type" => (key.as_str(), &all_f32),
            key => (key, value),
        })
        .collect();
    metadata.sort_by_key(|(key, _)| *key);
    let tensors: Vec<_> = tensors.iter().map(|(name, t)| (name.as_str(), t)).collect();
    replace(path, |out| Ok(gguf_file::write(out, &metadata, &tensors)?))
}

fn save_folder(source: &Path, config: &Config, weights: &Weights, out: &Path) -> Result<()> {
    for entry in fs::read_dir(source)? {
        let name = entry?.file_name();
        let text = name.to_string_lossy();
        let of_weights = text.ends_with(".index.json");
        if !of_weights && BESIDE.iter().any(|end| text.ends_with(end)) {
            fs::write(out.join(&name), fs::read(source.join(&name))?)?; // not its permissions
        }
    }
    let path = out.join("config.json");
    let mut json: Value = serde_json::from_slice(&fs::read(&path)?)?;
    for name in ["torch_dtype", "dtype"] {
        if let Some(dtype) = json.get_mut(name) {
            *dtype = "float32".into();
        }
    }
    fs::write(&path, serde_json::to_string_pretty(&json)? + "\n")?;
    let tensors = named(&HUGGING_FACE, config, weights)?;
    let format = HashMap::from([("format".to_string(), "pt".to_string())]); // older transformers ask for it
    replace(&out.join("model.safetensors"), |out| {
        write_safetensors(out, &tensors, format)
    })
}
