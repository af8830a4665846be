//! Runs the CUDA kernels' own source on the CPU and compares with the reference: plainly, under AddressSanitizer and
//! UndefinedBehaviorSanitizer, and with a race detector. `kernels/emulation/README.md` says how.
#![cfg(unix)]

mod build;
mod case;
mod check;
mod distributions;
mod faults;
mod geometry;
#[path = "../../src/kernels/mod.rs"]
mod kernels;
mod mutants;
mod paths;
mod problem;
mod ranks;
mod rows;
mod runs;

use std::{collections::BTreeSet, process::Command};

use build::{Build, driver};
use check::{Results, check, same_bits};
use distributions::{
    bad_distributions_stay_in_their_row, distributions_at_every_small_size, distributions_in_tiles,
    distributions_of_every_magnitude, distributions_of_long_rows,
};
use faults::faults_are_reported;
use kernels::abi::{Element, Kernel};
use problem::{Eps, OnChip, Problem, Tiles, View};
use ranks::{ranks_of_every_shape, ranks_that_are_given_differently};
use rows::{Kind, Row, bad_menu, menu, problem, row};

macro_rules! in_every_build {
    ($($property:ident)*) => {
        mod plain { $(#[test] fn $property() { super::$property(super::Build::Plain); })* }
        mod sanitized { $(#[test] fn $property() { super::$property(super::Build::Sanitized); })* }
        mod races { $(#[test] fn $property() { super::$property(super::Build::Races); })* }
    };
}

in_every_build! {
    every_rule_at_every_small_size
    sizes_round_a_block_and_a_vocabulary
    softcap
    every_magnitude
    options_one_by_one
    rows_at_every_address
    strided_rows
    padding_is_not_read_and_has_gradient_0
    bad_values_stay_in_their_row
    mean_and_many_rows
    clusters_of_every_size
    chunks_of_a_slice
    tiles_of_every_shape
    ranks_of_every_shape
    ranks_that_are_given_differently
    a_row_has_the_same_bits_anywhere
    distributions_at_every_small_size
    distributions_of_long_rows
    distributions_in_tiles
    distributions_of_every_magnitude
    bad_distributions_stay_in_their_row
    faults_are_reported
}

#[track_caller]
fn passes(problem: &Problem, build: Build) -> Results {
    check(problem, build).unwrap_or_else(|error| panic!("{error}"))
}

/// A few rows for the long ones: shifts, masks, both ends of ε.
fn short_menu() -> Vec<Row> {
    vec![
        row(Kind::Shifted(-300.0), 0.1, 1.5),
        row(Kind::Masked, 0.25, 1.0),
        row(Kind::Shifted(200.0), 0.0, 1.0),
    ]
}

/// One class; round 16 bytes of each type; round a warp's vectors.
fn every_rule_at_every_small_size(build: Build) {
    for element in Element::ALL {
        for vocab in [1, 2, 3, 7, 8, 9, 31, 32, 33] {
            passes(&problem("every rule", element, vocab, &menu()), build);
        }
    }
}

/// An even number of vectors, one element either side of a power of two, more than one step of a block's loop, and a
/// real vocabulary that is odd.
fn sizes_round_a_block_and_a_vocabulary(build: Build) {
    for element in Element::ALL {
        for vocab in [255, 1000, 1023, 1024, 1025] {
            let rows = if vocab == 1023 { menu() } else { short_menu() };
            passes(&problem("sizes", element, vocab, &rows), build);
        }
        if element == Element::F32 {
            let rows = [row(Kind::Shifted(1e4), 0.1, 1.0); 3];
            passes(
                &Problem {
                    z_loss: 0.0,
                    ..problem("far from 0", element, 100, &rows)
                },
                build,
            );
        }
        for vocab in [4097, 50257] {
            let rows = &short_menu()[..if vocab == 50257 { 2 } else { 3 }];
            let mut problem = problem("long rows", element, vocab, rows);
            problem.seeds = vec![0, 3];
            passes(&problem, build);
        }
    }
}

fn softcap(build: Build) {
    for element in Element::ALL {
        for vocab in [1, 9, 33, 1023] {
            let rows = if vocab == 1023 { short_menu() } else { menu() };
            let mut problem = problem("softcap", element, vocab, &rows);
            problem.softcap = Some(30.0);
            passes(&problem, build);
        }
    }
    // The unrolled loops of both sweeps, and masks in them.
    let rows = match build {
        Build::Plain => menu(),
        _ => short_menu(),
    };
    for (element, offset) in [(Element::BF16, 0), (Element::F16, 6), (Element::F32, 4)] {
        let mut problem = problem("long rows, softcap", element, 20_011, &rows);
        problem.softcap = Some(30.0);
        problem.seeds = vec![0];
        (problem.logits_view.offset, problem.grad_view.offset) = (offset, offset);
        passes(&problem, build);
    }
}

/// Deviations near a type's limits.
fn far(element: Element) -> [f32; 2] {
    match element {
        Element::F16 => [3e4, 1e-4],
        _ => [1e10, 1e38],
    }
}

/// Logits up to the types' limits, under scales and softcaps from small to large.
fn every_magnitude(build: Build) {
    let rows = |far: [f32; 2]| {
        vec![
            row(Kind::Far(far[0]), 0.0, 1.0),
            row(Kind::Far(far[1]), 0.1, 0.5),
            row(Kind::Lowest, 0.0, 1.0),
            row(Kind::Lowest, 0.1, 1.0),
            row(Kind::LowestTarget, 0.1, 1.0),
            row(Kind::AllLowest, 0.1, 1.0),
            row(Kind::Normal, 0.1, 1.0),
            row(Kind::MaskedTarget, 0.1, 1.0),
            row(Kind::Masked, 1.0, 1.0),
        ]
    };
    for element in Element::ALL {
        for (vocab, scale, softcap) in [
            (3, 0.7, None),
            (33, 1.0, None),
            (33, 1e30, None),
            (40, 1e-30, None),
            (7, 5e37, None),
            (33, 0.75, Some(30.0)),
            (33, 1.0, Some(1e4)),
            (40, 1e-3, Some(1e5)),
            (9, 1e30, Some(2.0)),
            (1100, 0.5, None),
        ] {
            let mut problem = problem("magnitudes", element, vocab, &rows(far(element)));
            problem.name += &format!(", scale {scale}, softcap {softcap:?}");
            (problem.logit_scale, problem.softcap, problem.z_loss) = (scale, softcap, 0.0);
            passes(&problem, build);
        }
    }
}

/// Each option alone, so that no other hides its absence; and none of them.
fn options_one_by_one(build: Build) {
    let rows: Vec<Row> = [
        Kind::Ignored,
        Kind::Normal,
        Kind::Masked,
        Kind::Confident,
        Kind::Shifted(200.0),
        Kind::Ignored,
    ]
    .map(|kind| row(kind, 0.0, 1.0))
    .to_vec();
    for element in Element::ALL {
        let plain = Problem {
            eps: Eps::Uniform(0.0),
            weights: None,
            z_loss: 0.0,
            logit_scale: 1.0,
            upstream: vec![1.0],
            result_scale: 1.0,
            ..problem("no options", element, 41, &rows)
        };
        let named = |name: &str| Problem {
            name: format!("{name}, {}", plain.name),
            ..plain.clone()
        };
        let n = rows.len();
        let per_row = |values: [f32; 6]| values.to_vec();
        let variants = [
            plain.clone(),
            Problem {
                targets_are_i64: false,
                ..named("u32 targets")
            },
            Problem {
                eps: Eps::Uniform(0.1),
                ..named("uniform smoothing")
            },
            Problem {
                eps: Eps::Uniform(1.0),
                ..named("nothing but smoothing")
            },
            Problem {
                eps: Eps::PerRow(per_row([0.9, 0.1, 0.2, 0.0, 1.0, 0.9])),
                ..named("smoothing of each row")
            },
            Problem {
                weights: Some(per_row([9.0, 0.5, 2.0, 1.0, 0.0, 9.0])),
                ..named("weights")
            },
            Problem {
                z_loss: 0.1,
                ..named("z-loss")
            },
            Problem {
                logit_scale: 0.5,
                ..named("scale")
            },
            Problem {
                softcap: Some(5.0),
                ..named("softcap")
            },
            Problem {
                softcap: Some(5.0),
                logit_scale: 2.0,
                z_loss: 0.1,
                eps: Eps::Uniform(0.1),
                ..named("all of z")
            },
            Problem {
                upstream: vec![-2.0],
                ..named("upstream")
            },
            Problem {
                upstream: (0..n).map(|i| i as f32 - 1.5).collect(),
                ..named("upstream of each row")
            },
            Problem {
                result_scale: 0.125,
                ..named("result scale")
            },
            Problem {
                mean: true,
                result_scale: 0.5,
                ..named("mean")
            },
        ];
        for mut problem in variants {
            // Weights and targets that an ignored row must not use.
            if !problem.targets_are_i64 {
                problem
                    .targets
                    .iter_mut()
                    .for_each(|t| *t = if *t < 0 { i64::from(u32::MAX) } else { *t });
            }
            passes(&problem, build);
        }
    }
}

/// Every start of a row relative to 16 bytes, the gradient's the same or another.
fn rows_at_every_address(build: Build) {
    for element in Element::ALL {
        let size = element.size();
        for offset in (0..16).step_by(size) {
            for (vocab, grad_offset) in [(5, offset), (45, (offset + size) % 16), (70, 16 - size)] {
                let mut problem = problem("addresses", element, vocab, &short_menu());
                problem.name += &format!(", logits at {offset}, gradient at {grad_offset}");
                problem.logits_view.offset = offset;
                problem.grad_view.offset = grad_offset;
                problem.seeds = vec![0, 1];
                passes(&problem, build);
            }
        }
    }
}

/// A slice of the vocabulary, a transposed batch, every second row, all at once with four dimensions.
fn strided_rows(build: Build) {
    for element in Element::ALL {
        let rows = [menu(), menu()].concat().split_off(22);
        assert_eq!(rows.len(), 24);
        let vocab = 37;
        let view = |sizes: &[usize], strides: &[usize], offset: usize| View {
            sizes: sizes.to_vec(),
            strides: strides.to_vec(),
            offset: offset * element.size(),
        };
        let views = [
            view(&[24], &[vocab + 3], 1),
            view(&[6, 4], &[4 * vocab, vocab], 0),
            view(&[3, 2, 4], &[2 * vocab + 5, 500, 1000], 3),
            view(&[2, 3, 2, 2], &[vocab + 1, 200, 3000, 1000], 2),
        ];
        for (i, logits_view) in views.iter().enumerate() {
            let problem = Problem {
                logits_view: logits_view.clone(),
                grad_view: views[(i + 1) % views.len()].clone(),
                seeds: vec![0, 1],
                ..problem(&format!("strided rows {i}"), element, vocab, &rows)
            };
            passes(&problem, build);
        }
    }
}

fn padding_is_not_read_and_has_gradient_0(build: Build) {
    for element in Element::ALL {
        for (vocab, width) in [(1, 2), (7, 8), (33, 64), (40, 41), (70, 300)] {
            let problem = Problem {
                width,
                logits_view: View::contiguous(menu().len(), width),
                grad_view: View {
                    offset: element.size(),
                    ..View::contiguous(menu().len(), width)
                },
                ..problem(&format!("padded to {width}"), element, vocab, &menu())
            };
            passes(&problem, build);
        }
    }
}

fn bad_values_stay_in_their_row(build: Build) {
    for element in Element::ALL {
        for vocab in [1, 33] {
            passes(&problem("bad values", element, vocab, &bad_menu()), build);
        }
        // A u32 target cannot be negative but may be anything above.
        let mut problem = problem("bad u32 targets", element, 9, &bad_menu());
        problem.targets_are_i64 = false;
        problem
            .targets
            .iter_mut()
            .for_each(|t| *t = (*t).min(i64::from(u32::MAX) - 1));
        passes(&problem, build);
        // A uniform smoothing is checked by the host; bad targets without weights remain.
        problem.weights = None;
        problem.eps = Eps::Uniform(0.1);
        passes(&problem, build);
    }
}

/// More rows than the reduction has threads, than its threads take at once; none that counts.
fn mean_and_many_rows(build: Build) {
    for (count, element) in [
        (1, Element::F32),
        (1023, Element::F16),
        (1025, Element::BF16),
        (4200, Element::F32),
    ] {
        let rows: Vec<Row> = (0..count)
            .map(|i| row(Kind::Normal, 0.1, [1.0, 0.25, 2.0, 0.0][i % 4]))
            .collect();
        let mut problem = problem("many rows", element, 2, &rows);
        problem.mean = true;
        problem.on_chip.clear(); // what is new here is the reduction
        problem.tiles.clear();
        problem.seeds = vec![0, 1];
        passes(&problem, build);
    }
    for weight in [0.0, 1.0] {
        let kind = if weight == 0.0 {
            Kind::Normal
        } else {
            Kind::Ignored
        };
        let mut problem = problem(
            "no row counts",
            Element::F32,
            10,
            &[row(kind, 0.1, weight); 3],
        );
        problem.mean = true;
        let results = passes(&problem, build);
        assert_eq!(results.reduced, 0.0);
    }
}

/// As the crate launches them: apart and in place.
fn on_chip(blocks: &[usize]) -> Vec<OnChip> {
    let run = |&blocks_per_row: &usize| {
        [false, true].map(|in_place| OnChip {
            blocks_per_row,
            in_place,
            threads: 256,
        })
    };
    blocks.iter().flat_map(run).collect()
}

/// Slices without a class, of one, cut at any distance from 16 bytes; the largest in each of them.
fn clusters_of_every_size(build: Build) {
    for element in Element::ALL {
        for (vocab, offset) in [(1, 0), (17, 6), (130, 2), (1000, 14)] {
            let rows = [
                row(Kind::Flat, 0.1, 1.0),
                row(Kind::Ignored, 0.0, 1.0),
                row(Kind::Masked, 0.2, 1.5),
                row(Kind::Confident, 0.0, 1.0),
                row(Kind::BadTarget, 0.1, 1.0),
            ];
            let mut problem = problem("clusters", element, vocab, &rows);
            problem.on_chip = on_chip(&[1, 2, 3, 4, 5, 6, 7, 8, 16]);
            let offset = offset / element.size() * element.size();
            (problem.logits_view.offset, problem.grad_view.offset) = (offset, offset);
            problem.seeds = vec![0, 1];
            passes(&problem, build);
        }
        // Padding is the last block's; a gradient that starts elsewhere than the logits is shifted.
        let (vocab, width) = (300, 341);
        let problem = Problem {
            width,
            logits_view: View::contiguous(3, width),
            grad_view: View {
                offset: 4,
                ..View::contiguous(3, width)
            },
            on_chip: on_chip(&[2, 8]),
            ..problem("padded clusters", element, vocab, &short_menu())
        };
        passes(&problem, build);
    }
}

/// A chunk has 32 KiB, with a gradient the first has 8: one element either side of them, at both ends of a word; several
/// chunks; a real vocabulary.
fn chunks_of_a_slice(build: Build) {
    for element in Element::ALL {
        let (early, chunk) = (8 * 1024 / element.size(), 32 * 1024 / element.size());
        let sizes = [
            (early - 1, 0),
            (early, 12),
            (early + 1, 0),
            (chunk, 12),
            (chunk + 1, 0),
            (early + chunk + 7, 4),
        ];
        for (vocab, offset) in sizes {
            let mut problem = problem("chunks", element, vocab, &short_menu()[..2]);
            problem.on_chip = on_chip(&[1]);
            (problem.logits_view.offset, problem.grad_view.offset) = (offset, offset);
            problem.seeds = vec![0, 3];
            passes(&problem, build);
        }
    }
    let mut problem = problem("GPT-2 on chip", Element::BF16, 50257, &short_menu()[..2]);
    problem.on_chip = on_chip(&[2]);
    problem.seeds = vec![0, 2];
    passes(&problem, build);
}

/// A class a tile, groups of 16 bytes cut anywhere, no cut at all; the target and the largest in any of them.
fn tiles_of_every_shape(build: Build) {
    for element in Element::ALL {
        for (vocab, width) in [(1, 1), (23, 23), (70, 75)] {
            let shapes = [(1, 1), (2, 7), (3, 8), (4, 9), (24, 33), (5, 70)];
            let problem = Problem {
                width,
                logits_view: View {
                    offset: 6 / element.size() * element.size(),
                    ..View::contiguous(menu().len(), width)
                },
                grad_view: View::contiguous(menu().len(), width),
                on_chip: Vec::new(),
                tiles: shapes
                    .iter()
                    .enumerate()
                    .map(|(i, &(rows, classes))| Tiles {
                        rows,
                        classes,
                        stats: i % 2 == 0,
                    })
                    .collect(),
                seeds: vec![0, 1],
                ..problem("tiles", element, vocab, &menu())
            };
            passes(&problem, build);
            passes(
                &Problem {
                    softcap: Some(20.0),
                    ..problem
                },
                build,
            );
        }
    }
}

/// At any address, among any neighbours, in any number of rows.
fn a_row_has_the_same_bits_anywhere(build: Build) {
    for (element, vocab) in [
        (Element::F32, 1001),
        (Element::F16, 333),
        (Element::BF16, 1001),
    ] {
        let alone = problem(
            "a row alone",
            element,
            vocab,
            &[row(Kind::Normal, 0.1, 1.5)],
        );
        let content = alone.logits.clone();
        let expected = passes(&alone, build);
        let width = vocab + 1;
        for position in 0..4 {
            let rows = [
                row(Kind::Shifted(90.0), 0.7, 0.5),
                row(Kind::Nan, 0.0, 2.0),
                row(Kind::Masked, 0.2, 1.0),
            ];
            let mut rows = rows.to_vec();
            rows.insert(position, row(Kind::Normal, 0.1, 1.5));
            let mut problem = problem(
                &format!("the row as number {position}"),
                element,
                vocab,
                &rows,
            );
            problem.logits[position * vocab..][..vocab].copy_from_slice(&content);
            problem.targets[position] = alone.targets[0];
            problem.logits_view = View {
                offset: position * element.size(),
                ..View::contiguous(4, width)
            };
            problem.seeds = vec![1];
            let results = passes(&problem, build);
            let same = |what: &str, all: &[f32], one: &[f32]| {
                let here = &all[position * one.len()..][..one.len()];
                same_bits(&format!("{}: {what}", problem.name), here, one)
                    .unwrap_or_else(|error| panic!("{error}"));
            };
            same("loss", &results.forward.loss, &expected.forward.loss);
            same("fused loss", &results.fused.loss, &expected.fused.loss);
            same("gradient", &results.backward.grad, &expected.backward.grad);
            same("fused gradient", &results.fused.grad, &expected.fused.grad);
            for (here, alone) in results.on_chip.iter().zip(&expected.on_chip) {
                same("loss on chip", &here.loss, &alone.loss);
                same("gradient on chip", &here.grad, &alone.grad);
            }
            for (here, alone) in results.tiles.iter().zip(&expected.tiles) {
                same("loss of tiles", &here.loss, &alone.loss);
                same("gradient of tiles", &here.grad, &alone.grad);
            }
            for (here, alone) in results.forward.stats.iter().zip(&expected.forward.stats) {
                same("statistics", here, alone);
            }
        }
    }
}

#[test]
fn the_driver_has_every_kernel() {
    let output = Command::new(driver(Build::Plain))
        .arg("--list")
        .output()
        .expect("the driver runs");
    let listed = String::from_utf8(output.stdout).expect("symbols are text");
    let listed: BTreeSet<String> = listed.lines().map(str::to_owned).collect();
    assert_eq!(
        listed,
        Kernel::all().into_iter().map(Kernel::symbol).collect()
    );
}
