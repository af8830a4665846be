//! The tokenizer in a GGUF file's own metadata: byte-level BPE, or SentencePiece's BPE.

use anyhow::{Context, Result, anyhow, bail, ensure};
use candle_core::quantized::gguf_file::{Content, Value};
use tokenizers::{
    AddedToken, NormalizerWrapper, PreTokenizerWrapper, SplitDelimiterBehavior, Tokenizer,
    decoders::{
        byte_fallback::ByteFallback, fuse::Fuse, sequence::Sequence as DecoderSequence,
        strip::Strip,
    },
    models::bpe::{BPE, Vocab},
    normalizers::{Prepend, Replace, Sequence as NormalizerSequence, unicode::NFC},
    pre_tokenizers::{
        byte_level::ByteLevel,
        digits::Digits,
        sequence::Sequence,
        split::{Split, SplitPattern},
    },
};

/// Kinds of tokens, as llama.cpp numbers them.
pub const NORMAL: i64 = 1;
const UNKNOWN: i64 = 2;
pub const CONTROL: i64 = 3;
/// Found in a text as they are, whatever the text is.
const USER_DEFINED: i64 = 4;
pub const BYTE: i64 = 6;

/// How Llama 3, Qwen 2 and Mistral's Tekken divide a text into words: Llama 3's, with digits alone, with case.
const LLAMA3_WORDS: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const QWEN2_WORDS: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const TEKKEN_WORDS: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// SentencePiece's space.
const SPACE: &str = "▁";

/// The file's list of tokens.
pub struct Tokens<'a> {
    pub texts: Vec<&'a str>,
    kinds: Option<Vec<i64>>,
}

impl<'a> Tokens<'a> {
    /// None where the file has no list.
    pub fn of(content: &'a Content) -> Result<Option<Self>> {
        let Some(texts) = array(content, "tokens") else {
            return Ok(None);
        };
        let texts = texts.iter().map(|text| match text {
            Value::String(text) => Ok(text.as_str()),
            _ => bail!("a token is no text"),
        });
        let texts: Vec<_> = texts.collect::<Result<_>>()?;
        let kinds = array(content, "token_type");
        let kinds = kinds.map(|kinds| kinds.iter().map(integer).collect::<Result<Vec<_>>>());
        let kinds = kinds.transpose()?;
        let count = kinds.as_ref().map_or(texts.len(), Vec::len);
        ensure!(
            count == texts.len(),
            "it has {} tokens and says of {count} what they are",
            texts.len()
        );
        Ok(Some(Self { texts, kinds }))
    }

    /// Numbers and kinds.
    pub fn iter(&self) -> impl Iterator<Item = (usize, i64)> {
        let kind = |id: usize| self.kinds.as_ref().map_or(NORMAL, |kinds| kinds[id]);
        (0..self.texts.len()).map(move |id| (id, kind(id)))
    }

    fn vocab(&self) -> Vocab {
        let texts = self.texts.iter().map(|text| text.to_string());
        texts.zip(0..).collect()
    }
}

/// The tokenizer that the file describes. It adds nothing round a text.
pub fn tokenizer(content: &Content) -> Result<Tokenizer> {
    let tokens = Tokens::of(content)?.context("it has no tokenizer.ggml.tokens")?;
    let mut tokenizer = match text(content, "model") {
        Some("gpt2") => byte_level(content, &tokens)?,
        Some("llama") => sentence_piece(content, &tokens)?,
        kind => bail!(
            "it is of the kind {:?}; those known are \"gpt2\" and \"llama\"",
            kind.unwrap_or("")
        ),
    };
    // One number each: control tokens in templates alone, the others in any text.
    let added = |special: bool, kinds: &[i64]| -> Vec<AddedToken> {
        let of_kind = tokens.iter().filter(|(_, kind)| kinds.contains(kind));
        let added =
            of_kind.map(|(id, _)| AddedToken::from(tokens.texts[id], special).normalized(false));
        added.filter(|token| !token.content.is_empty()).collect()
    };
    let failed = |e| anyhow!("its tokens: {e}");
    let special = added(true, &[CONTROL, UNKNOWN]);
    tokenizer.add_special_tokens(special).map_err(failed)?;
    let others = added(false, &[USER_DEFINED]);
    tokenizer.add_tokens(others).map_err(failed)?;
    Ok(tokenizer)
}

fn byte_level(content: &Content, tokens: &Tokens) -> Result<Tokenizer> {
    let merges = array(content, "merges").context("it has no tokenizer.ggml.merges")?;
    let merges = merges.iter().map(|merge| {
        let (left, right) = merge.to_string().ok()?.split_once(' ')?;
        Some((left.to_string(), right.to_string()))
    });
    let merges = merges.collect::<Option<Vec<_>>>();
    let merges = merges.context("a merge is not two texts with a space between")?;
    let bytes = |words| ByteLevel::new(false, true, words);
    let split = |pattern: &str| -> Result<PreTokenizerWrapper> {
        let pattern = SplitPattern::Regex(pattern.into());
        let split = Split::new(pattern, SplitDelimiterBehavior::Isolated, false);
        let split = split.map_err(|e| anyhow!(e))?;
        Ok(Sequence::new(vec![split.into(), bytes(false).into()]).into())
    };
    let kind = text(content, "pre").unwrap_or("gpt-2");
    let words = match kind {
        "gpt-2" | "gpt2" | "default" => bytes(true).into(),
        "smollm" | "starcoder" | "refact" | "codeshell" => {
            Sequence::new(vec![Digits::new(true).into(), bytes(true).into()]).into()
        }
        "llama-bpe" | "llama3" | "smaug-bpe" => split(LLAMA3_WORDS)?,
        "qwen2" => split(QWEN2_WORDS)?,
        "tekken" => split(TEKKEN_WORDS)?,
        other => {
            bail!("it divides text into words by the rules {other:?}, which are not known here")
        }
    };
    // There a word that is a token is one, whatever the merges make of it; files do not say so.
    let whole_words = ["llama-bpe", "llama3", "smaug-bpe", "tekken"].contains(&kind);
    let model = BPE::builder()
        .vocab_and_merges(tokens.vocab(), merges)
        .ignore_merges(whole_words)
        .build();
    let mut tokenizer = Tokenizer::new(model.map_err(|e| anyhow!(e))?);
    if kind == "qwen2" {
        let composed: NormalizerWrapper = NFC.into();
        tokenizer
            .with_normalizer(Some(composed))
            .map_err(|e| anyhow!(e))?;
    }
    tokenizer.with_pre_tokenizer(Some(words));
    tokenizer.with_decoder(Some(bytes(true)));
    Ok(tokenizer)
}

/// SentencePiece joins the two neighbours that make the token of the best score, again and again; bytes stand for what
/// no token is of. Kudo and Richardson, arXiv 1808.06226.
fn sentence_piece(content: &Content, tokens: &Tokens) -> Result<Tokenizer> {
    let scores = array(content, "scores").context("it has no tokenizer.ggml.scores")?;
    let scores = scores.iter().map(|score| Ok(score.to_f32()?));
    let scores: Vec<f32> = scores.collect::<Result<_>>()?;
    ensure!(
        scores.len() == tokens.texts.len(),
        "it has {} tokens and {} scores",
        tokens.texts.len(),
        scores.len()
    );
    let vocab = tokens.vocab();
    let mut merges = Vec::new();
    let normal = tokens.iter().filter(|(_, kind)| *kind == NORMAL);
    for (id, text) in normal.map(|(id, _)| (id, tokens.texts[id])) {
        for (at, _) in text.char_indices().skip(1) {
            let (left, right) = text.split_at(at);
            if let (Some(&left), Some(&right)) = (vocab.get(left), vocab.get(right)) {
                merges.push((scores[id], left, right));
            }
        }
    }
    merges.sort_by(|a, b| b.0.total_cmp(&a.0).then((a.1, a.2).cmp(&(b.1, b.2))));
    let text_of = |id: u32| tokens.texts[id as usize].to_string();
    let merges = merges
        .into_iter()
        .map(|(_, left, right)| (text_of(left), text_of(right)));
    let mut model = BPE::builder()
        .vocab_and_merges(vocab, merges.collect())
        .byte_fallback(true)
        .fuse_unk(true);
    if let Some((unknown, _)) = tokens.iter().find(|(_, kind)| *kind == UNKNOWN) {
        model = model.unk_token(tokens.texts[unknown].to_string());
    }
    let mut tokenizer = Tokenizer::new(model.build().map_err(|e| anyhow!(e))?);
    let failed = |e| anyhow!("its spaces: {e}");
    let mut spaces: Vec<NormalizerWrapper> = Vec::new();
    if flag(content, "add_space_prefix").unwrap_or(true) {
        spaces.push(Prepend::new(SPACE.to_string()).into());
    }
    spaces.push(Replace::new(" ", SPACE).map_err(failed)?.into());
    let spaces = NormalizerSequence::new(spaces);
    tokenizer.with_normalizer(Some(spaces)).map_err(failed)?;
    tokenizer.with_decoder(Some(DecoderSequence::new(vec![
        Replace::new(SPACE, " ").map_err(failed)?.into(),
        ByteFallback::default().into(),
        Fuse::default().into(),
        Strip::new(' ', 1, 0).into(),
    ])));
    Ok(tokenizer)
}

fn value<'a>(content: &'a Content, key: &str) -> Option<&'a Value> {
    content.metadata.get(&format!("tokenizer.ggml.{key}"))
}

/// `tokenizer.ggml.` and a key, a text.
pub fn text<'a>(content: &'a Content, key: &str) -> Option<&'a str> {
    match value(content, key) {
        Some(Value::String(text)) => Some(text),
        _ => None,
    }
}

pub fn flag(content: &Content, key: &str) -> Option<bool> {
    value(content, key)?.to_bool().ok()
}

pub fn number(content: &Content, key: &str) -> Option<u32> {
    integer(value(content, key)?).ok()?.try_into().ok()
}

fn array<'a>(content: &'a Content, key: &str) -> Option<&'a [Value]> {
    match value(content, key) {
        Some(Value::Array(values)) => Some(values),
        _ => None,
    }
}

/// Files have numbers in several types.
pub fn integer(value: &Value) -> Result<i64> {
    match value {
        Value::I8(value) => Ok((*value).into()),
        Value::I16(value) => Ok((*value).into()),
        Value::I32(value) => Ok((*value).into()),
        Value::I64(value) => Ok(*value),
        value => Ok(value.to_u64()?.try_into()?),
    }
}
