//! The report: every metric of every method as mean ± deviation over seeds, and the methods beside uncertainty-aware
//! learning, seed by seed.

use std::fmt::Write as _;

use crate::{Outcome, metrics::Summary};

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

/// `about` says what was trained on what.
pub fn markdown(outcomes: &[Outcome], seeds: usize, about: &str) -> String {
    let mut text = String::new();
    let command: Vec<String> = std::env::args().skip(1).collect();
    let add = |text: &mut String, line: &str| writeln!(text, "{line}").expect("a string grows");
    add(&mut text, "# Uncertainty-aware smoothing, measured\n");
    add(
        &mut text,
        &format!(
            "`cargo run --release --example study -- {}`\n\n{about}\n\nMean ± sample deviation over {seeds} seeds, on held-out \
             samples. *Certain* samples have an uncertainty below the median, \
             or the least where half have it. *shuffled* is UAL with the same \
             uncertainties dealt to the samples at random: what it lacks is what knowing them is worth.\n",
            command.join(" ")
        ),
    );
    let methods = methods(outcomes);
    let groups = outcomes
        .first()
        .map_or(0, |outcome| outcome.run.groups.len());
    for group in 0..groups {
        let name = outcomes[0].run.groups[group].name;
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
        "Mean ± deviation of the difference of each seed, and in how many seeds UAL is lower, which is better.\n",
    );
    let header: Vec<&str> = METRICS[..COMPARED].iter().map(|(name, _)| *name).collect();
    add(&mut text, &format!("| | | {} |", header.join(" | ")));
    add(&mut text, &format!("|---|---|{}", "---|".repeat(COMPARED)));
    for group in 0..groups {
        let name = outcomes[0].run.groups[group].name;
        for method in methods.iter().filter(|method| **method != "UAL") {
            let cells = METRICS[..COMPARED].iter().map(|(_, metric)| {
                let ual = values(outcomes, "UAL", group, *metric);
                let other = values(outcomes, method, group, *metric);
                let differences: Vec<f64> = ual.iter().zip(&other).map(|(u, o)| u - o).collect();
                let lower = differences
                    .iter()
                    .filter(|difference| **difference < 0.0)
                    .count();
                match differences.len() {
                    0 => "–".into(),
                    n => format!("{} ({lower} of {n})", cell(&differences)),
                }
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
    for method in &methods {
        let clusters: Vec<_> = outcomes
            .iter()
            .filter(|outcome| outcome.run.method == *method)
            .filter_map(|outcome| outcome.clusters)
            .collect();
        let silhouette: Vec<f64> = clusters.iter().map(|c| c.silhouette).collect();
        let ratio: Vec<f64> = clusters.iter().map(|c| c.within_over_between).collect();
        add(
            &mut text,
            &format!("| {method} | {} | {} |", cell(&silhouette), cell(&ratio)),
        );
    }
    add(
        &mut text,
        "\nA cluster is a token in different contexts of held-out responses; the higher the silhouette and the lower the \
         ratio of mean distances, the tighter.\n\n## Pictures, of the first seed\n\n![Losses](losses.svg)\n\n\
         ![Reliability](reliability.svg)\n\n![Smoothing against uncertainty](smoothing.svg)\n\n\
         ![Clusters, two principal components](clusters.svg)",
    );
    text
}
