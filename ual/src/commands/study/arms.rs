//! The methods that the study compares, each with the samples that it trains on.

use std::{borrow::Cow, collections::BTreeMap};

use anyhow::{Context, Result};
use rand::{SeedableRng, rngs::StdRng, seq::SliceRandom};

use crate::{
    data::samples::{Dataset, Sample},
    training::{args::Args, method::Method, setup, smoothing::Prior},
};

/// What the others are compared with.
pub const UAL: &str = "UAL";
/// The control of `--group`.
pub const WITHIN: &str = "within kind";
/// [`UAL`] where that spreads smoothing evenly.
pub const UNIGRAM: &str = "UAL, unigram";

/// The uncertainties of `samples`, dealt at random to those of the same `kind`.
fn shuffled(samples: &[Sample], seed: u64, kind: fn(&Sample) -> usize) -> Vec<Sample> {
    let mut kinds: BTreeMap<usize, Vec<f32>> = BTreeMap::new();
    for sample in samples {
        let uncertainties = kinds.entry(kind(sample)).or_default();
        uncertainties.push(sample.uncertainty);
    }
    let mut rng = StdRng::seed_from_u64(seed ^ 0x5eed);
    for uncertainties in kinds.values_mut() {
        uncertainties.shuffle(&mut rng);
    }
    let deal = |sample: &Sample| {
        let left = kinds.get_mut(&kind(sample)).and_then(Vec::pop);
        Sample {
            uncertainty: left.expect("one for each sample"),
            ..sample.clone()
        }
    };
    samples.iter().map(deal).collect()
}

/// A method, and what it trains on.
pub struct Arm<'a> {
    pub name: &'static str,
    pub method: Method,
    pub prior: Prior,
    pub samples: Cow<'a, [Sample]>,
}

pub fn arms<'a>(data: &'a Dataset, args: &Args) -> Result<Vec<Arm<'a>>> {
    let train = data.train.as_slice();
    let plain = |name, method| Arm {
        name,
        method,
        prior: args.smoothing_prior,
        samples: Cow::Borrowed(train),
    };
    // Each with a map of the same mean: dealt anew, uncertainties meet other lengths of responses.
    let control = |name: &'static str, kind: fn(&Sample) -> usize| -> Result<Arm> {
        let samples = shuffled(train, args.seed, kind);
        let map = setup::fit(&samples, args).with_context(|| format!("the control {name:?}"))?;
        Ok(Arm {
            name,
            method: Method::Ual(map),
            prior: args.smoothing_prior,
            samples: Cow::Owned(samples),
        })
    };
    let mut arms = vec![
        plain("SFT", Method::Sft),
        plain("constant", Method::Constant(args.mean_smoothing)),
        control("shuffled", |_| 0)?,
    ];
    if !data.groups.is_empty() {
        arms.push(control(WITHIN, |sample| sample.group)?);
    }
    let ual = plain(UAL, Method::Ual(setup::fit(train, args)?));
    if args.smoothing_prior == Prior::Even {
        arms.push(Arm {
            prior: Prior::Unigram,
            ..plain(UNIGRAM, ual.method.clone())
        });
    }
    arms.push(ual);
    Ok(arms)
}
