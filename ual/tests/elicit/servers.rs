//! Servers that do not behave as OpenAI's.

use std::{
    io::{BufRead, BufReader, Write},
    net::TcpListener,
    thread,
    time::{Duration, Instant},
};

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

#[test]
fn an_answer_is_found_where_servers_put_it() {
    let whole = |message: serde_json::Value, reason: &str| {
        Response::new(
            200,
            json!({"choices": [{"message": message, "finish_reason": reason}]}),
        )
    };
    let server = Server::start(move |asked| match asked.sample {
        0 => whole(
            json!({"content": [
                {"type": "thinking", "thinking": [{"type": "text", "text": "Uncertainty: 1"}]},
                {"type": "text", "text": "Uncer"},
                {"type": "text", "text": "tainty: 10"},
            ]}),
            "stop",
        ),
        1 => whole(json!({"content": "Uncertainty: 11"}), "STOP"),
        2 => whole(
            json!({"content": "Uncertainty: 12", "reasoning_content": "Uncertainty: 99"}),
            "stop",
        ),
        3 => whole(
            json!({"content": "", "reasoning_content": "Hm.\nUncertainty: 13"}),
            "stop",
        ),
        4 => whole(
            json!({"content": null, "reasoning": "Uncertainty: 14"}),
            "stop",
        ),
        5 => whole(
            json!({"content": null, "reasoning_content": "Uncertainty: 5"}),
            "length",
        ),
        _ => whole(json!({"content": "Uncertainty: 16"}), "MAX_TOKENS"),
    });
    let job = Job::new(7);
    let run = job.run(&server, &["--attempts", "1"]).expect(3);
    let scored = job.scored();
    assert_eq!(scored.len(), 5, "{}", run.stderr);
    for (i, u) in [0.1, 0.11, 0.12, 0.13, 0.14].into_iter().enumerate() {
        assert_eq!(scored[&format!("s{i}")]["uncertainty"], u);
    }
    assert!(
        run.stderr
            .contains("the answer ended for the reason \"length\" within the model's reasoning"),
        "{}",
        run.stderr
    );
}

#[test]
fn event_streams_are_read() {
    const START: &str = r#"data: {"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": null}]}

data: {"choices": [{"index": 0, "delta": {"reasoning_content": "Uncertainty: 9"}}]}

data: {"choices": [{"index": 0, "delta": {"content": "Uncertainty: 2"}}]}

data: {"choices": [{"index": 1, "delta": {"content": "9"}}]}
"#;
    const MORE: &str =
        "\ndata: {\"choices\": [{\"index\": 0, \"delta\": {\"content\": \"5\"}}]}\n\n";
    const STOP: &str =
        "data: {\"choices\": [{\"index\": 0, \"delta\": {}, \"finish_reason\": \"stop\"}]}\n\n";
    const USAGE: &str = "data: {\"choices\": [], \"usage\": {\"prompt_tokens\": 5, \"completion_tokens\": 4}}\n\ndata: [DONE]\n\n";
    let server = Server::start(|asked| {
        if asked.sample == 4 && asked.body.get("stream").is_none() {
            return Response::error(400, "only stream mode is supported");
        }
        let body = match asked.sample {
            0 => format!("{START}{MORE}{STOP}{USAGE}"),
            1 => format!(": hello\n\nevent: message\n{START}{MORE}{STOP}{USAGE}")
                .replace('\n', "\r\n"),
            // Cut off between two digits.
            2 => START.to_string(),
            3 => format!("{START}data: {{\"error\": {{\"message\": \"broke\"}}}}\n\n"),
            _ => format!("{START}{MORE}{STOP}"),
        };
        Response::bytes(200, body).header("content-type", "text/event-stream")
    });
    let job = Job::new(5);
    let few = ["--attempts", "1", "--retries", "0"];
    let run = job.run(&server, &few).expect(3);
    let scored = job.scored();
    assert_eq!(scored.len(), 2, "{}", run.stderr);
    for line in scored.values() {
        assert_eq!(line["uncertainty"], 0.25);
        assert_eq!(line["completion_tokens"], 4);
    }
    for message in [
        "s2: 1 answers that cannot be parsed; the last is of no use, its stream ends before",
        "s3: 502 Bad Gateway: broke",
        "s4: 400 Bad Request: only stream mode is supported (a server that only streams wants --body '{\"stream\": true}')",
    ] {
        assert!(run.stderr.contains(message), "{message}: {}", run.stderr);
    }
    let stream = [
        "--attempts",
        "1",
        "--retries",
        "0",
        "--body",
        "{\"stream\": true}",
    ];
    job.run(&server, &stream).expect(3);
    assert_eq!(job.scored()["s4"]["uncertainty"], 0.25);
}

#[test]
fn azure_has_a_query_and_a_header_of_its_own() {
    let server = Server::start(|asked| Response::uncertainty(percent(asked.sample)));
    let base = server.url.replace("/v1", "/openai/deployments/d");
    let ask = |url: &str, more: &[&str]| {
        let job = Job::new(1);
        let mut command = job.command(&["--base-url", url, "--model", "m", "--key", "k"]);
        Run::of(command.args(more).output().unwrap()).expect(0);
        server.asked().pop().unwrap()
    };
    for path in ["", "/", "/chat/completions"] {
        let asked = ask(&format!("{base}{path}?api-version=2024-10-21"), &[]);
        assert_eq!(
            asked.target,
            "/openai/deployments/d/chat/completions?api-version=2024-10-21"
        );
        assert_eq!(asked.header("api-key"), "k");
        assert_eq!(asked.header("authorization"), "");
    }
    let asked = ask(&base, &[]);
    assert_eq!(asked.header("api-key"), "");
    assert_eq!(asked.header("authorization"), "Bearer k");
    let asked = ask(&base, &["--key-header", "X-Key"]);
    assert_eq!(asked.header("x-key"), "k");
}

/// A server that answers every connection with `response` and keeps the first line that it reads.
fn blunt(response: &'static str) -> (u16, std::sync::mpsc::Receiver<String>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let (sender, lines) = std::sync::mpsc::channel();
    thread::spawn(move || {
        for mut stream in listener.incoming().flatten() {
            let mut line = Vec::new();
            _ = BufReader::new(&stream).read_until(b'\n', &mut line);
            _ = sender.send(String::from_utf8_lossy(&line).into_owned());
            _ = stream.write_all(response.as_bytes());
        }
    });
    (port, lines)
}

#[test]
fn what_cannot_work_stops_at_once_and_says_why() {
    let job = Job::new(3);
    let ask = |url: &str, key: &str| {
        let start = Instant::now();
        let mut command = job.command(&["--base-url", url, "--model", "m"]);
        let run = Run::of(command.args(["--key", key]).output().unwrap()).expect(1);
        assert!(start.elapsed() < Duration::from_secs(20), "{}", run.stderr);
        assert!(!run.stderr.contains("repeated"), "{}", run.stderr);
        run.stderr
    };
    // Longer than a name can be, so that nobody is asked for it.
    let host = "x".repeat(300);
    let stderr = ask(&format!("http://{host}/v1"), "k");
    let message = format!("there is no host {host}");
    assert!(stderr.contains(&message), "{stderr}");

    let stderr = ask("http://127.0.0.1:9/v1", "sk-long-key…");
    let message =
        "the key (--key or OPENAI_API_KEY) cannot be sent in a header: its character 12 is U+2026";
    assert!(stderr.contains(message), "{stderr}");
    assert!(!stderr.contains("sk-long"), "{stderr}");

    let (port, _lines) = blunt("HTTP/1.1 400 Bad Request\r\ncontent-length: 0\r\n\r\n");
    let stderr = ask(&format!("https://127.0.0.1:{port}/v1"), "k");
    assert!(
        stderr.contains("may have to start with http://"),
        "{stderr}"
    );
}

#[test]
fn redirections_name_their_target() {
    for status in [301, 302, 303, 307, 308] {
        let server = Server::start(move |_| {
            Response::bytes(status, "").header(
                "location",
                "https://u:hidden@other.example/v2/chat/completions",
            )
        });
        // The test's server takes no GET.
        let run = Job::new(3).run(&server, &["--concurrency", "1"]).expect(1);
        let message =
            "the server redirects to https://u:***@other.example/v2; give that as --base-url";
        assert!(run.stderr.contains(message), "{}", run.stderr);
        assert_eq!(server.asked().len(), 1);
    }
}

#[test]
fn an_empty_address_is_none_and_the_proxy_is_named() {
    let (port, lines) = blunt("HTTP/1.1 403 Forbidden\r\ncontent-length: 0\r\n\r\n");
    let job = Job::new(1);
    let mut command = job.command(&["--model", "m", "--retries", "0"]);
    command
        .env("OPENAI_BASE_URL", "")
        .env(
            "HTTPS_PROXY",
            format!("http://user:hidden@127.0.0.1:{port}"),
        )
        .env_remove("NO_PROXY")
        .env_remove("no_proxy");
    let run = Run::of(command.output().unwrap());
    assert_ne!(run.code, Some(0));
    assert!(
        lines
            .recv()
            .unwrap()
            .starts_with("CONNECT api.openai.com:443"),
        "{}",
        run.stderr
    );
    let message = format!("through the proxy http://127.0.0.1:{port} (");
    assert!(run.stderr.contains(&message), "{}", run.stderr);
    assert!(!run.stderr.contains("hidden"), "{}", run.stderr);
}

#[test]
fn the_total_stays_what_was_asked_for() {
    let server = Server::start(|asked| match asked.sample {
        0..3 => Response::error(400, "no"),
        _ => Response::uncertainty(50),
    });
    let run = Job::new(10).run(&server, &[]).expect(3);
    assert!(
        run.stderr.contains("7/10 answers, 3 not to be had, "),
        "{}",
        run.stderr
    );
}
