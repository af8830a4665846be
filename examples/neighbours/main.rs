//! Methods related to uncertainty-aware learning, each a few lines on this crate's loss: row losses, row weights and the
//! statistics that come with them. Every module but [`problem`] and [`runs`] is one method's training step.
//!
//! ```sh
//! cargo run --release --example neighbours            # all
//! cargo run --release --example neighbours -- dro     # one: dro, feasible, pseudo-labels, reliable, gradient-norm,
//!                                                     # confidence, adaptation
//! ```
//!
//! The problem is a toy; the numbers show that a step does what it should, not how good a method is.

mod adaptation;
mod confidence;
mod dro;
mod feasible;
mod gradient_norm;
mod problem;
mod pseudo_labels;
mod reliable;
mod runs;
#[cfg(test)]
mod tests;

use candle_core::{Result, bail};

type Method = (&'static str, fn() -> Result<String>);

const METHODS: [Method; 7] = [
    ("dro", dro_report),
    ("feasible", feasible_report),
    ("pseudo-labels", pseudo_labels_report),
    ("reliable", reliable_report),
    ("gradient-norm", gradient_norm_report),
    ("confidence", confidence_report),
    ("adaptation", adaptation_report),
];

fn main() -> Result<()> {
    let wanted: Vec<String> = std::env::args().skip(1).collect();
    if let Some(name) = wanted
        .iter()
        .find(|name| METHODS.iter().all(|(n, _)| n != name))
    {
        bail!(
            "no method {name}; there are {}",
            METHODS.map(|(name, _)| name).join(", ")
        )
    }
    for (name, report) in METHODS {
        if wanted.is_empty() || wanted.iter().any(|w| w == name) {
            println!("{name:14} {}", report()?);
        }
    }
    Ok(())
}

fn dro_report() -> Result<String> {
    let runs::Dro {
        minority_weight: [first, last],
        minority_loss: [plain, robust],
    } = runs::dro()?;
    Ok(format!(
        "minority's weight {first:.2} → {last:.2}; its loss {robust:.3}, plainly trained {plain:.3}"
    ))
}

fn feasible_report() -> Result<String> {
    let run = runs::feasible()?;
    let active = run.multipliers.iter().filter(|m| **m > 0.0).count();
    let satisfied = run.always_satisfied.iter().filter(|s| **s).count();
    let [plain, feasible] = run.largest_loss;
    Ok(format!(
        "largest loss {feasible:.3}, bound {}, after plain training {plain:.3}; {active} of {} multipliers rose above 0, \
         {satisfied} samples were always within the bound",
        run.bound,
        run.multipliers.len()
    ))
}

fn pseudo_labels_report() -> Result<String> {
    let run = runs::pseudo_labels()?;
    let [accepted, all] = run.accuracy;
    let [before, after, unadjusted] = run.test_accuracy;
    Ok(format!(
        "{} labels, {accepted:.3} right (of all predictions {all:.3}); test accuracy {before:.3} → {after:.3}, without \
         adjustment {unadjusted:.3}",
        run.accepted
    ))
}

fn reliable_report() -> Result<String> {
    let run = runs::reliable()?;
    let [selected, all] = run.accuracy;
    let [certain, mean] = run.disagreement;
    let [before, after] = run.test_accuracy;
    Ok(format!(
        "selected labels {selected:.3} right (of all {all:.3}), their disagreement {certain:.4} (of all {mean:.4}); \
         test accuracy {before:.3} → {after:.3}"
    ))
}

fn gradient_norm_report() -> Result<String> {
    let run = runs::gradient_norm()?;
    let of = |by: &str, asked: &runs::Asked| {
        format!(
            "{} selected by the {by}: {:.3} of them predicted wrongly (of all {:.3}), their entropy {:.3}, test accuracy \
             {:.3} → {:.3}",
            asked.selected,
            asked.wrong,
            run.wrong,
            asked.entropy,
            run.test_accuracy,
            asked.test_accuracy
        )
    };
    Ok([
        of("entropy's gradient", &run.by_entropy),
        of("loss's", &run.by_loss),
    ]
    .join("; "))
}

fn confidence_report() -> Result<String> {
    let run = runs::confidence()?;
    let [wrong, right] = run.weight;
    let [plain, weighted] = run.test_accuracy;
    Ok(format!(
        "weights of wrong labels {wrong:.2}, of right ones {right:.2}; test accuracy {weighted:.3}, plainly trained {plain:.3}"
    ))
}

fn adaptation_report() -> Result<String> {
    let run = runs::adaptation()?;
    let [before, after] = run.accuracy;
    let [entropy_before, entropy_after] = run.entropy;
    Ok(format!(
        "accuracy on turned data {before:.3} → {after:.3}, entropy {entropy_before:.3} → {entropy_after:.3}"
    ))
}
