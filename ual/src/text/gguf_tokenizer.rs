//! The tokenizer in a GGUF file's own metadata, for models with a byte-level BPE.

use anyhow::{Result, anyhow, bail};
use candle_core::quantized::{
    gguf_file::{Content, Value},
    tokenizer::TokenizerFromGguf,
};
use tokenizers::{
    ModelWrapper, PreTokenizerWrapper, SplitDelimiterBehavior, Tokenizer,
    pre_tokenizers::{
        byte_level::ByteLevel,
        digits::Digits,
        sequence::Sequence,
        split::{Split, SplitPattern},
    },
};

/// Llama 3's division of a text into words.
const LLAMA3_WORDS: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// The byte-level BPE tokenizer that the file describes.
pub fn tokenizer(content: &Content) -> Result<Tokenizer> {
    let mut tokenizer = Tokenizer::from_gguf(content)?;
    // candle takes GPT-2's division into words for most models, with a space before the text; digits apart are the
    // SmolLM family's.
    let bytes = |words| ByteLevel::new(false, true, words);
    let kind = text(content, "tokenizer.ggml.pre").unwrap_or("gpt-2");
    let words: PreTokenizerWrapper = match kind {
        "gpt-2" | "gpt2" | "default" => bytes(true).into(),
        "smollm" | "starcoder" | "refact" | "codeshell" => {
            Sequence::new(vec![Digits::new(true).into(), bytes(true).into()]).into()
        }
        "llama-bpe" | "llama3" | "smaug-bpe" => {
            let pattern = SplitPattern::Regex(LLAMA3_WORDS.into());
            let split = Split::new(pattern, SplitDelimiterBehavior::Isolated, false);
            let split = split.map_err(|e| anyhow!(e))?;
            // A word that is a token is one, whatever the merges make of it; files do not say so.
            let mut model = tokenizer.get_model().clone();
            if let ModelWrapper::BPE(bpe) = &mut model {
                bpe.ignore_merges = true;
            }
            tokenizer.with_model(model);
            Sequence::new(vec![split.into(), bytes(false).into()]).into()
        }
        other => {
            bail!("it divides text into words by the rules {other:?}, which are not known here")
        }
    };
    tokenizer.with_pre_tokenizer(Some(words));
    Ok(tokenizer)
}

fn text<'a>(content: &'a Content, key: &str) -> Option<&'a str> {
    match content.metadata.get(key) {
        Some(Value::String(text)) => Some(text),
        _ => None,
    }
}
