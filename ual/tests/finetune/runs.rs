//! The command from the outside: a small run of each kind of data, and bad input.

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
    process::{Command, Output},
};

use candle_cross_entropy::ual::{Shape, SmoothingMap};
use serde_json::Value;
use tempfile::TempDir;

fn finetune(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_ual"))
        .arg("finetune")
        .env("RAYON_NUM_THREADS", "1") // what threads keep for themselves would count as a batch's memory
        .args(arguments)
        .output()
        .unwrap()
}

fn small_run(out: &Path, more: &[&str]) -> (String, Value) {
    let small = [
        "--dim",
        "16",
        "--layers",
        "1",
        "--heads",
        "2",
        "--pretrain-steps",
        "2",
        "--steps",
        "3",
    ];
    let output = finetune(&[&small[..], &["--out", out.to_str().unwrap()], more].concat());
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert!(output.status.success(), "{stderr}");
    assert!(
        stderr.contains("tokens/s"),
        "progress must be readable without a terminal: {stderr}"
    );
    let metrics = serde_json::from_slice(&fs::read(out.join("metrics.json")).unwrap()).unwrap();
    (String::from_utf8(output.stdout).unwrap(), metrics)
}

/// The message of a run that must fail.
fn refusal(arguments: &[&str]) -> String {
    let out = TempDir::new().unwrap();
    let output = finetune(&[&["--out", out.path().to_str().unwrap()], arguments].concat());
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert!(
        !output.status.success() && !stderr.contains("panicked"),
        "{arguments:?}: {stderr}"
    );
    stderr
}

fn write_data(folder: &TempDir, lines: &[u8]) -> PathBuf {
    let path = folder.path().join("data.jsonl");
    fs::write(&path, lines).unwrap();
    path
}

/// What two runs with the same arguments must have in common.
fn results(mut metrics: Value) -> Value {
    metrics["arguments"].take();
    metrics["peak_batch_bytes"].take(); // how tasks fall to threads moves it by some bytes
    let (pretraining, runs) = (
        metrics["pretraining"].take(),
        metrics["runs"].as_array_mut().unwrap(),
    );
    assert!(pretraining["seconds"].as_f64().unwrap() > 0.0);
    for training in runs.iter_mut().map(|run| &mut run["training"]) {
        training["seconds"].take();
        training["tokens_per_second"].take();
    }
    metrics
}

#[test]
fn a_run_on_synthetic_data_reports_every_method_and_repeats() {
    let (first, second) = (TempDir::new().unwrap(), TempDir::new().unwrap());
    let (stdout, metrics) = small_run(first.path(), &["--batch", "64"]);
    for group in ["all", "certain", "uncertain"] {
        for method in ["SFT", "constant", "UAL"] {
            let found = |line: &&str| line.split_whitespace().take(2).eq([group, method]);
            let line = stdout
                .lines()
                .find(found)
                .unwrap_or_else(|| panic!("no {group} {method} in {stdout}"));
            assert_eq!(line.split_whitespace().count(), 9, "{line}");
        }
    }
    let map = fs::read_to_string(first.path().join("smoothing_map.json")).unwrap();
    assert!(serde_json::from_str::<SmoothingMap>(&map).unwrap().scale() > 0.0);
    let smoothing: Vec<f64> = (0..3)
        .map(|run| metrics["runs"][run]["mean_smoothing"].as_f64().unwrap())
        .collect();
    assert!(
        smoothing[0] == 0.0
            && (smoothing[1] - 0.1).abs() < 1e-6
            && (smoothing[2] - 0.1).abs() < 1e-5
    );
    for picture in ["reliability.svg", "losses.svg"] {
        let text = fs::read_to_string(first.path().join(picture)).unwrap();
        assert!(
            text.starts_with("<svg") && text.trim_end().ends_with("</svg>") && text.contains("UAL")
        );
    }
    // Steps are whole: of three, each has one tick in either panel.
    let losses = fs::read_to_string(first.path().join("losses.svg")).unwrap();
    let ticks = losses.lines().filter(|line| line.parse::<usize>().is_ok());
    let mut ticks: Vec<_> = ticks.collect();
    ticks.sort_unstable();
    assert_eq!(ticks, ["0", "0", "1", "1", "2", "2", "3", "3"]);
    // The first method's curve is one line, the others are dashes, through which it shows.
    let lines = |color: &str| losses.matches(&format!("stroke=\"{color}\"")).count();
    assert_eq!(lines("#0072B2"), 4); // curve and legend, in two panels
    assert!(lines("#D55E00") > 4 && lines("#009E73") > lines("#D55E00"));
    let nll = |run: usize| {
        metrics["runs"][run]["groups"][0]["summary"]["nll"]
            .as_f64()
            .unwrap()
    };
    assert_ne!(nll(0), nll(2), "smoothing must change the training");

    let (_, again) = small_run(second.path(), &["--batch", "64"]);
    assert_eq!(results(metrics), results(again));
}

#[test]
fn a_run_on_real_data_without_uncertainties_estimates_them() {
    let folder = TempDir::new().unwrap();
    let line = |i: usize, more: &str| match i % 3 {
        0 => format!(
            r#"{{"prompt": "Add 1 to {i}.", "response": "It is {}."{more}}}"#,
            i + 1
        ),
        1 => format!(r#"{{"prompt": "", "response": "free words {i} é ☃", "id": {i}{more}}}"#),
        _ => format!(r#"{{"prompt": "Say {i}.", "response": "{i}"{more}}}"#),
    };
    let lines = |more: &dyn Fn(usize) -> &'static str| -> Vec<u8> {
        let lines: Vec<String> = (0..24).map(|i| line(i, more(i))).collect();
        (lines.join("\n") + "\n\n").into_bytes()
    };
    let data = write_data(
        &folder,
        &lines(&|i| {
            if i == 4 {
                r#", "uncertainty": null"#
            } else {
                ""
            }
        }),
    );
    let more = [
        "--data",
        data.to_str().unwrap(),
        "--vocab",
        "300",
        "--max-tokens",
        "12",
        "--batch",
        "6",
    ];
    let (stdout, metrics) = small_run(&folder.path().join("new/out"), &more);
    assert!(
        stdout.contains("19 training samples, 5 held out"),
        "{stdout}"
    );
    assert!(stdout.contains("uncertainty: estimated"), "{stdout}");
    assert!(
        metrics["runs"][2]["groups"][0]["summary"]["nll"]
            .as_f64()
            .unwrap()
            > 0.0
    );
    assert!(metrics["runs"][2]["groups"][0]["summary"]["kl"].is_null());

    let (_, again) = small_run(&folder.path().join("again"), &more);
    assert_eq!(results(metrics), results(again));

    // Estimates are on a scale of their own.
    write_data(
        &folder,
        &lines(&|i| {
            if i == 4 {
                ""
            } else {
                r#", "uncertainty": 0.01"#
            }
        }),
    );
    let refusal = refusal(&more);
    assert!(
        refusal.contains(":5: 1 of 24 samples have no uncertainty"),
        "{refusal}"
    );
}

#[test]
fn responses_to_one_prompt_are_trained_on_or_held_out() {
    let folder = TempDir::new().unwrap();
    let line = |i: usize| {
        format!(
            r#"{{"prompt": "Question {}", "response": "{i}", "uncertainty": 0.{}}}"#,
            i / 3,
            1 + i % 7
        )
    };
    let lines: Vec<String> = (0..30).map(line).collect();
    let data = write_data(&folder, lines.join("\n").as_bytes());
    let data = data.to_str().unwrap();
    // A fifth of 30 are 6, of 20 are 4: two whole prompts of three.
    for (limit, expected) in [
        ("30", "24 training samples, 6 held out"),
        ("20", "14 training samples, 6 held out"),
    ] {
        let (stdout, _) = small_run(
            &folder.path().join(limit),
            &[
                "--data", data, "--vocab", "300", "--limit", limit, "--batch", "6",
            ],
        );
        assert!(stdout.contains(expected), "{stdout}");
    }
}

#[test]
fn a_prompt_with_most_samples_is_on_one_side() {
    let folder = TempDir::new().unwrap();
    let write = |others: usize| {
        let line = |i: usize| {
            let prompt = if i < others { "other" } else { "usual" };
            format!(
                r#"{{"prompt": "{prompt}", "response": "{i}", "uncertainty": 0.{}}}"#,
                1 + i % 7
            )
        };
        let lines: Vec<String> = (0..20).map(line).collect();
        write_data(&folder, lines.join("\n").as_bytes())
    };
    let data = write(3);
    let more = [
        "--data",
        data.to_str().unwrap(),
        "--vocab",
        "300",
        "--batch",
        "6",
        "--seed",
    ];
    let mut sizes = BTreeSet::new();
    for seed in ["1", "2", "3", "4"] {
        let (stdout, _) = small_run(&folder.path().join(seed), &[&more[..], &[seed]].concat());
        let size = [
            "17 training samples, 3 held out",
            "3 training samples, 17 held out",
        ]
        .into_iter()
        .find(|size| stdout.starts_with(size) || stdout.contains(&format!(": {size}")));
        sizes.insert(size.expect("whole prompts"));
    }
    assert_eq!(sizes.len(), 2, "either comes first under some seed");
    write(0);
    let refusal = refusal(&more[..6]);
    assert!(refusal.contains("of other prompts"), "{refusal}");
}

/// Negative log-likelihoods of every method's loss curve.
fn losses(metrics: &Value) -> Vec<f64> {
    let runs = metrics["runs"].as_array().unwrap();
    runs.iter()
        .flat_map(|run| run["training"]["points"].as_array().unwrap())
        .flat_map(|point| ["train_nll", "held_out_nll"].map(|name| point[name].as_f64().unwrap()))
        .collect()
}

#[test]
fn the_linear_loss_trains_alike_in_less_memory() {
    let out = TempDir::new().unwrap();
    let run = |name: &str, more: &[&str]| {
        let (stdout, metrics) = small_run(&out.path().join(name), more);
        assert_eq!(metrics["plan"]["loss"], name);
        let [linear, logits] = ["linear", "logits"].map(|loss| {
            let bytes = metrics["peak_batch_bytes"][loss].as_f64().unwrap();
            let figure = format!("{:.1} MiB with --loss {loss}", bytes / f64::from(1 << 20));
            assert!(stdout.contains(&figure), "no {figure:?} in {stdout}");
            bytes
        });
        assert!(
            0.0 < linear && linear < logits,
            "{linear} and {logits} bytes"
        );
        losses(&metrics)
    };
    let (linear, logits) = (run("linear", &[]), run("logits", &["--loss", "logits"]));
    assert_eq!((linear.len(), logits.len()), (18, 18)); // three methods, three steps, two losses
    for (linear, logits) in linear.iter().zip(&logits) {
        assert!(
            (linear - logits).abs() <= 1e-3 * logits,
            "{linear} and {logits}"
        );
    }
}

/// Smoothing that is spread by how often tokens are used pulls towards tokens that are used: the same training without
/// smoothing, others with it, and either way to compute the loss.
#[test]
fn smoothing_follows_the_prior() {
    let run = |more: &[&str]| {
        let out = TempDir::new().unwrap();
        let (_, metrics) = small_run(out.path(), more);
        let runs = metrics["runs"].as_array().unwrap().clone();
        let nll = |run: &Value| run["groups"][0]["summary"]["nll"].as_f64().unwrap();
        [0, 1, 2].map(|method| nll(&runs[method]))
    };
    let (even, unigram) = (
        run(&["--smoothing-prior", "even"]),
        run(&["--smoothing-prior", "unigram"]),
    );
    let logits = run(&["--smoothing-prior", "unigram", "--loss", "logits"]);
    assert_eq!(even[0], unigram[0]);
    for method in 1..3 {
        // Of most of the vocabulary no response has a token.
        assert!(
            unigram[method] < even[method] - 1e-4,
            "{unigram:?} and {even:?}"
        );
        assert!(
            (unigram[method] - logits[method]).abs() <= 1e-3 * logits[method],
            "{unigram:?} and {logits:?}"
        );
    }
}

/// Each has a map of its own, with the mean smoothing that is asked for; what has no uncertainty-aware smoothing does not change.
#[test]
fn smoothing_follows_the_map() {
    let run = |map: &str| {
        let out = TempDir::new().unwrap();
        let (_, metrics) = small_run(out.path(), &["--smoothing-map", map]);
        let runs = metrics["runs"].as_array().unwrap();
        let number = |run: &Value| run.as_f64().unwrap();
        assert!((number(&runs[2]["mean_smoothing"]) - 0.1).abs() < 1e-6);
        let saved = fs::read_to_string(out.path().join("smoothing_map.json")).unwrap();
        let saved: SmoothingMap = serde_json::from_str(&saved).unwrap();
        let nll = [0, 1, 2].map(|i| number(&runs[i]["groups"][0]["summary"]["nll"]));
        (saved, nll)
    };
    let (linear, expected) = run("linear");
    assert_eq!(linear.shape(), Shape::Linear);
    let mut found = vec![expected[2]];
    for (map, shape) in [
        ("squared", Shape::Power(2.0)),
        ("rank", Shape::Rank),
        ("floor", Shape::Floor(0.5)),
    ] {
        let (saved, nll) = run(map);
        assert_eq!(saved.shape(), shape);
        assert_eq!(nll[..2], expected[..2]);
        assert!(!found.contains(&nll[2]), "{map}: {found:?}");
        found.push(nll[2]);
    }
}

#[test]
fn a_bad_line_is_named() {
    let good = br#"{"prompt": "a", "response": "b"}"#;
    let cases: [(&[u8], &str); 7] = [
        (br#"{"prompt": "a"}"#, "its fields are \"prompt\""),
        (
            br#"{"prompt": "a", "response": 7}"#,
            "\"response\" is not a string",
        ),
        (
            br#"{"prompt": "a", "response": " "}"#,
            "\"response\" is empty",
        ),
        (
            br#"{"prompt": "a", "response": "b", "uncertainty": 3}"#,
            "\"uncertainty\" is 3; it must be in [0, 1]",
        ),
        (
            br#"{"prompt": "a", "response": "b""#,
            "EOF while parsing an object (column 31)",
        ),
        (b"[1, 2]", "invalid type"),
        (b"{\"prompt\": \"\xff\"}", "not UTF-8 from byte 13"),
    ];
    for (line, wanted) in cases {
        let folder = TempDir::new().unwrap();
        let data = write_data(&folder, &[good, &b"\n\n"[..], line, b"\n", good].concat());
        let message = refusal(&["--data", data.to_str().unwrap()]);
        assert!(
            message.contains(&format!("{}:3: ", data.display())) && message.contains(wanted),
            "{message}"
        );
    }
}

#[test]
fn data_that_cannot_be_used_is_refused() {
    let folder = TempDir::new().unwrap();
    let missing = folder.path().join("nothing.jsonl");
    assert!(refusal(&["--data", missing.to_str().unwrap()]).contains("cannot read"));
    let empty = write_data(&folder, b"");
    assert!(refusal(&["--data", empty.to_str().unwrap()]).contains("0 samples"));
    let certain: String = (0..9)
        .map(|i| format!("{{\"prompt\": \"{i}\", \"response\": \"{i}\", \"uncertainty\": 0}}\n"))
        .collect();
    let certain = write_data(&folder, certain.as_bytes());
    let message = refusal(&["--data", certain.to_str().unwrap(), "--vocab", "300"]);
    assert!(
        message.contains("every uncertainty is 0") && message.contains("--mean-smoothing 0 "),
        "{message}"
    );
}

#[test]
fn bad_arguments_are_named() {
    let cases: [(&[&str], &str); 17] = [
        (&["--train-last", "1"], "--model <FILE.gguf>"), // which it needs
        (&["--steps", "0"], "--steps is 0"),
        (&["--batch", "0"], "--batch is 0"),
        (&["--layers", "0"], "--layers is 0"),
        (&["--heads", "0"], "--heads is 0"),
        (&["--dim", "20"], "--dim is 20; it must be a multiple of 8"),
        (&["--lr", "0"], "--lr is 0"),
        (&["--clip", "nan"], "--clip is NaN"),
        (&["--weight-decay", "inf"], "--weight-decay is inf"),
        (&["--held-out", "1"], "--held-out is 1"),
        (&["--max-smoothing", "1.5"], "--max-smoothing is 1.5"),
        (
            &["--mean-smoothing", "0.6"],
            "--mean-smoothing is 0.6; it must be in [0, 0.5]",
        ),
        (&["--vocab", "10"], "--vocab is 10"),
        (&["--max-tokens", "2"], "--max-tokens is 2"),
        (&["--loss", "tiles"], "invalid value 'tiles' for '--loss"),
        (
            &["--smoothing-prior", "zipf"],
            "invalid value 'zipf' for '--smoothing-prior",
        ),
        (
            &["--device", "tpu"],
            "--device is \"tpu\"; it must be cpu, cuda or cuda:N",
        ),
    ];
    for (arguments, wanted) in cases {
        let message = refusal(arguments);
        assert!(message.contains(wanted), "{arguments:?}: {message}");
    }
    if !cfg!(feature = "cuda") {
        assert!(refusal(&["--device", "cuda:0"]).contains("compiled without CUDA"));
    }
}

/// Most samples certain, which is what a strong model says of factual data: the message has values that work.
#[test]
fn uncertainties_that_are_too_rare_are_named_with_what_works() {
    let folder = TempDir::new().unwrap();
    let write = |uncertainty: fn(usize) -> f64| {
        let line = |i: usize| {
            format!(
                "{{\"prompt\": \"question {i}\", \"response\": \"the answer is {}\", \"uncertainty\": {}}}\n",
                i / 3,
                uncertainty(i)
            )
        };
        let lines: String = (0..60).map(line).collect();
        write_data(&folder, lines.as_bytes())
    };
    let data = write(|i| if i % 10 == 0 { 0.4 } else { 0.0 });
    let data = data.to_str().unwrap();
    fn of<'a>(data: &'a str, more: &[&'a str]) -> Vec<&'a str> {
        [&["--data", data, "--vocab", "300"], more].concat()
    }
    let value = |text: &str, option: &str| {
        let (_, rest) = text
            .rsplit_once(option)
            .unwrap_or_else(|| panic!("{option}: {text}"));
        let rest = rest.trim_start();
        let end = rest.find([' ', ',', '\n']).unwrap_or(rest.len());
        rest[..end].to_string()
    };
    let text = refusal(&of(data, &[]));
    for wanted in [
        "--mean-smoothing is 0.1",
        "of 48 samples, have an uncertainty above 0",
        "tokens of the training samples' responses",
        "--max-smoothing 0.5 at most",
    ] {
        assert!(text.contains(wanted), "{wanted}: {text}");
    }
    let out = TempDir::new().unwrap();
    small_run(
        out.path(),
        &of(
            data,
            &["--mean-smoothing", &value(&text, "--mean-smoothing")],
        ),
    );
    let text = refusal(&of(
        data,
        &["--mean-smoothing", "0.05", "--max-smoothing", "0.1"],
    ));
    small_run(
        out.path(),
        &of(
            data,
            &[
                "--mean-smoothing",
                "0.05",
                "--max-smoothing",
                &value(&text, "--max-smoothing"),
            ],
        ),
    );
    let floor = ["--smoothing-map", &value(&text, "--smoothing-map")];
    small_run(out.path(), &of(data, &floor));
    write(|_| 0.0);
    let text = refusal(&of(data, &[]));
    assert!(text.contains("every uncertainty is 0"), "{text}");
    // All equal: said, as it is no error.
    write(|_| 0.3);
    let more = [
        "--dim", "16", "--layers", "1", "--heads", "2", "--steps", "1",
    ];
    let more = [
        &more[..],
        &[
            "--pretrain-steps",
            "1",
            "--out",
            out.path().to_str().unwrap(),
        ],
    ];
    let output = finetune(&of(data, &more.concat()));
    let text = String::from_utf8_lossy(&output.stderr);
    assert!(
        output.status.success() && text.contains("UAL is then constant smoothing"),
        "{text}"
    );
}
