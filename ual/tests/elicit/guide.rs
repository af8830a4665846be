//! The documents' commands, as a reader runs them one after another, on the sample file.

use std::{
    fs,
    path::Path,
    process::{Command, Stdio},
};

use tempfile::TempDir;

use crate::{
    model::write_model_for,
    server::{Response, Server},
};

const DOCUMENTS: [&str; 3] = ["README.md", "docs/guide.md", "docs/elicitation.md"];
const PROGRAM: &str = "cargo run --release -- ";
/// How other commands begin: downloads, this test suite, a profiler, an installation, a key for the endpoint.
const OTHERS: [&str; 5] = [
    "pip download ",
    "cargo test ",
    "nsys ",
    "cargo install ",
    "export OPENAI_API_KEY=",
];

/// Lines of `sh` blocks, continued ones joined, without comments.
fn commands(text: &str) -> Vec<String> {
    let (mut all, mut inside, mut begun) = (Vec::new(), false, String::new());
    for line in text.lines() {
        if line.starts_with("```") {
            inside = line == "```sh";
        } else if inside {
            let line = line.split(" #").next().unwrap_or_default().trim();
            match line.strip_suffix('\\') {
                Some(line) => begun += line,
                None => all.push(std::mem::take(&mut begun) + line),
            }
        }
    }
    all.retain(|line| !line.is_empty() && !line.starts_with('#'));
    all
}

/// With options that make it short.
fn shortened(words: &[&str]) -> Vec<String> {
    let mut words: Vec<String> = words.iter().map(|word| word.to_string()).collect();
    let mut set = |name: &str, value: &str| match words.iter().position(|word| word == name) {
        Some(at) => words[at + 1] = value.to_string(),
        None => words.extend([name, value].map(String::from)),
    };
    set("--steps", "3");
    let given = words.iter().any(|word| word == "--model");
    if !given {
        for (name, value) in [
            ("--pretrain-steps", "3"),
            ("--dim", "16"),
            ("--layers", "1"),
            ("--heads", "2"),
        ] {
            words.extend([name, value].map(String::from));
        }
    }
    if words[0] == "study" {
        words.extend(["--seeds", "1"].map(String::from));
    }
    words
}

#[test]
fn the_commands_of_the_documents_run() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let server = Server::start(|asked| Response::uncertainty(asked.text.len() % 90 + 5));
    let mut run = 0;
    for document in DOCUMENTS {
        let folder = TempDir::new().unwrap();
        fs::create_dir(folder.path().join("ual")).unwrap();
        for name in ["ual/samples.jsonl", "in.jsonl"] {
            fs::copy(root.join("ual/samples.jsonl"), folder.path().join(name)).unwrap();
        }
        let text = fs::read_to_string(root.join(document)).unwrap();
        for line in commands(&text) {
            let line = line.strip_prefix("RAYON_NUM_THREADS=1 ").unwrap_or(&line);
            let Some(arguments) = line.strip_prefix(PROGRAM) else {
                let known = OTHERS.iter().any(|other| line.starts_with(other));
                assert!(
                    known,
                    "{document}: neither `ual` nor a known program: {line}"
                );
                continue;
            };
            let words: Vec<&str> = arguments.split_whitespace().collect();
            for word in words.iter().filter(|word| word.ends_with(".gguf")) {
                write_model_for(&folder.path().join(word), 512);
            }
            let words = match words[0] {
                "elicit" | "data" | "probe" => words.iter().map(|word| word.to_string()).collect(),
                _ => shortened(&words),
            };
            // A command that is shown a second time, for another way, is another reader's.
            if words[0] == "elicit" {
                let _ = fs::remove_file(folder.path().join("scored.jsonl"));
            }
            let output = Command::new(env!("CARGO_BIN_EXE_ual"))
                .args(&words)
                .current_dir(folder.path())
                .env("OPENAI_BASE_URL", &server.url)
                .env("OPENAI_API_KEY", "key")
                .env_remove("OPENAI_MODEL")
                .env("NO_PROXY", "127.0.0.1")
                .stdin(Stdio::null())
                .output()
                .unwrap();
            let said = String::from_utf8_lossy(&output.stderr);
            run += 1;
            // The archive, which the line before it downloads, is not there, nor what would be made of it.
            let missing = match words[0].as_str() {
                "data" => Some("cannot read vaderSentiment-3.3.2.tar.gz"),
                "probe" => Some("cannot read ratings.jsonl"),
                _ => None,
            };
            if let Some(missing) = missing {
                assert!(said.contains(missing), "{document}: {line}\n{said}");
                continue;
            }
            assert!(
                output.status.success(),
                "{document}: {line}\n{words:?}\n{said}"
            );
        }
    }
    assert!(run >= 10, "{run} commands were found");
}
