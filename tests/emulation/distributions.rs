//! Problems whose targets are distributions: what stands beside the rows of the other grids.

use rand::{Rng, SeedableRng, rngs::StdRng};

use super::{
    build::Build,
    far, passes,
    problem::{Distribution, Eps, Problem, Target, Tiles, View, round},
    rows::{Kind, Row, menu, problem, row},
    short_menu,
};
use crate::kernels::abi::Element;

const NORMAL: Row = row(Kind::Normal, 0.1, 1.0);

/// What a row's target is.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Form {
    Class,
    /// So many entries.
    TopK(usize),
    /// Of so many elements' offset from a 16-byte boundary.
    Probabilities(Element, usize),
}

/// Which options there are beside it.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Options {
    pub weights: bool,
    pub prior: bool,
    pub entropy: bool,
}

pub const NONE: Options = Options {
    weights: false,
    prior: false,
    entropy: false,
};
pub const WEIGHTS: Options = Options {
    weights: true,
    ..NONE
};
pub const PRIOR: Options = Options {
    prior: true,
    ..NONE
};
pub const ENTROPY: Options = Options {
    entropy: true,
    ..NONE
};
pub const ALL: Options = Options {
    weights: true,
    prior: true,
    entropy: true,
};

/// [`problem`] with targets and options of these kinds.
pub fn distribution(
    name: &str,
    element: Element,
    vocab: usize,
    rows: &[Row],
    form: Form,
    options: Options,
) -> Problem {
    let mut rows = rows.to_vec();
    if matches!(form, Form::Probabilities(..)) {
        // None is ignored.
        for row in rows.iter_mut().filter(|row| row.kind == Kind::Ignored) {
            *row = NORMAL;
        }
    }
    let mut p = problem(name, element, vocab, &rows);
    p.name += &format!(", {form:?}, {options:?}");
    p.on_chip.clear();
    let mut rng = StdRng::seed_from_u64(vocab as u64);
    let target = match form {
        Form::Class => Target::Class,
        Form::TopK(k) => {
            let (mut classes, mut probabilities) = (Vec::new(), Vec::new());
            for (i, row) in rows.iter().enumerate() {
                let (of_row, t) = entries(&p, i, row.kind, k, &mut rng);
                classes.extend(of_row);
                probabilities.extend(t);
            }
            Target::TopK {
                k,
                classes,
                probabilities,
            }
        }
        Form::Probabilities(of, offset) => {
            let mut values = Vec::new();
            for (i, row) in rows.iter().enumerate() {
                values.extend(probabilities(&p, i, row.kind, of, &mut rng));
            }
            Target::Probabilities {
                values,
                element: of,
                view: View {
                    offset: offset * of.size(),
                    ..View::contiguous(rows.len(), vocab + offset)
                },
            }
        }
    };
    let mut values = |zeros: bool, size: f32| -> Vec<f32> {
        let mut values: Vec<f32> = (0..vocab)
            .map(|k| match k % 7 == 3 && zeros {
                true => 0.0,
                false => size * rng.random_range(0.1..2.0),
            })
            .collect();
        values[0] = size;
        values
    };
    let class_weights = options.weights.then(|| values(true, 1.0));
    // Squares of such values are beyond f32.
    let prior = options.prior.then(|| values(true, 1e-25));
    p.distribution = Some(Distribution {
        target,
        class_weights,
        prior,
        entropy_weight: match options.entropy {
            true => Eps::PerRow((0..rows.len()).map(|i| i as f32 * 0.25 - 1.0).collect()),
            false => Eps::Uniform(0.0),
        },
    });
    p
}

/// Entries of a row: its target and classes beside it, some twice, some absent; all absent where the row is ignored.
fn entries(p: &Problem, i: usize, kind: Kind, k: usize, rng: &mut StdRng) -> (Vec<i64>, Vec<f32>) {
    let ignored = p.ignore_index();
    let mut classes = vec![p.targets[i]];
    let mut probabilities = vec![0.625];
    for j in 1..k {
        let class = match j % 5 {
            _ if kind == Kind::Ignored => ignored,
            4 => classes[rng.random_range(0..j)],
            3 => ignored,
            _ => rng.random_range(0..p.vocab as i64),
        };
        // Of rows whose target is not masked no entry is.
        let masked = usize::try_from(class).is_ok_and(|class| p.row(i)[class] == f32::NEG_INFINITY);
        classes.push(match kind {
            Kind::Masked if masked => p.targets[i],
            _ => class,
        });
        probabilities.push(match class {
            class if class == ignored => f32::NAN,
            _ => rng.random_range(0.0..0.5) / k as f32,
        });
    }
    (classes, probabilities)
}

fn probabilities(p: &Problem, i: usize, kind: Kind, of: Element, rng: &mut StdRng) -> Vec<f32> {
    let mut t: Vec<f32> = (0..p.vocab).map(|_| rng.random_range(0.0..1.0)).collect();
    let sum: f32 = t.iter().sum();
    // They need not sum to 1.
    t.iter_mut().for_each(|t| *t *= 0.375 / sum);
    let target = usize::try_from(p.targets[i]).unwrap_or_default();
    t[target] += 0.5;
    for (t, &x) in t.iter_mut().zip(p.row(i)) {
        if kind == Kind::Masked && x == f32::NEG_INFINITY {
            *t = 0.0;
        }
        *t = round(of, *t);
    }
    t
}

/// Few, that break with any term, bound or barrier.
pub fn for_mutants() -> Vec<Problem> {
    let (f32, bf16) = (Element::F32, Element::BF16);
    let rows = menu();
    let at = |mut p: Problem, offset: usize| {
        (p.logits_view.offset, p.grad_view.offset) = (offset, offset);
        p
    };
    let precise = Problem {
        z_loss: 0.0,
        ..distribution("precise", f32, 66, &rows, Form::Class, PRIOR)
    };
    let long = [
        row(Kind::Shifted(-300.0), 0.1, 1.5),
        row(Kind::Masked, 0.25, 1.0),
        row(Kind::Rising, 0.1, 1.0),
        row(Kind::Flat, 0.1, 1.0),
        row(Kind::Confident, 0.0, 1.0),
        row(Kind::Confident, 0.0, 1.0),
    ];
    let half = Form::Probabilities(Element::F16, 1);
    let mut problems = vec![
        at(distribution("few", f32, 33, &rows, Form::TopK(12), ALL), 4),
        distribution("one with weights", bf16, 70, &rows, Form::Class, WEIGHTS),
        precise,
        distribution("entropy", f32, 9, &rows, Form::TopK(1), ENTROPY),
        at(distribution("all", bf16, 66, &rows, half, ALL), 10),
        at(
            distribution("warps", bf16, 1501, &long, Form::TopK(300), ALL),
            10,
        ),
        distribution(
            "long",
            f32,
            3599,
            &long,
            Form::Probabilities(bf16, 0),
            PRIOR,
        ),
        distribution(
            "whole words",
            bf16,
            9001,
            &long,
            Form::Probabilities(f32, 0),
            ALL,
        ),
    ];
    problems[1].mean = true;
    problems[5].mean = true;
    problems.extend(sure());
    let magnitudes = [
        row(Kind::Far(1e38), 0.1, 0.5),
        row(Kind::Lowest, 0.1, 1.0),
        row(Kind::LowestTarget, 0.1, 1.0),
    ];
    let mut far = distribution("far", f32, 33, &magnitudes, Form::TopK(4), PRIOR);
    (far.logit_scale, far.z_loss) = (1e30, 0.0);
    problems.push(far);
    problems.extend(bad());
    problems
}

/// p_y next to 1, and the target in any warp; what a thread's sum of probabilities would lose if it were a number.
pub fn sure() -> Vec<Problem> {
    let rows = [0.0, 0.0, 0.0, 0.1].map(|eps| row(Kind::Confident, eps, 1.0));
    let alone = |p: Problem| Problem {
        z_loss: 0.0,
        seeds: vec![0],
        ..p
    };
    let mut problems: Vec<Problem> = [Form::Class, Form::TopK(3)]
        .map(|form| {
            alone(distribution(
                "sure",
                Element::F32,
                4099,
                &rows,
                form,
                WEIGHTS,
            ))
        })
        .into();
    let (vocab, form) = (20_001, Form::Probabilities(Element::F32, 0));
    let mut small = alone(distribution(
        "lost",
        Element::F32,
        vocab,
        &rows[..2],
        form,
        NONE,
    ));
    let targets = small.targets.clone();
    if let Some(Target::Probabilities { values, .. }) =
        small.distribution.as_mut().map(|d| &mut d.target)
    {
        // Four of them are less than half a unit in the last place of 1.
        values.fill(1.4e-8);
        for (row, target) in targets.into_iter().enumerate() {
            values[row * vocab + target as usize] = 1.0;
        }
    }
    problems.push(small);
    problems
}

/// Bad values between good ones: of entries, of probabilities, of the classes.
pub fn bad() -> Vec<Problem> {
    let normal = [NORMAL; 8];
    let element = Element::BF16;
    let values = [-0.5, f32::NAN, f32::INFINITY];
    let top_k = distribution("bad entries", element, 19, &normal, Form::TopK(3), ALL);
    let mut entries = top_k.clone();
    let Some(Distribution {
        target:
            Target::TopK {
                classes,
                probabilities,
                ..
            },
        entropy_weight: Eps::PerRow(weights),
        ..
    }) = &mut entries.distribution
    else {
        unreachable!("as asked for")
    };
    for (i, value) in values.into_iter().enumerate() {
        (classes[3 * i + 4], probabilities[3 * i + 4]) = (2, value);
    }
    (classes[3 * 4], classes[3 * 5 + 1], weights[6]) = (19, -1, f32::NAN);
    let bad_targets = [
        row(Kind::Normal, 0.1, 1.0),
        row(Kind::BadTarget, 0.1, 1.0),
        row(Kind::BadTarget, 0.1, 1.0),
    ];
    let mut problems = vec![
        entries,
        distribution(
            "bad targets",
            element,
            19,
            &bad_targets,
            Form::Class,
            WEIGHTS,
        ),
    ];
    for of in Element::ALL {
        let form = Form::Probabilities(of, 0);
        let mut p = distribution("bad probabilities", element, 600, &normal, form, NONE);
        p.weights.as_mut().expect("a weight a row")[3] = 0.0;
        let Some(Distribution {
            target: Target::Probabilities { values: t, .. },
            ..
        }) = &mut p.distribution
        else {
            unreachable!("as asked for")
        };
        for (i, value) in values.into_iter().enumerate() {
            t[600 * (i + 1) + 111 * i] = value;
        }
        p.logits[600 * 2 + 111] = f32::NEG_INFINITY;
        problems.push(p);
    }
    let mut with = |change: &dyn Fn(&mut Distribution)| {
        let mut p = top_k.clone();
        change(p.distribution.as_mut().expect("one"));
        problems.push(p);
    };
    for value in values {
        with(&|d| d.class_weights.as_mut().expect("one")[18] = value);
        with(&|d| d.prior.as_mut().expect("one")[4] = value);
    }
    with(&|d| d.prior.as_mut().expect("one").fill(0.0));
    problems
}

/// Every form of target with every option, at sizes about 16 bytes and a warp's vectors.
pub fn distributions_at_every_small_size(build: Build) {
    // What sanitizers see of a row of a few classes they see of a longer one.
    let (skipped, seeds) = match build {
        Build::Plain => (0, vec![0, 1]),
        _ => (5, vec![1]),
    };
    for element in Element::ALL {
        let forms = [
            Form::Class,
            Form::TopK(1),
            Form::TopK(5),
            Form::TopK(40),
            Form::Probabilities(Element::F32, 0),
            Form::Probabilities(Element::F16, 1),
            Form::Probabilities(Element::BF16, 3),
        ];
        for form in forms {
            for &(vocab, options) in &[
                (1, NONE),
                (2, ALL),
                (7, PRIOR),
                (8, WEIGHTS),
                (9, ENTROPY),
                (31, ALL),
                (33, NONE),
                (65, PRIOR),
                (66, ALL),
            ][skipped..]
            {
                let rows = menu();
                let mut p = distribution("distributions", element, vocab, &rows, form, options);
                let size = element.size();
                p.logits_view.offset = vocab % 5 * size % 16;
                p.grad_view.offset = vocab % 3 * size % 16;
                p.softcap = (vocab % 4 == 2).then_some(30.0);
                p.seeds = seeds.clone();
                p.mean = vocab % 2 == 1;
                passes(&p, build);
            }
        }
        // Targets of 32 bits, a value for all rows, padding.
        let rows = menu();
        let mut p = distribution("u32", element, 41, &rows, Form::Class, ENTROPY);
        p.targets_are_i64 = false;
        let wide = |t: &mut i64| *t = if *t < 0 { i64::from(u32::MAX) } else { *t };
        p.targets.iter_mut().for_each(wide);
        if let Some(distribution) = &mut p.distribution {
            distribution.entropy_weight = Eps::Uniform(-0.5);
        }
        (p.width, p.logits_view, p.grad_view) = (
            50,
            View::contiguous(rows.len(), 50),
            View::contiguous(rows.len(), 51),
        );
        p.weights = None;
        passes(&p, build);
    }
}

/// More groups than a thread loads ahead, entries than a block has threads, the last of them alone in a warp.
pub fn distributions_of_long_rows(build: Build) {
    for element in Element::ALL {
        for (vocab, form, options) in [
            (2049, Form::TopK(300), ALL),
            (5003, Form::Probabilities(element, 1), ALL),
            (4097, Form::Probabilities(Element::F32, 0), PRIOR),
            (9000, Form::Class, ALL),
        ] {
            let mut p = distribution("long rows", element, vocab, &short_menu(), form, options);
            p.seeds = vec![0, 3];
            (p.logits_view.offset, p.grad_view.offset) = (0, 8);
            passes(&p, build);
        }
    }
    for problem in sure() {
        passes(&problem, build);
    }
    let form = Form::TopK(33);
    let rows = &short_menu()[..2];
    let mut p = distribution("GPT-2", Element::BF16, 50257, rows, form, ALL);
    p.seeds = vec![0];
    passes(&p, build);
}

/// A class a tile, more entries than it has classes, and cut anywhere.
pub fn distributions_in_tiles(build: Build) {
    for element in Element::ALL {
        for (form, options) in [
            (Form::Class, ALL),
            (Form::TopK(12), NONE),
            (Form::TopK(12), ALL),
            (Form::Probabilities(Element::F32, 1), ALL),
            (Form::Probabilities(Element::BF16, 0), PRIOR),
        ] {
            let rows = menu();
            let shapes = [(1, 1), (2, 7), (24, 33), (5, 70)];
            let mut p = distribution("tiles", element, 70, &rows, form, options);
            p.tiles = shapes
                .iter()
                .enumerate()
                .map(|(i, &(rows, classes))| Tiles {
                    rows,
                    classes,
                    stats: i % 2 == 0,
                })
                .collect();
            p.width = 75;
            p.logits_view = View {
                offset: 6 / element.size() * element.size(),
                ..View::contiguous(rows.len(), 75)
            };
            p.grad_view = View::contiguous(rows.len(), 75);
            p.seeds = vec![0, 1];
            passes(&p, build);
            p.softcap = Some(20.0);
            passes(&p, build);
        }
    }
}

/// As `every_magnitude`.
pub fn distributions_of_every_magnitude(build: Build) {
    let rows = |far: [f32; 2]| {
        vec![
            row(Kind::Far(far[0]), 0.0, 1.0),
            row(Kind::Far(far[1]), 0.1, 0.5),
            row(Kind::Lowest, 0.1, 1.0),
            row(Kind::LowestTarget, 0.1, 1.0),
            row(Kind::AllLowest, 0.1, 1.0),
            row(Kind::Normal, 0.1, 1.0),
            row(Kind::Masked, 1.0, 1.0),
        ]
    };
    for element in Element::ALL {
        for (vocab, scale, softcap) in [
            (33, 1.0, None),
            (33, 1e30, None),
            (40, 1e-30, None),
            (33, 1.0, Some(1e4)),
            (9, 1e30, Some(2.0)),
        ] {
            for form in [
                Form::Class,
                Form::TopK(4),
                Form::Probabilities(Element::F32, 0),
            ] {
                let rows = rows(far(element));
                let mut p = distribution("magnitudes", element, vocab, &rows, form, PRIOR);
                p.name += &format!(", scale {scale}, softcap {softcap:?}");
                (p.logit_scale, p.softcap, p.z_loss) = (scale, softcap, 0.0);
                passes(&p, build);
            }
        }
    }
}

pub fn bad_distributions_stay_in_their_row(build: Build) {
    for problem in bad() {
        passes(&problem, build);
    }
}
