//! The report: every arm at its best, uncertainty-aware learning less the others with intervals, and what it rests on.

use crate::{
    commands::study::{
        arms::{QUESTIONS, UAL},
        clusters::Clusters,
        compare::{COMPARED, Comparison, Difference, comparisons},
        outcome::{Entry, Outcome, arms},
    },
    report::{markdown::table, metrics::Summary, statistics::bootstrap},
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

/// What was chosen, and how often where not always the same: `0.03 × 2, 0.1 × 1`.
fn tally<T: PartialOrd + ToString>(mut values: Vec<T>) -> String {
    values.sort_by(|a, b| a.partial_cmp(b).expect("numbers"));
    let runs: Vec<&[T]> = values.chunk_by(|a, b| a == b).collect();
    match runs[..] {
        [same] => same[0].to_string(),
        _ => {
            let cells = runs
                .iter()
                .map(|run| format!("{} × {}", run[0].to_string(), run.len()));
            cells.collect::<Vec<_>>().join(", ")
        }
    }
}

/// Every entry's metrics over a group of held-out samples.
fn held_out(text: &mut String, entries: &[Entry], group: usize) {
    let mut header = vec!["", "mean smoothing", "step"];
    header.extend(METRICS.map(|(name, _)| name));
    let of = |entry: &Entry| {
        let seeds = entry.seeds.iter();
        let smoothings = tally(seeds.clone().map(|s| s.outcome.smoothing).collect());
        let steps = tally(seeds.clone().map(|s| s.step).collect());
        let mut cells = vec![entry.to_string(), smoothings, steps];
        for (_, metric) in METRICS {
            let values = seeds
                .clone()
                .filter_map(|s| metric(s.groups[group].summary.as_ref()?));
            cells.push(cell(&values.collect::<Vec<_>>()));
        }
        cells
    };
    let rows: Vec<_> = entries.iter().map(of).collect();
    table(text, &header, &rows);
}

fn interval(difference: &Option<Difference>) -> String {
    let Some(difference) = difference else {
        return "–".into();
    };
    let Difference {
        interval,
        better,
        seeds,
        ..
    } = difference;
    format!(
        "{:.4} [{:.4}, {:.4}] ({better} of {seeds})",
        interval.mean, interval.low, interval.high
    )
}

/// Those of the entries with early stopping, or those at the end of training.
fn part<'a>(entries: &[Entry], comparisons: &'a [Comparison], early: bool) -> Vec<&'a Comparison> {
    let first = |c: &&Comparison| entries[c.first].early == early;
    comparisons.iter().filter(first).collect()
}

/// The other of a comparison; that of both, early stopping, need not be said.
fn other(entries: &[Entry], c: &Comparison) -> String {
    match entries[c.first].early {
        true => entries[c.less].arm.to_string(),
        false => entries[c.less].to_string(),
    }
}

fn differences(text: &mut String, entries: &[Entry], groups: &[&str], comparisons: &[&Comparison]) {
    let mut header = vec!["", ""];
    header.extend(COMPARED.map(|(name, _)| name));
    let of = |c: &&Comparison| {
        let less = match entries[c.first].arm {
            UAL => format!("less {}", other(entries, c)),
            first => format!("{first} less {}", other(entries, c)),
        };
        let mut cells = vec![groups[c.group].to_string(), less];
        cells.extend(c.differences.iter().map(interval));
        cells
    };
    let rows: Vec<_> = comparisons.iter().map(of).collect();
    table(text, &header, &rows);
}

/// Which of a pair's differences have this verdict: `all (NLL, KL), certain (NLL)`.
fn verdicts(groups: &[&str], comparisons: &[&Comparison], wanted: bool) -> String {
    let mut parts = Vec::new();
    for c in comparisons {
        let named = COMPARED.iter().zip(&c.differences);
        let names: Vec<&str> = named
            .filter(|(_, d)| d.as_ref().and_then(Difference::verdict) == Some(wanted))
            .map(|((name, _), _)| *name)
            .collect();
        if !names.is_empty() {
            parts.push(format!("{} ({})", groups[c.group], names.join(", ")));
        }
    }
    match parts.is_empty() {
        true => "nothing".into(),
        false => parts.join(", "),
    }
}

/// In both directions, a line a pair.
fn findings(text: &mut String, entries: &[Entry], groups: &[&str], comparisons: &[&Comparison]) {
    let first_group = comparisons
        .iter()
        .filter(|c| c.group == comparisons[0].group);
    for pair in first_group {
        let alike = |c: &&&Comparison| (c.first, c.less) == (pair.first, pair.less);
        let of_pair: Vec<&Comparison> = comparisons.iter().filter(alike).copied().collect();
        text.push_str(&format!(
            "- Beside {}: {} is better in {}; worse in {}.\n",
            other(entries, pair),
            entries[pair.first].arm,
            verdicts(groups, &of_pair, true),
            verdicts(groups, &of_pair, false)
        ));
    }
    text.push('\n');
}

/// How the choice of the mean smoothing matters.
fn by_smoothing(text: &mut String, outcomes: &[Outcome], groups: &[&str]) {
    let parts = &groups[..3.min(groups.len())];
    let held_out: Vec<String> = parts.iter().map(|name| format!("{name}, end")).collect();
    let mut header = vec!["", "mean smoothing"];
    header.extend(held_out.iter().map(String::as_str));
    let validated = outcomes.iter().all(|outcome| outcome.stopped.is_some());
    if validated {
        let more = ["validation, end", "validation, early stopping"];
        header.extend(more);
        header.extend(["all, early stopping", "step"]);
    }
    let mut rows = Vec::new();
    for arm in arms(outcomes) {
        let mut of_arm: Vec<&Outcome> = outcomes.iter().filter(|o| o.run.method == arm).collect();
        of_arm.sort_by(|a, b| a.smoothing.total_cmp(&b.smoothing)); // stable: seeds keep their order
        for trainings in of_arm.chunk_by(|a, b| a.smoothing == b.smoothing) {
            let mean = |value: &dyn Fn(&Outcome) -> Option<f64>| {
                let values = trainings.iter().filter_map(|outcome| value(outcome));
                cell(&values.collect::<Vec<_>>())
            };
            let mut cells = vec![arm.to_string(), trainings[0].smoothing.to_string()];
            for group in 0..parts.len() {
                cells.push(mean(&|o| Some(o.run.groups[group].summary?.nll)));
            }
            if validated {
                let early = |o: &Outcome| Some(o.stopped.as_ref()?.validation_nll);
                let held_out = |o: &Outcome| Some(o.stopped.as_ref()?.groups[0].summary?.nll);
                cells.push(mean(&|o| o.run.training.points.last()?.validation_nll));
                cells.extend([mean(&early), mean(&held_out)]);
                let stopped = trainings.iter().filter_map(|o| o.stopped.as_ref());
                cells.push(tally(stopped.map(|stopped| stopped.step).collect()));
            }
            rows.push(cells);
        }
    }
    table(text, &header, &rows);
}

/// UAL less another, over seeds alone, and in how many it is better.
fn over_seeds(ual: &[f64], other: &[f64], better: fn(f64) -> bool) -> String {
    let differences: Vec<f64> = ual.iter().zip(other).map(|(u, o)| u - o).collect();
    let count = differences.iter().filter(|d| better(**d)).count();
    let seeds = differences.len();
    match (bootstrap(&differences), differences.first()) {
        (Some(interval), _) => format!(
            "{:.4} [{:.4}, {:.4}] ({count} of {seeds})",
            interval.mean, interval.low, interval.high
        ),
        (None, Some(difference)) => format!("{difference:.4} ({count} of {seeds})"),
        (None, None) => "–".into(),
    }
}

/// Of the last hidden layer at the end of training.
fn clusters(text: &mut String, entries: &[Entry]) {
    let ended: Vec<&Entry> = entries.iter().filter(|entry| !entry.early).collect();
    let of = |entry: &Entry, measure: fn(&Clusters) -> f64| -> Vec<f64> {
        let clusters = entry.seeds.iter().map(|s| s.outcome.clusters.as_ref());
        clusters.filter_map(|c| c.map(measure)).collect()
    };
    let silhouette = |entry: &Entry| of(entry, |c| c.silhouette);
    let ratio = |entry: &Entry| of(entry, |c| c.within_over_between);
    let mut rows: Vec<Vec<String>> = Vec::new();
    for entry in &ended {
        let (silhouette, ratio) = (silhouette(entry), ratio(entry));
        rows.push(vec![entry.to_string(), cell(&silhouette), cell(&ratio)]);
    }
    if let Some(ual) = ended.iter().find(|entry| entry.arm == UAL) {
        for other in ended.iter().filter(|entry| entry.arm != UAL) {
            rows.push(vec![
                format!("{ual} less {other}"),
                over_seeds(&silhouette(ual), &silhouette(other), |d| d > 0.0),
                over_seeds(&ratio(ual), &ratio(other), |d| d < 0.0),
            ]);
        }
    }
    table(text, &["", "silhouette", "within / between"], &rows);
}

fn of_seeds(seeds: usize) -> String {
    match seeds {
        1 => "with one seed".into(),
        _ => format!("over {seeds} seeds"),
    }
}

/// How much was tried, so that a reader can tell what chance alone would find.
fn effort(outcomes: &[Outcome], entries: &[Entry], comparisons: &[Comparison]) -> String {
    let mut smoothings: Vec<f32> = outcomes.iter().map(|o| o.smoothing).collect();
    smoothings.sort_by(f32::total_cmp);
    smoothings.dedup();
    let smoothings = smoothings.iter().filter(|mean| **mean > 0.0).count();
    let seeds = entries.first().map_or(0, |entry| entry.seeds.len());
    let known = comparisons.iter().flat_map(|c| &c.differences).flatten();
    let known: Vec<_> = known.collect();
    let found = known.iter().filter(|d| d.verdict().is_some()).count();
    format!(
        "Tried were {} trainings: {} arms, those that smooth with {smoothings} mean smoothing{} each, {}. \
         Compared are {} differences, of which {found} have an interval that excludes 0; of so many about {:.0} would by \
         chance alone, were there nothing to find.",
        outcomes.len(),
        arms(outcomes).len(),
        if smoothings == 1 { "" } else { "s" },
        of_seeds(seeds),
        known.len(),
        known.len() as f64 * 0.05
    )
}

/// Those for which the largest mean smoothing was chosen: their best may lie beyond what was tried.
fn at_the_edge(outcomes: &[Outcome], entries: &[Entry]) -> Option<String> {
    let tried = outcomes.iter().map(|outcome| outcome.smoothing);
    let largest = tried.clone().fold(0.0, f32::max);
    let several = tried.clone().any(|mean| mean > 0.0 && mean < largest);
    let named = entries.iter().filter_map(|entry| {
        let seeds = entry.seeds.iter();
        let there = seeds.filter(|s| s.outcome.smoothing == largest).count();
        (there > 0).then(|| format!("{entry} ({there} of {})", entry.seeds.len()))
    });
    let named: Vec<String> = named.collect();
    (several && !named.is_empty()).then(|| {
        format!(
            "The largest mean smoothing that was tried, {largest}, was chosen, in so many of the seeds, for: {}. A larger one \
             may be better still for these.\n\n",
            named.join("; ")
        )
    })
}

/// How the arms were chosen.
fn chosen(entries: &[Entry]) -> &'static str {
    match entries.iter().any(|entry| entry.early) {
        true => {
            "Each arm is reported twice, as validation chose it in each seed: at the end of training, with the mean smoothing \
             whose validation NLL is least there; and with *early stopping*, with the mean smoothing and the step whose \
             validation NLL is least of all. Held-out samples took no part in it."
        }
        false => {
            "There was no validation: each arm is reported at the end of training with the mean smoothing that was given, \
             which need not be its best."
        }
    }
}

/// `about` says what was trained on what.
pub fn markdown(outcomes: &[Outcome], entries: &[Entry], about: &str) -> String {
    let mut text = String::from("# Uncertainty-aware smoothing, measured\n\n");
    let command: Vec<String> = std::env::args().skip(1).collect(); // `study` and its options
    let first = entries.first().and_then(|entry| entry.seeds.first());
    let groups = first.map_or(&[][..], |chosen| chosen.groups);
    let groups: Vec<&str> = groups.iter().map(|group| group.name.as_str()).collect();
    let seeds = entries.first().map_or(0, |entry| entry.seeds.len());
    let comparisons = comparisons(entries);
    text.push_str(&format!(
        "`cargo run --release -- {}`\n\n{about}\n\n{}\n\nMean ± sample deviation, {}. *Certain* samples have \
         an uncertainty below the median, or the least where half have it.\n\n",
        command.join(" "),
        chosen(entries),
        of_seeds(seeds)
    ));
    for (group, name) in groups.iter().enumerate() {
        text.push_str(&format!("## Held out, {name}\n\n"));
        held_out(&mut text, entries, group);
    }
    text.push_str(&at_the_edge(outcomes, entries).unwrap_or_default());
    text.push_str(&format!(
        "## UAL less the others\n\nMean over seeds of the difference, its 95 % interval, and in how many seeds it is in \
         UAL's favour. Intervals are of 10,000 resamples of the seeds and, within each, of the held-out prompts with all their \
         responses, both methods drawn alike. The calibration error is computed anew in each resample; as resampling makes it larger, most of all \
         where it is small, intervals are moved so that the resamples' mean is the difference.{}\n\n",
        match seeds {
            1 => " There is one seed: they say nothing of other seeds.",
            2..10 => " Of so few seeds they are too narrow: they may exclude 0 by chance more often than once in twenty times.",
            _ => "",
        }
    ));
    let validated = entries.iter().any(|entry| entry.early);
    let parts = [
        ("With early stopping", part(entries, &comparisons, true)),
        ("At the end of training", part(entries, &comparisons, false)),
    ];
    let parts = &parts[usize::from(!validated)..];
    for (title, comparisons) in parts {
        text.push_str(&format!("### {title}\n\n"));
        differences(&mut text, entries, &groups, comparisons);
    }
    text.push_str("## Which differences exclude 0\n\n");
    text.push_str(&effort(outcomes, entries, &comparisons));
    text.push_str("\n\n");
    for (title, comparisons) in parts {
        text.push_str(&format!("{title}:\n\n"));
        findings(&mut text, entries, &groups, comparisons);
    }
    text.push_str("## NLL by mean smoothing\n\n");
    by_smoothing(&mut text, outcomes, &groups);
    text.push_str("## What each arm is there to answer\n\n");
    let arms = arms(outcomes);
    for (arm, question) in QUESTIONS.iter().filter(|(arm, _)| arms.contains(arm)) {
        text.push_str(&format!("- *{arm}* {question}\n"));
    }
    text.push_str("\n## Clusters of tokens in the last hidden layer\n\n");
    clusters(&mut text, entries);
    text.push_str(
        "At the end of training. A cluster is a token in different contexts of held-out responses; the higher the silhouette \
         and the lower the ratio of mean distances, the tighter. Intervals are over seeds alone; in brackets, in how many \
         the difference is in UAL's favour.\n\n## Pictures, of the first seed\n\n![Losses](losses.svg)\n\n![Reliability](reliability.svg)\n\n\
         ![Smoothing against uncertainty](smoothing.svg)\n\n![Clusters, two principal components](clusters.svg)\n\nEach arm \
         with the mean smoothing chosen for the end of training.\n",
    );
    text
}
