//! Samples of rated sentences and of exact questions.

use std::{collections::BTreeMap, fs};

use anyhow::{Context, Result, ensure};
use rand::{
    Rng, SeedableRng,
    rngs::StdRng,
    seq::{SliceRandom, index},
};
use serde::Serialize;

use crate::{
    commands::data::args::HumanRatings,
    data::ratings::{self, Sentence, Sentences},
    digest, files,
    report::metrics,
    training::ranks,
};

const ASK: &str = "How positive or negative is this sentence, from -4 (extremely negative) to 4 (extremely positive)? \
                   Answer with one number.";
const EXACT: &str = "arithmetic";
const EASY: &str = "reading";
/// Exact questions subtract numbers below it.
const LARGEST: i32 = 1000;
/// The largest answer of any question, and but for its sign the least.
const MOST: i32 = 4;

/// A question, and what people answered, or what is right.
struct Question {
    id: String,
    kind: &'static str,
    prompt: String,
    answers: Vec<i8>,
}

/// A line of the file.
#[derive(Debug, Serialize)]
pub struct Sample {
    pub id: String,
    pub kind: &'static str,
    pub prompt: String,
    pub response: String,
    pub uncertainty: f32,
    pub held_out: bool,
    /// How many people gave each answer; of held-out samples alone, so that none is trained on.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub response_counts: Option<BTreeMap<i8, usize>>,
}

pub fn run(args: &HumanRatings) -> Result<()> {
    args.check()?;
    ranks::refuse("data")?;
    let archive = args.archive.display();
    let bytes = fs::read(&args.archive).with_context(|| format!("cannot read {archive}"))?;
    let found = digest::of_bytes(&bytes);
    ensure!(
        found == ratings::DIGEST,
        "--archive is {archive}, whose SHA-256 is {found}; that of vaderSentiment-3.3.2.tar.gz is {}",
        ratings::DIGEST
    );
    let Sentences {
        sentences,
        contradicted,
        repeated,
    } = ratings::read(&bytes).with_context(|| archive.to_string())?;
    let samples = samples(
        &sentences,
        (args.exact, args.easy),
        args.seed,
        args.held_out,
    )?;
    files::replace_with_lines(&args.out, &samples)?;

    println!(
        "{} sentences; left out: {contradicted} whose ratings have another mean than the archive says, {repeated} that are \
         there before\n\n{}\n{}: \"kind\" is for --group",
        sentences.len(),
        table(&samples),
        args.out.display()
    );
    Ok(())
}

/// Of the sentences and of so many exact questions, hard and easy ones, in random order; the first are held out.
pub fn samples(
    sentences: &[Sentence],
    (exact, easy): (usize, usize),
    seed: u64,
    held_out: f64,
) -> Result<Vec<Sample>> {
    let rng = &mut StdRng::seed_from_u64(seed);
    let mut questions = exact_questions(exact, rng)?;
    questions.extend(easy_questions(easy, rng)?);
    questions.extend(sentences.iter().map(|sentence| Question {
        id: sentence.id.clone(),
        kind: sentence.kind,
        prompt: format!("{ASK}\n\n{}", sentence.text),
        answers: sentence.ratings.clone(),
    }));
    questions.shuffle(rng);
    let held_out = (questions.len() as f64 * held_out).round() as usize;
    let samples = questions.into_iter().enumerate().map(|(i, question)| {
        let mut counts: BTreeMap<i8, usize> = BTreeMap::new();
        for &answer in &question.answers {
            *counts.entry(answer).or_default() += 1;
        }
        let response = question.answers[rng.random_range(0..question.answers.len())];
        let mut others = counts.clone();
        others.entry(response).and_modify(|count| *count -= 1);
        Sample {
            id: question.id,
            kind: question.kind,
            prompt: question.prompt,
            response: response.to_string(),
            uncertainty: (entropy(&others) / f64::from(2 * MOST + 1).ln()) as f32,
            held_out: i < held_out,
            response_counts: (i < held_out).then_some(counts),
        }
    });
    Ok(samples.collect())
}

/// Differences, each once, whose answers are among those of the rated sentences and equally frequent.
fn exact_questions(count: usize, rng: &mut impl Rng) -> Result<Vec<Question>> {
    let all: Vec<(i32, i32)> = (0..LARGEST)
        .flat_map(|from| (-MOST..=MOST).map(move |answer| (from, from - answer)))
        .filter(|(_, subtracted)| (0..LARGEST).contains(subtracted))
        .collect();
    ensure!(
        count <= all.len(),
        "--exact is {count}; there are {} such questions",
        all.len()
    );
    let question = |(from, subtracted): (i32, i32)| Question {
        id: format!("{EXACT}-{from}-{subtracted}"),
        kind: EXACT,
        prompt: format!("What is {from} - {subtracted}? Answer with one number."),
        answers: vec![(from - subtracted) as i8],
    };
    let drawn = index::sample(rng, all.len(), count).into_iter();
    Ok(drawn.map(|i| question(all[i])).collect())
}

/// Questions that say their answer as a word, each once, with equally frequent answers.
fn easy_questions(count: usize, rng: &mut impl Rng) -> Result<Vec<Question>> {
    const WORDS: [&str; 5] = ["zero", "one", "two", "three", "four"];
    const NAMES: [&str; 24] = [
        "Ada", "Ben", "Carla", "David", "Elena", "Farid", "Grace", "Hugo", "Ines", "Jonas", "Kira",
        "Liam", "Mona", "Nils", "Olga", "Paul", "Rosa", "Samir", "Tara", "Umut", "Vera", "Wanda",
        "Yusuf", "Zoe",
    ];
    const PLACES: [&str; 10] = [
        "in the kitchen",
        "at school",
        "on the train",
        "in the garden",
        "at the office",
        "on the beach",
        "in the library",
        "at the market",
        "on the bus",
        "at home",
    ];
    const VERBS: [(&str, &str); 6] = [
        ("wrote down", "write down"),
        ("drew", "draw"),
        ("guessed", "guess"),
        ("picked", "pick"),
        ("called out", "call out"),
        ("thought of", "think of"),
    ];
    let answers = 2 * MOST as usize + 1;
    let all = answers * NAMES.len() * PLACES.len() * VERBS.len();
    ensure!(
        count <= all,
        "--easy is {count}; there are {all} such questions"
    );
    let question = |number: usize| {
        let answer = (number % answers) as i32 - MOST;
        let rest = number / answers;
        let (name, rest) = (NAMES[rest % NAMES.len()], rest / NAMES.len());
        let (place, (past, verb)) = (PLACES[rest % PLACES.len()], VERBS[rest / PLACES.len()]);
        let sign = if answer < 0 { "minus " } else { "" };
        let word = WORDS[answer.unsigned_abs() as usize];
        Question {
            id: format!("{EASY}-{number}"),
            kind: EASY,
            prompt: format!(
                "{name} was {place} and {past} the number {sign}{word}. Which number did {name} {verb}? Answer with one number."
            ),
            answers: vec![answer as i8],
        }
    };
    Ok(index::sample(rng, all, count)
        .into_iter()
        .map(question)
        .collect())
}

/// In nats; 0 of nothing.
fn entropy(counts: &BTreeMap<i8, usize>) -> f64 {
    let all = counts.values().sum::<usize>() as f64;
    metrics::entropy(counts.values().map(|&count| count as f64 / all))
}

fn table(samples: &[Sample]) -> String {
    let mut text =
        "kind        trained  held out  uncertainty: least, quartiles, largest\n".to_string();
    let kinds = ratings::KINDS.iter().map(|(kind, _)| *kind);
    for kind in kinds.chain([EXACT, EASY]) {
        let of_kind = || samples.iter().filter(|sample| sample.kind == kind);
        let mut sorted: Vec<f32> = of_kind().map(|sample| sample.uncertainty).collect();
        sorted.sort_by(f32::total_cmp);
        let Some(last) = sorted.len().checked_sub(1) else {
            continue;
        };
        let held_out = of_kind().filter(|sample| sample.held_out).count();
        text += &format!("{kind:10} {:>8} {held_out:>9} ", sorted.len() - held_out);
        for quarter in 0..=4 {
            text += &format!(" {:.3}", sorted[last * quarter / 4]);
        }
        text += "\n";
    }
    text
}
