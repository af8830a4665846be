//! Runs of the program.

use std::{
    collections::BTreeMap,
    fs,
    path::PathBuf,
    process::{Command, Output, Stdio},
};

use serde_json::Value;
use tempfile::TempDir;

use crate::server::Server;

/// A folder with `in.jsonl` of samples 0 to n − 1.
pub struct Job {
    pub folder: TempDir,
}

impl Job {
    pub fn new(samples: usize) -> Self {
        let lines: String = (0..samples).map(|i| line(i) + "\n").collect();
        let job = Self {
            folder: TempDir::new().unwrap(),
        };
        fs::write(job.path("in.jsonl"), lines).unwrap();
        job
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// The command in this folder, without arguments.
    pub fn program(&self) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_ual"));
        command.arg("elicit");
        for name in [
            "OPENAI_BASE_URL",
            "OPENAI_API_KEY",
            "OPENAI_MODEL",
            "HTTP_PROXY",
            "http_proxy",
            "HTTPS_PROXY",
            "https_proxy",
            "ALL_PROXY",
            "all_proxy",
        ] {
            command.env_remove(name);
        }
        command
            .current_dir(self.folder.path())
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        command
    }

    pub fn command(&self, more: &[&str]) -> Command {
        let mut command = self.program();
        command
            .args(["--data", "in.jsonl", "--out", "out.jsonl"])
            .args(more);
        command
    }

    pub fn remote(&self, server: &Server, more: &[&str]) -> Command {
        let mut command = self.command(&["--base-url", &server.url, "--backoff", "0.02"]);
        command.args(more);
        if !more.contains(&"--model") {
            command.args(["--model", "stronger"]);
        }
        command
    }

    pub fn run(&self, server: &Server, more: &[&str]) -> Run {
        Run::of(self.remote(server, more).output().unwrap())
    }

    pub fn out(&self) -> String {
        fs::read_to_string(self.path("out.jsonl")).unwrap()
    }

    /// The lines of OUT, by id. Every one must be JSON.
    pub fn scored(&self) -> BTreeMap<String, Value> {
        let lines: Vec<Value> = self
            .out()
            .lines()
            .map(|line| serde_json::from_str(line).unwrap())
            .collect();
        let count = lines.len();
        let scored: BTreeMap<_, _> = lines
            .into_iter()
            .map(|line| (line["id"].as_str().unwrap().to_string(), line))
            .collect();
        assert_eq!(scored.len(), count, "a sample is there twice");
        scored
    }
}

pub struct Run {
    pub code: Option<i32>,
    pub stdout: String,
    pub stderr: String,
}

impl Run {
    pub fn of(output: Output) -> Self {
        let run = Self {
            code: output.status.code(),
            stdout: String::from_utf8(output.stdout).unwrap(),
            stderr: String::from_utf8(output.stderr).unwrap(),
        };
        assert!(!run.stderr.contains("panicked"), "{}", run.stderr);
        run
    }

    #[track_caller]
    pub fn expect(self, code: i32) -> Self {
        assert_eq!(self.code, Some(code), "{}\n{}", self.stdout, self.stderr);
        self
    }
}

pub fn line(sample: usize) -> String {
    format!(
        "{{ \"id\": \"s{sample}\",\"n\":1.10, \"prompt\": \"question {sample}?\", \"response\": \"é {sample}\" }}"
    )
}

pub fn percent(sample: usize) -> usize {
    sample * 7 % 101
}
