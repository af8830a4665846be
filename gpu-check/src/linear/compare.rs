//! How far results of a device are from the exact ones, in units of what they may be off.

use anyhow::{Context, Result};
use candle_core::{DType, Device, Tensor};
use candle_cross_entropy::Reduction;

use super::problem::{Exact, Outcome, Problem};
use crate::{
    cases::{gradient_tolerance, off, values},
    report::Worst,
};

/// Errors of the path that holds whole logits on the same device, root mean square of each gradient.
pub struct Unfused(Vec<f64>);

impl Unfused {
    pub fn measure(problem: &Problem, exact: &Exact, device: &Device) -> Result<Self> {
        let gradients = problem.run_unfused(device)?;
        let errors = gradients
            .iter()
            .zip(&exact.outcome.gradients)
            .map(|(got, exact)| {
                // Without the padding's gradient, which is 0 in both.
                let exact = exact.narrow(0, 0, got.dims()[0])?;
                error(got, &exact)
            });
        Ok(Self(errors.collect::<Result<_>>()?))
    }

    /// The gradients' errors may be `factor` times as large, and differ as sums in another order do.
    pub fn see(
        &self,
        worst: &mut Worst,
        problem: &Problem,
        got: &Outcome,
        exact: &Exact,
        factor: f64,
    ) -> Result<()> {
        let gradients = got.gradients.iter().zip(&exact.outcome.gradients);
        for ((name, theirs), (got, exact)) in NAMES.iter().zip(&self.0).zip(gradients) {
            let (ours, size) = (error(got, exact)?, root_mean_square(&values(exact)?));
            worst.see(off(ours, 0.0, factor * theirs + 2e-6 * size), || {
                format!(
                    "error of the gradient of {name}, {}: {ours:e}, unfused {theirs:e}, of {size:e}",
                    problem.label
                )
            });
        }
        Ok(())
    }
}

const NAMES: [&str; 3] = ["hidden", "weight", "bias"];

fn root_mean_square(values: &[f64]) -> f64 {
    (values.iter().map(|v| v * v).sum::<f64>() / values.len() as f64).sqrt()
}

fn error(got: &Tensor, exact: &Tensor) -> Result<f64> {
    let (got, exact) = (values(got)?, values(exact)?);
    let differences: Vec<f64> = got.iter().zip(exact).map(|(a, e)| a - e).collect();
    Ok(root_mean_square(&differences))
}

/// Loss, statistics and gradients, each within what rounded logits explain.
pub fn see(worst: &mut Worst, problem: &Problem, got: &Outcome, exact: &Exact) -> Result<()> {
    see_loss(worst, problem, &got.loss, exact)?;
    see_stats(worst, problem, got, exact)?;
    // A gradient of a logit is off by its own rounding and by what the logits' does to the probabilities.
    let gradients = got.gradients.iter().zip(&exact.outcome.gradients);
    for (name, (got, exact_gradient)) in NAMES.iter().zip(gradients) {
        let expected = values(exact_gradient)?;
        let largest = expected.iter().fold(0.0, |m: f64, g| m.max(g.abs()));
        for (i, (got, e)) in values(got)?.into_iter().zip(expected).enumerate() {
            let rounding = match problem.dtype() {
                DType::F32 => 0.0,
                dtype => 0.505 * gradient_tolerance(dtype, e),
            };
            let tolerance = rounding + 4.0 * exact.blur * largest;
            worst.see(off(got, e, tolerance), || {
                format!(
                    "gradient of {name} {i}, {}: {got:e} for {e:e}",
                    problem.label
                )
            });
        }
    }
    Ok(())
}

pub fn see_loss(worst: &mut Worst, problem: &Problem, got: &Tensor, exact: &Exact) -> Result<()> {
    let expected = values(&exact.outcome.loss)?;
    let shares = match problem.reduction {
        Reduction::None => exact.shares.clone(),
        _ => vec![exact.shares.iter().sum()],
    };
    for (i, ((got, e), share)) in values(got)?
        .into_iter()
        .zip(expected)
        .zip(shares)
        .enumerate()
    {
        // A target's logit and the normaliser may be off in opposite directions.
        let tolerance = 1e-5 * e.abs() + 2.0 * exact.blur * share;
        worst.see(off(got, e, tolerance), || {
            format!("loss {i}, {}: {got:e} for {e:e}", problem.label)
        });
    }
    Ok(())
}

fn see_stats(worst: &mut Worst, problem: &Problem, got: &Outcome, exact: &Exact) -> Result<()> {
    let (stats, expected) = (&got.stats, &exact.outcome.stats);
    // By how many times the logits' error each may be off.
    let compared = [
        ("nll", &stats.nll, &expected.nll, 2.0),
        ("lse", &stats.lse, &expected.lse, 1.0),
        ("entropy", &stats.entropy, &expected.entropy, 8.0),
        ("max_prob", &stats.max_prob, &expected.max_prob, 2.0),
        (
            "grad_norm_sq",
            &stats.grad_norm_sq,
            &expected.grad_norm_sq,
            8.0,
        ),
    ];
    for (name, got, expected, sensitivity) in compared {
        for (row, (got, e)) in values(got)?.into_iter().zip(values(expected)?).enumerate() {
            let tolerance = 1e-5 * e.abs() + sensitivity * exact.blur;
            worst.see(off(got, e, tolerance), || {
                format!("{name} of row {row}, {}: {got:e} for {e:e}", problem.label)
            });
        }
    }
    // Logits that are equal once they are rounded leave the choice open.
    let predicted = values(&stats.predicted)?
        .into_iter()
        .zip(values(&expected.predicted)?);
    for (row, (got, e)) in predicted.enumerate() {
        let logit = |class: f64| {
            let row = exact.logits.chunks(problem.shape.vocab).nth(row);
            let logit = row.and_then(|row| row.get(class as usize));
            logit.copied().context("no such class")
        };
        let behind = if got == e {
            0.0
        } else {
            logit(e)? - logit(got)?
        };
        let ignored = exact.shares[row] == 0.0 && got != e;
        let error = if ignored {
            f64::INFINITY
        } else {
            behind / (2.0 * exact.blur)
        };
        worst.see(error, || {
            format!("predicted of row {row}, {}: {got} for {e}", problem.label)
        });
    }
    Ok(())
}
