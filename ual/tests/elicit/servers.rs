//! Servers that do not behave as OpenAI's.

use candle_ual::commands::elicit::secrets::Secrets;
use serde_json::json;

use crate::{
    job::{Job, Run, percent},
    server::{Response, Server},
};

#[test]
fn bytes_that_are_no_text_are_that_samples_matter() {
    let server = Server::start(|asked| match asked.sample {
        // An invalid byte before the number costs nothing, one in the number makes it unreadable.
        1 => Response::bytes(
            200,
            &b"{\"choices\": [{\"message\": {\"content\": \"caf\xe9\\nUncertainty: 30\"}}]}"[..],
        )
        .header("content-type", "application/json"),
        2 => Response::bytes(
            200,
            &b"{\"choices\": [{\"message\": {\"content\": \"Uncertainty: 3\xff0\"}}]}"[..],
        )
        .header("content-type", "application/json"),
        3 => Response::bytes(200, &b"\x1f\x8b\x08\x00\x00\x00"[..])
            .header("content-type", "application/json")
            .header("content-encoding", "gzip"),
        4 => Response::bytes(200, &b"\x1f\x8b\x08\x00\x00\x00"[..]),
        5 => {
            Response::bytes(400, &b"\x1f\x8b\x08\x00\x00\x00"[..]).header("content-encoding", "br")
        }
        _ => Response::uncertainty(percent(asked.sample)),
    });
    let job = Job::new(9);
    let run = job.run(&server, &["--attempts", "2"]).expect(3);
    let scored = job.scored();
    assert_eq!(scored.len(), 5, "{}", run.stderr);
    assert_eq!(scored["s1"]["uncertainty"], 0.3);
    for message in [
        "s2: 2 answers that cannot be parsed; the last ends with \"Uncertainty: 3\u{fffd}0\"",
        "s3: 2 answers that cannot be parsed; the last is of no use, its content encoding is \"gzip\"",
        "s4: 2 answers that cannot be parsed; the last is of no use, its content encoding is \"gzip\"",
        "s5: 400 Bad Request: its content encoding is \"br\"",
    ] {
        assert!(run.stderr.contains(message), "{message}: {}", run.stderr);
    }
    assert_eq!(server.asked()[0].header("accept-encoding"), "identity");
}

#[test]
fn the_key_and_a_password_are_masked_in_every_text() {
    const KEY: &str = "sk-very/secret-key";
    const PASSWORD: &str = "pass%20word1";
    // What a careless gateway does: it repeats what it was sent, here so that the key lies across the cut of the message.
    let echo = "x".repeat(290) + KEY;
    for status in [200, 400, 401, 422, 429, 500] {
        for body in [
            json!({"error": {"message": echo}}).to_string(),
            format!("no JSON, {}", echo.replace('/', "\\/")),
            json!({"choices": [{"message": {"content": format!("you are {KEY}")}}]}).to_string(),
            json!({"choices": [{"message": {}, "finish_reason": KEY}]}).to_string(),
        ] {
            let server = Server::start(move |_| Response::bytes(status, body.clone()));
            let url = server
                .url
                .replace("http://", &format!("http://user:{PASSWORD}@"));
            let job = Job::new(1);
            let once = ["--base-url", &url, "--key", KEY, "--model", "m"];
            let limits = ["--retries", "0", "--attempts", "1"];
            let mut command = job.command(&once);
            let run = Run::of(command.args(limits).output().unwrap());
            assert_ne!(run.code, Some(0));
            for part in ["sk-very", "secret-key", PASSWORD] {
                assert!(
                    !run.stderr.contains(part),
                    "{status} {part}: {}",
                    run.stderr
                );
                assert!(!job.out().contains(part));
            }
        }
    }
    let job = Job::new(1);
    for url in [
        "http://user:pass%20word1@127.0.0.1:9/v1",
        "http://pass%20word1@127.0.0.1:9/v1",
        "http://user:pass%20word1/x@127.0.0.1:9/v1",
        "http://127.0.0.1:9/v1?api-key=pass%20word1",
        "ftp://user:pass%20word1@127.0.0.1/v1",
    ] {
        let arguments = ["--base-url", url, "--model", "m", "--retries", "0"];
        let run = Run::of(job.command(&arguments).output().unwrap()).expect(1);
        assert!(!run.stderr.contains(PASSWORD), "{}", run.stderr);
        assert!(run.stderr.contains("***"), "{}", run.stderr);
        let mut help = job.program();
        let run = Run::of(
            help.arg("--help")
                .env("OPENAI_BASE_URL", url)
                .output()
                .unwrap(),
        );
        assert!(!run.stdout.contains(PASSWORD), "{}", run.stdout);
    }
    // A short one is part of many words.
    let secrets = Secrets::new(Some("no"), "http://u:pw@host");
    assert_eq!(
        secrets.hide("unknown: no, http://u:pw@host"),
        "unknown: ***, http://u:***@host"
    );
    // As the header of the address's own login says it.
    assert_eq!(secrets.hide("Basic dTpwdw=="), "Basic ***");
}

#[test]
fn answers_of_at_most_one_are_warned_of() {
    let answer = |sample: usize| ["0.85", "0", "1", "0.2", "40", "0.5", "1.5", "0.1"][sample % 8];
    let server = Server::start(move |asked| {
        Response::says(&format!("Uncertainty: {}", answer(asked.sample)))
    });
    let job = Job::new(8);
    let run = job.run(&server, &[]).expect(0);
    let warning =
        "6 of 8 answers are at most 1 of 100 (1 of them 0, 4 between 0 and 1, 1 exactly 1)";
    assert!(run.stderr.contains(warning), "{}", run.stderr);
    assert_eq!(job.scored()["s0"]["uncertainty"], 0.0085);
    // Also of answers that an earlier run left.
    let run = job.run(&server, &[]).expect(0);
    assert!(run.stderr.contains(warning), "{}", run.stderr);

    let server = Server::start(|asked| Response::uncertainty(asked.sample));
    let run = Job::new(4).run(&server, &[]).expect(0);
    assert!(!run.stderr.contains("warning"), "{}", run.stderr);
}

#[test]
fn a_model_that_does_not_keep_to_the_form_is_not_paid_for_without_end() {
    let server = Server::start(|_| Response::says("My answer is\nsomewhere near eighty."));
    let job = Job::new(200);
    let run = job
        .run(&server, &["--attempts", "2", "--concurrency", "4"])
        .expect(1);
    assert!(
        run.stderr.contains("20 answers in a row could not be read"),
        "{}",
        run.stderr
    );
    assert!(
        run.stderr
            .contains(r#"ends with "My answer is\nsomewhere near eighty.""#),
        "{}",
        run.stderr
    );
    let asked = server.asked().len();
    assert!((20..=23).contains(&asked), "{asked} requests");

    // Not in a row.
    let server = Server::start(|asked| match asked.sample % 4 {
        0 => Response::uncertainty(1),
        _ => Response::says("eighty"),
    });
    let job = Job::new(48);
    job.run(&server, &["--concurrency", "1"]).expect(3);
    assert_eq!(job.scored().len(), 12);
}
