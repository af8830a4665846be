//! Real data: a file's samples, see [`input`], and each one's `"uncertainty"`, if it has one; whether it is `"held_out"`, if
//! the file says so; and how many people gave each response, see [`response_counts`].
//!
//! The tokeniser is the model's own, with its chat template, or a byte-level BPE trained on the training samples' text, with
//! control tokens: `<begin> prompt <answer> response <end>`. Where no sample has an uncertainty it is estimated, see
//! [`crate::data::ngram`].

use std::{
    collections::{BTreeMap, BTreeSet, HashSet},
    path::Path,
};

use anyhow::{Context, Result, anyhow, bail, ensure};
use rand::{SeedableRng, rngs::StdRng, seq::SliceRandom};
use serde_json::Value;
use tokenizers::{
    Tokenizer, TokenizerBuilder,
    models::bpe::{BPE, BpeTrainer},
    normalizers::NormalizerWrapper,
    pre_tokenizers::byte_level::ByteLevel,
};

use crate::{
    data::{
        conversation::Conversations,
        form::{self, Turn},
        input::{self, Record as Read},
        ngram::{NGram, Ranks},
        response_counts::{self, ResponseCounts},
        samples::{Dataset, Sample},
    },
    text::chat::Encoder,
};

/// Control tokens precede those of a tokeniser trained here: no text can produce them.
const BEGIN: u32 = 0;
const ANSWER: u32 = 1;
const END: u32 = 2;
const CONTROL: u32 = 3;

struct Record {
    turns: Vec<Turn>,
    /// What makes samples be about the same: what stands before the first response, or, of a text without a prompt, the
    /// text.
    question: String,
    uncertainty: Option<f32>,
    held_out: Option<bool>,
    response_counts: Option<ResponseCounts>,
    /// Of the file, from 1.
    line: usize,
    /// What the field of `--group` says.
    group: Option<String>,
}

pub struct Options<'a> {
    pub seed: u64,
    /// Share of the samples, above 0 and below 1, where they do not say themselves which are held out.
    pub held_out: f64,
    pub vocab: usize,
    pub max_tokens: usize,
    /// So many samples, drawn at random, and no more.
    pub limit: Option<usize>,
    /// The field that parts the samples into groups.
    pub group: Option<&'a str>,
}

/// `encoder` is that of the model, if there is one; else one is trained on the training samples.
pub fn load(path: &Path, encoder: Option<Encoder>, options: &Options) -> Result<Dataset> {
    let mut records = read(path, options.group)?;
    let estimated = !all_or_none(path, &records, "uncertainty", |r| r.uncertainty.is_some())?;
    let parted = all_or_none(path, &records, "\"held_out\"", |r| r.held_out.is_some())?;
    // Of all records, so that they are the same whichever are drawn.
    let groups: BTreeSet<&String> = records.iter().flat_map(|record| &record.group).collect();
    let groups: Vec<String> = groups.into_iter().cloned().collect();
    shuffle(&mut records, options.seed);
    records.truncate(options.limit.unwrap_or(usize::MAX));
    let (held_out, place) = if parted {
        records.sort_by_key(|record| record.held_out == Some(false)); // keeps the order else
        let held_out = records.partition_point(|record| record.held_out == Some(true));
        let both = (1..records.len()).contains(&held_out);
        (held_out, both.then_some(held_out))
    } else {
        let wanted = (records.len() as f64 * options.held_out).round() as usize;
        (wanted, between_questions(&records, wanted))
    };
    let Some(place) = place else {
        bail!(
            "{}: {} samples, of which {held_out} would be held out; there must be some to train on and some held out, \
             of other prompts",
            path.display(),
            records.len(),
        );
    };
    let train = records.split_off(place);
    if parted {
        warn_of_shared_questions(path, &train, &records);
    }
    let encoder = match encoder {
        Some(encoder) => encoder,
        None => train_encoder(&train, options.vocab)?,
    };
    let conversations = Conversations::new(&encoder);
    let encode = |records: &[Record]| -> Result<Vec<(Sample, bool)>> {
        let sample = |record: &Record| {
            encode(record, &conversations, &groups, options.max_tokens)
                .with_context(|| format!("{}:{}", path.display(), record.line))
        };
        records.iter().map(sample).collect()
    };
    let (mut train_samples, mut held_out_samples) = (encode(&train)?, encode(&records)?);
    let truncated = train_samples
        .iter()
        .chain(&held_out_samples)
        .filter(|(_, truncated)| *truncated)
        .count();
    if estimated {
        estimate(&mut train_samples, &mut held_out_samples, vocab(&encoder));
    }

    let samples = |list: Vec<(Sample, bool)>| {
        list.into_iter()
            .map(|(sample, _)| sample)
            .collect::<Vec<_>>()
    };
    let (train, held_out) = (samples(train_samples), samples(held_out_samples));
    let plain = |s: &Sample| Sample {
        tokens: s.tokens.clone(),
        prompt: 1,
        between: Vec::new(),
        uncertainty: 0.0,
        group: s.group,
        truth: Vec::new(),
    };
    Ok(Dataset {
        vocab: vocab(&encoder),
        pretrain: train.iter().map(plain).collect(),
        description: format!(
            "{}: {} training samples, {} held out{}, {truncated} of them cut to {} tokens;\nuncertainty: \
             {}",
            path.display(),
            train.len(),
            held_out.len(),
            if parted { " as the file says" } else { "" },
            options.max_tokens,
            match estimated {
                true => "estimated by the rank of the response's trigram cross-entropy",
                false => "given",
            },
        ),
        train,
        validation: Vec::new(),
        held_out,
        groups,
    })
}

fn vocab(encoder: &Encoder) -> usize {
    encoder.tokenizer.get_vocab_size(true) + encoder.offset as usize
}

fn read(path: &Path, group: Option<&str>) -> Result<Vec<Record>> {
    input::read(path, |read| record(read, group))
}

fn record(read: Read, group: Option<&str>) -> Result<Record> {
    let uncertainty = match read.fields.get("uncertainty") {
        None | Some(Value::Null) => None,
        Some(value) => {
            let number = value.as_f64().map(|u| u as f32);
            ensure!(
                number.is_some_and(|u| (0.0..=1.0).contains(&u)),
                "\"uncertainty\" is {value}; it must be in [0, 1]"
            );
            number
        }
    };
    let held_out = match read.fields.get("held_out") {
        None | Some(Value::Null) => None,
        Some(Value::Bool(held_out)) => Some(*held_out),
        Some(other) => bail!("\"held_out\" is {other}; it must be true or false"),
    };
    let response_counts = match read.fields.get(response_counts::FIELD) {
        None | Some(Value::Null) => None,
        Some(value) => Some(ResponseCounts::parse(value, &read.turns)?),
    };
    let group = group.map(|field| match read.fields.get(field) {
        Some(Value::String(group)) => Ok(group.clone()),
        None | Some(Value::Null) => bail!("{field:?}, the field of --group, is missing"),
        Some(other) => Ok(other.to_string()),
    });
    let first = read.turns.iter().position(Turn::is_response);
    let (prompt, response) = form::prompt_and_response(&read.turns[..=first.unwrap_or(0)]);
    let question = match prompt.trim() {
        "" => response,
        prompt => prompt.to_string(),
    };
    Ok(Record {
        turns: read.turns,
        question,
        uncertainty,
        held_out,
        response_counts,
        line: read.line,
        group: group.transpose()?,
    })
}

/// Whether all records have something. That only some have it is an error: an estimate of the others' uncertainty would be
/// on another scale, and on which side they are is not known.
fn all_or_none(
    path: &Path,
    records: &[Record],
    what: &str,
    has: impl Fn(&Record) -> bool,
) -> Result<bool> {
    let (with, without): (Vec<&Record>, _) = records.iter().partition(|record| has(record));
    if let (false, Some(first)) = (with.is_empty(), without.first()) {
        bail!(
            "{}:{}: {} of {} samples have no {what}, of which this is the first; all must have one, or none",
            path.display(),
            first.line,
            without.len(),
            records.len()
        );
    }
    Ok(!with.is_empty())
}

/// Where the file says which samples are held out, that is done, whatever their prompts.
fn warn_of_shared_questions(path: &Path, train: &[Record], held_out: &[Record]) {
    let trained: HashSet<&str> = train.iter().map(|r| r.question.as_str()).collect();
    let shared = held_out
        .iter()
        .filter(|r| trained.contains(r.question.as_str()));
    match shared.count() {
        0 => (),
        shared => eprintln!(
            "{}: the prompts of {shared} held-out samples are trained on as well",
            path.display()
        ),
    }
}

/// The first place from `wanted` on, or else the last before it, where a question ends and another begins: responses to
/// one prompt are not trained on while others are held out. None where `wanted` leaves nothing on one side.
fn between_questions(records: &[Record], wanted: usize) -> Option<usize> {
    let between = |&i: &usize| records[i].question != records[i - 1].question;
    if !(1..records.len()).contains(&wanted) {
        return None;
    }
    (wanted..records.len())
        .find(between)
        .or_else(|| (1..wanted).rev().find(between))
}

/// Questions in random order, the samples of each one after another.
fn shuffle(records: &mut Vec<Record>, seed: u64) {
    let mut questions: BTreeMap<String, Vec<Record>> = BTreeMap::new();
    for record in records.drain(..) {
        let question = record.question.clone();
        questions.entry(question).or_default().push(record);
    }
    let mut questions: Vec<Vec<Record>> = questions.into_values().collect();
    questions.shuffle(&mut StdRng::seed_from_u64(seed));
    records.extend(questions.into_iter().flatten());
}

fn train_encoder(records: &[Record], vocab: usize) -> Result<Encoder> {
    let tokenizer = train_tokenizer(records, vocab)?;
    Ok(Encoder::plain(tokenizer, CONTROL, [BEGIN, ANSWER, END]))
}

fn train_tokenizer(records: &[Record], vocab: usize) -> Result<Tokenizer> {
    let mut trainer = BpeTrainer::builder()
        .show_progress(false)
        .vocab_size(vocab - CONTROL as usize)
        .initial_alphabet(ByteLevel::alphabet().into_iter().collect()) // so that any text can be encoded
        .build();
    let mut tokenizer = TokenizerBuilder::new()
        .with_model(BPE::default())
        .with_normalizer(None::<NormalizerWrapper>)
        .with_pre_tokenizer(Some(ByteLevel::new(false, true, true)))
        .with_post_processor(Some(ByteLevel::default()))
        .with_decoder(Some(ByteLevel::default()))
        .build()
        .map_err(|e| anyhow!("tokeniser: {e}"))?;
    let texts = records
        .iter()
        .flat_map(|record| record.turns.iter().map(|turn| turn.text.as_str()));
    tokenizer
        .train(&mut trainer, texts)
        .map_err(|e| anyhow!("tokeniser: {e}"))?;
    Ok(tokenizer.into())
}

/// The sample, and whether it had to be cut.
fn encode(
    record: &Record,
    conversations: &Conversations,
    groups: &[String],
    max_tokens: usize,
) -> Result<(Sample, bool)> {
    let conversation = conversations.encode(&record.turns, max_tokens)?;
    let responses = &conversation.responses;
    let group = record.group.as_ref();
    let truth = match &record.response_counts {
        Some(counts) => {
            let response = &conversation.tokens[responses[0].clone()];
            counts.truth(&record.turns, response, conversations)?
        }
        None => Vec::new(),
    };
    Ok((
        Sample {
            prompt: responses[0].start,
            between: responses
                .windows(2)
                .map(|pair| pair[0].end..pair[1].start)
                .collect(),
            tokens: conversation.tokens,
            uncertainty: record.uncertainty.unwrap_or(0.0),
            group: group
                .and_then(|group| groups.binary_search(group).ok())
                .unwrap_or(0),
            truth,
        },
        conversation.cut,
    ))
}

/// Estimates the uncertainties from the training samples' text.
fn estimate(train: &mut [(Sample, bool)], held_out: &mut [(Sample, bool)], vocab: usize) {
    let mut model = NGram::new(vocab);
    train.iter().for_each(|(sample, _)| model.add(sample));
    // A training sample must not be judged by a model that has seen it.
    let seen = train.iter().map(|(s, _)| model.cross_entropy_without(s));
    let seen: Vec<f64> = seen.collect();
    let ranks = Ranks::new(seen.clone());
    for ((sample, _), &score) in train.iter_mut().zip(&seen) {
        sample.uncertainty = ranks.of(score);
    }
    for (sample, _) in held_out {
        sample.uncertainty = ranks.of(model.cross_entropy(sample));
    }
}
