//! The report: every metric of every method as mean ± deviation over seeds, and the methods beside uncertainty-aware
//! learning, seed by seed.

use std::fmt::Write as _;

use crate::{
    commands::study::{
        arms::{UAL, UNIGRAM, WITHIN},
        clusters::Clusters,
        outcome::Outcome,
    },
    report::metrics::Summary,
};

type Metric = (&'static str, fn(&Summary) -> Option<f64>);

/// All but entropy and accuracy are the better the lower.
const METRICS: [Metric; 6] = [
    ("NLL", |s| Some(s.nll)),
    ("KL", |s| s.kl),
    ("ECE", |s| Some(s.ece)),
    ("Brier", |s| Some(s.brier)),
    ("entropy", |s| Some(s.entropy)),
    ("accuracy", |s| Some(s.accuracy)),
];
const COMPARED: usize = 4;

/// Mean and, of at least two values, sample deviation.
pub fn mean_and_deviation(values: &[f64]) -> (f64, Option<f64>) {
    let n = values.len() as f64;
    let mean = values.iter().sum::<f64>() / n;
    let squares: f64 = values.iter().map(|value| (value - mean).powi(2)).sum();
    (
        mean,
        (values.len() > 1).then(|| (squares / (n - 1.0)).sqrt()),
    )
}

fn cell(values: &[f64]) -> String {
    if values.is_empty() {
        return "–".into();
    }
    match mean_and_deviation(values) {
        (mean, Some(deviation)) => format!("{mean:.4} ± {deviation:.4}"),
        (mean, None) => format!("{mean:.4}"),
    }
}

/// Of each seed, what UAL has less another method, and in how many it is better.
fn difference(ual: &[f64], other: &[f64], better: fn(f64) -> bool) -> String {
    let differences: Vec<f64> = ual.iter().zip(other).map(|(u, o)| u - o).collect();
    let count = differences.iter().filter(|d| better(**d)).count();
    match differences.len() {
        0 => "–".into(),
        n => format!("{} ({count} of {n})", cell(&differences)),
    }
}

/// In the order in which they ran.
fn methods(outcomes: &[Outcome]) -> Vec<&'static str> {
    let mut methods = Vec::new();
    for outcome in outcomes {
        if !methods.contains(&outcome.run.method) {
            methods.push(outcome.run.method);
        }
    }
    methods
}

/// A metric of a method, a value a seed.
fn values(
    outcomes: &[Outcome],
    method: &str,
    group: usize,
    metric: fn(&Summary) -> Option<f64>,
) -> Vec<f64> {
    let of_method = outcomes
        .iter()
        .filter(|outcome| outcome.run.method == method);
    of_method
        .filter_map(|outcome| metric(outcome.run.groups[group].summary.as_ref()?))
        .collect()
}

/// A measure of a method's clusters, a value a seed.
fn of_clusters(outcomes: &[Outcome], method: &str, measure: fn(&Clusters) -> f64) -> Vec<f64> {
    let of_method = outcomes
        .iter()
        .filter(|outcome| outcome.run.method == method);
    of_method
        .filter_map(|outcome| outcome.clusters.as_ref().map(measure))
        .collect()
}

/// `about` says what was trained on what.
pub fn markdown(outcomes: &[Outcome], seeds: usize, about: &str) -> String {
    let mut text = String::new();
    let command: Vec<String> = std::env::args().skip(1).collect(); // `study` and its options
    let add = |text: &mut String, line: &str| writeln!(text, "{line}").expect("a string grows");
    let methods = methods(outcomes);
    let note = |method: &str, text: &str| match methods.contains(&method) {
        true => format!(" *{method}* {text}"),
        false => String::new(),
    };
    add(&mut text, "# Uncertainty-aware smoothing, measured\n");
    add(
        &mut text,
        &format!(
            "`cargo run --release -- {}`\n\n{about}\n\nMean ± sample deviation over {seeds} seeds, on held-out \
             samples. *Certain* samples have an uncertainty below the median, \
             or the least where half have it. *shuffled* is UAL with the same \
             uncertainties dealt to the samples at random: what it lacks is what knowing them is worth.{}{}\n",
            command.join(" "),
            note(
                WITHIN,
                "is the same, dealt among samples of one kind: what it lacks is what they say beyond the kind."
            ),
            note(
                UNIGRAM,
                "is UAL with its smoothing spread by how often the training samples' responses have a token, not evenly."
            ),
        ),
    );
    let groups = outcomes
        .first()
        .map_or(0, |outcome| outcome.run.groups.len());
    for group in 0..groups {
        let name = &outcomes[0].run.groups[group].name;
        add(&mut text, &format!("## Held out, {name}\n"));
        let header: Vec<&str> = METRICS.iter().map(|(name, _)| *name).collect();
        add(&mut text, &format!("| | {} |", header.join(" | ")));
        add(&mut text, &format!("|---|{}", "---|".repeat(METRICS.len())));
        for method in &methods {
            let cells = METRICS.map(|(_, metric)| cell(&values(outcomes, method, group, metric)));
            add(&mut text, &format!("| {method} | {} |", cells.join(" | ")));
        }
        add(&mut text, "");
    }
    add(&mut text, "## UAL less the others, seed by seed\n");
    add(
        &mut text,
        &format!(
            "Mean ± deviation of the difference of each seed, and in how many seeds UAL is lower, which is better. A \
             difference of nothing but chance has one sign in all {seeds} seeds once in {} times.\n",
            1u64 << seeds.saturating_sub(1).min(63)
        ),
    );
    let header: Vec<&str> = METRICS[..COMPARED].iter().map(|(name, _)| *name).collect();
    add(&mut text, &format!("| | | {} |", header.join(" | ")));
    add(&mut text, &format!("|---|---|{}", "---|".repeat(COMPARED)));
    let others = || methods.iter().filter(|method| **method != UAL);
    for group in 0..groups {
        let name = &outcomes[0].run.groups[group].name;
        for method in others() {
            let cells = METRICS[..COMPARED].iter().map(|(_, metric)| {
                let of = |method: &str| values(outcomes, method, group, *metric);
                difference(&of(UAL), &of(method), |difference| difference < 0.0)
            });
            let cells: Vec<String> = cells.collect();
            add(
                &mut text,
                &format!("| {name} | less {method} | {} |", cells.join(" | ")),
            );
        }
    }
    add(
        &mut text,
        "\n## Clusters of tokens in the last hidden layer\n",
    );
    add(
        &mut text,
        "| | silhouette | within / between |\n|---|---|---|",
    );
    let silhouette = |method: &str| of_clusters(outcomes, method, |c| c.silhouette);
    let ratio = |method: &str| of_clusters(outcomes, method, |c| c.within_over_between);
    for method in &methods {
        let cells = [silhouette(method), ratio(method)].map(|values| cell(&values));
        add(&mut text, &format!("| {method} | {} |", cells.join(" | ")));
    }
    for method in others() {
        let cells = [
            difference(&silhouette(UAL), &silhouette(method), |d| d > 0.0),
            difference(&ratio(UAL), &ratio(method), |d| d < 0.0),
        ];
        add(
            &mut text,
            &format!("| UAL less {method} | {} |", cells.join(" | ")),
        );
    }
    add(
        &mut text,
        "\nA cluster is a token in different contexts of held-out responses; the higher the silhouette and the lower the \
         ratio of mean distances, the tighter; in brackets, in how many seeds UAL's are tighter.\n\n## Pictures, of the first seed\n\n![Losses](losses.svg)\n\n\
         ![Reliability](reliability.svg)\n\n![Smoothing against uncertainty](smoothing.svg)\n\n\
         ![Clusters, two principal components](clusters.svg)",
    );
    text
}
