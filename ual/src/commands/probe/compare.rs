//! Which trainings are compared, and what each comparison asks.

use std::fmt;

use crate::{
    commands::probe::{
        arms::{
            Method::{self, *},
            Spread::{self, *},
        },
        outcome::{Ending, Outcome},
    },
    report::{
        metrics::Summary,
        statistics::{Interval, bootstrap},
    },
};

/// Trainings, one a mean smoothing, of which the best on the validation part counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ArmName(pub Method, pub Spread);

impl fmt::Display for ArmName {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        match self {
            Self(method, Responses) => f.write_str(method.name()),
            Self(method, spread) => write!(f, "{}, over {}", method.name(), spread.name()),
        }
    }
}

/// The first less the second, and the question that the difference answers.
pub type Question = (ArmName, ArmName, &'static str);

const UAL: ArmName = ArmName(Ual, Responses);

pub const QUESTIONS: [Question; 16] = [
    (
        UAL,
        ArmName(Plain, Responses),
        "Does smoothing that follows uncertainty help?",
    ),
    (
        ArmName(Constant, Responses),
        ArmName(Plain, Responses),
        "Does the same smoothing of all samples help?",
    ),
    (
        UAL,
        ArmName(Constant, Responses),
        "Does it matter which samples are smoothed?",
    ),
    (
        UAL,
        ArmName(Shuffled, Responses),
        "Is it knowing the uncertainties, and not that smoothing varies?",
    ),
    (
        UAL,
        ArmName(WithinKind, Responses),
        "Do uncertainties say more than of what kind a sample is?",
    ),
    (
        UAL,
        ArmName(OwnEntropy, Responses),
        "Are people's disagreements worth more than the model's own entropy?",
    ),
    (
        ArmName(Ual, Frequencies),
        UAL,
        "Is smoothing by the responses' frequencies better than evenly over them?",
    ),
    (
        ArmName(Ual, Frequencies),
        ArmName(Constant, Frequencies),
        "With frequencies, does it matter which samples are smoothed?",
    ),
    (
        ArmName(Ual, Vocabulary),
        ArmName(Plain, Vocabulary),
        "Does UAL help where smoothing goes to a whole vocabulary?",
    ),
    (
        ArmName(Ual, Vocabulary),
        ArmName(Constant, Vocabulary),
        "There, does it matter which samples are smoothed?",
    ),
    (
        ArmName(Squared, Responses),
        UAL,
        "Is smoothing by the square of the uncertainty better?",
    ),
    (ArmName(Rank, Responses), UAL, "Is smoothing by its rank?"),
    (
        ArmName(Floor, Responses),
        UAL,
        "Is giving half of the smoothing to all samples alike, and half by uncertainty?",
    ),
    (
        ArmName(Floor, Responses),
        ArmName(Constant, Responses),
        "Is that better than giving all of it to all alike?",
    ),
    (
        ArmName(Rank, Responses),
        ArmName(Constant, Responses),
        "Is the rank better than that?",
    ),
    (
        ArmName(Threshold, Responses),
        UAL,
        "Is smoothing the more uncertain half alone?",
    ),
];

pub type Metric = (&'static str, fn(&Summary) -> Option<f64>);

/// All but accuracy are the better the lower.
pub const METRICS: [Metric; 4] = [
    ("KL", |s| s.kl),
    ("ECE", |s| Some(s.ece)),
    ("Brier", |s| Some(s.brier)),
    ("accuracy", |s| Some(s.accuracy)),
];

/// A metric of an arm, a value a seed.
pub fn values(
    outcomes: &[&Outcome],
    arm: ArmName,
    ending: Ending,
    part: usize,
    metric: fn(&Summary) -> Option<f64>,
) -> Vec<f64> {
    let value = |outcome: &&Outcome| {
        let (_, end) = outcome.chosen((arm.0, arm.1), ending)?;
        metric(end.parts[part].as_ref()?)
    };
    outcomes.iter().filter_map(value).collect()
}

/// Of the differences of all seeds, the first less the second. None where one was not trained.
pub fn difference(
    outcomes: &[&Outcome],
    (first, second): (ArmName, ArmName),
    ending: Ending,
    part: usize,
    metric: fn(&Summary) -> Option<f64>,
) -> Option<Interval> {
    let of = |arm| values(outcomes, arm, ending, part, metric);
    let (first, second) = (of(first), of(second));
    let pairs = first.iter().zip(&second).map(|(a, b)| a - b);
    bootstrap(&pairs.collect::<Vec<_>>())
}
