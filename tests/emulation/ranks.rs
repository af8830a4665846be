//! Slices of a vocabulary that ranks have: each one's forward, the merge, each one's backward.

use super::{
    build::Build,
    distributions::{self, ALL, Form, NONE, PRIOR, distribution},
    passes,
    problem::{Altered, Problem, Ranks, View},
    rows::{Kind, bad_menu, menu, problem, row},
};
use crate::kernels::abi::Element;

/// A class each, uneven, in any order, one rank, cut into tiles.
fn shapes(vocab: usize) -> Vec<Ranks> {
    let (third, half) = (vocab / 3, vocab / 2);
    let ranks = |first_classes: &[usize], tile, stats| Ranks {
        first_classes: first_classes.to_vec(),
        tile,
        stats,
        altered: None,
    };
    match vocab {
        1 => vec![ranks(&[0], 1, true), ranks(&[0], 1, false)],
        2..4 => vec![ranks(&[1, 0], 1, true), ranks(&[0, vocab - 1], 2, false)],
        4..1000 => vec![
            ranks(&[half + 1, 0, third], 7, true),
            ranks(&[1, 0, vocab - 1, half], vocab, false),
        ],
        _ => vec![ranks(&[half + 1, 0, third], third, true)],
    }
}

fn with_ranks(p: Problem) -> Problem {
    Problem {
        on_chip: Vec::new(),
        tiles: Vec::new(),
        ranks: shapes(p.vocab),
        seeds: vec![0],
        ..p
    }
}

/// With padding behind the last rank's classes.
fn padded(p: Problem) -> Problem {
    let view = View::contiguous(p.rows(), p.vocab + 5);
    Problem {
        width: p.vocab + 5,
        grad_view: view.clone(),
        logits_view: View { offset: 12, ..view },
        ..p
    }
}

pub fn ranks_of_every_shape(build: Build) {
    let rows = menu();
    for element in Element::ALL {
        for vocab in [1, 3, 33, 70] {
            let p = padded(with_ranks(problem("ranks", element, vocab, &rows)));
            passes(&p, build);
            let softcap = Some(20.0);
            passes(&Problem { softcap, ..p }, build);
        }
        for (vocab, form, options) in [
            (3, Form::TopK(4), ALL),
            (70, Form::Class, ALL),
            (70, Form::TopK(12), NONE),
            (70, Form::TopK(40), ALL),
            (70, Form::Probabilities(Element::F32, 1), ALL),
            (70, Form::Probabilities(Element::BF16, 0), PRIOR),
        ] {
            let p = distribution("ranks", element, vocab, &rows, form, options);
            let p = padded(with_ranks(p));
            passes(&p, build);
            let softcap = Some(20.0);
            passes(&Problem { softcap, ..p }, build);
        }
    }
    let bad = problem("ranks", Element::F32, 33, &bad_menu());
    let distributions = [distributions::bad(), distributions::sure()].concat();
    for p in [vec![bad], distributions].concat() {
        passes(&with_ranks(p), build);
    }
}

/// Rows of which ranks say different things are NaN, and no others.
pub fn ranks_that_are_given_differently(build: Build) {
    for p in differing() {
        passes(&p, build);
    }
}

/// Everything that a rank may be given otherwise than the rest.
pub fn differing() -> Vec<Problem> {
    use Altered::*;
    let rows = [row(Kind::Normal, 0.1, 1.0); 3];
    let one = problem("ranks differ", Element::BF16, 33, &rows);
    let several = distribution("ranks differ", Element::F32, 33, &rows, Form::TopK(6), ALL);
    let one_differs = [Target, Smoothing, Weight];
    let several_differ = [
        Target,
        Smoothing,
        Weight,
        EntropyWeight,
        Probability,
        ClassWeight,
        Prior,
    ];
    // Each with and without statistics, which are kernels of their own for one class a row.
    let ranks = |altered: &[Altered]| {
        let twice = altered
            .iter()
            .flat_map(|&altered| [(altered, false), (altered, true)]);
        let ranks = twice.map(|(altered, stats)| Ranks {
            first_classes: vec![0, 20, 11],
            tile: 9,
            stats,
            altered: Some(altered),
        });
        ranks.collect()
    };
    vec![
        Problem {
            ranks: ranks(&one_differs),
            ..with_ranks(one)
        },
        Problem {
            ranks: ranks(&several_differ),
            ..with_ranks(several)
        },
    ]
}

/// Few, that break with any term of the merge, and with any idea of where a rank's classes are.
pub fn for_mutants() -> Vec<Problem> {
    let (f32, bf16, rows) = (Element::F32, Element::BF16, menu());
    let form = Form::Probabilities(bf16, 1);
    let mut problems = differing();
    problems.extend([
        padded(with_ranks(problem("ranks", bf16, 70, &rows))),
        padded(with_ranks(distribution(
            "ranks",
            f32,
            70,
            &rows,
            Form::TopK(12),
            ALL,
        ))),
        with_ranks(distribution("ranks", f32, 70, &rows, form, ALL)),
    ]);
    problems
}
