//! A sample as its model is used to see it: by the model's own chat template where it has one.

use std::{fs, path::Path, str::FromStr};

use anyhow::{Context, Result, anyhow, ensure};
use candle_core::quantized::gguf_file::{Content, Value};
use minijinja::{Environment, ErrorKind, context, syntax::SyntaxConfig};
use serde_json::{Value as Json, json};
use tokenizers::Tokenizer;

use crate::text::gguf_tokenizer::{self, flag, number};

pub const TOKENIZER: &str = "tokenizer.json";
pub const CHAT_TEMPLATE: &str = "chat_template.jinja";

/// Stand for prompt and response in a template; nothing in one takes them apart.
const PROMPT: &str = "PROMPT5d1c";
const RESPONSE: &str = "RESPONSE5d1c";
/// The same for any turn: its number follows, and [`TURN_END`].
const TURN: &str = "TURN5d1c";
const TURN_END: char = 'e';

/// Who asks.
pub const USER: &str = "user";
/// Who says what is learned.
pub const ASSISTANT: &str = "assistant";

const CHATML: &str = "{{ bos_token }}{% for message in messages %}\
    {{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}{% endfor %}";

/// A part of a conversation as a model sees it.
#[derive(Debug, PartialEq)]
pub enum Piece {
    /// Of the template, its first `learned` tokens being those that end a response.
    Template { tokens: Vec<u32>, learned: usize },
    /// What the turn of this number says.
    Turn(usize, Lead),
}

/// What precedes a turn, where that has a part in how its text is divided.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Lead {
    /// Nothing, or it has no part.
    Start,
    /// Text that is not left out.
    Middle,
    /// A space that the turn's first token takes in.
    Space,
}

/// In Jinja, and the tokens it may name.
#[derive(Clone)]
pub struct Template {
    text: String,
    begin: String,
    end: String,
}

/// Text to tokens, and what stands round prompt and response.
#[derive(Clone)]
pub struct Encoder {
    pub tokenizer: Tokenizer,
    /// The same for what does not begin a text, where the tokenizer puts a space before what does: SentencePiece's do.
    middle: Option<Tokenizer>,
    /// Added to the tokenizer's ids: so many control tokens precede them.
    pub offset: u32,
    pub before: Vec<u32>,
    pub between: Vec<u32>,
    /// What follows a response and is learned with it, at least a token; the last ends a response.
    pub ending: Vec<u32>,
    /// Of prompt and response.
    leads: [Lead; 2],
    /// What says how conversations of any turns look. Without one they are `before`, and prompt, `between`, response and
    /// `end` again and again.
    pub template: Option<Template>,
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
    /// Without a template, with one token each before prompt and response and after it.
    pub fn plain(tokenizer: Tokenizer, offset: u32, [before, between, end]: [u32; 3]) -> Self {
        Self {
            tokenizer,
            middle: None,
            offset,
            before: vec![before],
            between: vec![between],
            ending: vec![end],
            leads: [Lead::Start; 2],
            template: None,
        }
    }

    /// `template` replaces the file's.
    pub fn from_gguf(
        content: &Content,
        tokenizer: Tokenizer,
        template: Option<String>,
    ) -> Result<Self> {
        let own = match content.metadata.get("tokenizer.chat_template") {
            Some(Value::String(text)) => Some(text.clone()),
            _ => None,
        };
        let text = |key: &str| gguf_tokenizer::text(content, key);
        let token = |key: &str| tokenizer.id_to_token(number(content, key)?);
        // As llama.cpp has it where a file does not say.
        let usually =
            text("model") == Some("llama") || matches!(text("pre"), Some("llama-bpe" | "tekken"));
        let conventions = Conventions {
            template: template.or(own),
            begin: token("bos_token_id"),
            end: token("eos_token_id"),
            add_begin: flag(content, "add_bos_token").unwrap_or(usually),
        };
        Self::new(tokenizer, &conventions)
    }

    /// Of a folder as Hugging Face has them, with chat_template.jinja and tokenizer_config.json where these are there.
    /// `template` replaces the folder's.
    pub fn from_folder(
        folder: &Path,
        tokenizer: Tokenizer,
        template: Option<String>,
    ) -> Result<Self> {
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
            template: match template {
                Some(template) => Some(template),
                None => read(CHAT_TEMPLATE)?.or(of_config),
            },
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
        // A template says itself whether a text begins with `begin`.
        let added = if conventions.add_begin { begin } else { "" };
        let chatml = has("<|im_start|>") && has("<|im_end|>");
        let template = match &conventions.template {
            Some(text) => Some((text.as_str(), begin)),
            None => chatml.then_some((CHATML, added)),
        };
        let template = template.map(|(text, begin)| Template {
            text: text.to_string(),
            begin: begin.to_string(),
            end: end.unwrap_or("").to_string(),
        });
        let text = match &template {
            Some(template) => template
                .rendered(&[(USER, PROMPT), (ASSISTANT, RESPONSE)])
                .context("its chat template cannot be used; --chat-template takes another")?,
            None => format!("{added}{PROMPT}\n{RESPONSE}"),
        };
        let parts = text.split_once(PROMPT).and_then(|(before, rest)| {
            let (between, after) = rest.split_once(RESPONSE)?;
            Some((before, between, after))
        });
        let (before, between, after) =
            parts.context("its chat template does not show prompt and response, in this order")?;
        let mut encoder = Self {
            middle: without_space(&tokenizer)?,
            tokenizer,
            offset: 0,
            before: Vec::new(),
            between: Vec::new(),
            ending: Vec::new(),
            leads: [Lead::Start; 2],
            template,
        };
        (encoder.before, encoder.leads[0]) = encoder.fixed(before, true)?;
        (encoder.between, encoder.leads[1]) = encoder.fixed(between, false)?;
        let control = encoder.tokenizer.get_added_tokens_decoder();
        let (after, _) = encoder.fixed(after, false)?;
        encoder.ending = match after.iter().position(|id| control.contains_key(id)) {
            Some(at) => after[..=at].to_vec(),
            None => end
                .and_then(|end| encoder.tokenizer.token_to_id(end))
                .into_iter()
                .collect(),
        };
        ensure!(
            !encoder.ending.is_empty(),
            "the tokenizer has no token that ends a response"
        );
        ensure!(
            !(encoder.before.is_empty() && encoder.between.is_empty()),
            "nothing stands before a response"
        );
        encoder.set_special(false);
        Ok(encoder)
    }

    /// A conversation of turns by these roles, of which the last is the assistant's. What a template makes of the texts
    /// themselves (many trim them) is not seen.
    pub fn pieces(&self, roles: &[&str]) -> Result<Vec<Piece>> {
        match &self.template {
            Some(template) if *roles != [USER, ASSISTANT] => self.of_template(template, roles),
            _ => self.of_exchanges(roles),
        }
    }

    fn of_exchanges(&self, roles: &[&str]) -> Result<Vec<Piece>> {
        let template = |tokens: &[u32], learned: usize| Piece::Template {
            tokens: tokens.to_vec(),
            learned,
        };
        let mut pieces = vec![template(&self.before, 0)];
        for (i, &role) in roles.iter().enumerate() {
            if role == ASSISTANT {
                pieces.push(template(&self.between, 0));
                pieces.push(Piece::Turn(i, self.leads[1]));
                pieces.push(template(&self.ending, self.ending.len()));
                continue;
            }
            let lead = match i {
                0 => self.leads[0],
                _ => self.lead(Lead::Middle),
            };
            if i > 0 && roles[i - 1] != ASSISTANT {
                let (line, _) = self.fixed("\n", false)?;
                pieces.push(template(&line, 0)); // two texts before a response
            }
            pieces.push(Piece::Turn(i, lead));
        }
        Ok(pieces)
    }

    fn of_template(&self, template: &Template, roles: &[&str]) -> Result<Vec<Piece>> {
        let named: Vec<String> = (0..roles.len())
            .map(|i| format!("{TURN}{i}{TURN_END}"))
            .collect();
        let turns: Vec<(&str, &str)> = roles
            .iter()
            .copied()
            .zip(named.iter().map(String::as_str))
            .collect();
        let text = template.rendered(&turns).with_context(|| {
            format!(
                "the model's chat template takes no conversation of {}",
                roles.join(", ")
            )
        })?;
        let mut special = self.clone();
        special.set_special(true);
        let control = special.tokenizer.get_added_tokens_decoder();
        let mut pieces = Vec::new();
        let mut shown = vec![0; roles.len()];
        let mut after_response = false;
        let mut parts = text.split(TURN);
        let mut fixed = parts.next().unwrap_or_default();
        for part in parts {
            let (tokens, lead) = special.fixed(fixed, pieces.is_empty())?;
            let ends = tokens.iter().position(|id| control.contains_key(id));
            let ends = ends.filter(|&at| after_response && Some(&tokens[at]) == self.ending.last());
            pieces.push(Piece::Template {
                learned: ends.map_or(0, |at| at + 1),
                tokens,
            });
            let (turn, after) = part
                .split_once(TURN_END)
                .and_then(|(number, after)| Some((number.parse::<usize>().ok()?, after)))
                .context("its chat template takes a turn apart")?;
            pieces.push(Piece::Turn(turn, lead));
            shown[turn] += 1;
            after_response = roles[turn] == ASSISTANT;
            fixed = after;
        }
        for ((turn, &times), &role) in (1..).zip(&shown).zip(roles) {
            ensure!(
                times == 1 || times > 1 && role != ASSISTANT,
                "the model's chat template shows turn {turn} ({role}) {times} times"
            );
        }
        ensure!(
            after_response
                && matches!(pieces.last(), Some(Piece::Turn(last, _)) if *last == roles.len() - 1),
            "the model's chat template does not end with the last response"
        );
        // As of a single response: what may follow the end is for the next turn.
        pieces.push(Piece::Template {
            tokens: self.ending.clone(),
            learned: self.ending.len(),
        });
        Ok(pieces)
    }

    /// Of a text by itself.
    pub fn ids(&self, text: &str) -> Result<Vec<u32>> {
        self.ids_after(text, Lead::Start)
    }

    pub fn ids_after(&self, text: &str, lead: Lead) -> Result<Vec<u32>> {
        let middle = self.middle.as_ref().unwrap_or(&self.tokenizer);
        let encoding = match lead {
            Lead::Start => encode(&self.tokenizer, text),
            Lead::Middle => encode(middle, text),
            Lead::Space => encode(middle, &format!(" {text}")),
        };
        Ok(encoding?
            .get_ids()
            .iter()
            .map(|id| id + self.offset)
            .collect())
    }

    /// `Start` where nothing else makes a difference.
    fn lead(&self, lead: Lead) -> Lead {
        self.middle.as_ref().map_or(Lead::Start, |_| lead)
    }

    /// Tokens of a template's text before a turn, and how that begins. A space at its end is the turn's, as in words.
    fn fixed(&self, text: &str, first: bool) -> Result<(Vec<u32>, Lead)> {
        let Some(middle) = &self.middle else {
            return Ok((self.ids(text)?, Lead::Start));
        };
        let (text, lead) = match text.strip_suffix(' ') {
            Some(text) => (text, Lead::Space),
            None => (text, Lead::Middle),
        };
        if first {
            let lead = if text.is_empty() { Lead::Start } else { lead };
            return Ok((self.ids(text)?, lead));
        }
        // From its first control token on, the tokenizer decides whether a space follows one.
        let encoding = encode(middle, text)?;
        let control = self.tokenizer.get_added_tokens_decoder();
        let ids = encoding.get_ids();
        let first = ids
            .iter()
            .position(|id| control.get(id).is_some_and(|token| token.special));
        let first = first.unwrap_or(ids.len());
        let rest = encoding
            .get_offsets()
            .get(first)
            .map_or("", |&(start, _)| &text[start..]);
        let mut all: Vec<u32> = ids[..first].iter().map(|id| id + self.offset).collect();
        all.extend(self.ids(rest)?);
        Ok((all, lead))
    }

    /// Whether control tokens in a text are single tokens: in templates they are, in samples they are text like any
    /// other.
    fn set_special(&mut self, special: bool) {
        for tokenizer in [Some(&mut self.tokenizer), self.middle.as_mut()]
            .into_iter()
            .flatten()
        {
            tokenizer.set_encode_special_tokens(!special);
        }
    }
}

fn encode(tokenizer: &Tokenizer, text: &str) -> Result<tokenizers::Encoding> {
    let encoding = tokenizer.encode(text, false);
    encoding.map_err(|e| anyhow!("tokenizer: {e}"))
}

/// The tokenizer without the space that it puts before a text, if it does.
fn without_space(tokenizer: &Tokenizer) -> Result<Option<Tokenizer>> {
    fn remove(part: &mut Json) -> bool {
        let mut removed = match part["type"].as_str() {
            Some("Prepend") => {
                *part = json!({"type": "Sequence", "normalizers": []});
                true
            }
            Some("Metaspace") if part["prepend_scheme"] != "never" => {
                part["prepend_scheme"] = "never".into();
                true
            }
            Some("ByteLevel") if part["add_prefix_space"] == true => {
                part["add_prefix_space"] = false.into();
                true
            }
            _ => false,
        };
        for parts in ["normalizers", "pretokenizers"] {
            let parts = part.get_mut(parts).and_then(Json::as_array_mut);
            for part in parts.into_iter().flatten() {
                removed |= remove(part);
            }
        }
        removed
    }
    let (normalizer, words) = (tokenizer.get_normalizer(), tokenizer.get_pre_tokenizer());
    let mut parts = json!({"normalizer": normalizer, "pre_tokenizer": words});
    let removed = ["normalizer", "pre_tokenizer"].map(|part| remove(&mut parts[part]));
    if removed == [false; 2] {
        return Ok(None);
    }
    let mut all: Json = serde_json::from_str(&tokenizer.to_string(false).map_err(|e| anyhow!(e))?)?;
    for part in ["normalizer", "pre_tokenizer"] {
        all[part] = parts[part].take();
    }
    Ok(Some(
        Tokenizer::from_str(&all.to_string()).map_err(|e| anyhow!(e))?,
    ))
}

impl Template {
    /// A conversation of (role, text), as transformers renders it.
    fn rendered(&self, turns: &[(&str, &str)]) -> Result<String> {
        let mut environment = Environment::new();
        let mut syntax = SyntaxConfig::builder();
        syntax.trim_blocks(true).lstrip_blocks(true);
        environment.set_syntax(syntax.build()?);
        environment
            .set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        environment.add_function("raise_exception", |message: String| {
            Err::<(), _>(minijinja::Error::new(ErrorKind::InvalidOperation, message))
        });
        let messages: Vec<_> = turns
            .iter()
            .map(|&(role, content)| context! { role, content })
            .collect();
        Ok(environment.render_str(
            &self.text,
            context! {
                messages,
                bos_token => self.begin.as_str(),
                eos_token => self.end.as_str(),
                add_generation_prompt => false,
            },
        )?)
    }
}
