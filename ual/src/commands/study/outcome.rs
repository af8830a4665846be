//! What a training of the study came to, and what of it is reported.

use std::fmt;

use anyhow::{Context, Result};
use serde::Serialize;

use crate::{
    commands::study::{choice, clusters::Clusters},
    report::{
        curve::{Curve, Measured, Stopped},
        run::{Group, Run},
        units::Unit,
    },
};

/// A training of a seed, and what it came to.
#[derive(Serialize)]
pub struct Outcome {
    pub seed: u64,
    /// The mean smoothing that was asked for.
    pub smoothing: f32,
    pub run: Run,
    /// Where early stopping would have stopped it; with validation alone.
    pub stopped: Option<Early>,
    pub clusters: Option<Clusters>,
    /// Empty where another training of the arm is reported.
    #[serde(skip)] // large
    pub units: Vec<Vec<Unit>>,
}

/// What early stopping would have kept.
#[derive(Serialize)]
pub struct Early {
    pub step: usize,
    pub validation_nll: f64,
    pub groups: Vec<Group>,
    /// The same.
    #[serde(skip)]
    pub units: Vec<Vec<Unit>>,
}

impl From<Stopped> for Early {
    fn from(stopped: Stopped) -> Self {
        let Measured { groups, units } = stopped.held_out;
        Self {
            step: stopped.step,
            validation_nll: stopped.validation_nll,
            groups,
            units,
        }
    }
}

/// An arm of a seed as it was chosen.
pub struct Chosen<'a> {
    pub outcome: &'a Outcome,
    pub step: usize,
    pub groups: &'a [Group],
    pub units: &'a [Vec<Unit>],
}

/// An arm as it is reported, of each seed what was chosen of it.
pub struct Entry<'a> {
    pub arm: &'static str,
    /// Whether validation chose the step too, not the smoothing alone.
    pub early: bool,
    pub seeds: Vec<Chosen<'a>>,
}

impl fmt::Display for Entry<'_> {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        let stopping = if self.early { ", early stopping" } else { "" };
        write!(f, "{}{stopping}", self.arm)
    }
}

/// In the order in which they ran.
pub fn arms(outcomes: &[Outcome]) -> Vec<&'static str> {
    let mut arms = Vec::new();
    for outcome in outcomes {
        if !arms.contains(&outcome.run.method) {
            arms.push(outcome.run.method);
        }
    }
    arms
}

/// Of one arm and seed; the step is chosen too if `early`, which needs validation.
fn chosen<'a>(trainings: &[&'a Outcome], early: bool) -> Option<Chosen<'a>> {
    let curves: Vec<&Curve> = trainings.iter().map(|o| &o.run.training).collect();
    if early {
        let choice = choice::early(&curves)?;
        let outcome = trainings[choice.training];
        let stopped = outcome.stopped.as_ref()?;
        return Some(Chosen {
            outcome,
            step: stopped.step,
            groups: &stopped.groups,
            units: &stopped.units,
        });
    }
    let choice = choice::at_end(&curves)?;
    let outcome = trainings[choice.training];
    Some(Chosen {
        outcome,
        step: choice.step,
        groups: &outcome.run.groups,
        units: &outcome.units,
    })
}

/// Every arm at the end of its training and then, with validation, every arm with early stopping.
pub fn entries(outcomes: &[Outcome]) -> Result<Vec<Entry<'_>>> {
    let mut seeds: Vec<u64> = outcomes.iter().map(|outcome| outcome.seed).collect();
    seeds.dedup();
    let validated = outcomes.iter().all(|outcome| outcome.stopped.is_some());
    let mut entries = Vec::new();
    for early in [false, true] {
        if early && !validated {
            continue;
        }
        for arm in arms(outcomes) {
            let of_seed = |&seed: &u64| {
                let trainings = outcomes.iter();
                let trainings: Vec<&Outcome> = trainings
                    .filter(|o| o.run.method == arm && o.seed == seed)
                    .collect();
                chosen(&trainings, early).with_context(|| format!("{arm:?} has no curve"))
            };
            entries.push(Entry {
                arm,
                early,
                seeds: seeds.iter().map(of_seed).collect::<Result<_>>()?,
            });
        }
    }
    Ok(entries)
}
