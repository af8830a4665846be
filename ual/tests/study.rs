//! The study: its clusters on points with a known answer, and a small run whose report says what its outcomes are.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::{Path, PathBuf},
    process::{Command, Output},
};

use candle_core::Device;
use candle_ual::{
    commands::study::clusters::{self, Points},
    data::samples::Sample,
    model::decoder::{Config, Decoder},
    report::plots::Look,
};
use plotters::style::RGBColor;
use serde_json::{Value, json};
use tempfile::TempDir;

fn points(clusters: &[&[[f64; 3]]]) -> Points {
    let mut points = Points::default();
    for (label, states) in clusters.iter().enumerate() {
        points.labels.extend(states.iter().map(|_| label));
        points
            .states
            .extend(states.iter().map(|state| state.to_vec()));
    }
    points
}

#[test]
fn silhouette_and_distances_by_hand() {
    // Pairs at distance 2; from one pair to the other 10 or √104.
    let square = points(&[
        &[[0.0, 0.0, 1.0], [0.0, 2.0, 1.0]],
        &[[10.0, 0.0, 1.0], [10.0, 2.0, 1.0]],
    ]);
    let clusters = square.clusters().unwrap();
    let between = (10.0 + 104f64.sqrt()) / 2.0;
    assert_eq!((clusters.clusters, clusters.states), (2, 4));
    assert!((clusters.silhouette - (between - 2.0) / between).abs() < 1e-12);
    assert!((clusters.within_over_between - 2.0 / between).abs() < 1e-12);
    // The other way round, every point is nearer to the other cluster.
    let crossed = points(&[
        &[[0.0, 0.0, 1.0], [10.0, 2.0, 1.0]],
        &[[10.0, 0.0, 1.0], [0.0, 2.0, 1.0]],
    ]);
    let crossed = crossed.clusters().unwrap();
    assert!(crossed.silhouette < -0.3 && crossed.within_over_between > 1.5);
    let same = points(&[&[[1.0; 3]; 3], &[[1.0; 3]; 3]])
        .clusters()
        .unwrap();
    assert_eq!(same.silhouette, 0.0);
    assert!(points(&[&[[0.0; 3]; 4]]).clusters().is_none());
    assert!(Points::default().clusters().is_none());
}

#[test]
fn the_projection_keeps_the_two_widest_directions() {
    // 6 wide, 2 wide and 0.2 wide, rotated in the plane of the first two.
    let corners: Vec<[f64; 3]> = (0..8)
        .map(|i| {
            let sign = |bit: usize| if i >> bit & 1 == 0 { -1.0 } else { 1.0 };
            let (x, y, z) = (3.0 * sign(0), sign(1), 0.1 * sign(2));
            [0.6 * x - 0.8 * y + 5.0, 0.8 * x + 0.6 * y, z]
        })
        .collect();
    let projected = points(&[&corners]).projection();
    for (x, y) in projected {
        assert!(
            (x.abs() - 3.0).abs() < 1e-6 && (y.abs() - 1.0).abs() < 1e-6,
            "{x}, {y}"
        );
    }
    assert!(Points::default().projection().is_empty());
}

#[test]
fn a_context_counts_once() {
    let config = Config::small(20, (8, 1, 2), 10);
    let model = Decoder::new(config, 1, &Device::Cpu).unwrap();
    let sample = |tokens: &[u32]| Sample {
        tokens: tokens.to_vec(),
        prompt: 2,
        between: Vec::new(),
        uncertainty: 0.0,
        group: 0,
        truth: Vec::new(),
    };
    // The token 7 in five contexts, of which one stands twice, and 8 in four.
    let mut samples: Vec<_> = (0..5).map(|i| sample(&[i, 5, 7, 9])).collect();
    samples.push(sample(&[0, 5, 7, 10, 9]));
    samples.extend((0..4).map(|i| sample(&[i, 6, 8, 9])));
    let points = clusters::points(&model, &samples, 3, &Device::Cpu).unwrap();
    assert_eq!(points.labels, [0; 5]);
    let distinct: BTreeSet<String> = points
        .states
        .iter()
        .map(|state| format!("{state:?}"))
        .collect();
    assert_eq!(distinct.len(), 5);
}

fn command(out: &Path, more: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_ual"))
        .arg("study")
        .env("RAYON_NUM_THREADS", "1") // how products round depends on it
        .args(["--seeds", "2", "--steps", "4", "--pretrain-steps", "2"])
        .args(["--dim", "16", "--layers", "1", "--heads", "2", "--out"])
        .arg(out)
        .args(more)
        .output()
        .unwrap()
}

fn study(out: &Path, more: &[&str]) -> (String, Vec<Value>) {
    let output = command(out, more);
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{stderr}");
    let outcomes = fs::read(out.join("outcomes.json")).unwrap();
    let report = fs::read_to_string(out.join("report.md")).unwrap();
    (report, serde_json::from_slice(&outcomes).unwrap())
}

#[test]
fn a_small_study_reports_its_outcomes() {
    let folder = TempDir::new().unwrap();
    let (report, outcomes) = study(&folder.path().join("a"), &[]);
    let methods: Vec<_> = outcomes
        .iter()
        .map(|o| o["run"]["method"].as_str().unwrap())
        .collect();
    let all = ["SFT", "constant", "shuffled", "UAL, unigram", "UAL"];
    assert_eq!(methods, [all, all].concat());
    for picture in ["losses", "reliability", "smoothing", "clusters"] {
        let picture = format!("{picture}.svg");
        assert!(report.contains(&picture));
        let text = fs::read_to_string(folder.path().join("a").join(picture)).unwrap();
        assert!(text.starts_with("<svg"));
    }
    // UAL is green here as in `ual finetune`, in the picture of its smoothing too.
    let picture = |name: &str| fs::read_to_string(folder.path().join("a").join(name)).unwrap();
    assert_eq!(Look::of("UAL").color, RGBColor(0, 158, 115));
    assert!(picture("smoothing.svg").contains("#009E73"));
    let looks: Vec<_> = all
        .iter()
        .chain(&["within kind"])
        .map(|m| Look::of(m))
        .collect();
    for (i, a) in looks.iter().enumerate() {
        let others = &looks[i + 1..];
        assert!(
            others
                .iter()
                .all(|b| a.color != b.color && a.dash != b.dash)
        );
    }
    // A panel a method with one scale, names of the axes, and tokens' names.
    let clusters = picture("clusters.svg");
    let count = |text: &str| clusters.lines().filter(|line| *line == text).count();
    assert_eq!(count("along the widest direction"), 5);
    assert_eq!(count("along the second widest"), 5);
    assert!(clusters.contains("\ntoken "));
    let numbers = clusters.lines().filter(|line| line.parse::<f64>().is_ok());
    let mut times: BTreeMap<&str, usize> = BTreeMap::new();
    numbers.for_each(|number| *times.entry(number).or_default() += 1);
    assert!(
        times.len() > 2 && times.values().all(|n| n % 5 == 0),
        "{times:?}"
    );
    // All that smooth have one mean over the rows they are trained on.
    for (m, outcome) in outcomes.iter().enumerate() {
        let mean = outcome["run"]["mean_smoothing"].as_f64().unwrap();
        let expected = if m % 5 == 0 { 0.0 } else { 0.1 };
        assert!((mean - expected).abs() < 1e-5, "{mean}");
    }
    // Means and deviations of two seeds, by hand.
    let nll = |seed: usize, method: usize, group: usize| {
        let groups = &outcomes[5 * seed + method]["run"]["groups"];
        groups[group]["summary"]["nll"].as_f64().unwrap()
    };
    let mut sections = report.split("\n## ").skip(1);
    for group in 0..3 {
        let section = sections.next().unwrap();
        for (m, method) in all.iter().enumerate() {
            let (a, b) = (nll(0, m, group), nll(1, m, group));
            let deviation = (a - b).abs() / 2f64.sqrt();
            let row = format!("| {method} | {:.4} ± {deviation:.4} |", (a + b) / 2.0);
            assert!(section.contains(&row), "{row}\n{section}");
        }
    }
    let differences = sections.next().unwrap();
    let less: Vec<f64> = (0..2)
        .map(|seed| nll(seed, 4, 0) - nll(seed, 0, 0))
        .collect();
    let lower = less.iter().filter(|d| **d < 0.0).count();
    let mean = (less[0] + less[1]) / 2.0;
    let row = differences
        .lines()
        .find(|line| line.starts_with("| all | less SFT |"));
    let row = row.unwrap();
    assert!(row.contains(&format!("| {mean:.4} ±")), "{row}, {mean}");
    assert!(row.contains(&format!("({lower} of 2)")), "{row}");
    // Clusters, the last table.
    let silhouette = |seed: usize, method: usize| {
        let clusters = &outcomes[5 * seed + method]["clusters"];
        clusters["silhouette"].as_f64().unwrap()
    };
    let less: Vec<f64> = (0..2)
        .map(|seed| silhouette(seed, 4) - silhouette(seed, 1))
        .collect();
    let higher = less.iter().filter(|d| **d > 0.0).count();
    let deviation = (less[0] - less[1]).abs() / 2f64.sqrt();
    let mean = (less[0] + less[1]) / 2.0;
    let row = format!("| UAL less constant | {mean:.4} ± {deviation:.4} ({higher} of 2) |");
    assert!(report.contains(&row), "{row}\n{report}");
    // The control has other samples' uncertainties, so it differs from UAL; and the same run gives the same numbers.
    assert_ne!(nll(0, 2, 0), nll(0, 4, 0));
    let (_, again) = study(&folder.path().join("b"), &[]);
    let groups = |outcomes: &[Value]| -> Vec<Value> {
        outcomes
            .iter()
            .map(|o| o["run"]["groups"].clone())
            .collect()
    };
    assert_eq!(groups(&again), groups(&outcomes));
}

/// Samples of two kinds, one certain and one uncertain.
fn write_data(folder: &Path, uncertainty: impl Fn(usize) -> f64) -> PathBuf {
    let line = |i: usize| {
        let kind = ["sum", "talk"][i % 2];
        json!({"prompt": format!("question {i}"), "response": format!("the answer is {}", i / 3),
               "uncertainty": uncertainty(i), "kind": kind})
    };
    let lines: Vec<String> = (0..40).map(|i| line(i).to_string()).collect();
    let path = folder.join("data.jsonl");
    fs::write(&path, lines.join("\n")).unwrap();
    path
}

#[test]
fn kinds_have_a_control_and_results_of_their_own() {
    let folder = TempDir::new().unwrap();
    // Within a kind all are equally uncertain, so that dealing them within it changes nothing.
    let data = write_data(folder.path(), |i| [0.2, 0.6][i % 2]);
    let arguments = [
        "--data",
        data.to_str().unwrap(),
        "--vocab",
        "300",
        "--group",
        "kind",
    ];
    let (report, outcomes) = study(&folder.path().join("out"), &arguments);
    let groups = |run: usize| outcomes[run]["run"]["groups"].as_array().unwrap();
    for seed in 0..2 {
        let run = |arm: usize| &outcomes[6 * seed + arm]["run"];
        let arms: Vec<_> = (0..6)
            .map(|arm| run(arm)["method"].as_str().unwrap())
            .collect();
        assert_eq!(
            arms,
            [
                "SFT",
                "constant",
                "shuffled",
                "within kind",
                "UAL, unigram",
                "UAL"
            ]
        );
        assert_eq!(run(3)["groups"], run(5)["groups"]);
        assert_ne!(run(2)["groups"], run(5)["groups"]);
        assert_ne!(run(4)["groups"], run(5)["groups"]);
    }
    let names: Vec<_> = groups(0).iter().map(|group| &group["name"]).collect();
    assert_eq!(names, ["all", "certain", "uncertain", "sum", "talk"]);
    // Here the kind is the certainty.
    let rows = |group: usize| &groups(0)[group]["summary"];
    assert_eq!((rows(1), rows(2)), (rows(3), rows(4)));
    assert_ne!(rows(3), rows(4));
    for section in [
        "## Held out, talk",
        "| talk | less within kind |",
        "*within kind* is",
        "*UAL, unigram* is",
    ] {
        assert!(report.contains(section), "{section}");
    }

    // A kind that one seed draws and another does not has its place all the same.
    let lines = fs::read_to_string(&data).unwrap();
    let rare = lines.replacen("\"sum\"", "\"rare\"", 1);
    fs::write(&data, &rare).unwrap();
    let few = [&arguments[..], &["--limit", "12", "--held-out", "0.5"]].concat();
    let (report, outcomes) = study(&folder.path().join("rare"), &few);
    assert!(report.contains("## Held out, rare"));
    for outcome in &outcomes {
        let groups = outcome["run"]["groups"].as_array().unwrap();
        assert_eq!(groups.len(), 6);
    }

    let missing = command(
        &folder.path().join("no"),
        &[&arguments[..5], &["topic"]].concat(),
    );
    let stderr = String::from_utf8_lossy(&missing.stderr);
    assert!(stderr.contains("data.jsonl:1: \"topic\""), "{stderr}");
}

/// The control may need more smoothing a sample than there is, where the method does not: said before anything is trained.
#[test]
fn a_control_that_cannot_be_is_refused_at_once() {
    let folder = TempDir::new().unwrap();
    let data = folder.path().join("data.jsonl");
    // One sample in ten is uncertain, and its response makes half of the rows.
    let line = |i: usize| {
        let (uncertainty, response) = match i % 10 {
            0 => (0.9, "z ".repeat(40)),
            _ => (0.0, "z z".into()),
        };
        json!({"prompt": format!("{i}"), "response": response, "uncertainty": uncertainty})
    };
    let lines: Vec<String> = (0..40).map(|i| line(i).to_string()).collect();
    fs::write(&data, lines.join("\n")).unwrap();
    let out = folder.path().join("out");
    let data = data.to_str().unwrap();
    let refused = command(
        &out,
        &["--data", data, "--vocab", "300", "--mean-smoothing", "0.2"],
    );
    let stderr = String::from_utf8_lossy(&refused.stderr);
    assert!(
        !refused.status.success() && stderr.contains("the control \"shuffled\""),
        "{stderr}"
    );
    assert!(!out.exists());
}
