//! Data sets in the forms in which people have them, as every command reads them.

use std::{
    fs,
    io::Write,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use candle_ual::{
    commands::elicit::samples::{self, Score},
    data::{
        form::Turn,
        input::{self, Record},
        jsonl::{self, Options},
        ngram::Ranks,
    },
};
use flate2::{Compression, write::GzEncoder};
use serde_json::{Value, json};
use tempfile::TempDir;

fn write(folder: &TempDir, bytes: impl AsRef<[u8]>) -> PathBuf {
    let path = folder.path().join("data");
    fs::write(&path, bytes).unwrap();
    path
}

fn read(bytes: impl AsRef<[u8]>) -> anyhow::Result<Vec<Record>> {
    input::read(&write(&TempDir::new().unwrap(), bytes), Ok)
}

fn refusal(bytes: impl AsRef<[u8]>) -> String {
    let folder = TempDir::new().unwrap();
    let path = write(&folder, bytes);
    let [of_finetune, of_elicit] = [
        jsonl::load(&path, None, &OPTIONS).err(),
        samples::read(&path).err(),
    ]
    .map(|error| format!("{:#}", error.expect("a refusal")));
    assert_eq!(of_finetune, of_elicit, "the commands read alike");
    of_finetune.replace(path.to_str().unwrap(), "data")
}

fn says(turns: &[Turn]) -> Vec<(&str, &str)> {
    turns
        .iter()
        .map(|turn| (turn.role.as_str(), turn.text.as_str()))
        .collect()
}

const OPTIONS: Options = Options {
    seed: 1,
    held_out: 0.2,
    vocab: 300,
    max_tokens: 64,
    limit: None,
    group: None,
};

fn gzipped(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = GzEncoder::new(Vec::new(), Compression::default());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

#[test]
fn forms_are_known_by_their_fields() {
    let one = |fields: Value| read(fields.to_string()).unwrap().remove(0).turns;
    let question = [("user", "q"), ("assistant", "a")];
    assert_eq!(
        says(&one(json!({"prompt": "q", "response": "a", "more": 1}))),
        question
    );
    assert_eq!(
        says(&one(json!({"prompt": "q", "completion": "a"}))),
        question
    );
    assert_eq!(
        says(&one(json!({"instruction": "q", "output": "a"}))),
        question
    );
    for nothing in [json!(""), json!(null)] {
        let sample = json!({"instruction": "q", "input": nothing, "output": "a"});
        assert_eq!(says(&one(sample)), question);
    }
    assert_eq!(
        says(&one(
            json!({"instruction": "Add.", "input": "1 and 2", "output": "3"})
        )),
        [("user", "Add.\n\n1 and 2"), ("assistant", "3")]
    );
}

#[test]
fn conversations_have_turns_up_to_the_last_response() {
    let expected = [
        ("system", "s"),
        ("user", "q"),
        ("assistant", "a"),
        ("user", "r"),
        ("assistant", "b"),
    ];
    let turns = |names: [&str; 2], roles: [&str; 3], more: &[Value]| {
        let roles = [roles[0], roles[1], roles[2], roles[1], roles[2]];
        let turns = expected.iter().zip(roles);
        let turns = turns.map(|((_, text), role)| json!({names[0]: role, names[1]: text}));
        let mut turns: Vec<Value> = turns.collect();
        turns.extend_from_slice(more);
        Value::from(turns)
    };
    let roles = ["system", "user", "assistant"];
    let messages = turns(["role", "content"], roles, &[]);
    let parts = json!([{"type": "text", "text": "after"}]);
    let unanswered = json!({"role": "user", "content": parts});
    for sample in [
        // As some data sets have it: the prompt beside the messages.
        json!({"messages": messages, "prompt": "q", "response": "x"}),
        json!({"messages": turns(["role", "content"], roles, &[unanswered])}),
        json!({"conversations": turns(["from", "value"], ["system", "human", "gpt"], &[])}),
        json!({"conversations": turns(["role", "content"], roles, &[]), "id": 3}),
    ] {
        let record = read(sample.to_string()).unwrap().remove(0);
        assert_eq!(says(&record.turns), expected);
    }
    let folder = TempDir::new().unwrap();
    let path = write(&folder, json!({"messages": messages}).to_string());
    let sample = samples::read(&path).unwrap().remove(0);
    assert_eq!(
        sample.prompt,
        "system: s\n\nuser: q\n\nassistant: a\n\nuser: r"
    );
    assert_eq!(sample.response, "b");

    for (sample, message) in [
        (json!({"messages": "q"}), "\"messages\" is not a list"),
        (json!({"messages": []}), "no turn of the assistant"),
        (
            json!({"messages": [{"role": "user", "content": "q"}]}),
            "no turn of the assistant",
        ),
        (
            json!({"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": " "}]}),
            "is empty",
        ),
        (
            json!({"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": null}]}),
            "messages[1]: it has no \"content\"",
        ),
        (
            json!({"conversations": [{"from": "narrator", "value": "q"}]}),
            "conversations[0]: \"narrator\" is nobody",
        ),
        (
            json!({"conversations": [{"value": "q"}]}),
            "conversations[0]: it has no \"role\" or \"from\"",
        ),
    ] {
        let found = refusal(sample.to_string());
        assert!(found.contains(message), "{found}");
    }
}

#[test]
fn conversations_are_learned_from_by_a_tokenizer_of_their_own() {
    let folder = TempDir::new().unwrap();
    let line = |i: usize| {
        let turn = |role: &str, content: &str| json!({"role": role, "content": content});
        let first = format!("first {}?", i % 10);
        let turns = [
            turn("user", &first),
            turn("assistant", "one"),
            turn("user", "and then?"),
            turn("assistant", &format!("then {i}")),
        ];
        json!({"messages": turns}).to_string() + "\n"
    };
    let path = write(&folder, (0..20).map(line).collect::<String>());
    let data = jsonl::load(&path, None, &OPTIONS).unwrap();
    // Those with one beginning are on one side.
    assert_eq!((data.train.len(), data.held_out.len()), (16, 4));
    for sample in data.train.iter().chain(&data.held_out) {
        assert_eq!(sample.between.len(), 1);
        let between = sample.between[0].clone();
        assert!(sample.prompt < between.start && between.end < sample.tokens.len());
        assert_eq!(sample.tokens[between.start - 1], 2, "the end is learned");
        assert_eq!(sample.tokens[between.end - 1], 1, "and then an answer");
    }
}

#[test]
fn what_fits_no_form_is_told_which_there_are() {
    let message = refusal(concat!(
        r#"{"prompt": "p", "response": "r"}"#,
        "\n",
        r#"{"question": "p", "answer": "r"}"#
    ));
    for part in [
        "data:2: ",
        r#"its fields are "answer", "question", which"#,
        r#"{"messages": [{"role", "content"}, …]}"#,
        r#"{"conversations": [{"from", "value"}, …]}"#,
        r#"{"prompt", "response"}"#,
        r#"{"prompt", "completion"}"#,
        r#"{"instruction", "input", "output"}"#,
    ] {
        assert!(message.contains(part), "{part}: {message}");
    }
}

#[test]
fn files_are_lines_or_arrays_with_any_breaks_and_marks() {
    let pretty = "[\n  {\"prompt\": \"1\",\n   \"n\": 1.10, \"response\": \"a \\n b\"},\n\n {\"prompt\": \"2\", \"response\": \"b\"}\n]\n";
    let lines = "{\"prompt\": \"1\",\"n\": 1.10, \"response\": \"a \\n b\"}\r\n\r\n{\"prompt\": \"2\", \"response\": \"b\"}";
    for (text, expected) in [(pretty, [2, 5]), (lines, [1, 3])] {
        for bytes in [
            text.as_bytes().to_vec(),
            [b"\xef\xbb\xbf", text.as_bytes()].concat(),
            text.replace("\r\n", "\n").replace('\n', "\r\n").into(),
            gzipped(text.as_bytes()),
            [
                gzipped(&text.as_bytes()[..9]),
                gzipped(&text.as_bytes()[9..]),
            ]
            .concat(),
        ] {
            let records = read(bytes).unwrap();
            let found: Vec<usize> = records.iter().map(|record| record.line).collect();
            assert_eq!(found, expected);
            assert_eq!(
                records[0].object,
                r#"{"prompt": "1","n": 1.10, "response": "a \n b"}"#
            );
            assert_eq!(says(&records[1].turns), [("user", "2"), ("assistant", "b")]);
        }
    }
    assert!(read("[]").unwrap().is_empty());
}

#[test]
fn an_array_is_scored_as_lines() {
    let folder = TempDir::new().unwrap();
    let path = write(
        &folder,
        "[{\n \"instruction\": \"q\",\n \"output\": \"a\"\n}]",
    );
    let sample = samples::read(&path).unwrap().remove(0);
    let score = Score {
        uncertainty: 0.5,
        votes: None,
        spread: None,
        model: "m",
        cost: None,
    };
    let line = sample.scored(&score).unwrap();
    assert!(
        line.starts_with(r#"{"instruction": "q","output": "a","id":""#)
            && !line.contains(['\n', '\r']),
        "{line}"
    );
    let again = read(line).unwrap().remove(0);
    assert_eq!(again.fields["uncertainty"], 0.5);
}

#[test]
fn every_command_refuses_the_same() {
    let good = r#"{"prompt": "p", "response": "r"}"#;
    for (bad, message) in [
        (
            r#"{"prompt": "p", "response": "r", "prompt": "q"}"#,
            r#"the field "prompt" is there twice"#,
        ),
        (
            r#"{"prompt": "p", "response": "r", "n": 1, "n": 1}"#,
            r#"the field "n" is there twice"#,
        ),
        (r#"["p", "r"]"#, "expected an object"),
        (r#"{"prompt": "p", "response": "r"} {}"#, "trailing"),
        (
            r#"{"prompt": "p", "response": 1}"#,
            r#""response" is not a string"#,
        ),
        (
            r#"{"instruction": "p", "output": " "}"#,
            r#""output" is empty"#,
        ),
        (r#"{"prompt": null, "response": "r"}"#, "its fields are"),
    ] {
        let found = refusal(format!("{good}\n{bad}\n{good}"));
        assert!(
            found.starts_with("data:2: ") && found.contains(message),
            "{found}"
        );
        if !bad.ends_with("{}") {
            let found = refusal(format!("[{good},\n{bad}\n,{good}]"));
            assert!(
                found.starts_with("data:2: ") && found.contains(message),
                "{found}"
            );
        }
    }
    for (bytes, message) in [
        (&b"\xff\xfe{\0"[..], "UTF-16"),
        (
            b"version https://git-lfs.github.com/spec/v1\n",
            "git lfs pull",
        ),
        (b"\x1f\x8b\x08\x00nonsense", "cannot be decompressed"),
        (b"[{\"prompt\": \"p\"", "data:1: "),
    ] {
        let found = refusal(bytes);
        assert!(found.contains(message), "{found}");
    }
}

#[test]
fn the_sample_file_is_data_for_every_command() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("samples.jsonl");
    let samples = samples::read(&path).unwrap();
    assert_eq!(samples.len(), 24);
    // As the documents' commands take it.
    let options = Options {
        group: Some("source"),
        held_out: 0.25,
        max_tokens: 192,
        ..OPTIONS
    };
    let data = jsonl::load(&path, None, &options).unwrap();
    assert_eq!((data.train.len(), data.held_out.len()), (18, 6));
    assert_eq!(data.groups, ["fact", "open"]);
    for document in [
        include_str!("../../README.md"),
        include_str!("../../docs/guide.md"),
    ] {
        assert!(document.contains("--data ual/samples.jsonl --out scored.jsonl"));
        assert!(!document.contains("--data samples.jsonl"));
    }
}

#[test]
fn samples_that_say_it_are_held_out() {
    let folder = TempDir::new().unwrap();
    let loaded = |lines: &[String], limit| {
        let options = Options { limit, ..OPTIONS };
        jsonl::load(&write(&folder, lines.concat()), None, &options)
    };
    let line = |i: usize, field: &str| {
        format!(
            "{{\"prompt\": \"{i}?\", \"response\": \"{i}\", \"uncertainty\": 0.{i:02}{field}}}\n"
        )
    };
    let is_held_out = |i: usize| i % 3 == 1;
    let said = |i: usize| line(i, &format!(", \"held_out\": {}", is_held_out(i)));
    let mut lines: Vec<String> = (0..30).map(said).collect();
    let data = loaded(&lines, None).unwrap();
    assert_eq!((data.train.len(), data.held_out.len()), (20, 10));
    let some = loaded(&lines, Some(12)).unwrap();
    assert_eq!(some.train.len() + some.held_out.len(), 12);
    for data in [data, some] {
        for (samples, held_out) in [(&data.train, false), (&data.held_out, true)] {
            for sample in samples {
                let number = (sample.uncertainty * 100.0).round() as usize;
                assert_eq!(is_held_out(number), held_out, "{number}");
            }
        }
    }

    lines[4] = line(4, "");
    let error = loaded(&lines, None).err().unwrap().to_string();
    assert!(
        error.contains(":5: 1 of 30 samples have no \"held_out\""),
        "{error}"
    );
    lines[4] = line(4, ", \"held_out\": \"test\"");
    let error = loaded(&lines, None).err().unwrap().to_string();
    assert!(
        error.contains(":5: \"held_out\" is \"test\"; it must be"),
        "{error}"
    );
    let trained: Vec<String> = (0..30).map(|i| line(i, ", \"held_out\": false")).collect();
    let error = loaded(&trained, None).err().unwrap().to_string();
    assert!(
        error.contains("30 samples, of which 0 would be held out"),
        "{error}"
    );
}

#[test]
fn counts_of_responses_are_of_the_samples_own() {
    let folder = TempDir::new().unwrap();
    for (more, message) in [
        (
            json!([1]),
            "\"response_counts\" is [1]; it must be an object",
        ),
        (
            json!({"a": -1}),
            "has -1 for \"a\"; it must be a number from 0 on",
        ),
        (json!({"a": 0, "b": 2}), "the response is \"a\", which"),
    ] {
        let sample = json!({"prompt": "q", "response": "a", "response_counts": more});
        let path = write(&folder, sample.to_string());
        let error = format!("{:#}", jsonl::load(&path, None, &OPTIONS).err().unwrap());
        assert!(error.contains(message), "{error}");
    }
}

#[test]
fn many_samples_are_read_and_ranked_in_seconds() {
    let start = Instant::now();
    let ranks = Ranks::new((0..400_000).map(f64::from).collect());
    assert!((0..400_000).all(|i| ranks.of(f64::from(i)) < 1.0));
    let folder = TempDir::new().unwrap();
    let line = |i: usize| format!("{{\"prompt\": \"{i}?\", \"response\": \"{}\"}}\n", i % 977);
    let path = write(&folder, (0..200_000).map(line).collect::<String>());
    let data = jsonl::load(&path, None, &OPTIONS).unwrap();
    assert_eq!(data.train.len() + data.held_out.len(), 200_000);
    let taken = start.elapsed(); // where ranks are counted, several minutes
    assert!(taken < Duration::from_secs(120), "{taken:?}");
}

fn parquet(name: &str) -> Vec<u8> {
    fs::read(
        Path::new(env!("CARGO_MANIFEST_DIR"))
            .join("tests/parquet")
            .join(name),
    )
    .unwrap()
}

/// `parquet/make.py` made the files, by Arrow's own writer.
#[test]
fn parquet_is_read_as_data_sets_are_published() {
    let records = read(parquet("messages.parquet")).unwrap();
    assert_eq!(records.len(), 300); // in three groups of rows
    for (i, record) in records.iter().enumerate() {
        let (question, answer) = (format!("What is {i} + {i}?"), format!("„{}“\n", 2 * i));
        let expected = [
            ("system", "Be brief."),
            ("user", &question),
            ("assistant", &answer),
        ];
        assert_eq!(says(&record.turns), expected);
        assert_eq!(record.line, i + 1);
        assert_eq!(record.fields["score"], json!(i as f64 / 300.0));
    }
    // Scores are appended to a row's object.
    let folder = TempDir::new().unwrap();
    let samples = samples::read(&write(&folder, parquet("messages.parquet"))).unwrap();
    let score = Score {
        uncertainty: 0.5,
        votes: None,
        spread: None,
        model: "m",
        cost: None,
    };
    let line: Value = serde_json::from_str(&samples[7].scored(&score).unwrap()).unwrap();
    assert_eq!(line["messages"][1]["content"], "What is 7 + 7?");
}

#[test]
fn columns_of_parquet_become_fields_of_their_kind() {
    let records = read(parquet("columns.parquet")).unwrap();
    let fields = |row: usize| Value::Object(records[row].fields.clone());
    assert_eq!(
        fields(0),
        json!({
            "prompt": "one?", "response": "1", "uncertainty": 0.1, "large": i64::MAX, "unsigned": u64::MAX,
            "missing": null, "nan": null, "flag": true, "when": "2024-02-29 12:30:00.000000 +00:00", "price": "1.25",
            "bytes": {"base64": "/wA="}, "map": {"a": 1}, "nested": {"list": [[1, 2], []], "none": null},
        })
    );
    assert_eq!(
        fields(1),
        json!({
            "prompt": "two?", "response": "2", "uncertainty": 0.2, "large": -(1i64 << 53) - 1, "unsigned": null,
            "missing": null, "nan": 1.5, "flag": false, "when": null, "price": null, "bytes": "text", "map": {},
            "nested": {"list": [], "none": "x"},
        })
    );
}

#[test]
fn damaged_parquet_is_refused_by_name() {
    let whole = parquet("messages.parquet");
    for end in [4, 100, whole.len() / 2, whole.len() - 1] {
        let text = refusal(&whole[..end]);
        assert!(
            text.starts_with("data: it begins as a Parquet file does"),
            "{text}"
        );
    }
    let mut damaged = whole.clone();
    damaged[200..600].fill(0x55);
    let text = refusal(&damaged);
    assert!(
        text.starts_with("data: ") && text.contains("Parquet"),
        "{text}"
    );
}

/// As tables have a list of objects: a list a field.
#[test]
fn turns_may_stand_in_columns() {
    let told = |turns: Value| read(json!({"messages": turns}).to_string());
    let records = told(json!({"role": ["user", "assistant"], "content": ["One?", "1"]})).unwrap();
    assert_eq!(
        says(&records[0].turns),
        [("user", "One?"), ("assistant", "1")]
    );
    for bad in [
        json!({"role": ["user"], "content": ["One?", "1"]}),
        json!({"role": "user"}),
        json!({}),
    ] {
        let error = told(bad.clone()).err().expect("a refusal");
        assert!(
            format!("{error:#}").contains("is not a list"),
            "{bad}: {error:#}"
        );
    }
}
