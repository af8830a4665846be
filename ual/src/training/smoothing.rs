//! The smoothing map of given uncertainties, and what to do where there can be none; what smoothing is spread over.

use std::{collections::BTreeMap, fmt};

use anyhow::{Context, Result, bail};
use candle_core::{Device, Tensor};
use candle_cross_entropy::ual::{Shape, SmoothingMap};
use clap::ValueEnum;
use rand::{Rng, seq::SliceRandom};
use serde::Serialize;

use crate::data::samples::Sample;

/// `--mean-smoothing` and `--max-smoothing` where they are not given.
pub const MEAN: f32 = 0.1;
pub const MAX: f32 = 0.5;

/// How a sample's smoothing follows its uncertainty.
#[derive(Clone, Copy, Debug, Default, PartialEq, ValueEnum, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Map {
    /// In proportion to it
    #[default]
    Linear,
    /// In proportion to its square
    Squared,
    /// By its rank among the training samples
    Rank,
    /// Half of the mean smoothing to all samples alike, half in proportion to the uncertainty
    Floor,
}

/// As on the command line.
impl fmt::Display for Map {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        let value = self.to_possible_value().expect("none is skipped");
        f.write_str(value.get_name())
    }
}

impl Map {
    pub fn shape(self) -> Shape {
        match self {
            Self::Linear => Shape::Linear,
            Self::Squared => Shape::Power(2.0),
            Self::Rank => Shape::Rank,
            Self::Floor => Shape::Floor(0.5),
        }
    }

    /// Whether samples without uncertainty are smoothed.
    fn smooths_all(self) -> bool {
        match self {
            Self::Linear | Self::Squared => false,
            Self::Rank | Self::Floor => true,
        }
    }
}

/// What smoothing is spread over.
#[derive(Clone, Copy, Debug, Default, PartialEq, ValueEnum, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Prior {
    /// All tokens evenly
    Even,
    /// Tokens by how often they are in the training samples' responses
    #[default]
    Unigram,
    /// Those tokens evenly that are in the training samples' responses
    Responses,
}

impl Prior {
    /// The share of each of `vocab` tokens, (V) f32, which sum to 1; none where all have the same.
    pub fn shares(
        self,
        samples: &[Sample],
        vocab: usize,
        device: &Device,
    ) -> candle_core::Result<Option<Tensor>> {
        let counts = counts(samples, vocab);
        let weights = match self {
            Self::Even => return Ok(None),
            Self::Unigram => counts,
            Self::Responses => counts.into_iter().map(|count| count.min(1)).collect(),
        };
        let all = weights.iter().sum::<u64>().max(1) as f64;
        let shares = weights.into_iter().map(|n| (n as f64 / all) as f32);
        Ok(Some(Tensor::from_vec(shares.collect(), vocab, device)?))
    }
}

/// How often each of `vocab` tokens is in the samples' responses.
fn counts(samples: &[Sample], vocab: usize) -> Vec<u64> {
    let mut counts = vec![0u64; vocab];
    for sample in samples {
        for (i, &token) in sample.tokens.iter().enumerate() {
            counts[token as usize] += u64::from(sample.is_response(i));
        }
    }
    counts
}

/// A sample's uncertainty, and how many rows, tokens of its response, it has.
pub type Weighted = (f32, usize);

/// With the mean over rows. Fails with an [`obstacle`].
pub fn fit(samples: &[Weighted], map: Map, mean: f32, max: f32) -> Result<SmoothingMap> {
    if let Some(obstacle) = obstacle(samples, mean, max).filter(|_| !map.smooths_all()) {
        bail!(obstacle);
    }
    let of_rows = samples.iter().flat_map(|&(u, n)| std::iter::repeat_n(u, n));
    let of_rows: Vec<f32> = of_rows.collect();
    SmoothingMap::fit_shape(map.shape(), &of_rows, mean, max)
        .context("the uncertainties of the training samples")
}

/// Why no map has this mean: too few rows have an uncertainty above 0. Names the options, and values that work.
pub fn obstacle(samples: &[Weighted], mean: f32, max: f32) -> Option<String> {
    let rows = |samples: &mut dyn Iterator<Item = &Weighted>| -> usize {
        samples.map(|&(_, rows)| rows).sum()
    };
    let all = rows(&mut samples.iter());
    let uncertain = || samples.iter().filter(|(uncertainty, _)| *uncertainty > 0.0);
    let smoothed = rows(&mut uncertain());
    let (mean, max) = (f64::from(mean), f64::from(max));
    // The map's own tolerance.
    if mean * all as f64 <= max * smoothed as f64 * (1.0 + f64::from(f32::EPSILON) / 2.0) {
        return None;
    }
    let beginning = format!(
        "--mean-smoothing is {}, the mean over the tokens of the training samples' responses, and",
        mean as f32
    );
    if smoothed == 0 {
        return Some(format!(
            "{beginning} every uncertainty is 0, so that UAL would smooth nothing. With --mean-smoothing 0 nothing is \
             smoothed at all; else score the samples in another way (`ual elicit` with --local, another --model or more \
             --votes)"
        ));
    }
    let share = smoothed as f64 / all as f64;
    let mut text = format!(
        "{beginning} of {all} such tokens {smoothed}, those of {} of {} samples, have an uncertainty above 0: others are \
         not smoothed, and these by --max-smoothing {} at most. --mean-smoothing {} works",
        uncertain().count(),
        samples.len(),
        max as f32,
        rounded(share * max, f64::floor)
    );
    if mean / share <= 0.9 {
        let larger = rounded(mean / share, f64::ceil);
        text += &format!(", or --max-smoothing {larger}");
    }
    text += ", or --smoothing-map floor, which smooths the others too";
    Some(text)
}

/// What makes the comparison pointless, though it can be made: all samples are equally uncertain.
pub fn warning(samples: &[Weighted]) -> Option<String> {
    let (first, _) = samples.first()?;
    let equal = *first > 0.0 && samples.iter().all(|(uncertainty, _)| uncertainty == first);
    equal.then(|| {
        format!(
            "all uncertainties are {first}: UAL is then constant smoothing, and will do no better and no worse than it"
        )
    })
}

/// Two digits of a number in (0, 1\].
fn rounded(value: f64, round: fn(f64) -> f64) -> String {
    let digits = (1.0 - value.log10().floor()).max(1.0);
    let unit = 10f64.powf(digits);
    let digits = digits as usize;
    format!("{:.digits$}", round(value * unit) / unit)
}

/// The values, dealt at random among those of one kind; `kinds` has each one's.
pub fn dealt(values: &[f32], kinds: &[usize], rng: &mut impl Rng) -> Vec<f32> {
    let mut of_kinds: BTreeMap<usize, Vec<f32>> = BTreeMap::new();
    for (&value, &kind) in values.iter().zip(kinds) {
        of_kinds.entry(kind).or_default().push(value);
    }
    for values in of_kinds.values_mut() {
        values.shuffle(rng);
    }
    let deal = |kind| of_kinds.get_mut(kind).and_then(Vec::pop);
    let dealt = kinds.iter().map(deal);
    dealt
        .map(|value| value.expect("one for each sample"))
        .collect()
}
