//! How many people gave each response to a prompt, and so how probable each token of a response is.

use std::collections::BTreeMap;

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

use crate::data::{conversation::Conversations, form::Turn, samples::Distribution};

/// The field of a sample that has them: an object, a count for each response.
pub const FIELD: &str = "response_counts";

/// Responses and their counts, above 0. That of the sample is among them.
pub struct ResponseCounts(Vec<(String, f64)>);

impl ResponseCounts {
    /// `turns` are the sample's.
    pub fn parse(value: &Value, turns: &[Turn]) -> Result<Self> {
        let fields = value
            .as_object()
            .with_context(|| format!("{FIELD:?} is {value}; it must be an object of counts"))?;
        let mut counts = Vec::new();
        for (response, value) in fields {
            match value.as_f64() {
                Some(0.0) => (),
                Some(count) if count > 0.0 => counts.push((response.clone(), count)),
                _ => bail!("{FIELD:?} has {value} for {response:?}; it must be a number from 0 on"),
            }
        }
        let responses: Vec<&Turn> = turns.iter().filter(|turn| turn.is_response()).collect();
        let [response] = responses[..] else {
            bail!(
                "{FIELD:?} is about one response; the sample has {}",
                responses.len()
            );
        };
        ensure!(
            counts.iter().any(|(text, _)| *text == response.text),
            "the response is {:?}, which {FIELD:?} does not have",
            response.text
        );
        Ok(Self(counts))
    }

    /// Each response and its count.
    pub fn counts(&self) -> impl Iterator<Item = (&str, f64)> {
        self.0
            .iter()
            .map(|(response, count)| (response.as_str(), *count))
    }

    /// The distribution of every token of the sample's `response`, given those before it.
    pub fn truth(
        &self,
        turns: &[Turn],
        response: &[u32],
        conversations: &Conversations,
    ) -> Result<Vec<Distribution>> {
        let mut turns = turns.to_vec();
        let mut all = Vec::new();
        for (text, count) in &self.0 {
            turns.last_mut().context("a sample has a response")?.text = text.clone();
            let whole = conversations.encode(&turns, usize::MAX)?;
            all.push((whole.tokens[whole.responses[0].clone()].to_vec(), *count));
        }
        let distribution = |at: usize| {
            let mut counts: BTreeMap<u32, f64> = BTreeMap::new();
            for (tokens, count) in &all {
                if tokens.len() > at && tokens[..at] == response[..at] {
                    *counts.entry(tokens[at]).or_default() += count;
                }
            }
            let sum: f64 = counts.values().sum();
            let shares = counts
                .iter()
                .map(|(&token, count)| (token, (count / sum) as f32));
            shares.collect()
        };
        Ok((0..response.len()).map(distribution).collect())
    }
}
