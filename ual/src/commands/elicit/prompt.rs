//! What the model is asked, and how its answer is read.

use anyhow::{Result, ensure};

const DEFAULT: &str = include_str!("prompt.txt");
const PROMPT: &str = "{prompt}";
const RESPONSE: &str = "{response}";

/// A text with the placeholders `{prompt}` and `{response}`.
pub struct Template(String);

impl Default for Template {
    fn default() -> Self {
        Self(DEFAULT.to_string())
    }
}

impl Template {
    /// Fails when a placeholder is missing.
    pub fn new(text: String) -> Result<Self> {
        for name in [PROMPT, RESPONSE] {
            ensure!(
                text.contains(name),
                "the prompt lacks the placeholder {name}"
            );
        }
        Ok(Self(text))
    }

    pub fn text(&self) -> &str {
        &self.0
    }

    /// The template with the sample in it. A placeholder's name inside the sample stays as it is.
    pub fn fill(&self, prompt: &str, response: &str) -> String {
        let mut filled = String::with_capacity(self.0.len() + prompt.len() + response.len());
        let mut rest = self.0.as_str();
        while let Some(at) = rest.find('{') {
            let (before, from) = rest.split_at(at);
            filled.push_str(before);
            rest = if let Some(after) = from.strip_prefix(PROMPT) {
                filled.push_str(prompt);
                after
            } else if let Some(after) = from.strip_prefix(RESPONSE) {
                filled.push_str(response);
                after
            } else {
                filled.push('{');
                &from[1..]
            };
        }
        filled + rest
    }
}

/// The uncertainty in \[0, 1\] that an answer states, from 0 to 100, in its last line that is not blank: `Uncertainty: N`,
/// N decimal digits with or without a fraction. None for any other answer: nothing is guessed.
pub fn parse(answer: &str) -> Option<f64> {
    let last = answer
        .lines()
        .map(str::trim)
        .rfind(|line| !line.is_empty())?;
    let number = last.strip_prefix("Uncertainty:")?.trim_start();
    let (whole, fraction) = number.split_once('.').unwrap_or((number, "0"));
    let digits = |text: &str| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    if !digits(whole) || !digits(fraction) {
        return None;
    }
    let number: f64 = number.parse().ok()?;
    (number <= 100.0).then_some(number / 100.0)
}
