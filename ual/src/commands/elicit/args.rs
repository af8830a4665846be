//! Command-line arguments and their checks.

use std::{fs, path::PathBuf, time::Duration};

use anyhow::{Context, Result, ensure};
use clap::error::ErrorKind;
use serde_json::{Map, Value};
use ureq::http::HeaderName;

use crate::{
    commands::elicit::{client, prompt::Template, secrets::Secrets},
    model::pretrained::Overrides,
};

const DEFAULT_URL: &str = "https://api.openai.com/v1";

/// Scores how uncertain the right response to each sample is
///
/// Asks a stronger model over an OpenAI-compatible chat endpoint, or, with --local, takes the entropy of a local model's
/// predictions. Killed and started again with the same arguments, it continues.
///
/// Exit status: 0 when every sample is scored, 3 when some could not be, 1 for an error, 2 for an
/// unknown or missing option.
#[derive(clap::Args, Debug)]
#[command(after_help = "\
Examples:
  ual elicit --data samples.jsonl --out scored.jsonl --model MODEL
  ual elicit --data samples.jsonl --out scored.jsonl --local MODEL.gguf")]
pub struct Args {
    /// A line a sample, {"id": "…", "prompt": "…", "response": "…"}; further fields are kept. Without an id the sample's is
    /// a hash of its prompt and response. A JSON array, Parquet and other forms of samples do as well
    #[arg(
        long,
        value_name = "FILE.jsonl",
        required_unless_present = "print_prompt"
    )]
    pub data: Option<PathBuf>,
    /// A line a scored sample, in the order in which the samples were done: the input's fields, "uncertainty" in [0, 1],
    /// "votes", "spread", "model", "prompt_tokens", "completion_tokens". Answers of samples that still lack some are in FILE.jsonl.votes
    #[arg(
        long,
        value_name = "FILE.jsonl",
        required_unless_present = "print_prompt"
    )]
    pub out: Option<PathBuf>,
    /// Where the endpoint is: /chat/completions is appended to its path; a query stays
    #[arg(
        long,
        value_name = "URL",
        env = "OPENAI_BASE_URL",
        hide_env_values = true,
        default_value = DEFAULT_URL
    )]
    base_url: String,
    /// Key of the endpoint, if it wants one. The environment is the safer place: arguments are seen by other users
    #[arg(long, env = "OPENAI_API_KEY", hide_env_values = true)]
    key: Option<String>,
    /// Header for the key: authorization (after "Bearer"), or another, with the key alone. By default Azure's api-key where
    /// the URL is Azure's or has an api-version, else authorization
    #[arg(long, value_name = "NAME")]
    key_header: Option<String>,
    /// Model to ask
    #[arg(long, env = "OPENAI_MODEL")]
    model: Option<String>,
    /// Answers a sample. Their mean is its uncertainty, their standard deviation its spread
    #[arg(long, default_value_t = 1)]
    pub votes: usize,
    /// Requests in flight
    #[arg(long, default_value_t = 4)]
    pub concurrency: usize,
    /// Requests for one answer, until one of their answers can be parsed
    #[arg(long, default_value_t = 3)]
    pub attempts: usize,
    /// Repetitions of a request that fails for a reason that may pass: a limit, an error of the server, the network
    #[arg(long, default_value_t = 6)]
    pub retries: u32,
    /// Seconds before the first repetition, doubled before each further one; longer where the server says so
    #[arg(long, value_name = "SECONDS", default_value_t = 1.0)]
    backoff: f64,
    /// Longest time the server may ask to wait; the program stops when it asks for more
    #[arg(long, value_name = "SECONDS", default_value_t = 600.0)]
    max_wait: f64,
    /// Time for one request
    #[arg(long, value_name = "SECONDS", default_value_t = 120.0)]
    timeout: f64,
    /// Further fields of a request, such as {"temperature": 0.7}
    #[arg(long, value_name = "JSON", default_value = "{}")]
    body: String,
    /// Prompt to use instead of the default: a text with the placeholders {prompt} and {response}. It must ask for an
    /// answer that ends with the line "Uncertainty: N", N a number from 0 to 100
    #[arg(long, value_name = "FILE")]
    prompt: Option<PathBuf>,
    /// Prints the prompt and ends
    #[arg(long)]
    pub print_prompt: bool,
    /// Asks no server: a sample's uncertainty is the mean entropy, divided by log V, of this model's predictions over the
    /// response's tokens, given the prompt. A Llama-family model: a GGUF file, or a folder with config.json, tokenizer.json
    /// and safetensors
    #[arg(long, value_name = "MODEL.gguf")]
    pub local: Option<PathBuf>,
    #[command(flatten)]
    pub overrides: Overrides,
}

impl Args {
    pub fn check(&self) -> Result<()> {
        for (name, value) in [
            ("--votes", self.votes),
            ("--concurrency", self.concurrency),
            ("--attempts", self.attempts),
        ] {
            ensure!(value > 0, "{name} is 0; it must be at least 1");
        }
        for (name, value) in [
            ("--backoff", self.backoff),
            ("--max-wait", self.max_wait),
            ("--timeout", self.timeout),
        ] {
            ensure!(
                value > 0.0 && value <= 1e6,
                "{name} is {value}; it must be above 0 and at most 1e6"
            );
        }
        let url = self.base_url();
        ensure!(
            self.local.is_some()
                || self.print_prompt
                || url.starts_with("http://")
                || url.starts_with("https://"),
            "--base-url is {:?}; it must start with http:// or https://",
            Secrets::new(self.key(), url).hide(url)
        );
        ensure!(
            self.local.is_some() || self.overrides.are_none(),
            "--tokenizer and --chat-template are of the model of --local, which is not given"
        );
        ensure!(
            self.local.is_none() || self.votes == 1,
            "--votes is {}; a local model gives one answer",
            self.votes
        );
        if self.local.is_none() && !self.print_prompt {
            self.model();
            self.check_key()?;
        }
        Ok(())
    }

    /// Says where the key has a character that cannot be sent, and does not show it.
    fn check_key(&self) -> Result<()> {
        let name = self.key_header();
        ensure!(
            HeaderName::try_from(name).is_ok(),
            "--key-header is {name:?}; that is no name of a header"
        );
        for (c, place) in self.key().unwrap_or_default().chars().zip(1..) {
            ensure!(
                c == ' ' || c.is_ascii_graphic(),
                "the key (--key or OPENAI_API_KEY) cannot be sent in a header: its character {place} is U+{:04X}",
                u32::from(c)
            );
        }
        Ok(())
    }

    /// The model to ask. Ends the program where there is none.
    pub fn model(&self) -> &str {
        set(self.model.as_deref()).unwrap_or_else(|| {
            let missing = "the model to ask is missing: --model MODEL, or OPENAI_MODEL; or --local MODEL.gguf\n";
            clap::Error::raw(ErrorKind::MissingRequiredArgument, missing).exit()
        })
    }

    pub fn base_url(&self) -> &str {
        set(Some(&self.base_url)).unwrap_or(DEFAULT_URL)
    }

    pub fn key(&self) -> Option<&str> {
        set(self.key.as_deref())
    }

    pub fn key_header(&self) -> &str {
        let default = || client::key_header(self.base_url());
        self.key_header.as_deref().unwrap_or_else(default)
    }

    pub fn backoff(&self) -> Duration {
        Duration::from_secs_f64(self.backoff)
    }

    pub fn max_wait(&self) -> Duration {
        Duration::from_secs_f64(self.max_wait)
    }

    pub fn timeout(&self) -> Duration {
        Duration::from_secs_f64(self.timeout)
    }

    pub fn body(&self) -> Result<Map<String, Value>> {
        serde_json::from_str(&self.body)
            .with_context(|| format!("--body is {:?}; it must be a JSON object", self.body))
    }

    pub fn template(&self) -> Result<Template> {
        match &self.prompt {
            None => Ok(Template::default()),
            Some(path) => fs::read_to_string(path)
                .map_err(anyhow::Error::from)
                .and_then(Template::new)
                .with_context(|| format!("--prompt {}", path.display())),
        }
    }
}

/// What is empty, as of a variable that is set but empty, is not set.
fn set(value: Option<&str>) -> Option<&str> {
    value.map(str::trim).filter(|value| !value.is_empty())
}
