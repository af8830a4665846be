//! What the model is asked, and how its answer is read.

use anyhow::{Result, ensure};

const DEFAULT: &str = include_str!("prompt.txt");
const PROMPT: &str = "{prompt}";
const RESPONSE: &str = "{response}";
/// What the line of an answer begins with, before a colon.
const NAME: &str = "Uncertainty";

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

/// What some models and servers leave at an answer's end.
const CLOSING: [&str; 11] = [
    "<|im_end|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<|end|>",
    "<|endoftext|>",
    "<|end_of_text|>",
    "<|return|>",
    "<end_of_turn>",
    "<eos>",
    "</s>",
    "<｜end▁of▁sentence｜>",
];
/// Of bold, italic and code.
const MARKS: [char; 3] = ['*', '_', '`'];

/// The uncertainty in \[0, 1\] that an answer states, from 0 to 100, in its last line that is not blank: `Uncertainty: N`,
/// N decimal digits with or without a fraction. What surrounds them without another meaning is allowed: marks of bold,
/// italic and code, a code fence, a closing token, `%`, `/100`, a full stop, and the name may be in any case. None for
/// any other answer: nothing is guessed.
pub fn parse(answer: &str) -> Option<f64> {
    let last = narrow(last_line(answer)?);
    let rest = after_name(marks(&last))?;
    let rest = marks(marks(rest).strip_prefix(':')?);
    let (whole, rest) = digits(rest)?;
    let (fraction, rest) = rest
        .strip_prefix('.')
        .and_then(digits)
        .unwrap_or(("0", rest));
    if !nothing_more(rest) {
        return None;
    }
    let number: f64 = format!("{whole}.{fraction}").parse().ok()?;
    (number <= 100.0).then_some(number / 100.0)
}

/// Without closing tokens and the end of a code fence.
fn last_line(answer: &str) -> Option<&str> {
    let mut text = answer.trim_end();
    while let Some(rest) = CLOSING.iter().find_map(|end| text.strip_suffix(end)) {
        text = rest.trim_end();
    }
    let mut lines = text.lines().rev().map(str::trim).filter(|l| !l.is_empty());
    let last = lines.next()?;
    let fence = last.len() >= 3 && last.bytes().all(|byte| byte == b'`');
    if fence { lines.next() } else { Some(last) }
}

/// With ASCII for full-width digits and signs.
fn narrow(line: &str) -> String {
    let ascii = |c: char| match c {
        '０'..='９' | '：' | '．' | '％' | '／' => {
            char::from_u32(c as u32 - '！' as u32 + '!' as u32).unwrap_or(c)
        }
        '。' => '.',
        c => c,
    };
    line.chars().map(ascii).collect()
}

fn marks(text: &str) -> &str {
    text.trim_start_matches(|c: char| MARKS.contains(&c) || c.is_whitespace())
}

fn after_name(text: &str) -> Option<&str> {
    let (name, rest) = text.split_at_checked(NAME.len())?;
    name.eq_ignore_ascii_case(NAME).then_some(rest)
}

/// The digits that a text begins with, one at least, and what follows.
fn digits(text: &str) -> Option<(&str, &str)> {
    let end = text
        .find(|c: char| !c.is_ascii_digit())
        .unwrap_or(text.len());
    (end > 0).then(|| text.split_at(end))
}

/// Whether what follows the number changes nothing: `%` or `/100` at most, then a full stop at most.
fn nothing_more(text: &str) -> bool {
    let rest = marks(text);
    let rest = match rest.strip_prefix('/') {
        Some(whole) => match digits(whole.trim_start()) {
            Some(("100", rest)) => rest,
            _ => return false,
        },
        None => rest.strip_prefix('%').unwrap_or(rest),
    };
    let rest = marks(rest);
    marks(rest.strip_prefix('.').unwrap_or(rest)).is_empty()
}
