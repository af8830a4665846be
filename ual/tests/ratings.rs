//! `ual data human-ratings`: a made archive, the samples of it, and how they are read.

use std::{
    collections::{BTreeMap, HashSet},
    fs,
    process::Command,
};

use candle_ual::{
    commands::data::human_ratings::{Sample, samples},
    data::{
        jsonl::{self, Options},
        ratings::{self, Sentence},
    },
};
use flate2::{Compression, write::GzEncoder};
use serde_json::Value;
use tar::{Builder, Header};
use tempfile::TempDir;

type Files<'a> = BTreeMap<&'a str, Vec<u8>>;

fn packed(files: &Files) -> Vec<u8> {
    let mut archive = Builder::new(GzEncoder::new(Vec::new(), Compression::default()));
    for (name, bytes) in files {
        let mut header = Header::new_gnu();
        header.set_size(bytes.len() as u64);
        let path = format!("folder/{name}");
        archive.append_data(&mut header, path, &bytes[..]).unwrap();
    }
    archive.into_inner().unwrap().finish().unwrap()
}

fn archive(tables: &Files) -> Vec<u8> {
    packed(&Files::from([("hutto_ICWSM_2014.tar.gz", packed(tables))]))
}

/// As the real ones differ: lines end with CRLF, one table has a byte order mark, one another order than its other half.
fn tables() -> Files<'static> {
    let texts = [
        (
            "tweets_GroundTruth.txt",
            "1\t0.5\tA &amp; B &lt;3\r\n2\t1.5\tSaid in another round\r\n3\t-2\tOh  no.\r\n",
        ),
        (
            "tweets_anonDataRatings.txt",
            "1\t0.5\t1\t[1, 0]\r\n2\t1\t0\t[1, 1]\r\n3\t-2\t1\t[-4, -1, -1]\r\n",
        ),
        (
            "movieReviewSnippets_GroundTruth.txt",
            "1\t1\tA café.\r\n2\t0.333333333\toh NO. ",
        ),
        (
            "movieReviewSnippets_anonDataRatings.txt",
            "2\t0.333333333\t0.4\t[0, 0, 1]\r\n1\t1\t0\t[1, 1]",
        ),
        ("amazonReviewSnippets_GroundTruth.txt", "1_1\t4\tbuy it\r\n"),
        (
            "amazonReviewSnippets_anonDataRatings.txt",
            "\u{feff}1_1\t4\t0\t[4, 4]\r\n",
        ),
        (
            "nytEditorialSnippets_GroundTruth.txt",
            "1_1\t0\t\"So,\" he said.\n",
        ),
        (
            "nytEditorialSnippets_anonDataRatings.txt",
            "1_1\t0\t3\t[3, -3]\n",
        ),
    ];
    let bytes = texts.map(|(name, text)| (name, text.as_bytes().to_vec()));
    bytes.into_iter().collect()
}

fn sentence(id: &str, kind: &'static str, text: &str, ratings: &[i8]) -> Sentence {
    Sentence {
        id: id.into(),
        kind,
        text: text.into(),
        ratings: ratings.to_vec(),
    }
}

#[test]
fn sentences_are_those_whose_ratings_are_theirs() {
    let all = ratings::read(&archive(&tables())).unwrap();
    assert_eq!(
        all.sentences,
        [
            sentence("tweet-1", "tweet", "A & B <3", &[1, 0]),
            sentence("tweet-3", "tweet", "Oh  no.", &[-4, -1, -1]),
            sentence("film-1", "film", "A café.", &[1, 1]),
            sentence("product-1_1", "product", "buy it", &[4, 4]),
            sentence("editorial-1_1", "editorial", "\"So,\" he said.", &[3, -3]),
        ]
    );
    assert_eq!((all.contradicted, all.repeated), (1, 1));
}

#[test]
fn what_is_wrong_is_named() {
    let refusal = |archive: &[u8]| format!("{:#}", ratings::read(archive).err().unwrap());
    let (sentences, numbers) = ("tweets_GroundTruth.txt", "tweets_anonDataRatings.txt");
    for (name, text, message) in [
        (
            sentences,
            "1\t0.5",
            "tweets_GroundTruth.txt:1: it has 2 columns; there must be 3",
        ),
        (
            sentences,
            "1\tnone\ta",
            "tweets_GroundTruth.txt:1: invalid float",
        ),
        (
            sentences,
            "9\t0.5\ta",
            "tweets_GroundTruth.txt:1: tweets_anonDataRatings.txt has no ratings of \"9\"",
        ),
        (
            numbers,
            "1\t5\t0\t[5, 5]",
            "tweets_anonDataRatings.txt:1: the ratings are [5, 5]; they must be",
        ),
        (numbers, "1\t5\t0\t[1]", "must be at least two"),
        (
            numbers,
            "1\t5\t0\tmany",
            "tweets_anonDataRatings.txt:1: expected value",
        ),
    ] {
        let found = refusal(&archive(&Files::from_iter(
            tables()
                .into_iter()
                .chain([(name, text.as_bytes().to_vec())]),
        )));
        assert!(found.contains(message), "{found}");
    }
    let mut latin = tables();
    latin.insert(sentences, b"1\t0.5\tcaf\xe9s".to_vec());
    assert!(refusal(&archive(&latin)).contains("tweets_GroundTruth.txt: invalid utf-8"));
    let mut fewer = tables();
    fewer.remove(numbers);
    assert!(refusal(&archive(&fewer)).contains("has no tweets_anonDataRatings.txt"));
    assert!(refusal(&packed(&tables())).contains("it has no hutto_ICWSM_2014.tar.gz"));
    assert!(!refusal(b"nonsense").is_empty());
}

/// Forty sentences, of 3 to 20 raters.
fn sentences() -> Vec<Sentence> {
    let sentence = |i: usize| {
        let ratings: Vec<i8> = (0..3 + i % 18).map(|j| (i * j % 9) as i8 - 4).collect();
        let (kind, _) = ratings::KINDS[i % 4];
        sentence(
            &format!("{kind}-{i}"),
            kind,
            &format!("Sentence {i}"),
            &ratings,
        )
    };
    (0..40).map(sentence).collect()
}

#[test]
fn a_response_is_one_raters_and_its_uncertainty_the_others() {
    let sentences = sentences();
    let samples = samples(&sentences, (0, 0), 1, 0.25).unwrap();
    assert_eq!(samples.len(), 40);
    assert_eq!(samples.iter().filter(|sample| sample.held_out).count(), 10);
    let mut drawn = HashSet::new();
    for sample in &samples {
        let sentence = sentences.iter().find(|sentence| sentence.id == sample.id);
        let Sentence {
            kind,
            text,
            ratings,
            ..
        } = sentence.unwrap();
        assert_eq!(sample.kind, *kind);
        assert!(sample.prompt.ends_with(&format!("\n\n{text}")));
        let place = ratings
            .iter()
            .position(|rating| rating.to_string() == sample.response);
        drawn.insert(place.unwrap());
        let mut others = ratings.clone();
        others.remove(place.unwrap());
        let share = |rating: i8| {
            let equal = others.iter().filter(|&&other| other == rating).count();
            equal as f64 / others.len() as f64
        };
        // Over raters, not over ratings.
        let entropy: f64 = others.iter().map(|&rating| -share(rating).ln()).sum();
        let expected = entropy / others.len() as f64 / 9f64.ln();
        assert!((f64::from(sample.uncertainty) - expected).abs() < 1e-6);
        assert!(sample.uncertainty.is_sign_positive());
        match &sample.response_counts {
            Some(counts) => {
                assert!(sample.held_out);
                assert_eq!(counts.values().sum::<usize>(), ratings.len());
                for (rating, count) in counts {
                    assert_eq!(
                        ratings.iter().filter(|other| *other == rating).count(),
                        *count
                    );
                }
            }
            None => assert!(!sample.held_out),
        }
    }
    assert!(drawn.len() > 3, "of any rater");
}

fn lines(samples: &[Sample]) -> String {
    let line = |sample| serde_json::to_string(sample).unwrap() + "\n";
    samples.iter().map(line).collect()
}

#[test]
fn the_seed_decides_and_the_share_moves_the_boundary_alone() {
    let sentences = sentences();
    let made = |seed, held_out| samples(&sentences, (5, 0), seed, held_out).unwrap();
    assert_eq!(lines(&made(1, 0.2)), lines(&made(1, 0.2)));
    assert_ne!(lines(&made(1, 0.2)), lines(&made(2, 0.2)));
    let answers = |samples: &[Sample]| -> Vec<(String, String)> {
        let both = |sample: &Sample| (sample.id.clone(), sample.response.clone());
        samples.iter().map(both).collect()
    };
    let (few, many) = (made(1, 0.2), made(1, 0.4));
    assert_eq!(answers(&few), answers(&many));
    assert_eq!(few.iter().rposition(|sample| sample.held_out), Some(8));
    assert_eq!(many.iter().rposition(|sample| sample.held_out), Some(17));
}

#[test]
fn exact_questions_have_one_right_answer() {
    let made = samples(&[], (8980, 0), 1, 0.5).unwrap();
    let mut asked = HashSet::new();
    let mut frequencies = BTreeMap::new();
    for sample in &made {
        assert_eq!((sample.kind, sample.uncertainty), ("arithmetic", 0.0));
        let question = sample.prompt.strip_prefix("What is ").unwrap();
        let (difference, _) = question.split_once('?').unwrap();
        let (from, subtracted) = difference.split_once(" - ").unwrap();
        let answer = from.parse::<i32>().unwrap() - subtracted.parse::<i32>().unwrap();
        assert_eq!(answer.to_string(), sample.response);
        assert!(asked.insert(difference.to_string()), "{difference}");
        *frequencies.entry(answer).or_insert(0) += 1;
    }
    let counts: Vec<i32> = frequencies.values().copied().collect();
    assert_eq!(counts, [996, 997, 998, 999, 1000, 999, 998, 997, 996]);
    let error = samples(&[], (8981, 0), 1, 0.5).unwrap_err().to_string();
    assert_eq!(error, "--exact is 8981; there are 8980 such questions");
}

#[test]
fn easy_questions_say_their_answer() {
    let words = ["zero", "one", "two", "three", "four"];
    let made = samples(&[], (0, 12960), 1, 0.5).unwrap();
    let mut asked = HashSet::new();
    let mut frequencies = BTreeMap::new();
    for sample in &made {
        assert_eq!((sample.kind, sample.uncertainty), ("reading", 0.0));
        let (_, said) = sample.prompt.split_once(" the number ").unwrap();
        let (number, _) = said.split_once('.').unwrap();
        let word = number.trim_start_matches("minus ");
        let value = words.iter().position(|other| *other == word).unwrap() as i32;
        let value = if word == number { value } else { -value };
        assert_eq!(value.to_string(), sample.response);
        assert!(asked.insert(&sample.prompt), "{}", sample.prompt);
        *frequencies.entry(value).or_insert(0) += 1;
    }
    assert_eq!(frequencies.into_values().collect::<Vec<i32>>(), [1440; 9]);
    let error = samples(&[], (0, 12961), 1, 0.5).unwrap_err().to_string();
    assert_eq!(error, "--easy is 12961; there are 12960 such questions");
}

#[test]
fn the_file_is_read_with_its_split_and_its_truth() {
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("ratings.jsonl");
    let made = samples(&sentences(), (10, 0), 1, 0.3).unwrap();
    fs::write(&path, lines(&made)).unwrap();
    let options = Options {
        seed: 3,
        held_out: 0.9,
        vocab: 300,
        max_tokens: 64, // cuts the prompts
        limit: None,
        group: Some("kind"),
    };
    let data = jsonl::load(&path, None, &options).unwrap();
    assert_eq!((data.train.len(), data.held_out.len()), (35, 15));
    assert_eq!(
        data.groups,
        ["arithmetic", "editorial", "film", "product", "tweet"]
    );
    assert!(data.train.iter().all(|sample| sample.truth.is_empty()));
    // What the tokens say of the response together is its share.
    let mut found: Vec<f64> = Vec::new();
    for sample in &data.held_out {
        let response = &sample.tokens[sample.prompt..];
        assert_eq!(sample.truth.len(), response.len());
        let of_token = |(token, truth): (&u32, &Vec<(u32, f32)>)| {
            let sum: f32 = truth.iter().map(|(_, p)| p).sum();
            assert!((sum - 1.0).abs() < 1e-6);
            f64::from(truth.iter().find(|(other, _)| other == token).unwrap().1)
        };
        found.push(response.iter().zip(&sample.truth).map(of_token).product());
    }
    let expected = made.iter().filter_map(|sample| {
        let counts = sample.response_counts.as_ref()?;
        let given = counts[&sample.response.parse().unwrap()];
        Some(given as f64 / counts.values().sum::<usize>() as f64)
    });
    let mut expected: Vec<f64> = expected.collect();
    found.sort_by(f64::total_cmp);
    expected.sort_by(f64::total_cmp);
    assert!(expected[0] < 0.3 && expected[14] == 1.0);
    for (found, expected) in found.iter().zip(expected) {
        assert!((found - expected).abs() < 1e-6, "{found} {expected}");
    }

    // So training says how far the model is from what people answer.
    let out = folder.path().join("out");
    let small =
        "finetune --group kind --dim 16 --layers 1 --heads 2 --pretrain-steps 2 --steps 2 --data";
    let run = Command::new(env!("CARGO_BIN_EXE_ual"))
        .args(small.split(' '))
        .args([path.as_os_str(), "--out".as_ref(), out.as_os_str()])
        .output()
        .unwrap();
    let text = String::from_utf8(run.stdout).unwrap();
    assert!(
        text.contains("35 training samples, 15 held out as the file says"),
        "{text}"
    );
    let metrics: Value =
        serde_json::from_slice(&fs::read(out.join("metrics.json")).unwrap()).unwrap();
    for group in metrics["runs"][0]["groups"].as_array().unwrap() {
        let kl = group["summary"]["kl"].as_f64();
        assert!(kl.is_some_and(|kl| kl > 0.0), "{group}");
    }
}

#[test]
fn another_archive_is_refused() {
    let folder = TempDir::new().unwrap();
    let [path, out] = ["archive.tar.gz", "out.jsonl"].map(|name| folder.path().join(name));
    fs::write(&path, archive(&tables())).unwrap();
    let refusal = |more: &[&str]| {
        let run = Command::new(env!("CARGO_BIN_EXE_ual"))
            .args(["data", "human-ratings", "--archive"])
            .args([path.as_os_str(), "--out".as_ref(), out.as_os_str()])
            .args(more)
            .output()
            .unwrap();
        assert!(!run.status.success());
        String::from_utf8(run.stderr).unwrap()
    };
    let found = refusal(&[]);
    assert!(found.contains("whose SHA-256 is "), "{found}");
    assert!(found.contains(ratings::DIGEST), "{found}");
    let found = refusal(&["--held-out", "1"]);
    assert!(
        found.contains("--held-out is 1; it must be above 0 and below 1"),
        "{found}"
    );
    assert!(!out.exists());
}
