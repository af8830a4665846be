//! The report: what the comparisons came to, then how, then all tables.

use std::fmt::Write as _;

use crate::{
    commands::probe::{
        args::Args,
        arms::Spread,
        compare::{ArmName, METRICS, Metric, QUESTIONS, difference, values},
        outcome::{Ending, Outcome},
        stretches::{OfStretch, Stretch, best_of_seeds},
        trainings::{PARTS, plan, validation},
    },
    report::{markdown::table, metrics::mean, statistics::Interval},
};

pub const ENDINGS: [(Ending, &str); 2] = [
    (Ending::Early, "stopped where the validation loss is least"),
    (Ending::Last, "after all epochs"),
];

/// Everything that was trained.
pub struct Results {
    pub outcomes: Vec<Outcome>,
    pub stretches: Vec<Stretch>,
    pub of_stretches: Vec<OfStretch>,
}

impl Results {
    pub fn of_size(&self, size: usize) -> Vec<&Outcome> {
        self.outcomes.iter().filter(|o| o.size == size).collect()
    }

    /// In the order in which they were trained.
    pub fn arms(&self) -> Vec<ArmName> {
        let mut arms = Vec::new();
        for curve in self.outcomes.iter().flat_map(|outcome| &outcome.curves) {
            let arm = ArmName(curve.method, curve.spread);
            if !arms.contains(&arm) {
                arms.push(arm);
            }
        }
        arms
    }

    fn trainings(&self) -> usize {
        let all = self.outcomes.iter().map(|outcome| outcome.curves.len());
        let of_stretches = self.of_stretches.iter().map(|s| s.curves.len());
        all.chain(of_stretches).sum()
    }
}

/// One whose interval excludes 0 stands out.
fn cell(interval: Option<Interval>) -> String {
    let Some(Interval { mean, low, high }) = interval else {
        return "–".into();
    };
    let text = format!("{mean:+.3} [{low:+.3}, {high:+.3}]");
    match interval.is_some_and(|interval| interval.excludes_0()) {
        true => format!("**{text}**"),
        false => text,
    }
}

fn sizes_header(first: &[&str], args: &Args) -> Vec<String> {
    let sizes = args.sizes.iter().map(|size| format!("N = {size}"));
    first.iter().map(|s| s.to_string()).chain(sizes).collect()
}

fn of_arms(text: &mut String, results: &Results, args: &Args, ending: Ending) {
    let (_, kl) = METRICS[0];
    let row = |arm: ArmName| {
        let of_size = |&size: &usize| {
            let outcomes = results.of_size(size);
            let value = mean(values(&outcomes, arm, ending, 0, kl).into_iter());
            let value = value.map_or("–".into(), |value| format!("{value:.3}"));
            let chosen = outcomes.iter().filter_map(|outcome| {
                let (curve, end) = outcome.chosen((arm.0, arm.1), ending)?;
                Some((f64::from(curve.mean_smoothing), end.epoch as f64))
            });
            let (smoothings, epochs): (Vec<f64>, Vec<f64>) = chosen.unzip();
            let median = |mut values: Vec<f64>| {
                values.sort_by(f64::total_cmp);
                values.get(values.len() / 2).copied().unwrap_or(0.0)
            };
            let mut about = format!("{:.2}", median(smoothings));
            if ending == Ending::Early {
                about += &format!(", {}", median(epochs));
            }
            format!("{value} ({about})")
        };
        std::iter::once(arm.to_string())
            .chain(args.sizes.iter().map(of_size))
            .collect()
    };
    let rows: Vec<Vec<String>> = results.arms().into_iter().map(row).collect();
    table(text, &sizes_header(&[""], args), &rows);
}

fn differences(
    text: &mut String,
    results: &Results,
    args: &Args,
    ending: Ending,
    part: usize,
    (_, metric): Metric,
) {
    let row = |&(first, second, _): &(ArmName, ArmName, &str)| {
        let of_size = |&size: &usize| {
            let outcomes = results.of_size(size);
            cell(difference(&outcomes, (first, second), ending, part, metric))
        };
        let name = format!("{first} − {second}");
        std::iter::once(name)
            .chain(args.sizes.iter().map(of_size))
            .collect()
    };
    let rows: Vec<Vec<String>> = QUESTIONS.iter().map(row).collect();
    table(text, &sizes_header(&[""], args), &rows);
}

/// Divergence by mean smoothing, after all epochs.
fn by_smoothing(text: &mut String, results: &Results, args: &Args, size: usize) {
    let outcomes = results.of_size(size);
    let header: Vec<String> = ["", "part"]
        .into_iter()
        .map(str::to_string)
        .chain(args.smoothings.iter().map(|mean| format!("ε = {mean}")))
        .collect();
    let mut rows = Vec::new();
    for arm in results.arms() {
        for (part, name) in PARTS.iter().enumerate() {
            let of = |mean_smoothing: f32| {
                let kl = outcomes.iter().flat_map(|outcome| {
                    let of_arm = outcome.of((arm.0, arm.1));
                    of_arm
                        .filter(move |curve| {
                            curve.mean_smoothing == mean_smoothing || curve.mean_smoothing == 0.0
                        })
                        .filter_map(move |curve| curve.end(Ending::Last).parts[part]?.kl)
                });
                mean(kl).map_or("–".into(), |kl| format!("{kl:.3}"))
            };
            let cells = args.smoothings.iter().map(|&mean| of(mean));
            rows.push(
                [arm.to_string(), name.to_string()]
                    .into_iter()
                    .chain(cells)
                    .collect(),
            );
        }
    }
    table(text, &header, &rows);
}

fn of_stretches(text: &mut String, results: &Results, args: &Args) {
    let header = [
        "uncertainty",
        "mean",
        "best ε, early stopping",
        "best ε, all epochs",
    ];
    let row = |(number, stretch): (usize, &Stretch)| {
        let outcomes: Vec<&OfStretch> = results
            .of_stretches
            .iter()
            .filter(|outcome| outcome.stretch == number)
            .collect();
        let best = |ending| match best_of_seeds(&outcomes, ending) {
            Some(Interval { mean, low, high }) => format!("{mean:.2} [{low:.2}, {high:.2}]"),
            None => "–".into(),
        };
        let range = match stretch.to == 0.0 {
            true => "0".into(),
            false => format!("({:.3}, {:.3}]", stretch.above.max(0.0), stretch.to),
        };
        let mean = format!("{:.3}", stretch.mean);
        vec![range, mean, best(Ending::Early), best(Ending::Last)]
    };
    let rows: Vec<_> = results.stretches.iter().enumerate().map(row).collect();
    writeln!(
        text,
        "Of {} samples of each stretch of uncertainties, trained and measured alone with one smoothing for all, spread over the \
         responses: that with the least divergence on held-out samples of the same stretch, the mean over seeds deciding, and 95 % \
         of what it is where seeds are resampled.\n",
        args.stretch_size
    )
    .expect("a string grows");
    table(text, &header, &rows);
}

/// `about` says what was trained on what.
pub fn markdown(results: &Results, args: &Args, about: &str) -> String {
    let command: Vec<String> = std::env::args().skip(1).collect(); // `probe` and its options
    let comparisons =
        QUESTIONS.len() * ENDINGS.len() * PARTS.len() * METRICS.len() * args.sizes.len();
    let plans: Vec<String> = args
        .sizes
        .iter()
        .map(|&size| {
            let plan = plan(size, 0, args);
            format!(
                "{size}: {} epochs in batches of {}",
                plan.epochs, plan.batch
            )
        })
        .collect();
    let mut text = format!(
        "# Uncertainty-aware smoothing on frozen features, measured\n\n`cargo run --release -- {}`\n\n{about}\n\n\
         A head (one hidden layer of {}, relu) takes the frozen model's last hidden state at the end of the prompt and gives one of \
         the responses. AdamW, learning rate {}, no schedule ({}). Every sample that it is trained on has one person's \
         response, every held-out one the shares of all people's, so NLL, Brier score and accuracy are expectations over people, and \
         KL is the divergence from their distribution. *exact* held-out samples have one right response, *agreed* are the half of the \
         others on which people agree more, *disputed* the rest. For each of {} seeds other samples are drawn; as many more, \
         up to {}, are the validation part, on which every arm chooses its mean smoothing of {:?}, and with early stopping its epoch. \
         Intervals: 95 %, paired differences over seeds, 10,000 resamples; bold where they exclude 0. {} trainings, {comparisons} \
         comparisons in the tables: of so many some 5 % would stand out by chance, were there nothing to find.\n\n\
         Smoothing is spread evenly over the responses where nothing is said; *over frequencies*: by how often the samples trained \
         on have a response; *over vocabulary*: evenly over {} outputs, most of which are no response, as those of a language model \
         are.\n\n",
        command.join(" "),
        args.width,
        args.lr,
        plans.join("; "),
        args.seeds,
        validation(usize::MAX),
        args.smoothings,
        results.trainings(),
        args.outputs,
    );
    let add = |text: &mut String, line: &str| writeln!(text, "{line}").expect("a string grows");
    add(&mut text, "What each comparison asks:\n");
    for (first, second, question) in QUESTIONS {
        add(&mut text, &format!("* {first} − {second}: {question}"));
    }
    text.push('\n');
    for (ending, name) in ENDINGS {
        add(
            &mut text,
            &format!("## Divergence from people's responses, all samples, {name}\n"),
        );
        add(
            &mut text,
            match ending {
                Ending::Early => {
                    "KL in nats, mean over seeds; in brackets the median of the smoothings and of the epochs chosen.\n"
                }
                Ending::Last => {
                    "KL in nats, mean over seeds; in brackets the median of the smoothings chosen.\n"
                }
            },
        );
        of_arms(&mut text, results, args, ending);
        differences(&mut text, results, args, ending, 0, METRICS[0]);
    }
    add(
        &mut text,
        "## Which smoothing is best at which uncertainty\n",
    );
    of_stretches(&mut text, results, args);
    add(&mut text, PICTURES);
    for (ending, name) in ENDINGS {
        for (part, of) in PARTS.iter().enumerate() {
            for metric in METRICS {
                if part == 0 && metric.0 == METRICS[0].0 {
                    continue; // stands above
                }
                add(
                    &mut text,
                    &format!("## {}, {of} samples, {name}\n", metric.0),
                );
                differences(&mut text, results, args, ending, part, metric);
            }
        }
    }
    for &size in &args.sizes {
        add(
            &mut text,
            &format!("## KL by mean smoothing, N = {size}, after all epochs\n"),
        );
        by_smoothing(&mut text, results, args, size);
    }
    text.truncate(text.trim_end().len());
    text + "\n"
}

const PICTURES: &str = "## Pictures\n\n![Divergence over the number of samples](sizes.svg)\n\n\
                        ![Divergence over epochs](epochs.svg)\n\n![Divergence over mean smoothing](smoothing.svg)\n\n\
                        ![Best smoothing against uncertainty](uncertainty.svg)\n";

/// Whether an arm is one of those that pictures show.
pub fn is_shown(arm: ArmName) -> bool {
    use crate::commands::probe::arms::Method::*;
    matches!(
        arm,
        ArmName(Plain | Constant | Shuffled | Ual | Floor, Spread::Responses)
            | ArmName(Constant | Ual, Spread::Frequencies)
    )
}
