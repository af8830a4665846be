//! A sample as its model is used to see it: by the model's own chat template where it has one.

use std::{fs, path::Path};

use anyhow::{Context, Result, anyhow, ensure};
use candle_core::quantized::gguf_file::{Content, Value};
use minijinja::{Environment, ErrorKind, context, syntax::SyntaxConfig};
use serde_json::Value as Json;
use tokenizers::Tokenizer;

/// Stand for prompt and response in a template; nothing in one takes them apart.
const PROMPT: &str = "PROMPT5d1c";
const RESPONSE: &str = "RESPONSE5d1c";

/// Text to tokens, and what stands round prompt and response.
#[derive(Clone)]
pub struct Encoder {
    pub tokenizer: Tokenizer,
    /// Added to the tokenizer's ids: so many control tokens precede them.
    pub offset: u32,
    pub before: Vec<u32>,
    pub between: Vec<u32>,
    pub end: u32,
}

/// What a model's files say beside its tokenizer.
struct Conventions {
    /// In Jinja.
    template: Option<String>,
    begin: Option<String>,
    end: Option<String>,
    /// Whether a text begins with `begin`; a template says so itself.
    add_begin: bool,
}

impl Encoder {
    pub fn from_gguf(content: &Content, tokenizer: Tokenizer) -> Result<Self> {
        let value = |key: &str| content.metadata.get(&format!("tokenizer.{key}"));
        let text = |key: &str| match value(key) {
            Some(Value::String(text)) => Some(text.clone()),
            _ => None,
        };
        let token = |key: &str| tokenizer.id_to_token(value(key)?.to_u32().ok()?);
        let add_begin = value("ggml.add_bos_token").and_then(|value| value.to_bool().ok());
        let conventions = Conventions {
            template: text("chat_template"),
            begin: token("ggml.bos_token_id"),
            end: token("ggml.eos_token_id"),
            // As llama.cpp has it where a file does not say.
            add_begin: add_begin
                .unwrap_or_else(|| text("ggml.pre").as_deref() == Some("llama-bpe")),
        };
        Self::new(tokenizer, &conventions)
    }

    /// Of a folder as Hugging Face has them, with chat_template.jinja and tokenizer_config.json where these are there.
    pub fn from_folder(folder: &Path, tokenizer: Tokenizer) -> Result<Self> {
        let read = |name: &str| -> Result<Option<String>> {
            let path = folder.join(name);
            match path.exists() {
                true => Ok(Some(fs::read_to_string(path).context(name.to_string())?)),
                false => Ok(None),
            }
        };
        const CONFIG: &str = "tokenizer_config.json";
        let config: Json = match read(CONFIG)? {
            Some(text) => serde_json::from_str(&text).context(CONFIG)?,
            None => Json::Null,
        };
        let text = |json: &Json| json.as_str().map(str::to_string);
        let token = |key: &str| text(&config[key]).or_else(|| text(&config[key]["content"]));
        let named = |templates: &Vec<Json>| {
            let default = templates.iter().find(|t| t["name"] == "default")?;
            text(&default["template"])
        };
        let of_config = &config["chat_template"];
        let of_config = text(of_config).or_else(|| of_config.as_array().and_then(named));
        let conventions = Conventions {
            template: read("chat_template.jinja")?.or(of_config),
            begin: token("bos_token"),
            end: token("eos_token"),
            add_begin: config["add_bos_token"].as_bool().unwrap_or(false),
        };
        Self::new(tokenizer, &conventions)
    }

    /// Without a template: ChatML where the tokenizer has the tokens for it, else a line break after the prompt.
    fn new(mut tokenizer: Tokenizer, conventions: &Conventions) -> Result<Self> {
        // A tokenizer that was saved by whoever trained with it may have these.
        tokenizer.with_truncation(None).map_err(|e| anyhow!(e))?;
        tokenizer.with_padding(None);
        tokenizer.set_encode_special_tokens(false);
        let has = |token: &str| tokenizer.token_to_id(token).is_some();
        let begin = conventions.begin.as_deref().unwrap_or("");
        let end = match conventions.end.as_deref() {
            Some(end) => Some(end),
            None => ["</s>", "<|end_of_text|>", "<|endoftext|>"]
                .into_iter()
                .find(|end| has(end)),
        };
        let text = match &conventions.template {
            Some(template) => rendered(template, begin, end.unwrap_or(""))
                .context("its chat template cannot be used")?,
            None => {
                let begin = if conventions.add_begin { begin } else { "" };
                match has("<|im_start|>") && has("<|im_end|>") {
                    true => format!(
                        "{begin}<|im_start|>user\n{PROMPT}<|im_end|>\n<|im_start|>assistant\n{RESPONSE}<|im_end|>\n"
                    ),
                    false => format!("{begin}{PROMPT}\n{RESPONSE}"),
                }
            }
        };
        let parts = text.split_once(PROMPT).and_then(|(before, rest)| {
            let (between, after) = rest.split_once(RESPONSE)?;
            Some((before, between, after))
        });
        let (before, between, after) =
            parts.context("its chat template does not show prompt and response, in this order")?;
        let mut encoder = Self {
            tokenizer,
            offset: 0,
            before: Vec::new(),
            between: Vec::new(),
            end: 0,
        };
        encoder.before = encoder.ids(before)?;
        encoder.between = encoder.ids(between)?;
        let control = encoder.tokenizer.get_added_tokens_decoder();
        let after = encoder.ids(after)?;
        let after = after.into_iter().find(|id| control.contains_key(id));
        let end = after.or_else(|| encoder.tokenizer.token_to_id(end?));
        encoder.end = end.context("the tokenizer has no token that ends a response")?;
        ensure!(
            !(encoder.before.is_empty() && encoder.between.is_empty()),
            "nothing stands before a response"
        );
        encoder.tokenizer.set_encode_special_tokens(true); // in samples they are text like any other
        Ok(encoder)
    }

    /// The tokens of a sample, from those of prompt and response, and how many stand before the response.
    pub fn sample(&self, prompt: &[u32], response: &[u32]) -> (Vec<u32>, usize) {
        let tokens = [&self.before, prompt, &self.between, response].concat();
        let before = tokens.len() - response.len();
        (tokens, before)
    }

    pub fn ids(&self, text: &str) -> Result<Vec<u32>> {
        let encoding = self.tokenizer.encode(text, false);
        let encoding = encoding.map_err(|e| anyhow!("tokenizer: {e}"))?;
        Ok(encoding
            .get_ids()
            .iter()
            .map(|id| id + self.offset)
            .collect())
    }
}

/// A conversation of prompt and response by a template, as transformers renders it. What a template makes of the texts
/// themselves (many trim them) is not seen.
fn rendered(template: &str, begin: &str, end: &str) -> Result<String> {
    let mut environment = Environment::new();
    let mut syntax = SyntaxConfig::builder();
    syntax.trim_blocks(true).lstrip_blocks(true);
    environment.set_syntax(syntax.build()?);
    environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
    environment.add_function("raise_exception", |message: String| {
        Err::<(), _>(minijinja::Error::new(ErrorKind::InvalidOperation, message))
    });
    let message = |role: &str, content: &str| context! { role, content };
    Ok(environment.render_str(
        template,
        context! {
            messages => [message("user", PROMPT), message("assistant", RESPONSE)],
            bos_token => begin,
            eos_token => end,
            add_generation_prompt => false,
        },
    )?)
}
