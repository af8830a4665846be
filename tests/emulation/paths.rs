//! Whether the problems of this suite take every path through the kernels; `paths.txt` lists which one takes each.

use std::collections::{BTreeMap, BTreeSet};

use super::{
    build::Build,
    distributions::{ALL, ENTROPY, Form, NONE, PRIOR, distribution},
    passes,
    problem::Problem,
    ranks,
    rows::{Kind, menu, problem, row},
    short_menu,
};
use crate::kernels::abi::Element;

/// The problem with its logits and its gradient at these offsets.
fn placed(problem: Problem, offsets: [usize; 2], softcap: Option<f32>) -> Problem {
    let mut problem = Problem {
        softcap,
        seeds: vec![0],
        ..problem
    };
    [problem.logits_view.offset, problem.grad_view.offset] = offsets;
    problem.name += &format!(", offsets {offsets:?}, softcap {softcap:?}");
    problem
}

/// Problems that together take every path through the kernels: each type with and without a softcap, at places where groups
/// straddle words alike and differently for logits and gradients, and so long that loops take several groups at once.
fn problems_of_every_path() -> Vec<Problem> {
    let mut problems = Vec::new();
    for element in Element::ALL {
        for softcap in [None, Some(30.0)] {
            let long = 256 * 16 / element.size();
            let (alike, differently) = ([4, 4], [4, 8]);
            for (vocab, offsets) in [
                (33, [0, 0]),
                (130, alike),
                (130, differently),
                (long, [0, 8]),
                (long + 1, [0, 8]),
                (long, alike),
            ] {
                let rows = if vocab < long { menu() } else { short_menu() };
                let problem = problem("paths", element, vocab, &rows);
                problems.push(placed(problem, offsets, softcap));
            }
            for (vocab, form, options, offsets) in [
                (33, Form::TopK(40), ALL, [0, 0]),
                (130, Form::Probabilities(Element::F32, 1), ALL, alike),
                (130, Form::Probabilities(Element::F16, 3), ALL, differently),
                (130, Form::Probabilities(Element::BF16, 0), PRIOR, [0, 8]),
                (130, Form::Class, ENTROPY, differently),
                (long, Form::TopK(1), NONE, [0, 0]),
            ] {
                let rows = if vocab < long { menu() } else { short_menu() };
                let problem = distribution("paths", element, vocab, &rows, form, options);
                problems.push(placed(problem, offsets, softcap));
            }
        }
        let far = [
            row(Kind::Far(3e4), 0.1, 1.0),
            row(Kind::AllLowest, 0.1, 1.0),
        ];
        for problem in [
            problem("far", element, 2100, &far),
            distribution("far", element, 300, &far, Form::TopK(3), PRIOR),
        ] {
            problems.push(Problem {
                logit_scale: 1e4,
                z_loss: 0.0,
                seeds: vec![0],
                ..problem
            });
        }
    }
    for softcap in [None, Some(30.0)] {
        for mut problem in ranks::differing() {
            problem.name += &format!(", softcap {softcap:?}");
            (problem.softcap, problem.seeds) = (softcap, vec![0]);
            problems.push(problem);
        }
    }
    problems
}

/// Which of these problems takes each path first is in paths.txt: a new path without a problem is noticed, and so is a
/// problem that no longer takes one. `UPDATE_PATHS=1 cargo test --test emulation every_path` writes the file anew.
#[test]
fn every_path_is_taken() {
    let mut takers: BTreeMap<String, Option<String>> = BTreeMap::new();
    for problem in problems_of_every_path() {
        for line in passes(&problem, Build::Plain).paths.lines() {
            let (taken, path) = line.split_once('\t').expect("two fields");
            let taker = takers.entry(short(path)).or_default();
            if taken == "1" && taker.is_none() {
                *taker = Some(problem.name.clone());
            }
        }
    }
    let never: Vec<&String> = takers
        .iter()
        .filter(|(_, taker)| taker.is_none())
        .map(|(path, _)| path)
        .collect();
    assert!(never.is_empty(), "no problem takes {never:#?}");
    let found: String = takers
        .iter()
        .map(|(path, taker)| format!("{path}\t{}\n", taker.as_deref().unwrap_or_default()))
        .collect();
    if std::env::var_os("UPDATE_PATHS").is_some() {
        std::fs::write(
            concat!(env!("CARGO_MANIFEST_DIR"), "/tests/emulation/paths.txt"),
            &found,
        )
        .unwrap();
    }
    if found.contains("[]") {
        return; // a compiler that names template arguments otherwise than GCC
    }
    let listed = include_str!("paths.txt");
    let (found, listed): (BTreeSet<&str>, BTreeSet<&str>) =
        (found.lines().collect(), listed.lines().collect());
    let differences: Vec<&&str> = found.symmetric_difference(&listed).collect();
    assert!(
        differences.is_empty() || std::env::var_os("UPDATE_PATHS").is_some(),
        "paths.txt and what runs differ: {differences:#?}"
    );
}

/// `label function [argument, …]` of what the compiler calls a place.
fn short(path: &str) -> String {
    let (label, place) = path.split_once('\t').expect("label and place");
    let place = place.trim_start_matches("static const char* ");
    let function = &place[..place.find('(').unwrap_or(place.len())];
    let arguments = place.split_once("[with ").map_or("", |(_, with)| with);
    let value = |argument: &str| {
        let value = argument
            .split_once(" = ")
            .map_or(argument, |(_, value)| value);
        value[..value.find('(').unwrap_or(value.len())]
            .trim_end_matches(']')
            .to_string()
    };
    let arguments: Vec<String> = arguments.split("; ").map(value).collect();
    format!("{label}, {function} [{}]", arguments.join(", "))
}
