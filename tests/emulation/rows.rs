//! Rows that each have a reason to be in a grid.

use rand::{Rng, SeedableRng, rngs::StdRng};
use rand_distr::{Distribution, Normal};

use super::problem::{Eps, OnChip, Problem, Tiles, View, round};
use crate::kernels::abi::Element;

#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Kind {
    Normal,
    /// Normal plus a constant, which must change nothing; far below 0 a maximum that starts at 0 shows.
    Shifted(f32),
    /// p_y next to 1, where the loss and the target's gradient lose their digits first.
    Confident,
    /// All logits equal: the lowest index is predicted.
    Flat,
    /// Along the row by 300 in all, so that what sums are relative to changes again and again.
    Rising,
    /// Most probabilities underflow.
    Spread,
    /// So far from 0 that a rounding error of one is larger than any exponent; the largest twice.
    Far(f32),
    /// About a third of the classes have the lowest finite value, a mask as other libraries have them.
    Lowest,
    LowestTarget,
    AllLowest,
    /// About a third of the classes are −inf, not the target.
    Masked,
    MaskedTarget,
    AllMasked,
    Nan,
    Infinite,
    Ignored,
    BadTarget,
}

#[derive(Clone, Copy, Debug)]
pub struct Row {
    pub kind: Kind,
    pub eps: f32,
    pub weight: f32,
}

pub const fn row(kind: Kind, eps: f32, weight: f32) -> Row {
    Row { kind, eps, weight }
}

/// Every rule of a row once, those with smoothing with and without. First and last rows are ignored.
pub fn menu() -> Vec<Row> {
    use Kind::*;
    vec![
        row(Ignored, 0.1, 1.0),
        row(Normal, 0.1, 1.0),
        row(Shifted(-300.0), 0.3, 0.5),
        row(Shifted(200.0), 0.0, 2.0),
        row(Normal, 1.0, 1.25),
        row(Masked, 0.0, 1.0),
        row(Masked, 0.2, 1.0),
        row(MaskedTarget, 0.0, 1.0),
        row(MaskedTarget, 0.1, 3.0),
        row(AllMasked, 0.0, 1.0),
        row(AllMasked, 0.1, 1.0),
        row(Nan, 0.1, 1.0),
        row(Infinite, 0.0, 1.0),
        row(Confident, 0.0, 1.0),
        row(Confident, 0.1, 1.0),
        row(Flat, 0.05, 1.0),
        row(Spread, 0.05, 1.0),
        row(Rising, 0.1, 1.0),
        row(Normal, 0.1, 0.0),
        row(Nan, 0.1, 0.0),
        row(AllMasked, 0.1, 0.0),
        row(MaskedTarget, 0.1, 0.0),
        row(Ignored, f32::NAN, f32::NAN),
    ]
}

/// Rows whose values in the device's tensors are out of range, between good ones.
pub fn bad_menu() -> Vec<Row> {
    use Kind::*;
    vec![
        row(Normal, 0.1, 1.0),
        row(Normal, -0.1, 1.0),
        row(Normal, f32::NAN, 1.0),
        row(BadTarget, 0.1, 1.0),
        row(Normal, 0.1, 0.5),
        row(Normal, 1.5, 1.0),
        row(Normal, 0.1, -1.0),
        row(Normal, 0.1, f32::NAN),
        row(Normal, 0.1, f32::INFINITY),
        row(BadTarget, 0.1, 0.0),
        row(BadTarget, f32::NAN, f32::NAN),
        row(Normal, 0.1, 1.0),
    ]
}

/// A problem with these rows, contiguous, and every option at a value that matters.
pub fn problem(name: &str, element: Element, vocab: usize, rows: &[Row]) -> Problem {
    let mut problem = Problem {
        name: format!("{name}, {} V = {vocab}", element.name()),
        element,
        vocab,
        width: vocab,
        logits: Vec::new(),
        targets: Vec::new(),
        targets_are_i64: true,
        distribution: None,
        eps: Eps::PerRow(rows.iter().map(|row| row.eps).collect()),
        weights: Some(rows.iter().map(|row| row.weight).collect()),
        z_loss: 0.01,
        logit_scale: 0.75,
        softcap: None,
        logits_view: View::contiguous(rows.len(), vocab),
        grad_view: View::contiguous(rows.len(), vocab),
        upstream: vec![0.5],
        mean: false,
        result_scale: 1.5,
        on_chip: [(1, false), (4, true)]
            .map(|(blocks_per_row, in_place)| OnChip {
                blocks_per_row,
                in_place,
                threads: if vocab > 8192 { 256 } else { 64 },
            })
            .to_vec(),
        tiles: vec![Tiles {
            rows: 5,
            classes: vocab / 3 + 1,
            stats: vocab % 2 == 1,
        }],
        ranks: Vec::new(),
        seeds: vec![0, 1, 2],
    };
    for (i, row) in rows.iter().enumerate() {
        let mut rng = StdRng::seed_from_u64((vocab as u64) << 16 | i as u64);
        let target = match i % 3 {
            0 => vocab - 1,
            1 => 0,
            _ => rng.random_range(0..vocab),
        };
        let mut logits = values(row.kind, vocab, target, i, &mut rng);
        let lowest = lowest(element);
        logits.iter_mut().for_each(|x| {
            if x.is_finite() {
                *x = x.clamp(lowest, -lowest);
            }
        });
        logits.iter_mut().for_each(|x| *x = round(element, *x));
        problem.logits.extend(logits);
        problem.targets.push(match row.kind {
            Kind::Ignored => problem.ignore_index(),
            Kind::BadTarget if i % 2 == 0 => vocab as i64,
            // Wraps to a good class in 32 bits.
            Kind::BadTarget => 1 << 32,
            _ => target as i64,
        });
    }
    problem
}

fn values(kind: Kind, vocab: usize, target: usize, i: usize, rng: &mut StdRng) -> Vec<f32> {
    let (mean, deviation) = match kind {
        Kind::Shifted(by) => (by, 3.0),
        Kind::Far(deviation) => (0.0, deviation),
        Kind::Spread => (0.0, 1000.0),
        Kind::Flat => (1.5, 0.0),
        Kind::Confident => (0.0, 1.0),
        _ => (0.0, 3.0),
    };
    let normal = Normal::new(mean, deviation).expect("a finite deviation");
    let mut x: Vec<f32> = (0..vocab).map(|_| normal.sample(rng)).collect();
    let somewhere = i * 7919 % vocab;
    match kind {
        Kind::Confident => x[target] = 25.0,
        Kind::Rising => {
            let rise = |(k, x): (usize, &mut f32)| *x += 300.0 * k as f32 / vocab as f32;
            x.iter_mut().enumerate().for_each(rise);
        }
        Kind::Far(_) => {
            let largest = x.iter().copied().fold(f32::MIN, f32::max);
            x[somewhere] = largest;
        }
        Kind::Lowest => {
            let lowest = x.iter_mut().filter(|_| rng.random_range(0..3) == 0);
            lowest.for_each(|x| *x = f32::MIN);
        }
        Kind::LowestTarget => x[target] = f32::MIN,
        Kind::AllLowest => x.fill(f32::MIN),
        Kind::Masked | Kind::MaskedTarget => {
            x.iter_mut().for_each(|x| {
                *x = if rng.random_range(0..3) == 0 {
                    f32::NEG_INFINITY
                } else {
                    *x
                }
            });
            x[target] = if kind == Kind::Masked {
                0.5
            } else {
                f32::NEG_INFINITY
            };
        }
        Kind::AllMasked => x.fill(f32::NEG_INFINITY),
        Kind::Nan => x[somewhere] = f32::NAN,
        Kind::Infinite => x[somewhere] = f32::INFINITY,
        _ => {}
    }
    x
}

/// The lowest finite value.
fn lowest(element: Element) -> f32 {
    match element {
        Element::F32 => f32::MIN,
        Element::F16 => -65504.0,
        Element::BF16 => -3.389_531_4e38,
    }
}
