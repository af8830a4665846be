//! `forward_linear` of ranks that share the device, each with some rows of the output projection.

use anyhow::{Result, ensure};
use candle_core::{DType, Device};

use super::{
    SMALL, compare,
    problem::{Outcome, Placement, Problem},
};
use crate::{
    cases::{OPTIONS, REDUCTIONS},
    ranks::{bits, classes_of, on_ranks, whole},
    report::{Report, Worst},
};

pub fn run(device: &Device, reduced: bool, report: &mut Report) {
    for dtype in [DType::F32, DType::BF16] {
        for (o, options) in OPTIONS.iter().enumerate() {
            let all = options.name.ends_with("all at once");
            if reduced && !all {
                continue;
            }
            let name = format!("linear ranks {} {}", dtype.as_str(), options.name);
            report.numbers(&name, || {
                let mut worst = Worst::default();
                for (s, &shape) in SMALL[..3].iter().enumerate() {
                    let reduction = REDUCTIONS[(s + o) % 4];
                    let problem = Problem::new(dtype, *options, shape, reduction, s as u64)?;
                    worst.merge(slices(&problem, device)?);
                }
                Ok(worst)
            });
        }
    }
}

/// Three ranks, not in the order of their classes, one of them with one class, in tiles of a few.
fn slices(problem: &Problem, device: &Device) -> Result<Worst> {
    let vocab = problem.shape.vocab;
    let first_classes = [vocab / 2, 0, vocab - 1];
    let size = problem.logit_size(device);
    let results = on_ranks(3, |comm| {
        let classes = classes_of(first_classes[comm.rank()], &first_classes, vocab);
        let tiles = 7 * problem.shape.row_count() * size;
        let of_rank = problem.of_rank(comm, classes)?;
        let loss = of_rank.loss.clone().tile_bytes(tiles).memory_budget(tiles);
        of_rank.run(device, &loss, Placement::Contiguous)
    });
    let results: Vec<Outcome> = results.into_iter().collect::<Result<_>>()?;
    for result in &results[1..] {
        for (what, a, b) in [
            ("the loss", &result.loss, &results[0].loss),
            ("entropy", &result.stats.entropy, &results[0].stats.entropy),
            (
                "hidden's gradient",
                &result.gradients[0],
                &results[0].gradients[0],
            ),
        ] {
            ensure!(
                bits(a)? == bits(b)?,
                "{}: {what} differs in bits",
                problem.label
            );
        }
    }
    let mut gradients = vec![results[0].gradients[0].clone()];
    for factor in 1..results[0].gradients.len() {
        let slices = results.iter().map(|result| &result.gradients[factor]);
        gradients.push(whole(slices, &first_classes, 0)?);
    }
    let got = Outcome {
        loss: results[0].loss.clone(),
        stats: results[0].stats.clone(),
        gradients,
    };
    let mut worst = Worst::default();
    compare::see(&mut worst, problem, &got, &problem.exact(device)?)?;
    Ok(worst)
}
