//! The forms in which data sets have their samples, each known by its fields.

use std::fmt;

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Map, Value};

use crate::text::chat::{ASSISTANT, USER};

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Turn {
    /// As chat templates name it.
    pub role: String,
    pub text: String,
}

impl Turn {
    pub fn new(role: &str, text: impl Into<String>) -> Self {
        Self {
            role: role.to_string(),
            text: text.into(),
        }
    }

    /// Whether it is learned.
    pub fn is_response(&self) -> bool {
        self.role == ASSISTANT
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Form {
    Messages,
    Conversations,
    Response,
    Completion,
    Alpaca,
}

/// In the order in which they are looked for.
const FORMS: [Form; 5] = [
    Form::Messages,
    Form::Conversations,
    Form::Response,
    Form::Completion,
    Form::Alpaca,
];

impl Form {
    /// Fields that a sample of the form must have.
    fn fields(self) -> &'static [&'static str] {
        match self {
            Self::Messages => &["messages"],
            Self::Conversations => &["conversations"],
            Self::Response => &["prompt", "response"],
            Self::Completion => &["prompt", "completion"],
            Self::Alpaca => &["instruction", "output"],
        }
    }

    fn turns(self, fields: &Map<String, Value>) -> Result<Vec<Turn>> {
        let text = |name: &str| match &fields[name] {
            Value::String(text) => Ok(text.clone()),
            _ => bail!("{name:?} is not a string"),
        };
        let (prompt, response) = match *self.fields() {
            [prompt, response] => (prompt, response),
            [name, ..] => return conversation(name, &fields[name]),
            [] => unreachable!("every form has a field"),
        };
        let mut prompt = text(prompt)?;
        if self == Self::Alpaca && is_there(fields, "input") {
            let input = text("input")?;
            if !input.trim().is_empty() {
                prompt = format!("{prompt}\n\n{input}");
            }
        }
        let answer = text(response)?;
        ensure!(!answer.trim().is_empty(), "{response:?} is empty");
        Ok(vec![Turn::new(USER, prompt), Turn::new(ASSISTANT, answer)])
    }
}

impl fmt::Display for Form {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str(match self {
            Self::Messages => "{\"messages\": [{\"role\", \"content\"}, …]}",
            Self::Conversations => "{\"conversations\": [{\"from\", \"value\"}, …]} (ShareGPT)",
            Self::Response => "{\"prompt\", \"response\"}",
            Self::Completion => "{\"prompt\", \"completion\"}",
            Self::Alpaca => "{\"instruction\", \"input\", \"output\"} (Alpaca)",
        })
    }
}

/// A list of turns, up to the last response: what follows it is not learned.
fn conversation(name: &str, turns: &Value) -> Result<Vec<Turn>> {
    let turns = match turns {
        Value::Object(columns) => by_turns(columns),
        turns => turns.as_array().cloned(),
    };
    let turns = turns.with_context(|| format!("{name:?} is not a list"))?;
    let mut turns = turns
        .iter()
        .enumerate()
        .map(|(i, turn)| self::turn(turn).with_context(|| format!("{name}[{i}]")))
        .collect::<Result<Vec<_>>>()?;
    let last = turns.iter().rposition(Turn::is_response);
    turns.truncate(last.map_or(0, |last| last + 1));
    let response = turns.last().with_context(|| {
        format!("{name:?} has no turn of the assistant; there is nothing to learn")
    })?;
    ensure!(
        !response.text.trim().is_empty(),
        "the last response of {name:?} is empty"
    );
    Ok(turns)
}

/// Columns of one length each, as tables have lists of objects, to objects.
fn by_turns(columns: &Map<String, Value>) -> Option<Vec<Value>> {
    let columns: Vec<_> = columns
        .iter()
        .map(|(name, values)| Some((name, values.as_array()?)))
        .collect::<Option<_>>()?;
    let (_, first) = columns.first()?;
    let same = columns
        .iter()
        .all(|(_, values)| values.len() == first.len());
    let turn = |i: usize| {
        let fields = columns
            .iter()
            .map(|(name, values)| (name.to_string(), values[i].clone()));
        Value::Object(fields.collect())
    };
    same.then(|| (0..first.len()).map(turn).collect())
}

/// `{"role", "content"}` or `{"from", "value"}`: either is found under either name.
fn turn(turn: &Value) -> Result<Turn> {
    let field = |names: [&str; 2]| names.into_iter().find_map(|name| turn.get(name));
    let role = field(["role", "from"]).and_then(Value::as_str);
    let role = match role.context("it has no \"role\" or \"from\" that is a string")? {
        "human" => USER,
        "gpt" | "chatgpt" | "bot" | "model" => ASSISTANT,
        role => role,
    };
    ensure!(
        [USER, ASSISTANT, "system", "developer", "tool"].contains(&role),
        "{role:?} is nobody who takes part in a conversation: system, user, assistant, tool"
    );
    let text = match field(["content", "value"]) {
        Some(Value::String(text)) => text.clone(),
        // Parts of text, as servers take them.
        Some(Value::Array(parts)) => parts
            .iter()
            .map(|part| part["text"].as_str().context("a part of it is no text"))
            .collect::<Result<_>>()?,
        _ => bail!("it has no \"content\" or \"value\" that is a string"),
    };
    Ok(Turn::new(role, text))
}

/// Tables write null where a sample lacks a field.
fn is_there(fields: &Map<String, Value>, name: &str) -> bool {
    fields.get(name).is_some_and(|value| !value.is_null())
}

/// The form of a sample, and what it says; the last turn is a response that is not empty. `known` is the form of the
/// samples before it, which comes first where the fields fit several.
pub fn turns(fields: &Map<String, Value>, known: Option<Form>) -> Result<(Form, Vec<Turn>)> {
    let form = known
        .into_iter()
        .chain(FORMS)
        .find(|form| form.fields().iter().all(|name| is_there(fields, name)));
    let form = form.with_context(|| {
        let names = |names: Vec<String>| match names.is_empty() {
            true => "none".to_string(),
            false => names.join(", "),
        };
        let found = fields.keys().map(|name| format!("{name:?}")).collect();
        let forms = FORMS.iter().map(Form::to_string).collect();
        format!(
            "its fields are {}, which is no form of a sample that is known; those are {}",
            names(found),
            names(forms)
        )
    })?;
    Ok((form, form.turns(fields)?))
}

/// All but the last turn as one text, and the last, a response.
pub fn prompt_and_response(turns: &[Turn]) -> (String, String) {
    let (response, before) = turns.split_last().expect("a sample has a response");
    let prompt = match before {
        [prompt] if prompt.role == USER => prompt.text.clone(),
        turns => {
            let said = turns
                .iter()
                .map(|turn| format!("{}: {}", turn.role, turn.text));
            said.collect::<Vec<_>>().join("\n\n")
        }
    };
    (prompt, response.text.clone())
}
