//! The map from uncertainty to smoothing: fitted on a data set, saved with the run.

use candle_core::{Device, Result, Tensor, bail};
use serde::{Deserialize, Serialize};

use super::curve::{Curve, Shape};

/// Map from uncertainty to smoothing, ε(u) = min(scale·height(u), max), whose mean over the data it was fitted on is a
/// given one. By default height(u) = u, and 0 for u ≤ 0; see [`Shape`] for others.
///
/// Saved by serde as `{"shape": …, "scale": …, "max": …}`, where the shape by ranks holds each fitted value once, with its
/// rank; without `shape` a map is linear, as those saved before there were shapes.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(try_from = "Unchecked")]
pub struct SmoothingMap {
    #[serde(rename = "shape")]
    curve: Curve,
    // f32 so that its shortest decimal form reads back as the same number, in any format.
    scale: f32,
    max: f32,
}

#[derive(Deserialize)]
#[serde(rename = "SmoothingMap")]
struct Unchecked {
    #[serde(default, rename = "shape")]
    curve: Curve,
    scale: f32,
    max: f32,
}

impl TryFrom<Unchecked> for SmoothingMap {
    type Error = String;

    fn try_from(Unchecked { curve, scale, max }: Unchecked) -> std::result::Result<Self, String> {
        curve.check()?;
        if !(scale.is_finite() && scale >= 0.0) {
            return Err(format!(
                "scale is {scale}; it must be finite and at least 0"
            ));
        }
        if !(0.0..=1.0).contains(&max) {
            return Err(format!("max is {max}; it must be in [0, 1]"));
        }
        Ok(Self { curve, scale, max })
    }
}

impl SmoothingMap {
    /// The linear map whose mean smoothing over `uncertainties` is `mean`, with no value above `max`.
    ///
    /// A loss that is a mean over rows counts a sample as often as it has rows. Where samples differ in length, give each
    /// uncertainty once for every row (token) of its sample's response: then `mean` is the mean over rows, and a
    /// constant smoothing of `mean` is spent as often.
    ///
    /// Fails when `max` is outside \[0, 1\], when `mean` is outside \[0, max\], when an uncertainty is not finite, and
    /// when no scale gives that mean because too many uncertainties are 0 or less.
    pub fn fit(uncertainties: &[f32], mean: f32, max: f32) -> Result<Self> {
        Self::fit_shape(Shape::Linear, uncertainties, mean, max)
    }

    /// [`fit`](Self::fit) with another shape. Fails as it does, when the exponent of [`Shape::Power`] is not a
    /// finite number above 0, and when the share of [`Shape::Floor`] is outside \[0, 1\]; [`Shape::Rank`],
    /// [`Shape::Constant`] and a floor above 0 reach every mean up to `max`.
    ///
    /// ```
    /// use candle_cross_entropy::ual::{Shape, SmoothingMap};
    ///
    /// # fn main() -> candle_core::Result<()> {
    /// let uncertainties = [1.0f32, 2.0, 3.0, 10.0];
    /// let smoothing = |shape| -> candle_core::Result<Vec<f32>> {
    ///     let map = SmoothingMap::fit_shape(shape, &uncertainties, 0.125, 0.5)?;
    ///     map.smoothing_values(&uncertainties)
    /// };
    /// assert_eq!(smoothing(Shape::Linear)?, [0.03125, 0.0625, 0.09375, 0.3125]);
    /// assert_eq!(smoothing(Shape::Rank)?, [0.03125, 0.09375, 0.15625, 0.21875]); // the outlier weighs no more
    /// assert_eq!(smoothing(Shape::Floor(0.5))?, [0.078125, 0.09375, 0.109375, 0.21875]); // half of it to all alike
    /// assert_eq!(smoothing(Shape::Constant)?, [0.125; 4]);
    /// # Ok(())
    /// # }
    /// ```
    pub fn fit_shape(shape: Shape, uncertainties: &[f32], mean: f32, max: f32) -> Result<Self> {
        if !(0.0..=1.0).contains(&max) {
            bail!("max is {max}; it must be in [0, 1]")
        }
        if !(0.0..=max).contains(&mean) {
            bail!("mean is {mean}; it must be in [0, max], and max is {max}")
        }
        if uncertainties.is_empty() {
            bail!("uncertainties is empty; there must be one of each training sample")
        }
        check_finite(uncertainties)?;
        let curve = Curve::new(shape, uncertainties)?;
        let scale = match mean {
            0.0 => 0.0,
            _ => fit_scale(&curve, uncertainties, mean, max)?,
        };
        Ok(Self { curve, scale, max })
    }

    /// The smoothing of a sample, in \[0, max\]. Fails when `uncertainty` is not finite.
    pub fn smoothing(&self, uncertainty: f32) -> Result<f32> {
        if !uncertainty.is_finite() {
            bail!("uncertainty is {uncertainty}; it must be finite")
        }
        Ok(self.evaluate(uncertainty))
    }

    /// The smoothing of each of `uncertainties`. Fails when one is not finite, naming its index.
    pub fn smoothing_values(&self, uncertainties: &[f32]) -> Result<Vec<f32>> {
        check_finite(uncertainties)?;
        Ok(uncertainties.iter().map(|&u| self.evaluate(u)).collect())
    }

    /// The smoothing of the B samples of a batch as a (B, 1) tensor, which broadcasts over targets (B, T). For packed
    /// batches and for uncertainties of tokens see [`Layout`](super::Layout).
    pub fn smoothing_column(&self, uncertainties: &[f32], device: &Device) -> Result<Tensor> {
        let values = self.smoothing_values(uncertainties)?;
        Tensor::from_vec(values, (uncertainties.len(), 1), device)
    }

    /// The largest smoothing the map gives.
    pub fn max(&self) -> f32 {
        self.max
    }

    /// Smoothing per unit of [height](Shape), where it is not clipped; for the linear shape, per unit of uncertainty.
    pub fn scale(&self) -> f32 {
        self.scale
    }

    /// How smoothing grows with uncertainty.
    pub fn shape(&self) -> Shape {
        self.curve.shape()
    }

    fn evaluate(&self, uncertainty: f32) -> f32 {
        if self.scale == 0.0 {
            return 0.0; // a height may be +inf
        }
        (f64::from(self.scale) * self.curve.height(uncertainty)).clamp(0.0, f64::from(self.max))
            as f32
    }
}

/// The scale that makes the mean over `uncertainties` `mean`, which is above 0, after clipping at `max`.
fn fit_scale(curve: &Curve, uncertainties: &[f32], mean: f32, max: f32) -> Result<f32> {
    let mut positive: Vec<f64> = uncertainties
        .iter()
        .map(|&u| curve.height(u))
        .filter(|&height| height > 0.0)
        .collect();
    let cap = f64::from(max);
    let budget = f64::from(mean) * uncertainties.len() as f64;
    let reachable = cap * positive.len() as f64;
    // Half an f32 step of tolerance: mean and max that are meant to be equal may come from different sums.
    if budget > reachable * (1.0 + f64::from(f32::EPSILON) / 2.0) {
        bail!(
            "mean is {mean}; it must be at most {}: of {} uncertainties {} are above 0, and max is {max}",
            reachable / uncertainties.len() as f64,
            uncertainties.len(),
            positive.len(),
        )
    }

    // The mean after clipping is the smallest, over all numbers of clipped values, of the mean with that many of
    // the largest at `max` and the others unclipped. So the scale is the largest of the solutions of these linear
    // equations. Summed from the smallest up, so that no small value is lost beside a large one.
    positive.sort_by(f64::total_cmp);
    let mut unclipped = 0.0;
    let mut scale = 0f64;
    for (i, height) in positive.iter().enumerate() {
        unclipped += height;
        let clipped = cap * (positive.len() - 1 - i) as f64;
        scale = scale.max((budget - clipped) / unclipped);
    }
    if scale > f64::from(f32::MAX) {
        let smallest = uncertainties
            .iter()
            .copied()
            .filter(|&u| u > 0.0)
            .fold(f32::MAX, f32::min);
        bail!("uncertainties above 0 start at {smallest:e}; they are too small to be scaled")
    }
    Ok(scale as f32)
}

fn check_finite(uncertainties: &[f32]) -> Result<()> {
    match uncertainties.iter().position(|u| !u.is_finite()) {
        Some(i) => bail!(
            "uncertainties[{i}] is {}; it must be finite",
            uncertainties[i]
        ),
        None => Ok(()),
    }
}
