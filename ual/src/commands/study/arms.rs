//! The methods that the study compares, each with the samples that it trains on.

use std::borrow::Cow;

use anyhow::{Context, Result, ensure};
use rand::{SeedableRng, rngs::StdRng};

use crate::{
    data::samples::{Dataset, Sample},
    report::metrics,
    training::{
        args::Args,
        evaluate::evaluate_each,
        method::Method,
        setup::{self, Setup},
        smoothing::{Prior, dealt},
    },
};

/// Without smoothing.
pub const SFT: &str = "SFT";
/// What the others are compared with.
pub const UAL: &str = "UAL";
/// The control of `--group`.
pub const WITHIN: &str = "within kind";
/// [`UAL`] where that spreads smoothing evenly.
pub const UNIGRAM: &str = "UAL, unigram";
/// The same.
pub const RESPONSES: &str = "UAL, responses";
/// What these are compared with as well: constant smoothing that is spread as theirs.
pub const SPREAD_ALIKE: [(&str, &str); 2] = [
    (UNIGRAM, "constant, unigram"),
    (RESPONSES, "constant, responses"),
];
/// [`UAL`] by uncertainties that the model has itself.
pub const OWN: &str = "UAL, own entropy";

/// What an arm is there to answer, by its name.
pub const QUESTIONS: [(&str, &str); 9] = [
    (SFT, "has no smoothing: is smoothing worth anything at all?"),
    (
        "constant",
        "smooths all samples alike: is it worth anything that smoothing differs between samples?",
    ),
    (
        "shuffled",
        "is UAL with the same uncertainties dealt to the samples at random: does it help to know which samples are uncertain?",
    ),
    (
        WITHIN,
        "is the same, dealt among samples of one kind: do uncertainties say anything beyond the kind?",
    ),
    (
        UNIGRAM,
        "is UAL with its smoothing spread by how often the training samples' responses have a token: does it matter what \
         smoothing is spread over?",
    ),
    (
        RESPONSES,
        "is UAL with its smoothing spread evenly over the tokens of the training samples' responses: is it enough to leave \
         out the tokens that no response has?",
    ),
    (
        SPREAD_ALIKE[0].1,
        "smooths all samples alike, by the same frequencies: there, does it matter which samples are smoothed?",
    ),
    (
        SPREAD_ALIKE[1].1,
        "smooths all samples alike, over the tokens of responses: the same question.",
    ),
    (
        OWN,
        "is UAL by the mean entropy of the model's own predictions of a response before fine-tuning: are the given \
         uncertainties worth more than what the model has itself?",
    ),
];

/// The uncertainties of `samples`, dealt at random to those of the same `kind`.
fn shuffled(samples: &[Sample], seed: u64, kind: fn(&Sample) -> usize) -> Vec<Sample> {
    let uncertainties: Vec<f32> = samples.iter().map(|sample| sample.uncertainty).collect();
    let kinds: Vec<usize> = samples.iter().map(kind).collect();
    let mut rng = StdRng::seed_from_u64(seed ^ 0x5eed);
    let dealt = dealt(&uncertainties, &kinds, &mut rng);
    let sample = |(sample, uncertainty): (&Sample, f32)| Sample {
        uncertainty,
        ..sample.clone()
    };
    samples.iter().zip(dealt).map(sample).collect()
}

/// What sets a sample's smoothing, but for its mean.
#[derive(Clone, Copy, PartialEq)]
pub enum Smoothing {
    /// There is none.
    Nothing,
    Constant,
    Uncertainty,
}

/// A method, and what it trains on.
pub struct Arm<'a> {
    pub name: &'static str,
    pub smoothing: Smoothing,
    pub prior: Prior,
    pub samples: Cow<'a, [Sample]>,
}

impl Arm<'_> {
    /// Those of `means` that it is trained with.
    pub fn means(&self, means: &[f32]) -> Vec<f32> {
        match self.smoothing {
            Smoothing::Nothing => vec![0.0],
            Smoothing::Constant | Smoothing::Uncertainty => means.to_vec(),
        }
    }

    /// With this mean smoothing over its samples' rows. The map is fitted anew for each arm: dealt to other samples,
    /// uncertainties meet other lengths of responses.
    pub fn method(&self, mean: f32, args: &Args) -> Result<Method> {
        Ok(match self.smoothing {
            Smoothing::Nothing => Method::Sft,
            Smoothing::Constant => Method::Constant(mean),
            Smoothing::Uncertainty => {
                let args = Args {
                    mean_smoothing: mean,
                    ..args.clone()
                };
                let map = setup::fit(&self.samples, &args);
                map.map(Method::Ual).with_context(|| {
                    format!("the arm {:?} with a mean smoothing of {mean}", self.name)
                })?
            }
        })
    }

    /// An error if it cannot have one of the mean smoothings.
    pub fn check(&self, means: &[f32], args: &Args) -> Result<()> {
        let methods = self.means(means).into_iter();
        methods
            .map(|mean| self.method(mean, args))
            .try_for_each(|method| method.map(drop))
    }
}

/// All that can be said before there is a model.
pub fn arms<'a>(data: &'a Dataset, args: &Args) -> Vec<Arm<'a>> {
    let train = data.train.as_slice();
    let arm = |name, smoothing| Arm {
        name,
        smoothing,
        prior: args.smoothing_prior,
        samples: Cow::Borrowed(train),
    };
    let control = |name, kind: fn(&Sample) -> usize| Arm {
        samples: Cow::Owned(shuffled(train, args.seed, kind)),
        ..arm(name, Smoothing::Uncertainty)
    };
    let mut arms = vec![
        arm(SFT, Smoothing::Nothing),
        arm("constant", Smoothing::Constant),
        control("shuffled", |_| 0),
    ];
    if !data.groups.is_empty() {
        arms.push(control(WITHIN, |sample| sample.group));
    }
    if args.smoothing_prior == Prior::Even {
        let priors = [Prior::Unigram, Prior::Responses];
        for ((name, constant), prior) in SPREAD_ALIKE.into_iter().zip(priors) {
            arms.push(Arm {
                prior,
                ..arm(constant, Smoothing::Constant)
            });
            arms.push(Arm {
                prior,
                ..arm(name, Smoothing::Uncertainty)
            });
        }
    }
    arms.push(arm(UAL, Smoothing::Uncertainty));
    arms
}

/// The arm whose uncertainties are the model's, which has not been fine-tuned yet: the mean entropy of its predictions of a
/// response's tokens, what ends it among them, divided by the largest possible, log V.
pub fn own_entropy(setup: &Setup, args: &Args) -> Result<Arm<'static>> {
    let train: Vec<&Sample> = setup.data.train.iter().collect();
    let rows = evaluate_each(&setup.model, &train, setup.plan.batch)?;
    let largest = (setup.model.output_projection().dim(0)? as f64).ln();
    let scored = train.iter().zip(rows).map(|(sample, rows)| {
        let entropy = metrics::mean(rows.iter().map(|row| row.entropy));
        let share = entropy.context("a sample without a response")? / largest;
        ensure!(share.is_finite(), "the model's predictions are not finite");
        Ok(Sample {
            uncertainty: share.clamp(0.0, 1.0) as f32, // rounding
            ..(*sample).clone()
        })
    });
    Ok(Arm {
        name: OWN,
        smoothing: Smoothing::Uncertainty,
        prior: args.smoothing_prior,
        samples: Cow::Owned(scored.collect::<Result<_>>()?),
    })
}
