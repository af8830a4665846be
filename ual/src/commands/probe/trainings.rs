//! Trainings of one draw of samples.

use anyhow::Result;
use candle_core::{Device, Tensor};
use rand::{SeedableRng, rngs::StdRng, seq::SliceRandom};

use crate::{
    commands::probe::{
        args::Args,
        arms::{Arm, Known, Spread, arms},
        heads::{Heads, Plan, Samples, Shape},
        hidden::Hidden,
        outcome::{Curve, Outcome, Point},
        questions::Questions,
        scores::Measured,
    },
    report::metrics::entropy,
};

/// Of the held-out samples: all; those that have one right response; of the others the half on which people agree more, and
/// that on which they agree less.
pub const PARTS: [&str; 4] = ["all", "exact", "agreed", "disputed"];

/// Most samples of a validation part.
const MOST_VALIDATION: usize = 2000;
/// Up to so many samples a training has all epochs.
const SMALL: usize = 500;
const WEIGHT_DECAY: f64 = 0.01;

pub struct Data<'a> {
    pub questions: &'a Questions,
    /// Of the samples to train on, then of those held out.
    pub hidden: &'a Hidden,
}

/// Indices of samples to train on.
pub struct Draw {
    pub train: Vec<usize>,
    pub validation: Vec<usize>,
}

impl Draw {
    /// As many to validate on as to train on, up to 2000, of `from`; all different.
    pub fn new(mut from: Vec<usize>, size: usize, rng: &mut StdRng) -> Self {
        from.shuffle(rng);
        let validation = from.split_off(from.len() - validation(size));
        from.truncate(size);
        Self {
            train: from,
            validation,
        }
    }
}

pub fn validation(size: usize) -> usize {
    size.min(MOST_VALIDATION)
}

pub fn plan(size: usize, seed: u64, args: &Args) -> Plan {
    let share = (SMALL as f64 / size as f64).sqrt().min(1.0);
    Plan {
        epochs: (args.epochs as f64 * share).round().max(1.0) as usize,
        batch: (size / 16).clamp(16, 64),
        learning_rate: args.lr,
        weight_decay: WEIGHT_DECAY,
        seed,
    }
}

/// Members of the [`PARTS`].
pub fn parts(truths: &[Vec<f64>]) -> Vec<(&'static str, Vec<usize>)> {
    let entropies: Vec<f64> = truths
        .iter()
        .map(|shares| entropy(shares.iter().copied()))
        .collect();
    let mut uncertain: Vec<f64> = entropies.iter().copied().filter(|&e| e > 0.0).collect();
    uncertain.sort_by(f64::total_cmp);
    let median = uncertain.get(uncertain.len() / 2).copied().unwrap_or(0.0);
    let wanted: [&dyn Fn(f64) -> bool; 4] =
        [&|_| true, &|e| e == 0.0, &|e| e > 0.0 && e < median, &|e| {
            e > 0.0 && e >= median
        }];
    let members = |wanted: &dyn Fn(f64) -> bool| {
        let all = entropies.iter().enumerate();
        all.filter(|(_, entropy)| wanted(**entropy))
            .map(|(i, _)| i)
            .collect()
    };
    let members = wanted.map(members);
    PARTS.into_iter().zip(members).collect()
}

/// What the trainings of a draw have in common. States have mean 0 and variance 1 over the samples that are trained on.
pub struct Trainings<'a> {
    data: &'a Data<'a>,
    args: &'a Args,
    draw: Draw,
    states: Tensor,
    validation: Tensor,
    held_out: Tensor,
    truths: Vec<Vec<f64>>,
    parts: Vec<(&'static str, Vec<usize>)>,
}

impl<'a> Trainings<'a> {
    /// Measured on all that is held out, or on `members` of it.
    pub fn new(
        data: &'a Data<'a>,
        draw: Draw,
        members: Option<&[usize]>,
        args: &'a Args,
    ) -> Result<Self> {
        let questions = data.questions;
        let all: Vec<usize> = (0..questions.held_out.len()).collect();
        let members = members.unwrap_or(&all);
        let states = |members: &[usize], first: usize| -> Result<Tensor> {
            let members: Vec<u32> = members.iter().map(|&i| (first + i) as u32).collect();
            let members = Tensor::new(members, &Device::Cpu)?;
            Ok(data.hidden.states.index_select(&members, 0)?)
        };
        let own = states(&draw.train, 0)?;
        let mean = own.mean_keepdim(0)?;
        let variance = own.broadcast_sub(&mean)?.sqr()?.mean_keepdim(0)?;
        let deviation = (variance + 1e-6)?.sqrt()?;
        let scaled = |states: &Tensor| -> Result<Tensor> {
            Ok(states.broadcast_sub(&mean)?.broadcast_div(&deviation)?)
        };
        let truths: Vec<Vec<f64>> = members
            .iter()
            .map(|&i| questions.held_out[i].truth.clone())
            .collect();
        Ok(Self {
            states: scaled(&own)?,
            validation: scaled(&states(&draw.validation, 0)?)?,
            held_out: scaled(&states(members, questions.train.len())?)?,
            parts: parts(&truths),
            truths,
            data,
            args,
            draw,
        })
    }

    fn of_train<T>(&self, value: impl Fn(usize) -> T) -> Vec<T> {
        self.draw.train.iter().map(|&i| value(i)).collect()
    }

    /// Every arm, side by side.
    pub fn all(&self, seed: u64) -> Result<Outcome> {
        let questions = &self.data.questions.train;
        let kinds = self.of_train(|i| questions[i].kind);
        let kinds: Option<Vec<usize>> = kinds.into_iter().collect();
        let known = Known {
            uncertainties: &self.of_train(|i| questions[i].uncertainty),
            own_entropies: &self.of_train(|i| self.data.hidden.entropies[i]),
            kinds: kinds.as_deref(),
        };
        let mut curves = Vec::new();
        for spread in Spread::ALL {
            // The same deals in every stack.
            let mut rng = StdRng::seed_from_u64(seed ^ 0x5eed);
            let arms = arms(spread, &known, &self.args.smoothings, &mut rng)?;
            curves.extend(self.side_by_side(spread, &arms, seed)?);
        }
        Ok(Outcome {
            seed,
            size: self.draw.train.len(),
            curves,
        })
    }

    /// Arms that spread smoothing alike.
    pub fn side_by_side(&self, spread: Spread, arms: &[Arm], seed: u64) -> Result<Vec<Curve>> {
        let responses = self.data.questions.responses.len();
        let outputs = match spread {
            Spread::Vocabulary => self.args.outputs,
            Spread::Responses | Spread::Frequencies => responses,
        };
        let device = &Device::Cpu;
        let heads = Heads::new(
            Shape {
                heads: arms.len(),
                input: self.states.dim(1)?,
                hidden: self.args.width,
                outputs,
            },
            seed,
            device,
        )?;
        let questions = &self.data.questions.train;
        let answers = self.of_train(|i| questions[i].answer as u32);
        let prior = (spread == Spread::Frequencies).then(|| {
            let mut counts = vec![0f32; outputs];
            answers.iter().for_each(|&i| counts[i as usize] += 1.0);
            Tensor::from_vec(counts, outputs, device)
        });
        let of_sample = |i| arms.iter().map(|arm| arm.smoothing[i]).collect();
        let samples = Samples {
            states: self.states.clone(),
            smoothing: (0..answers.len()).map(of_sample).collect(),
            answers,
            prior: prior.transpose()?,
        };
        let given = |&i: &usize| {
            let mut shares = vec![0.0; responses];
            shares[questions[i].answer] = 1.0;
            shares
        };
        let given: Vec<Vec<f64>> = self.draw.validation.iter().map(given).collect();
        let whole = vec![("all", (0..given.len()).collect())];
        let validation = Measured::new(given, outputs, whole)?;
        let held_out = Measured::new(self.truths.clone(), outputs, self.parts.clone())?;

        let mut curves: Vec<Curve> = arms
            .iter()
            .map(|arm| Curve {
                method: arm.method,
                spread,
                mean_smoothing: arm.mean,
                points: Vec::new(),
            })
            .collect();
        let plan = plan(samples.answers.len(), seed, self.args);
        heads.train(&samples, &plan, |epoch| {
            let validated = heads.logits(&self.validation)?;
            let logits = heads.logits(&self.held_out)?;
            for (head, curve) in curves.iter_mut().enumerate() {
                curve.points.push(Point {
                    epoch,
                    validation_nll: validation.nll(&validated.get(head)?)?,
                    parts: held_out.summaries(&logits.get(head)?)?,
                });
            }
            Ok(())
        })?;
        Ok(curves)
    }
}
