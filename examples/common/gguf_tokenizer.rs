//! The tokenizer in a GGUF file's own metadata, for models with a byte-level BPE (`tokenizer.ggml.model = gpt2`).

use anyhow::{Context, Result, anyhow, bail};
use candle_core::quantized::gguf_file::{Content, Value};
use tokenizers::{
    AddedToken, Tokenizer,
    models::bpe::{BPE, Vocab},
    pre_tokenizers::{
        PreTokenizerWrapper, byte_level::ByteLevel, digits::Digits, sequence::Sequence,
    },
};

/// `token_type` of tokens that no text makes.
const CONTROL: i64 = 3;

fn list<'a>(content: &'a Content, key: &str) -> Result<&'a Vec<Value>> {
    let value = content.metadata.get(key);
    Ok(value.with_context(|| format!("no {key}"))?.to_vec()?)
}

fn text<'a>(content: &'a Content, key: &str) -> Result<&'a str> {
    let value = content.metadata.get(key);
    Ok(value.with_context(|| format!("no {key}"))?.to_string()?)
}

pub fn tokenizer(content: &Content) -> Result<Tokenizer> {
    let kind = text(content, "tokenizer.ggml.model")?;
    if kind != "gpt2" {
        bail!("the file's tokenizer is {kind}; only byte-level BPE (gpt2) can be read from it");
    }
    // How text is cut before the BPE; the others that are common differ in the treatment of digits only.
    let splits_digits = match text(content, "tokenizer.ggml.pre").unwrap_or("gpt-2") {
        "smollm" => true,
        "gpt-2" | "default" => false,
        other => bail!("the file's pre-tokenizer is {other}; it must be smollm or gpt-2"),
    };
    let tokens = list(content, "tokenizer.ggml.tokens")?;
    let tokens = tokens.iter().map(|token| Ok(token.to_string()?.clone()));
    let tokens = tokens.collect::<Result<Vec<String>>>()?;
    let merge = |merge: &Value| {
        let merge = merge.to_string()?;
        let (left, right) = merge.split_once(' ').context("a merge is not a pair")?;
        Ok((left.to_string(), right.to_string()))
    };
    let merges = list(content, "tokenizer.ggml.merges")?;
    let merges = merges.iter().map(merge).collect::<Result<Vec<_>>>()?;
    let vocab: Vocab = tokens.iter().cloned().zip(0..).collect();
    let bpe = BPE::builder()
        .vocab_and_merges(vocab, merges)
        .build()
        .map_err(|error| anyhow!("tokenizer: {error}"))?;

    let byte_level = ByteLevel::new(false, true, true);
    let mut steps: Vec<PreTokenizerWrapper> = Vec::new();
    if splits_digits {
        steps.push(Digits::new(true).into());
    }
    steps.push(byte_level.into());
    let mut tokenizer = Tokenizer::new(bpe);
    tokenizer
        .with_pre_tokenizer(Some(Sequence::new(steps)))
        .with_decoder(Some(byte_level));
    let kinds = list(content, "tokenizer.ggml.token_type")?;
    let control = tokens
        .iter()
        .zip(kinds)
        .filter(|(_, kind)| integer(kind) == Some(CONTROL));
    let control: Vec<AddedToken> = control
        .map(|(token, _)| AddedToken::from(token.as_str(), true))
        .collect();
    tokenizer
        .add_special_tokens(control)
        .map_err(|error| anyhow!("tokenizer: {error}"))?;
    Ok(tokenizer)
}

fn integer(value: &Value) -> Option<i64> {
    match value {
        Value::I32(n) => Some((*n).into()),
        Value::U32(n) => Some((*n).into()),
        _ => value.to_i64().ok(),
    }
}
