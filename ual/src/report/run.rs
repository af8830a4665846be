//! What a run found: the table on stdout and the files in the output folder.

use std::{fmt::Write as _, fs, path::Path};

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

use crate::report::{
    curve::Curve,
    metrics::{Bin, Row, Summary, reliability, split, summarise},
};

/// One training and its held-out results.
#[derive(Clone, Serialize)]
pub struct Run {
    pub method: &'static str,
    /// Over the rows of the training samples' responses.
    pub mean_smoothing: f32,
    pub groups: Vec<Group>,
    pub training: Curve,
}

/// Held-out rows of all samples, of the certain, of the uncertain or of a kind of samples.
#[derive(Clone, Serialize, Deserialize)]
pub struct Group {
    pub name: String,
    pub summary: Option<Summary>,
    pub reliability: Vec<Bin>,
}

/// The rows of all samples, of the [certain and the uncertain](PARTS), and of each of the data set's groups.
pub fn groups(rows: &[Row], threshold: f32, names: &[String]) -> Vec<Group> {
    let (certain, uncertain) = split(rows, threshold);
    let group = |name: &str, rows: &[Row]| Group {
        name: name.into(),
        summary: summarise(rows),
        reliability: reliability(rows).to_vec(),
    };
    let mut groups = vec![
        group("all", rows),
        group("certain", &certain),
        group("uncertain", &uncertain),
    ];
    groups.extend(names.iter().enumerate().map(|(i, name)| {
        let rows: Vec<Row> = rows.iter().copied().filter(|row| row.group == i).collect();
        group(name, &rows)
    }));
    groups
}

/// Where certain and uncertain samples stand among the [`groups`].
pub const PARTS: [usize; 2] = [1, 2];

pub fn table(runs: &[Run]) -> String {
    let with_kl = runs
        .iter()
        .flat_map(|run| &run.groups)
        .any(|group| group.summary.is_some_and(|s| s.kl.is_some()));
    let mut text = format!(
        "{:10} {:10} {:>6} {:>8} {:>8} {:>8} {:>8} {:>8}",
        "held out", "method", "rows", "NLL", "ECE", "Brier", "entropy", "accuracy"
    );
    if with_kl {
        write!(text, " {:>8}", "KL").expect("a string grows");
    }
    text += "\n";
    for group in 0..runs.first().map_or(0, |run| run.groups.len()) {
        for run in runs {
            let Group { name, summary, .. } = &run.groups[group];
            write!(text, "{name:10} {:10} ", run.method).expect("a string grows");
            let Some(s) = summary else {
                text += "no rows\n";
                continue;
            };
            write!(text, "{:>6}", s.rows).expect("a string grows");
            for value in [s.nll, s.ece, s.brier, s.entropy, s.accuracy]
                .into_iter()
                .chain(s.kl)
            {
                write!(text, " {value:>8.4}").expect("a string grows");
            }
            text += "\n";
        }
    }
    text
}

pub fn save_json(path: &Path, value: &impl Serialize) -> Result<()> {
    let text = serde_json::to_string_pretty(value)?;
    fs::write(path, text + "\n").with_context(|| format!("cannot write {}", path.display()))
}
