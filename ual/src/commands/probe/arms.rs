//! The trainings that are compared: what sets a sample's smoothing, and what that is spread over.

use anyhow::{Context, Result};
use candle_cross_entropy::ual::{Shape, SmoothingMap};
use rand::Rng;
use serde::Serialize;

use crate::training::smoothing::{Map, dealt};

/// Largest smoothing of a sample: no bound of its own, so that every mean can be had.
const MAX: f32 = 1.0;

/// What sets a sample's smoothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub enum Method {
    Plain,
    Constant,
    /// The same uncertainties as UAL, dealt to the samples at random.
    Shuffled,
    /// The same, dealt among samples of one kind.
    WithinKind,
    /// By the entropy of the frozen model's own prediction.
    OwnEntropy,
    Ual,
    /// UAL by the square of the uncertainty.
    Squared,
    /// UAL by its rank among the training samples.
    Rank,
    /// UAL that smooths samples above their median uncertainty, equally, and others not.
    Threshold,
    /// UAL of which half is given to all samples alike: certain ones are smoothed too.
    Floor,
}

/// What smoothing is spread over.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub enum Spread {
    /// The responses that there are, evenly.
    Responses,
    /// The same, by how often the training samples have them.
    Frequencies,
    /// The outputs of a language model, most of which are no response, evenly.
    Vocabulary,
}

use Method::*;

impl Method {
    pub fn name(self) -> &'static str {
        match self {
            Plain => "plain",
            Constant => "constant",
            Shuffled => "shuffled",
            WithinKind => "within kind",
            OwnEntropy => "UAL, own entropy",
            Ual => "UAL",
            Squared => "UAL, squared",
            Rank => "UAL, rank",
            Threshold => "UAL, threshold",
            Floor => "UAL, floor",
        }
    }
}

impl Spread {
    pub const ALL: [Self; 3] = [Self::Responses, Self::Frequencies, Self::Vocabulary];

    pub fn name(self) -> &'static str {
        match self {
            Self::Responses => "responses",
            Self::Frequencies => "frequencies",
            Self::Vocabulary => "vocabulary",
        }
    }

    /// The maps are compared where smoothing is spread over the responses.
    fn methods(self) -> &'static [Method] {
        let all = &[
            Constant, Shuffled, WithinKind, OwnEntropy, Ual, Squared, Rank, Threshold, Floor,
        ];
        match self {
            Self::Responses => all,
            Self::Frequencies | Self::Vocabulary => &all[..5],
        }
    }
}

/// What is known of the training samples, a value each.
pub struct Known<'a> {
    pub uncertainties: &'a [f32],
    pub own_entropies: &'a [f32],
    /// None where samples are not told apart by kind.
    pub kinds: Option<&'a [usize]>,
}

/// One training: a head of a stack.
#[derive(Clone, Debug)]
pub struct Arm {
    pub method: Method,
    /// Over the training samples; 0 of [`Plain`].
    pub mean: f32,
    /// Of every training sample.
    pub smoothing: Vec<f32>,
}

/// All that spread smoothing in one way. There is a plain one where the outputs are the responses, and one where they are
/// a vocabulary.
pub fn arms(spread: Spread, known: &Known, means: &[f32], rng: &mut impl Rng) -> Result<Vec<Arm>> {
    let plain = Arm {
        method: Plain,
        mean: 0.0,
        smoothing: vec![0.0; known.uncertainties.len()],
    };
    let mut arms = Vec::new();
    if spread != Spread::Frequencies {
        arms.push(plain);
    }
    for &method in spread.methods() {
        if method == WithinKind && known.kinds.is_none() {
            continue;
        }
        let uncertainties = uncertainties(method, known, rng);
        let shape = match method {
            Constant => Shape::Constant,
            Squared => Map::Squared.shape(),
            Rank => Map::Rank.shape(),
            Floor => Map::Floor.shape(),
            _ => Map::Linear.shape(),
        };
        for &mean in means {
            let map = SmoothingMap::fit_shape(shape, &uncertainties, mean, MAX)
                .with_context(|| format!("{} with mean smoothing {mean}", method.name()))?;
            arms.push(Arm {
                method,
                mean,
                smoothing: map.smoothing_values(&uncertainties)?,
            });
        }
    }
    Ok(arms)
}

fn uncertainties(method: Method, known: &Known, rng: &mut impl Rng) -> Vec<f32> {
    let given = known.uncertainties;
    match method {
        OwnEntropy => known.own_entropies.to_vec(),
        Shuffled => dealt(given, &vec![0; given.len()], rng),
        WithinKind => dealt(given, known.kinds.expect("samples have kinds"), rng),
        Threshold => {
            let mut sorted = given.to_vec();
            sorted.sort_by(f32::total_cmp);
            let median = sorted[sorted.len() / 2];
            given
                .iter()
                .map(|&u| f32::from(u8::from(u >= median)))
                .collect()
        }
        _ => given.to_vec(),
    }
}
