//! `forward_linear` against the f64 reference of the whole logits, and beside candle's products of whole logits in the
//! same type: the grid over types, options, sizes, tiles and budgets.

mod compare;
mod problem;
mod properties;
mod ranks;

use anyhow::{Result, ensure};
use candle_core::{DType, Device};

use crate::{
    cases::{OPTIONS, Options, REDUCTIONS},
    report::{Report, Worst},
};
use compare::Unfused;
use problem::{Outcome, Placement, Problem, Shape, TYPES};

/// Every option meets these.
const SMALL: &[Shape] = &[
    Shape {
        rows: &[3, 5],
        vocab: 41, // slices of the vocabulary, 41 too
        depth: 24,
        bias: true,
    },
    Shape {
        rows: &[9],
        vocab: 300,
        depth: 33, // rows of hidden and weight at every alignment
        bias: false,
    },
    Shape {
        rows: &[9, 10],
        vocab: 17, // blocks of rows
        depth: 24,
        bias: true,
    },
    Shape {
        rows: &[1, 1],
        vocab: 2100,
        depth: 16,
        bias: false,
    },
];

/// The plain one and all at once meet these.
const LARGE: &[Shape] = &[
    Shape {
        rows: &[4, 128],
        vocab: 4099, // prime: the last slice is odd
        depth: 64,
        bias: true,
    },
    Shape {
        rows: &[1031],
        vocab: 257,
        depth: 72,
        bias: false,
    },
];

/// Where rounding once a tile, or sums kept in a narrow type, would show.
const FOR_PRECISION: &[Shape] = &[
    Shape {
        rows: &[64],
        vocab: 8192,
        depth: 256,
        bias: false,
    },
    Shape {
        rows: &[4096],
        vocab: 256,
        depth: 64,
        bias: false,
    },
];

pub fn run(device: &Device, reduced: bool, report: &mut Report) {
    for dtype in TYPES {
        for (o, options) in OPTIONS.iter().enumerate() {
            let plain_or_all = o == 0 || options.name.ends_with("all at once");
            let (small, large): (&[_], &[_]) = match (reduced, plain_or_all) {
                (true, false) => continue,
                (true, true) => (&SMALL[..3], &[]),
                (false, false) => (SMALL, &[]),
                (false, true) => (SMALL, LARGE),
            };
            let name = format!("linear {} {}", dtype.as_str(), options.name);
            report.numbers(&name, || {
                let mut worst = Worst::default();
                for (s, &shape) in small.iter().chain(large).enumerate() {
                    // Every option meets every reduction.
                    let reduction = REDUCTIONS[(s + o) % 4];
                    let problem = Problem::new(dtype, *options, shape, reduction, s as u64)?;
                    worst.merge(tiles_and_budgets(&problem, device, reduced)?);
                }
                Ok(worst)
            });
        }
        if !reduced {
            let name = format!("linear {} errors beside whole logits", dtype.as_str());
            report.numbers(&name, || precision(dtype, device));
        }
    }
    properties::run(device, reduced, report);
    ranks::run(device, reduced, report);
}

/// From one class or row at a time to all at once; the budgets keep nothing, half and all. No bit depends on a budget.
fn tiles_and_budgets(problem: &Problem, device: &Device, reduced: bool) -> Result<Worst> {
    let mut worst = Worst::default();
    let exact = problem.exact(device)?;
    let unfused = Unfused::measure(problem, &exact, device)?;
    let (rows, vocab) = (problem.shape.row_count(), problem.shape.vocab);
    let (short, long) = (rows.min(vocab), rows.max(vocab));
    let size = problem.logit_size(device);
    let narrow: &[usize] = if reduced { &[7] } else { &[1, 7, 100] };
    let some = narrow
        .iter()
        .copied()
        .filter(|extent| (*extent..=100 * extent).contains(&long))
        .chain([long / 3 + 1]);
    let tiles = some.map(|extent| Some(extent * short * size)).chain([None]);
    for tile in tiles {
        let loss = match tile {
            Some(bytes) => problem.loss.clone().tile_bytes(bytes),
            None => problem.loss.clone(),
        };
        let mut first: Option<Vec<u64>> = None;
        for budget in [0, rows * vocab * size / 2, rows * (vocab + 8) * size] {
            let got = problem.run(
                device,
                &loss.clone().memory_budget(budget),
                Placement::Contiguous,
            )?;
            if let Some(first) = &first {
                ensure!(
                    *first == bits(&got)?,
                    "{}, tiles of {tile:?} bytes: bits depend on the budget",
                    problem.label
                );
                continue;
            }
            compare::see(&mut worst, problem, &got, &exact)?;
            // So few numbers that their errors may differ by chance.
            unfused.see(&mut worst, problem, &got, &exact, 2.0)?;
            first = Some(bits(&got)?);
        }
        // Without statistics and without a gradient other kernels run, and nothing is kept.
        let alone = problem.on(device, &loss)?.forward_linear(
            &problem.hidden.to_device(device)?,
            &problem.weight.to_device(device)?,
            problem
                .bias
                .as_ref()
                .map(|bias| bias.to_device(device))
                .transpose()?
                .as_ref(),
            problem.targets_on(device)?,
        )?;
        ensure!(
            !alone.track_op(),
            "{}: tracked without a variable",
            problem.label
        );
        compare::see_loss(&mut worst, problem, &alone, &exact)?;
    }
    Ok(worst)
}

/// Errors no larger than those of one unfused pass in the same type.
fn precision(dtype: DType, device: &Device) -> Result<Worst> {
    let mut worst = Worst::default();
    let plain = OPTIONS[0];
    let smoothed = Options {
        uniform: Some(0.1),
        ..plain
    };
    for &shape in FOR_PRECISION {
        let problem = Problem::new(dtype, smoothed, shape, REDUCTIONS[0], 9)?;
        let exact = problem.exact(device)?;
        let unfused = Unfused::measure(&problem, &exact, device)?;
        let tile = shape.row_count().min(shape.vocab) * 128 * problem.logit_size(device);
        for tile in [Some(tile), None] {
            let mut loss = problem.loss.clone().memory_budget(0);
            if let Some(tile) = tile {
                loss = loss.tile_bytes(tile);
            }
            let got = problem.run(device, &loss, Placement::Contiguous)?;
            compare::see(&mut worst, &problem, &got, &exact)?;
            unfused.see(&mut worst, &problem, &got, &exact, 1.25)?;
        }
    }
    Ok(worst)
}

/// Of everything; widening 16-bit values to f64 keeps their bits apart.
fn bits(outcome: &Outcome) -> Result<Vec<u64>> {
    let stats = crate::ranks::all(&outcome.stats);
    let all = [&outcome.loss].into_iter().chain(stats);
    let all = all.chain(&outcome.gradients).map(crate::ranks::bits);
    Ok(all.collect::<Result<Vec<_>>>()?.concat())
}
