//! Samples whose response is one of a few: what the head learns to give.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::Path,
};

use anyhow::{Context, Result, anyhow, bail, ensure};
use rand::{SeedableRng, rngs::StdRng, seq::SliceRandom};
use serde_json::Value;

use crate::data::{
    form::Turn,
    input::{self, Record},
    response_counts::{self, ResponseCounts},
};

/// Most responses that a head tells apart.
const MOST: usize = 256;

#[derive(Debug)]
pub struct Question {
    pub turns: Vec<Turn>,
    /// Which of the responses the sample has.
    pub answer: usize,
    /// In [0, 1].
    pub uncertainty: f32,
    /// What the field of --group says, as a number.
    pub kind: Option<usize>,
    /// The share of people who gave each response, where the sample is held out; else empty.
    pub truth: Vec<f64>,
}

#[derive(Debug)]
pub struct Questions {
    /// In the order of their text.
    pub responses: Vec<String>,
    pub train: Vec<Question>,
    pub held_out: Vec<Question>,
}

struct Read {
    turns: Vec<Turn>,
    response: String,
    uncertainty: f32,
    kind: Option<String>,
    counts: Option<ResponseCounts>,
}

/// Of a file, in random order; at most `limit` of them.
pub fn read(
    path: &Path,
    group: Option<&str>,
    limit: Option<usize>,
    seed: u64,
) -> Result<Questions> {
    let mut all = input::read(path, |record| question(record, group))?;
    all.shuffle(&mut StdRng::seed_from_u64(seed));
    all.truncate(limit.unwrap_or(usize::MAX));
    let responses: BTreeSet<&str> = all
        .iter()
        .flat_map(|read| {
            let counted = read.counts.iter().flat_map(ResponseCounts::counts);
            std::iter::once(read.response.as_str()).chain(counted.map(|(response, _)| response))
        })
        .collect();
    let responses: Vec<String> = responses.into_iter().map(str::to_string).collect();
    let name = path.display();
    ensure!(
        (2..=MOST).contains(&responses.len()),
        "{name}: {} different responses; a head tells from 2 to {MOST} apart",
        responses.len()
    );
    let number: BTreeMap<&str, usize> = responses
        .iter()
        .enumerate()
        .map(|(i, response)| (response.as_str(), i))
        .collect();
    let kinds: BTreeSet<String> = all.iter().filter_map(|read| read.kind.clone()).collect();
    let kinds: Vec<String> = kinds.into_iter().collect();
    let (mut train, mut held_out) = (Vec::new(), Vec::new());
    for read in all {
        let mut truth = Vec::new();
        if let Some(counts) = &read.counts {
            truth.resize(responses.len(), 0.0);
            let all: f64 = counts.counts().map(|(_, count)| count).sum();
            for (response, count) in counts.counts() {
                truth[number[response]] = count / all;
            }
        }
        let side = match truth.is_empty() {
            true => &mut train,
            false => &mut held_out,
        };
        side.push(Question {
            turns: read.turns,
            answer: number[read.response.as_str()],
            uncertainty: read.uncertainty,
            kind: read.kind.and_then(|kind| kinds.binary_search(&kind).ok()),
            truth,
        });
    }
    ensure!(
        !train.is_empty() && !held_out.is_empty(),
        "{name}: {} samples to train on and {} held out; there must be some of both",
        train.len(),
        held_out.len()
    );
    Ok(Questions {
        responses,
        train,
        held_out,
    })
}

fn question(read: Record, group: Option<&str>) -> Result<Read> {
    let field = |name: &str| read.fields.get(name).filter(|value| !value.is_null());
    let uncertainty = field("uncertainty").and_then(Value::as_f64);
    let uncertainty = uncertainty.context("it has no \"uncertainty\", a number in [0, 1]")? as f32;
    ensure!(
        (0.0..=1.0).contains(&uncertainty),
        "\"uncertainty\" is {uncertainty}; it must be in [0, 1]"
    );
    let counts = field(response_counts::FIELD)
        .map(|value| ResponseCounts::parse(value, &read.turns))
        .transpose()?;
    match (field("held_out"), &counts) {
        (Some(Value::Bool(true)), Some(_)) | (Some(Value::Bool(false)), None) => (),
        (held_out, _) => bail!(
            "\"held_out\" is {}; it must be true where there are {:?} and false where there are none",
            held_out.unwrap_or(&Value::Null),
            response_counts::FIELD
        ),
    }
    let kind = group.map(|name| match field(name) {
        Some(Value::String(kind)) => Ok(kind.clone()),
        Some(other) => Ok(other.to_string()),
        None => Err(anyhow!("{name:?}, the field of --group, is missing")),
    });
    let responses = read.turns.iter().filter(|turn| turn.is_response()).count();
    ensure!(
        responses == 1,
        "it has {responses} responses; a head gives one"
    );
    let response = read.turns.last().context("it has no response")?;
    Ok(Read {
        response: response.text.clone(),
        turns: read.turns,
        uncertainty,
        kind: kind.transpose()?,
        counts,
    })
}
