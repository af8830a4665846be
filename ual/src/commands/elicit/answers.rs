//! The answers, on disk. OUT has a line a sample that is done; OUT.votes has the answers of samples that still lack some.
//! Neither is ever rewritten: an answer is one appended line, and counts once that line is on the disk.

use std::{
    collections::HashMap,
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, ensure};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::{
    commands::elicit::{
        log::Log,
        samples::{Cost, Sample, Score, id, texts},
    },
    data::lines,
    training::smoothing::{self, Weighted},
};

/// How a line of OUT.votes begins.
const VOTE: &str = "{\"id\":";

/// A line of OUT.votes.
#[derive(Serialize, Deserialize)]
struct Vote {
    id: String,
    /// [`Sample::digest`]: shows that the text behind the id is still the same.
    sample: String,
    model: String,
    /// Answers the sample is to have.
    votes: usize,
    vote: f64,
    #[serde(flatten)]
    cost: Cost,
}

pub struct Answers<'a> {
    samples: &'a [Sample],
    model: String,
    /// Answers a sample; none for a local model's scores.
    votes: Option<usize>,
    out: Log,
    partial: Option<Log>,
    /// Of each sample, the answers so far.
    given: Vec<Vec<f64>>,
    /// Of each sample's answers, and of all there are.
    costs: Vec<Cost>,
    cost: Cost,
    /// Of each sample whose line is in OUT.
    uncertainties: Vec<Option<f64>>,
    scale: Scale,
}

/// How many answers there are, and how many at most 1 of 100: those may be meant on a scale from 0 to 1.
#[derive(Clone, Copy, Default)]
struct Scale {
    all: usize,
    zero: usize,
    between: usize,
    one: usize,
}

impl Scale {
    /// `answer` is in \[0, 1\].
    fn count(&mut self, answer: f64) {
        self.all += 1;
        match answer * 100.0 {
            0.0 => self.zero += 1,
            percent if percent < 1.0 => self.between += 1,
            1.0 => self.one += 1,
            _ => (),
        }
    }
}

impl<'a> Answers<'a> {
    /// Opens OUT and takes up what an earlier run left. Fails when that run had other samples, another model or another
    /// number of votes, and when another process is writing OUT.
    pub fn resume(
        path: &Path,
        samples: &'a [Sample],
        model: &str,
        votes: Option<usize>,
    ) -> Result<Self> {
        let (out, lines) = Log::open(path)?;
        let mut answers = Self {
            samples,
            model: model.to_string(),
            votes,
            out,
            partial: None,
            given: vec![Vec::new(); samples.len()],
            costs: vec![Cost::default(); samples.len()],
            cost: Cost::default(),
            uncertainties: vec![None; samples.len()],
            scale: Scale::default(),
        };
        let index: HashMap<&str, usize> = samples
            .iter()
            .enumerate()
            .map(|(i, s)| (s.id.as_str(), i))
            .collect();
        for (line, number) in lines.iter().zip(1..) {
            answers
                .take_done(line, &index)
                .with_context(|| format!("{}:{number}", path.display()))?;
        }
        answers.out.repair(samples.iter().map(Sample::beginning))?;

        let partial = partial_path(path);
        if votes.is_some_and(|votes| votes > 1) || partial.exists() {
            let (mut log, lines) = Log::open(&partial)?;
            for (line, number) in lines.iter().zip(1..) {
                answers
                    .take_vote(line, &index)
                    .with_context(|| format!("{}:{number}", partial.display()))?;
            }
            log.repair([VOTE])?;
            answers.partial = Some(log);
        }
        // Killed between a sample's last vote and its line.
        for i in 0..samples.len() {
            answers.finish_if_complete(i)?;
        }
        Ok(answers)
    }

    fn take_done(&mut self, line: &str, index: &HashMap<&str, usize>) -> Result<()> {
        let fields: Map<String, Value> = lines::object(line)?;
        let (prompt, response) = texts(&fields)?;
        let id = id(&fields)?.context("\"id\" is missing")?;
        let i = self.find(&id, index)?;
        ensure!(
            self.samples[i].prompt == prompt && self.samples[i].response == response,
            "sample {id} has another text in --data; choose another --out"
        );
        ensure!(
            self.uncertainties[i].is_none(),
            "sample {id} is there twice"
        );
        let uncertainty = fields.get("uncertainty").and_then(|u| u.as_f64());
        let uncertainty = uncertainty.filter(|u| (0.0..=1.0).contains(u));
        ensure!(
            uncertainty.is_some(),
            "\"uncertainty\" must be a number in [0, 1]"
        );
        let votes = fields
            .get("votes")
            .and_then(|votes| Some(votes.as_array()?.len()));
        let model = fields.get("model").and_then(|model| model.as_str());
        self.check(model.context("\"model\" is missing")?, votes)?;
        let given = fields.get("votes").and_then(|votes| votes.as_array());
        for vote in given.into_iter().flatten().filter_map(|vote| vote.as_f64()) {
            self.scale.count(vote);
        }
        self.cost += serde_json::from_value(fields.into()).context("the tokens")?;
        self.uncertainties[i] = uncertainty;
        Ok(())
    }

    fn take_vote(&mut self, line: &str, index: &HashMap<&str, usize>) -> Result<()> {
        let vote: Vote = serde_json::from_str(line)?;
        let i = self.find(&vote.id, index)?;
        ensure!(
            vote.sample == self.samples[i].digest(),
            "sample {} has another text in --data; choose another --out",
            vote.id
        );
        self.check(&vote.model, Some(vote.votes))?;
        ensure!(
            (0.0..=1.0).contains(&vote.vote),
            "\"vote\" is {}; it must be in [0, 1]",
            vote.vote
        );
        if self.uncertainties[i].is_none() {
            self.take(i, vote.vote, vote.cost); // else they are in OUT
        }
        Ok(())
    }

    fn find(&self, id: &str, index: &HashMap<&str, usize>) -> Result<usize> {
        let found = index.get(id).copied();
        found.with_context(|| format!("sample {id} is not in --data; choose another --out"))
    }

    fn check(&self, model: &str, votes: Option<usize>) -> Result<()> {
        ensure!(
            model == self.model,
            "scored by {model}, and now by {}; choose another --out",
            self.model
        );
        let count =
            |votes: Option<usize>| votes.map_or("no".to_string(), |votes| votes.to_string());
        ensure!(
            votes == self.votes,
            "scored with {} votes a sample, and now with {}; choose another --out",
            count(votes),
            count(self.votes)
        );
        Ok(())
    }

    /// How many answers a sample still lacks.
    pub fn missing(&self, sample: usize) -> usize {
        if self.uncertainties[sample].is_some() {
            return 0;
        }
        self.votes
            .unwrap_or(1)
            .saturating_sub(self.given[sample].len())
    }

    /// Samples whose line is in OUT.
    pub fn done(&self) -> usize {
        self.uncertainties.iter().flatten().count()
    }

    /// Whether there is an answer, of this run or an earlier one.
    pub fn any(&self) -> bool {
        self.done() > 0 || self.given.iter().any(|given| !given.is_empty())
    }

    /// What all answers on the disk have cost.
    pub fn cost(&self) -> Cost {
        self.cost
    }

    /// What is to be said when most answers are at most 1 of 100.
    pub fn warning(&self) -> Option<String> {
        let Scale {
            all,
            zero,
            between,
            one,
        } = self.scale;
        let low = zero + between + one;
        (2 * low > all).then(|| {
            format!(
                "warning: {low} of {all} answers are at most 1 of 100 ({zero} of them 0, {between} between 0 and 1, {one} exactly 1). \
                 If the model answers from 0 to 1, these uncertainties are a hundredth of what it means: \
                 ask for a number from 0 to 100 (--prompt), into another --out"
            )
        })
    }

    /// What `ual finetune` will say of these uncertainties, by a character of a response in place of a token.
    pub fn unfit(&self) -> Option<String> {
        let scored = self.samples.iter().zip(&self.uncertainties);
        let weighted = scored.filter_map(|(sample, uncertainty)| {
            Some(((*uncertainty)? as f32, sample.response.chars().count()))
        });
        let weighted: Vec<Weighted> = weighted.collect();
        let obstacle = smoothing::obstacle(&weighted, smoothing::MEAN, smoothing::MAX);
        let obstacle = obstacle.map(|obstacle| {
            format!(
                "warning: `ual finetune` will not train on these uncertainties with its usual options. With a token a \
                 character, as tokens are not known here: {obstacle}"
            )
        });
        obstacle.or_else(|| Some(format!("warning: {}", smoothing::warning(&weighted)?)))
    }

    fn take(&mut self, sample: usize, vote: f64, cost: Cost) {
        self.scale.count(vote);
        self.given[sample].push(vote);
        self.costs[sample] += cost;
        self.cost += cost;
    }

    /// Writes an answer, in \[0, 1\]. When this returns it is on the disk.
    pub fn add(&mut self, sample: usize, answer: f64, cost: Cost) -> Result<()> {
        let Some(votes) = self.votes else {
            return self.finish(sample, answer, None, None);
        };
        if let Some(partial) = &mut self.partial {
            let vote = Vote {
                id: self.samples[sample].id.clone(),
                sample: self.samples[sample].digest(),
                model: self.model.clone(),
                votes,
                vote: answer,
                cost,
            };
            partial.append(&serde_json::to_string(&vote)?)?;
        }
        self.take(sample, answer, cost);
        self.finish_if_complete(sample)
    }

    fn finish_if_complete(&mut self, sample: usize) -> Result<()> {
        if self.uncertainties[sample].is_some()
            || self
                .votes
                .is_none_or(|votes| self.given[sample].len() < votes)
        {
            return Ok(());
        }
        let votes = std::mem::take(&mut self.given[sample]);
        let count = votes.len() as f64;
        let mean = votes.iter().sum::<f64>() / count;
        let variance = votes.iter().map(|vote| (vote - mean).powi(2)).sum::<f64>() / count;
        self.finish(sample, mean, Some(&votes), Some(variance.sqrt()))
    }

    fn finish(
        &mut self,
        sample: usize,
        uncertainty: f64,
        votes: Option<&[f64]>,
        spread: Option<f64>,
    ) -> Result<()> {
        let score = Score {
            uncertainty,
            votes,
            spread,
            model: &self.model,
            cost: self.votes.map(|_| self.costs[sample]),
        };
        self.out.append(&self.samples[sample].scored(&score)?)?;
        self.uncertainties[sample] = Some(uncertainty);
        Ok(())
    }

    /// Removes OUT.votes when every sample is done: all that it holds is in OUT.
    pub fn close(self) -> Result<()> {
        match self.partial {
            Some(partial) if self.uncertainties.iter().all(Option::is_some) => {
                fs::remove_file(partial.path())
                    .with_context(|| format!("cannot remove {}", partial.path().display()))
            }
            _ => Ok(()),
        }
    }
}

fn partial_path(out: &Path) -> PathBuf {
    let mut path = out.as_os_str().to_os_string();
    path.push(".votes");
    path.into()
}
