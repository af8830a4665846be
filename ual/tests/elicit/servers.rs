//! Servers that do not behave as OpenAI's.

use crate::{
    job::{Job, percent},
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
