//! What is asked of a server, and what its answers come to.

use std::{
    fs,
    process::Command,
    sync::Mutex,
    time::{Duration, Instant},
};

use candle_ual::commands::elicit::prompt;
use serde_json::{Value, json};

use crate::{
    job::{Job, Run, line, percent},
    server::{Response, Server},
};

#[test]
fn every_sample_is_scored_and_keeps_its_fields() {
    let server = Server::start(|asked| Response::uncertainty(percent(asked.sample)));
    let job = Job::new(30);
    let mut command = job.remote(&server, &["--body", r#"{"temperature": 0}"#]);
    let run = Run::of(command.env("OPENAI_API_KEY", " secret\n").output().unwrap()).expect(0);
    assert!(
        run.stderr.contains("210 prompt + 90 completion tokens"),
        "{}",
        run.stderr
    );
    assert!(run.stdout.contains("30 of 30"), "{}", run.stdout);

    let out = job.out();
    for i in 0..30 {
        let own = line(i);
        let own = own.strip_suffix(" }").unwrap();
        let found = out
            .lines()
            .find(|line| line.starts_with(own))
            .expect("the input's text, unchanged");
        let found: Value = serde_json::from_str(found).unwrap();
        let u = percent(i) as f64 / 100.0;
        assert_eq!(found["uncertainty"], u);
        assert_eq!(found["votes"], json!([u]));
        assert_eq!(found["spread"], 0.0);
        assert_eq!(found["model"], "stronger");
        assert_eq!(found["prompt_tokens"], 7);
        assert_eq!(found["completion_tokens"], 3);
    }
    assert_eq!(job.scored().len(), 30);
    let asked = server.asked();
    assert_eq!(asked.len(), 30);
    for request in &asked {
        assert_eq!(request.target, "/v1/chat/completions");
        assert_eq!(request.header("authorization"), "Bearer secret");
        assert_eq!(request.body["model"], "stronger");
        assert_eq!(request.body["temperature"], 0);
        assert!(request.text.contains(&format!("é {}", request.sample)));
    }

    // All that says where and whom to ask may come from the environment.
    let mut command = job.command(&[]);
    command.env("OPENAI_BASE_URL", &server.url);
    command.env("OPENAI_MODEL", "stronger");
    Run::of(command.output().unwrap()).expect(0);
    assert_eq!(server.asked().len(), 30, "nothing is asked twice");
    assert_eq!(job.out(), out);
}

#[test]
fn fine_tuning_takes_the_output_as_its_data() {
    let server = Server::start(|asked| Response::uncertainty(percent(asked.sample)));
    let job = Job::new(20);
    job.run(&server, &["--votes", "2"]).expect(0);
    let small =
        "--data out.jsonl --out run --dim 16 --layers 1 --heads 2 --pretrain-steps 1 --steps 1";
    let mut finetune = Command::new(env!("CARGO_BIN_EXE_ual"));
    let run = Run::of(
        finetune
            .arg("finetune")
            .args(small.split(' '))
            .current_dir(job.folder.path())
            .output()
            .unwrap(),
    )
    .expect(0);
    assert!(run.stdout.contains("uncertainty: given"), "{}", run.stdout);
}

#[test]
fn answers_that_cannot_be_parsed_are_asked_again_then_reported() {
    let server = Server::start(|asked| match (asked.sample, asked.before) {
        (3, _) => Response::says("I would say 40"),
        (5, 0) => Response::says("Uncertainty: 140"),
        (6, 0) => Response::new(
            200,
            json!({"choices": [{"message": {"content": "Uncertainty: 1"}, "finish_reason": "length"}]}),
        ),
        (7, 0) => Response::new(200, json!({"choices": [{"message": {"content": null}}]})),
        (8, _) => Response::error(400, "too long for this model"),
        (9, _) => Response::new(200, json!({"other": "service"})),
        // A gateway's way to say that the server behind it failed.
        (10, 0) => Response::new(
            200,
            json!({"error": {"code": 502, "message": "overloaded"}}),
        ),
        (11, 0) => Response::new(
            200,
            json!({"choices": [{"message": {"content": "Uncertainty: 9"}, "finish_reason": "content_filter"}]}),
        ),
        (1, 0) => Response::new(
            200,
            json!({
                "choices": [{"message": {"content": "Uncertainty: 7"}, "finish_reason": "stop"}],
                "usage": {"prompt_tokens": null},
            }),
        ),
        _ => Response::uncertainty(percent(asked.sample)),
    });
    let job = Job::new(12);
    let count = |sample| {
        server
            .asked()
            .iter()
            .filter(|asked| asked.sample == sample)
            .count()
    };
    let run = job.run(&server, &["--attempts", "4"]).expect(3);
    assert!(
        run.stderr
            .contains("s3: 4 answers that cannot be parsed; the last ends with \"I would say 40\""),
        "{}",
        run.stderr
    );
    assert!(
        run.stderr
            .contains("s8: 400 Bad Request: too long for this model"),
        "{}",
        run.stderr
    );
    assert!(
        run.stderr.contains(
            "s9: 4 answers that cannot be parsed; the last is of no use, missing field `choices`"
        ),
        "{}",
        run.stderr
    );
    let missing = ["s3", "s8", "s9"];
    let scored = job.scored();
    for i in 0..12 {
        let id = format!("s{i}");
        assert_eq!(
            scored.contains_key(&id),
            !missing.contains(&id.as_str()),
            "{id}"
        );
    }
    assert_eq!(
        (count(3), count(5), count(6), count(7), count(8), count(4)),
        (4, 2, 2, 2, 1, 1)
    );
    assert_eq!((count(9), count(10), count(11), count(1)), (4, 2, 2, 1));
    assert_eq!(scored["s10"]["uncertainty"], 0.7);
    assert_eq!(
        scored["s11"]["uncertainty"], 0.77,
        "not the answer that was withheld"
    );
    assert_eq!(
        scored["s6"]["uncertainty"], 0.42,
        "not the answer that was cut short"
    );

    let run = job.run(&server, &["--attempts", "1"]).expect(3);
    assert_eq!(
        (count(3), count(4)),
        (5, 1),
        "a later run asks for what is missing, and no more"
    );
    assert_eq!(
        scored["s5"]["completion_tokens"], 6,
        "that of the answer that could not be parsed as well"
    );
    // Of the answers that are there, some of which say nothing of their cost, and of those to s3 and s9.
    let total: u64 = scored
        .values()
        .map(|line| line["prompt_tokens"].as_u64().unwrap())
        .sum();
    let message = format!("{} prompt + ", total + 7);
    assert!(run.stderr.contains(&message), "{message}: {}", run.stderr);
}

#[test]
fn passing_failures_are_repeated_up_to_a_limit() {
    let server = Server::start(|asked| match (asked.sample, asked.before) {
        (2, _) => Response::error(500, "broken here"),
        (4, 0) => Response::uncertainty(99).after(1500),
        (i, n) if i % 3 == 0 && n < 2 => Response::error(502, "broken now"),
        _ => Response::uncertainty(percent(asked.sample)),
    });
    let job = Job::new(10);
    let run = job
        .run(&server, &["--retries", "3", "--timeout", "0.7"])
        .expect(3);
    assert!(
        run.stderr
            .contains("s2: 500 Internal Server Error: broken here (given up after 4 requests)"),
        "{}",
        run.stderr
    );
    assert!(run.stderr.contains("requests repeated"), "{}", run.stderr);
    let scored = job.scored();
    assert_eq!(scored.len(), 9);
    assert_eq!(
        scored["s4"]["uncertainty"], 0.28,
        "of the second request: the first was too slow"
    );
    let count = |sample| {
        server
            .asked()
            .iter()
            .filter(|asked| asked.sample == sample)
            .count()
    };
    assert_eq!((count(2), count(3), count(4), count(5)), (4, 3, 2, 1));
}

#[test]
fn the_servers_limits_are_honoured() {
    // A limit that holds for a second, whoever asks.
    let first: Mutex<Option<Instant>> = Mutex::new(None);
    let server = Server::start(move |asked| {
        let mut first = first.lock().unwrap();
        if first.get_or_insert(asked.at).elapsed() < Duration::from_secs(1) {
            return Response::error(429, "slow down").header("retry-after", "1");
        }
        Response::uncertainty(percent(asked.sample))
    });
    let job = Job::new(12);
    job.run(&server, &["--concurrency", "3"]).expect(0);
    assert_eq!(job.scored().len(), 12);
    let asked = server.asked();
    let early = asked
        .iter()
        .filter(|other| other.at - asked[0].at < Duration::from_secs(1))
        .count();
    assert!(
        early <= 3,
        "{early} requests while the server wanted none; those on their way are three"
    );

    // One request every tenth of a second, of eight threads: most are turned away, and all get through in the end.
    let last: Mutex<Option<Instant>> = Mutex::new(None);
    let server = Server::start(move |asked| {
        let mut last = last.lock().unwrap();
        if last.is_some_and(|last| last.elapsed() < Duration::from_millis(100)) {
            return Response::error(429, "slow down").header("retry-after", "0");
        }
        *last = Some(Instant::now());
        Response::uncertainty(percent(asked.sample)).after(30)
    });
    let job = Job::new(24);
    let many = ["--concurrency", "8", "--retries", "5"];
    job.run(&server, &many).expect(0);
    assert_eq!(job.scored().len(), 24);
    let asked = server.asked().len();
    assert!(asked < 24 * 40, "{asked} requests");

    // A limit that is used up, which the server says before anyone exceeds it.
    let server = Server::start(|asked| match asked.sample {
        0 => Response::uncertainty(1)
            .header("x-ratelimit-remaining-requests", "0")
            .header("x-ratelimit-reset-requests", "1s"),
        _ => Response::uncertainty(1),
    });
    let job = Job::new(2);
    job.run(&server, &["--concurrency", "1"]).expect(0);
    let asked = server.asked();
    assert!(asked[1].at - asked[0].at >= Duration::from_secs(1));

    // Longer than the user would wait, said with an answer, which is kept.
    let server = Server::start(|asked| {
        Response::uncertainty(percent(asked.sample))
            .header("x-ratelimit-remaining-requests", "0")
            .header("x-ratelimit-reset-requests", "1h")
    });
    let job = Job::new(3);
    let run = job.run(&server, &["--concurrency", "1"]).expect(1);
    assert!(
        run.stderr.contains("used up: the server asks to wait"),
        "{}",
        run.stderr
    );
    assert_eq!((job.scored().len(), server.asked().len()), (1, 1));

    // Longer than the user would wait.
    let server = Server::start(|_| Response::error(429, "tomorrow").header("retry-after", "86400"));
    let run = Job::new(2).run(&server, &[]).expect(1);
    assert!(
        run.stderr
            .contains("the server asks to wait 86400 s, and --max-wait is 600 s"),
        "{}",
        run.stderr
    );

    // A wait of one's own making is none of the server's.
    let server = Server::start(|asked| match asked.before {
        0..3 => Response::error(429, "slow down"),
        _ => Response::uncertainty(1),
    });
    let short = ["--max-wait", "0.01"];
    Job::new(4).run(&server, &short).expect(0);

    // Without an end.
    let server = Server::start(|_| Response::error(429, "never"));
    let run = Job::new(1).run(&server, &["--retries", "2"]).expect(1);
    assert!(
        run.stderr
            .contains("429 Too Many Requests: never (given up after 3 requests)"),
        "{}",
        run.stderr
    );
}

#[test]
fn errors_that_stay_stop_the_program_at_once() {
    let cases = [
        (401, json!({"message": "wrong key"})),
        (404, json!({"message": "no such model"})),
        (
            400,
            json!({"message": "unknown", "code": "model_not_found"}),
        ),
        (
            429,
            json!({"message": "pay first", "code": "insufficient_quota"}),
        ),
    ];
    for (status, error) in cases {
        let answer = json!({"error": error});
        let server = Server::start(move |_| Response::new(status, answer.clone()));
        let job = Job::new(20);
        let run = job
            .run(&server, &["--key", "hidden", "--concurrency", "2"])
            .expect(1);
        assert!(run.stderr.contains(&status.to_string()), "{}", run.stderr);
        assert!(
            run.stderr.contains(error["message"].as_str().unwrap()),
            "{}",
            run.stderr
        );
        assert!(!run.stderr.contains("hidden"), "the key must not be shown");
        assert!(
            server.asked().len() <= 2,
            "{} requests",
            server.asked().len()
        );
        assert_eq!(job.out(), "");
    }
    let server = Server::start(|_| Response::error(400, "no such parameter"));
    let run = Job::new(50).run(&server, &[]).expect(1);
    assert!(
        run.stderr.contains("the first requests all failed"),
        "{}",
        run.stderr
    );
    assert!(server.asked().len() < 50);
    // A server that is always broken.
    let server = Server::start(|_| Response::error(500, "broken"));
    let one = ["--retries", "1", "--concurrency", "1"];
    let run = Job::new(50).run(&server, &one).expect(1);
    assert!(run.stderr.contains("all failed: 500"), "{}", run.stderr);
    assert!(run.stderr.contains("  s0: 500"), "{}", run.stderr);
    assert!(server.asked().len() < 50);
    // What a filter keeps back is a sample's matter, also of the first.
    let server = Server::start(|asked| match asked.sample {
        0 => Response::error(403, "flagged"),
        _ => Response::uncertainty(1),
    });
    let job = Job::new(6);
    let run = job.run(&server, &["--concurrency", "1"]).expect(3);
    assert!(run.stderr.contains("flagged"), "{}", run.stderr);
    assert_eq!(job.scored().len(), 5);
    let server = Server::start(|_| Response::error(403, "not you"));
    let run = Job::new(9).run(&server, &["--concurrency", "1"]).expect(1);
    assert!(run.stderr.contains("not you"), "{}", run.stderr);
    assert!(server.asked().len() < 9);
    // But not when an earlier run had an answer: the server is the right one, the samples are at fault.
    let server = Server::start(|asked| match asked.sample {
        1..=5 => Response::error(400, "too long"),
        _ => Response::uncertainty(percent(asked.sample)),
    });
    let job = Job::new(8);
    let lines = fs::read_to_string(job.path("in.jsonl")).unwrap();
    let first = lines.lines().next().unwrap();
    fs::write(job.path("in.jsonl"), first).unwrap();
    job.run(&server, &["--concurrency", "1"]).expect(0);
    fs::write(job.path("in.jsonl"), &lines).unwrap();
    job.run(&server, &["--concurrency", "1"]).expect(3);
    assert_eq!(job.scored().len(), 3);

    let nowhere = ["--base-url", "http://127.0.0.1:9/v1", "--model", "m"]; // the discard port
    let run = Run::of(Job::new(1).command(&nowhere).output().unwrap()).expect(1);
    assert!(run.stderr.contains("127.0.0.1:9"), "{}", run.stderr);
}

#[test]
fn votes_have_a_mean_and_a_spread() {
    let server = Server::start(|asked| Response::uncertainty([10, 20, 60][asked.before]));
    let job = Job::new(4);
    job.run(&server, &["--votes", "3", "--concurrency", "5"])
        .expect(0);
    for line in job.scored().values() {
        let mut votes: Vec<f64> = serde_json::from_value(line["votes"].clone()).unwrap();
        votes.sort_by(f64::total_cmp);
        assert_eq!(votes, [0.1, 0.2, 0.6]);
        assert!((line["uncertainty"].as_f64().unwrap() - 0.3).abs() < 1e-12);
        assert_eq!(line["prompt_tokens"], 21);
        let spread = ((0.04 + 0.01 + 0.09) / 3f64).sqrt();
        assert!((line["spread"].as_f64().unwrap() - spread).abs() < 1e-12);
    }
    assert!(!job.path("out.jsonl.votes").exists(), "all of it is in OUT");
}

#[test]
fn samples_without_an_id_get_a_stable_one() {
    let server = Server::start(|asked| Response::uncertainty(percent(asked.sample)));
    let job = Job::new(0);
    let sample = |i: usize| format!("{{\"prompt\": \"question {i}?\", \"response\": \"r\"}}\n");
    fs::write(
        job.path("in.jsonl"),
        sample(0) + &sample(1) + "\n" + &sample(0),
    )
    .unwrap();
    job.run(&server, &[]).expect(0);
    let ids: Vec<String> = job.scored().into_keys().collect();
    assert_eq!((ids.len(), server.asked().len()), (3, 3));
    assert!(
        ids.iter().any(|id| id.ends_with("-2")),
        "the same sample again: {ids:?}"
    );
    // In another order, with one more.
    fs::write(
        job.path("in.jsonl"),
        sample(2) + &sample(0) + &sample(0) + &sample(1),
    )
    .unwrap();
    job.run(&server, &[]).expect(0);
    assert_eq!(server.asked().len(), 4);
    assert!(ids.iter().all(|id| job.scored().contains_key(id)));
}

#[test]
fn bad_input_is_named() {
    let server = Server::start(|_| Response::uncertainty(1));
    let cases = [
        ("", "has no samples"),
        (
            "{\"prompt\": \"p\", \"response\": \"r\"}\nnonsense",
            "in.jsonl:2",
        ),
        ("{\"prompt\": \"p\"}", "its fields are \"prompt\""),
        (
            "{\"prompt\": 1, \"response\": \"r\"}",
            "\"prompt\" is not a string",
        ),
        (
            "{\"prompt\": \"p\", \"response\": \" \"}",
            "\"response\" is empty",
        ),
        (
            "{\"prompt\": \"p\", \"response\": \"r\", \"model\": \"m\"}",
            "a field \"model\" already",
        ),
        (
            "{\"id\": 1.5, \"prompt\": \"p\", \"response\": \"r\"}",
            "\"id\" is 1.5",
        ),
        (
            "{\"id\": 1, \"prompt\": \"p\", \"response\": \"r\"}\n{\"id\": \"1\", \"prompt\": \"q\", \"response\": \"r\"}",
            "as in line 1",
        ),
    ];
    for (text, message) in cases {
        let job = Job::new(0);
        fs::write(job.path("in.jsonl"), text).unwrap();
        let run = job.run(&server, &[]).expect(1);
        assert!(run.stderr.contains(message), "{text}: {}", run.stderr);
        assert!(!job.path("out.jsonl").exists());
    }
    let job = Job::new(1);
    let same = ["--data", "in.jsonl", "--out", "./in.jsonl", "--model", "m"];
    let run = Run::of(job.program().args(same).output().unwrap()).expect(1);
    assert!(
        run.stderr.contains("the file of the samples"),
        "{}",
        run.stderr
    );
    assert_eq!(
        fs::read_to_string(job.path("in.jsonl")).unwrap(),
        line(0) + "\n"
    );
    let run = job.run(&server, &["--votes", "0"]).expect(1);
    assert!(run.stderr.contains("--votes is 0"), "{}", run.stderr);
    let run = job.run(&server, &["--body", "[]"]).expect(1);
    assert!(run.stderr.contains("--body"), "{}", run.stderr);
    fs::write(job.path("p.txt"), "only {prompt}").unwrap();
    let run = job.run(&server, &["--prompt", "p.txt"]).expect(1);
    assert!(
        run.stderr.contains("lacks the placeholder {response}"),
        "{}",
        run.stderr
    );
    assert!(server.asked().is_empty());
}

#[test]
fn a_prompt_of_ones_own_takes_the_defaults_place() {
    let server = Server::start(|_| Response::uncertainty(1));
    let job = Job::new(0);
    let sample = r#"{"prompt": "question 0? {response}", "response": "{prompt} {"}"#;
    fs::write(job.path("in.jsonl"), sample).unwrap();
    fs::write(job.path("p.txt"), "{x} {prompt} | {response} {prompt}").unwrap();
    job.run(&server, &["--prompt", "p.txt"]).expect(0);
    assert_eq!(
        server.asked()[0].text,
        "{x} question 0? {response} | {prompt} { question 0? {response}"
    );

    let printed = Run::of(job.command(&["--print-prompt"]).output().unwrap())
        .expect(0)
        .stdout;
    assert_eq!(printed, prompt::Template::default().text());
    let guide = include_str!("../../../docs/elicitation.md");
    assert!(
        guide.contains(&printed),
        "docs/elicitation.md shows another prompt"
    );
}

#[test]
fn what_is_set_but_empty_is_not_set() {
    let job = Job::new(1);
    let told = |variable: &str| {
        let mut command = job.command(&["--base-url", "http://127.0.0.1:9"]);
        Run::of(command.env("OPENAI_MODEL", variable).output().unwrap())
            .expect(2)
            .stderr
    };
    assert!(told("").contains("--model MODEL, or OPENAI_MODEL"));
    assert!(told(" ").contains("--model MODEL, or OPENAI_MODEL"));
    // A key that is empty is none: the server sees no header.
    let server = Server::start(|_| Response::uncertainty(30));
    let mut command = job.remote(&server, &[]);
    Run::of(command.env("OPENAI_API_KEY", "").output().unwrap()).expect(0);
}

#[test]
fn an_output_that_is_no_file_is_refused() {
    let job = Job::new(1);
    let told = |out: &str| {
        let mut command = job.program();
        command.args([
            "--data",
            "in.jsonl",
            "--model",
            "m",
            "--base-url",
            "http://127.0.0.1:9",
            "--out",
            out,
        ]);
        Run::of(command.output().unwrap()).expect(1).stderr
    };
    let text = told("/dev/stdout");
    assert!(
        text.contains("/dev/stdout") && text.contains("it is no regular file"),
        "{text}"
    );
    assert!(told(".").contains("it is a folder"));
}

/// What would stop the training is said when the scoring ends.
#[test]
fn scores_that_no_training_takes_are_named() {
    let told = |uncertainty: fn(usize) -> usize| {
        let job = Job::new(20);
        let server = Server::start(move |asked| Response::uncertainty(uncertainty(asked.sample)));
        job.run(&server, &[]).expect(0).stderr
    };
    let certain = told(|sample| if sample == 0 { 40 } else { 0 });
    for part in [
        "warning: `ual finetune` will not train",
        "a character",
        "--mean-smoothing 0.0",
        "of 1 of 20 samples",
    ] {
        assert!(certain.contains(part), "{certain}");
    }
    let equal = told(|_| 40);
    assert!(
        equal.contains("warning: all uncertainties are 0.4: UAL is then constant smoothing"),
        "{equal}"
    );
    let fit = told(|sample| 20 + sample);
    assert!(!fit.contains("warning"), "{fit}");
}
