//! Shapes of the map: how high an uncertainty stands before it is scaled and clipped.

use candle_core::Result;
use serde::{Deserialize, Serialize};

/// How smoothing grows with uncertainty: ε(u) = min(scale·height(u), max).
///
/// Linear is the crate's reading of uncertainty-aware learning; the others are for ablation.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub enum Shape {
    /// height(u) = u, and 0 for u ≤ 0.
    #[default]
    Linear,
    /// height(u) = (u/unit)^γ, and 0 for u ≤ 0, with γ > 0, where unit is the largest of the fitted uncertainties:
    /// γ > 1 spends the smoothing on the most uncertain samples, γ < 1 spreads it.
    Power(f32),
    /// height(u) = the mid-rank of u in the fitted set, as a share of it: (#below + #equal/2)/n, in (0, 1), the same for
    /// equal values whatever their sign. Interpolated linearly between fitted values, constant outside them.
    Rank,
    /// height(u) = floor + (1 − floor)·max(u, 0)/mean, with floor in \[0, 1\], where mean is that of max(u, 0) over the
    /// fitted set: where nothing is clipped, this share of the mean smoothing goes to all samples alike, and the rest by
    /// uncertainty. 0 is linear, 1 constant.
    Floor(f32),
    /// height(u) = 1: every sample gets the mean smoothing.
    Constant,
}

/// A shape with what it took from the fitted set.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum Curve {
    #[default]
    Linear,
    Power {
        exponent: f32,
        unit: f32,
    },
    /// The fitted set's values, each once and ascending, and the mid-rank of each.
    Rank {
        uncertainties: Vec<f32>,
        ranks: Vec<f32>,
    },
    Floor {
        floor: f32,
        mean: f32,
    },
    Constant,
}

impl Curve {
    /// `uncertainties` are finite, and there is at least one.
    pub fn new(shape: Shape, uncertainties: &[f32]) -> Result<Self> {
        Ok(match shape {
            Shape::Linear => Self::Linear,
            Shape::Power(exponent) => {
                check_exponent(exponent).map_err(candle_core::Error::msg)?;
                let largest = uncertainties.iter().copied().fold(0.0, f32::max);
                // Without an uncertainty above 0 all heights are 0, whatever the unit.
                let unit = if largest > 0.0 { largest } else { 1.0 };
                Self::Power { exponent, unit }
            }
            Shape::Rank => mid_ranks(uncertainties),
            Shape::Floor(floor) => {
                check_floor(floor).map_err(candle_core::Error::msg)?;
                let sum: f64 = uncertainties.iter().map(|&u| f64::from(u.max(0.0))).sum();
                let mean = (sum / uncertainties.len() as f64) as f32;
                // Without an uncertainty above 0 all heights are the floor, whatever the mean.
                let mean = if mean > 0.0 { mean } else { 1.0 };
                Self::Floor { floor, mean }
            }
            Shape::Constant => Self::Constant,
        })
    }

    pub fn shape(&self) -> Shape {
        match self {
            Self::Linear => Shape::Linear,
            Self::Power { exponent, .. } => Shape::Power(*exponent),
            Self::Rank { .. } => Shape::Rank,
            Self::Floor { floor, .. } => Shape::Floor(*floor),
            Self::Constant => Shape::Constant,
        }
    }

    /// At least 0; +inf where a power leaves f64's range.
    pub fn height(&self, uncertainty: f32) -> f64 {
        let u = f64::from(uncertainty);
        match self {
            Self::Linear => u.max(0.0),
            Self::Power { exponent, unit } => {
                (u.max(0.0) / f64::from(*unit)).powf(f64::from(*exponent))
            }
            Self::Rank {
                uncertainties,
                ranks,
            } => {
                let above = uncertainties.partition_point(|&v| v <= uncertainty);
                let rank = |i: usize| f64::from(ranks[i]);
                if above == 0 {
                    rank(0)
                } else if above == uncertainties.len() {
                    rank(above - 1)
                } else {
                    let (low, high) = (
                        f64::from(uncertainties[above - 1]),
                        f64::from(uncertainties[above]),
                    );
                    let share = (u - low) / (high - low);
                    // min: rounding must not lift it over the next value's rank.
                    (rank(above - 1) + share * (rank(above) - rank(above - 1))).min(rank(above))
                }
            }
            Self::Floor { floor, mean } => {
                let floor = f64::from(*floor);
                floor + (1.0 - floor) * u.max(0.0) / f64::from(*mean)
            }
            Self::Constant => 1.0,
        }
    }

    /// Of a curve that was read from a file.
    pub fn check(&self) -> std::result::Result<(), String> {
        match self {
            Self::Linear | Self::Constant => Ok(()),
            Self::Power { exponent, unit } => {
                check_exponent(*exponent)?;
                if !(unit.is_finite() && *unit > 0.0) {
                    return Err(format!("unit is {unit}; it must be finite and above 0"));
                }
                Ok(())
            }
            Self::Floor { floor, mean } => {
                check_floor(*floor)?;
                if !(mean.is_finite() && *mean > 0.0) {
                    return Err(format!("mean is {mean}; it must be finite and above 0"));
                }
                Ok(())
            }
            Self::Rank {
                uncertainties,
                ranks,
            } => {
                if uncertainties.is_empty() || uncertainties.len() != ranks.len() {
                    return Err(format!(
                        "uncertainties has {} values and ranks {}; they must be as many, and at least one",
                        uncertainties.len(),
                        ranks.len()
                    ));
                }
                if !uncertainties.iter().all(|u| u.is_finite())
                    || !uncertainties.is_sorted_by(|a, b| a < b)
                {
                    return Err("uncertainties must be finite and ascending".into());
                }
                if !ranks.iter().all(|r| (0.0..=1.0).contains(r)) || !ranks.is_sorted() {
                    return Err("ranks must be in [0, 1] and not descending".into());
                }
                Ok(())
            }
        }
    }
}

fn check_exponent(exponent: f32) -> std::result::Result<(), String> {
    if !(exponent.is_finite() && exponent > 0.0) {
        return Err(format!(
            "exponent is {exponent}; it must be finite and above 0"
        ));
    }
    Ok(())
}

fn check_floor(floor: f32) -> std::result::Result<(), String> {
    if !(0.0..=1.0).contains(&floor) {
        return Err(format!("floor is {floor}; it must be in [0, 1]"));
    }
    Ok(())
}

fn mid_ranks(uncertainties: &[f32]) -> Curve {
    let mut sorted: Vec<f32> = uncertainties.iter().map(|u| u + 0.0).collect(); // −0 is 0
    sorted.sort_by(f32::total_cmp);
    let (mut values, mut ranks) = (Vec::new(), Vec::new());
    let mut below = 0;
    for equal in sorted.chunk_by(|a, b| a == b) {
        values.push(equal[0]);
        let rank = below as f64 + equal.len() as f64 / 2.0;
        ranks.push((rank / sorted.len() as f64) as f32);
        below += equal.len();
    }
    Curve::Rank {
        uncertainties: values,
        ranks,
    }
}
