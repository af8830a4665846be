//! The input: samples in any form of [`form`], with an id or without, and any further fields, which the output keeps as
//! they are. Its last response is what is scored, given what stands before it.

use std::{collections::HashMap, ops::AddAssign, path::Path};

use anyhow::{Context, Result, bail, ensure};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use sha2::{Digest, Sha256};

use crate::{
    data::{
        form::{self, Turn},
        input::{self, Record},
    },
    digest::hex,
};

/// Fields that the output adds to a sample's own.
const ADDED: [&str; 6] = [
    "uncertainty",
    "votes",
    "spread",
    "model",
    "prompt_tokens",
    "completion_tokens",
];

pub struct Sample {
    pub id: String,
    pub prompt: String,
    pub response: String,
    /// All of them, the last being the response.
    pub turns: Vec<Turn>,
    /// The JSON object as it stands in the file, and whether its id is missing there.
    object: String,
    unnamed: bool,
}

/// What scoring adds to a sample.
#[derive(Serialize)]
pub struct Score<'a> {
    /// In \[0, 1\].
    pub uncertainty: f64,
    /// The answers whose mean is the uncertainty, in \[0, 1\]; not there for a local model.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub votes: Option<&'a [f64]>,
    /// Standard deviation of the votes, not a sample's estimate of one: it divides by their number.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub spread: Option<f64>,
    pub model: &'a str,
    /// Not there for a local model.
    #[serde(flatten)]
    pub cost: Option<Cost>,
}

/// What a server has counted, also of answers that could not be used.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize)]
pub struct Cost {
    #[serde(default)]
    pub prompt_tokens: u64,
    #[serde(default)]
    pub completion_tokens: u64,
}

impl AddAssign for Cost {
    fn add_assign(&mut self, more: Self) {
        self.prompt_tokens += more.prompt_tokens;
        self.completion_tokens += more.completion_tokens;
    }
}

impl Sample {
    /// The sample's line in the output, without its line break: the text of its object, with fields appended.
    pub fn scored(&self, score: &Score) -> Result<String> {
        let added = serde_json::to_string(score).context("cannot write a score as JSON")?;
        let id = if self.unnamed {
            format!("\"id\":{},", Value::from(self.id.as_str()))
        } else {
            String::new()
        };
        // An object without fields has no prompt: a comma is always right.
        Ok(format!(
            "{},{id}{}",
            self.beginning(),
            added.trim_start_matches('{')
        ))
    }

    /// How its line in the output begins: with its own fields.
    pub fn beginning(&self) -> &str {
        let own = self.object.strip_suffix('}').unwrap_or(&self.object);
        own.trim_end()
    }

    /// Hash of what was scored: 32 hexadecimal digits.
    pub fn digest(&self) -> String {
        digest(&self.prompt, &self.response)
    }
}

fn digest(prompt: &str, response: &str) -> String {
    let mut hash = Sha256::new();
    hash.update((prompt.len() as u64).to_le_bytes()); // so that text moved from one to the other makes a difference
    hash.update(prompt);
    hash.update(response);
    hex(&hash.finalize()[..16])
}

/// The file's samples. A bad line is an error that names it, and so is an id that two samples have.
pub fn read(path: &Path) -> Result<Vec<Sample>> {
    let mut lines_of: HashMap<String, usize> = HashMap::new();
    let mut copies: HashMap<String, usize> = HashMap::new();
    let samples = input::read(path, |record| {
        let line = record.line;
        let mut sample = parse(record)?;
        if sample.unnamed {
            // Equal samples without an id: the second gets -2, and so on.
            let copy = copies.entry(sample.id.clone()).or_default();
            *copy += 1;
            if *copy > 1 {
                sample.id = format!("{}-{copy}", sample.id);
            }
        }
        if let Some(other) = lines_of.insert(sample.id.clone(), line) {
            bail!("\"id\" is {:?}, as in line {other}", sample.id);
        }
        Ok(sample)
    })?;
    ensure!(!samples.is_empty(), "{} has no samples", path.display());
    Ok(samples)
}

fn parse(record: Record) -> Result<Sample> {
    let Record {
        object,
        fields,
        turns,
        ..
    } = record;
    if let Some(name) = ADDED.iter().find(|&&name| fields.contains_key(name)) {
        bail!(
            "the sample has a field {name:?} already; the output adds one of this name, so rename or remove it"
        );
    }
    let (prompt, response) = form::prompt_and_response(&turns);
    let id = id(&fields)?;
    Ok(Sample {
        unnamed: id.is_none(),
        id: id.unwrap_or_else(|| digest(&prompt, &response)),
        prompt,
        response,
        turns,
        object,
    })
}

/// Prompt and response.
pub fn texts(fields: &Map<String, Value>) -> Result<(String, String)> {
    let (_, turns) = form::turns(fields, None)?;
    Ok(form::prompt_and_response(&turns))
}

/// The id, a string or an integer, if there is one.
pub fn id(fields: &Map<String, Value>) -> Result<Option<String>> {
    match fields.get("id") {
        None => Ok(None),
        Some(Value::String(id)) => Ok(Some(id.clone())),
        Some(Value::Number(id)) if !id.is_f64() => Ok(Some(id.to_string())),
        Some(other) => bail!("\"id\" is {other}; it must be a string or an integer"),
    }
}
