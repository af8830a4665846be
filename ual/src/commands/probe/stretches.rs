//! Which smoothing is best at which uncertainty: trainings on the samples of one stretch of uncertainties alone.

use anyhow::{Result, ensure};
use rand::{SeedableRng, rngs::StdRng};
use serde::Serialize;

use crate::{
    commands::probe::{
        args::Args,
        arms::{Arm, Method, Spread},
        outcome::{Curve, Ending},
        questions::Question,
        trainings::{Data, Draw, Trainings, validation},
    },
    report::statistics::{Interval, percentiles, resampled},
};

const QUINTILES: usize = 5;
const RESAMPLES: usize = 1000;
/// What each stretch is trained with.
const SMOOTHINGS: [f32; 12] = [
    0.0, 0.01, 0.03, 0.06, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8,
];

/// Samples with an uncertainty in (above, to]; those of uncertainty 0 are a stretch of their own, which has no lower bound.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Stretch {
    pub above: f32,
    pub to: f32,
    /// Of the samples to train on.
    pub mean: f32,
}

/// The trainings of a seed on one stretch.
#[derive(Clone, Debug, Serialize)]
pub struct OfStretch {
    pub seed: u64,
    pub stretch: usize,
    pub curves: Vec<Curve>,
}

impl Stretch {
    fn members(&self, questions: &[Question]) -> Vec<usize> {
        let within = |u: f32| u > self.above && u <= self.to;
        let all = questions.iter().enumerate();
        let within = all.filter(|(_, question)| within(question.uncertainty));
        within.map(|(i, _)| i).collect()
    }
}

/// Quintiles of the uncertainties above 0, and before them what has none, if there is such. Fails where one is too small for
/// trainings on `size` samples.
pub fn quintiles(questions: &[Question], size: usize) -> Result<Vec<Stretch>> {
    let mut sorted: Vec<f32> = questions.iter().map(|q| q.uncertainty).collect();
    sorted.sort_by(f32::total_cmp);
    let certain = sorted.partition_point(|&u| u <= 0.0);
    let (certain, uncertain) = sorted.split_at(certain);
    let mut ends: Vec<f32> = Vec::new();
    if !certain.is_empty() {
        ends.push(0.0);
    }
    if let Some(last) = uncertain.len().checked_sub(1) {
        ends.extend((1..=QUINTILES).map(|i| uncertain[last * i / QUINTILES]));
    }
    ends.dedup();
    let mut above = match certain.is_empty() {
        true => 0.0,
        false => -1.0,
    };
    let mut stretches = Vec::new();
    for to in ends {
        let within: Vec<f32> = sorted
            .iter()
            .copied()
            .filter(|&u| u > above && u <= to)
            .collect();
        stretches.push(Stretch {
            above,
            to,
            mean: within.iter().sum::<f32>() / within.len() as f32,
        });
        let needed = size + validation(size);
        ensure!(
            within.len() >= needed,
            "--stretch-size is {size}: with a validation part {needed} samples are needed of each stretch of uncertainties, and \
             up to {to} there are {}",
            within.len(),
        );
        above = to;
    }
    Ok(stretches)
}

/// Of one seed: every stretch with every smoothing, spread over the responses.
pub fn of_seed(
    data: &Data,
    stretches: &[Stretch],
    seed: u64,
    args: &Args,
) -> Result<Vec<OfStretch>> {
    let size = args.stretch_size;
    let trained = |(number, stretch): (usize, &Stretch)| {
        let members = stretch.members(&data.questions.train);
        let held_out = stretch.members(&data.questions.held_out);
        let draw = Draw::new(members, size, &mut StdRng::seed_from_u64(seed));
        let trainings = Trainings::new(data, draw, Some(&held_out), args)?;
        let arm = |&mean: &f32| Arm {
            method: Method::Constant,
            mean,
            smoothing: vec![mean; size],
        };
        let arms: Vec<Arm> = SMOOTHINGS.iter().map(arm).collect();
        Ok(OfStretch {
            seed,
            stretch: number,
            curves: trainings.side_by_side(Spread::Responses, &arms, seed)?,
        })
    };
    stretches.iter().enumerate().map(trained).collect()
}

/// The smoothing with the least mean divergence over these seeds, each training ending so.
pub fn best(outcomes: &[&OfStretch], ending: Ending) -> Option<f32> {
    let curves = outcomes.first()?.curves.iter().enumerate();
    let mean = |head: usize| -> f64 {
        let kl = outcomes.iter().map(|outcome| {
            let end = outcome.curves[head].end(ending);
            end.parts[0].and_then(|all| all.kl).unwrap_or(f64::INFINITY)
        });
        kl.sum()
    };
    let best = curves.min_by(|a, b| mean(a.0).total_cmp(&mean(b.0)));
    best.map(|(_, curve)| curve.mean_smoothing)
}

/// [`best`], and 95 % of what it is where seeds are resampled.
pub fn best_of_seeds(outcomes: &[&OfStretch], ending: Ending) -> Option<Interval> {
    let mean = f64::from(best(outcomes, ending)?);
    let of = |drawn: &[&OfStretch]| best(drawn, ending).map(f64::from);
    let resamples = resampled(outcomes, RESAMPLES, of);
    Some(Interval {
        mean,
        ..percentiles(resamples)
    })
}
