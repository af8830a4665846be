//! The study: its clusters on points with a known answer, and a small run whose report says what its outcomes are.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::{Path, PathBuf},
    process::{Command, Output, Stdio},
};

use candle_core::Device;
use candle_ual::{
    commands::study::{
        arms::own_entropy,
        choice::{self, Choice},
        clusters::{self, Points},
    },
    data::{
        packing::Packing,
        samples::{Dataset, Sample},
        synthetic,
    },
    model::decoder::{Config, Decoder},
    report::{
        curve::{Curve, Point},
        metrics::{Row, summarise},
        plots::Look,
        statistics::{bootstrap, nested_bootstrap},
        units::{COLUMNS, metrics, units},
    },
    training::{args::Args, ranks::Ranks, setup::Setup},
};
use clap::Parser;
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

fn sample(tokens: &[u32]) -> Sample {
    Sample {
        tokens: tokens.to_vec(),
        prompt: 2,
        between: Vec::new(),
        uncertainty: 0.0,
        group: 0,
        truth: Vec::new(),
    }
}

#[test]
fn a_context_counts_once() {
    let config = Config::small(20, (8, 1, 2), 10);
    let model = Decoder::new(config, 1, &Device::Cpu).unwrap();
    // The token 7 in five contexts, of which one stands twice, and 8 in four.
    let mut samples: Vec<_> = (0..5).map(|i| sample(&[i, 5, 7, 9])).collect();
    samples.push(sample(&[0, 5, 7, 10, 9]));
    samples.extend((0..4).map(|i| sample(&[i, 6, 8, 9])));
    let points = clusters::points(&model, &samples, 3).unwrap();
    assert_eq!(points.labels, [0; 5]);
    let distinct: BTreeSet<String> = points
        .states
        .iter()
        .map(|state| format!("{state:?}"))
        .collect();
    assert_eq!(distinct.len(), 5);
}

fn start(out: &Path, more: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_ual"));
    command
        .arg("study")
        .env("RAYON_NUM_THREADS", "1") // how products round depends on it
        .args(["--seeds", "2", "--pretrain-steps", "2"])
        .args(["--dim", "16", "--layers", "1", "--heads", "2", "--out"])
        .arg(out)
        .args(more);
    if !more.contains(&"--steps") {
        command.args(["--steps", "4"]);
    }
    command
}

fn command(out: &Path, more: &[&str]) -> Output {
    start(out, more).output().unwrap()
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
    let all = [
        "SFT",
        "constant",
        "shuffled",
        "constant, unigram",
        "UAL, unigram",
        "constant, responses",
        "UAL, responses",
        "UAL, own entropy",
        "UAL",
    ];
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
    assert_eq!(count("along the widest direction"), 9);
    assert_eq!(count("along the second widest"), 9);
    assert!(clusters.contains("\ntoken "));
    let numbers = clusters.lines().filter(|line| line.parse::<f64>().is_ok());
    let mut times: BTreeMap<&str, usize> = BTreeMap::new();
    numbers.for_each(|number| *times.entry(number).or_default() += 1);
    assert!(
        times.len() > 2 && times.values().all(|n| n % 9 == 0),
        "{times:?}"
    );
    // All that smooth have one mean over the rows they are trained on.
    for (m, outcome) in outcomes.iter().enumerate() {
        let mean = outcome["run"]["mean_smoothing"].as_f64().unwrap();
        let expected = if m % 9 == 0 { 0.0 } else { 0.1 };
        assert!((mean - expected).abs() < 1e-5, "{mean}");
    }
    // Means and deviations of two seeds, by hand.
    let nll = |seed: usize, method: usize, group: usize| {
        let groups = &outcomes[9 * seed + method]["run"]["groups"];
        groups[group]["summary"]["nll"].as_f64().unwrap()
    };
    let mut sections = report.split("\n## ").skip(1);
    for group in 0..3 {
        let section = sections.next().unwrap();
        for (m, method) in all.iter().enumerate() {
            let (a, b) = (nll(0, m, group), nll(1, m, group));
            let deviation = (a - b).abs() / 2f64.sqrt();
            let smoothing = if m == 0 { "0" } else { "0.1" };
            let mean = (a + b) / 2.0;
            let row = format!("| {method} | {smoothing} | 4 | {mean:.4} ± {deviation:.4} |");
            assert!(section.contains(&row), "{row}\n{section}");
        }
    }
    let differences = sections.next().unwrap();
    let less: Vec<f64> = (0..2)
        .map(|seed| nll(seed, 8, 0) - nll(seed, 0, 0))
        .collect();
    let lower = less.iter().filter(|d| **d < 0.0).count();
    let mean = (less[0] + less[1]) / 2.0;
    let row = differences
        .lines()
        .find(|line| line.starts_with("| all | less SFT |"));
    let row = row.unwrap();
    assert!(row.contains(&format!("| {mean:.4} [")), "{row}, {mean}");
    assert!(row.contains(&format!("({lower} of 2)")), "{row}");
    assert!(report.contains("18 trainings: 9 arms"), "{report}");
    assert!(report.contains("Compared are 180 differences"), "{report}"); // 8 arms and 4 more pairs, 3 groups, 5 metrics
    assert!(!report.contains("early stopping |"), "without validation");
    // Clusters, the last table.
    let silhouette = |seed: usize, method: usize| {
        let clusters = &outcomes[9 * seed + method]["clusters"];
        clusters["silhouette"].as_f64().unwrap()
    };
    let less: Vec<f64> = (0..2)
        .map(|seed| silhouette(seed, 8) - silhouette(seed, 1))
        .collect();
    let higher = less.iter().filter(|d| **d > 0.0).count();
    let mean = (less[0] + less[1]) / 2.0;
    let (low, high) = (less[0].min(less[1]), less[0].max(less[1]));
    let row = format!("| UAL less constant | {mean:.4} [{low:.4}, {high:.4}] ({higher} of 2) |");
    assert!(report.contains(&row), "{row}\n{report}");
    // The control has other samples' uncertainties, so it differs from UAL; and the same run gives the same numbers.
    assert_ne!(nll(0, 2, 0), nll(0, 8, 0));
    assert_ne!(nll(0, 4, 0), nll(0, 8, 0));
    assert_ne!(nll(0, 5, 0), nll(0, 8, 0));
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
        let run = |arm: usize| &outcomes[10 * seed + arm]["run"];
        let arms: Vec<_> = (0..10)
            .map(|arm| run(arm)["method"].as_str().unwrap())
            .collect();
        assert_eq!(
            arms,
            [
                "SFT",
                "constant",
                "shuffled",
                "within kind",
                "constant, unigram",
                "UAL, unigram",
                "constant, responses",
                "UAL, responses",
                "UAL, own entropy",
                "UAL"
            ]
        );
        assert_eq!(run(3)["groups"], run(9)["groups"]);
        for other in [2, 4, 5, 6, 7, 8] {
            assert_ne!(run(other)["groups"], run(9)["groups"]);
        }
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
        !refused.status.success() && stderr.contains("the arm \"shuffled\""),
        "{stderr}"
    );
    assert!(!out.exists());
}

#[derive(Parser)]
struct Training {
    #[command(flatten)]
    args: Args,
}

#[test]
fn own_uncertainties_are_entropies_of_the_predictions() {
    let out = TempDir::new().unwrap();
    let small = "ual --dim 16 --layers 1 --heads 2 --pretrain-steps 3 --out";
    let small = small.split(' ').chain(out.path().to_str());
    let args = Training::parse_from(small).args;
    let mut data = synthetic::generate(1);
    data.train = data.train.into_iter().step_by(160).collect(); // of several uncertainties
    let given: Vec<Sample> = data.train.clone();
    let alone = Ranks::alone();
    let setup = Setup::new(&args, data, None, &alone, &Device::Cpu).unwrap();
    let own = own_entropy(&setup, &args).unwrap();
    assert_eq!(own.samples.len(), 5);
    for (own, given) in own.samples.iter().zip(&given) {
        assert_eq!(own.tokens, given.tokens);
        // From the logits: -Σ p log p of each position that predicts a token of the response.
        let hidden = setup.model.hidden(&Packing::new(vec![&given.tokens]), None);
        let projection = setup.model.output_projection().t().unwrap();
        let logits = hidden.unwrap().matmul(&projection).unwrap();
        let logits = logits.to_vec2::<f32>().unwrap();
        let entropy = |logits: &Vec<f32>| -> f64 {
            let weights: Vec<f64> = logits.iter().map(|z| f64::from(*z).exp()).collect();
            let all: f64 = weights.iter().sum();
            weights.iter().map(|w| -(w / all) * (w / all).ln()).sum()
        };
        let of_response = &logits[given.prompt - 1..given.tokens.len() - 1];
        let mean = of_response.iter().map(entropy).sum::<f64>() / of_response.len() as f64;
        let expected = mean / (logits[0].len() as f64).ln();
        assert!((f64::from(own.uncertainty) - expected).abs() < 1e-5);
    }
}

/// A training with these NLLs on the validation samples, a point every ten steps.
fn curve(validation: &[f64]) -> Curve {
    let point = |(i, &nll): (usize, &f64)| Point {
        step: 10 * (i + 1),
        train_nll: 0.0,
        held_out_nll: -nll, // by which nothing may be chosen
        validation_nll: Some(nll),
    };
    Curve {
        points: validation.iter().enumerate().map(point).collect(),
        ..Curve::default()
    }
}

#[test]
fn validation_chooses_smoothing_and_step() {
    let curves = [
        curve(&[3.0, 1.0, 5.0]),
        curve(&[4.0, 3.0, 2.0]),
        curve(&[2.0, 1.0, 4.0]),
    ];
    let curves: Vec<&Curve> = curves.iter().collect();
    let choice = |training, step| Some(Choice { training, step });
    assert_eq!(choice::at_end(&curves), choice(1, 30));
    assert_eq!(choice::early(&curves), choice(0, 20)); // of two equals the first
    assert_eq!(choice::early(&curves[1..]), choice(1, 20));
    // NaN is not the least.
    let lost = curve(&[f64::NAN, 6.0, f64::NAN]);
    assert_eq!(choice::early(&[&lost, curves[1]]), choice(1, 30));
    assert_eq!(choice::at_end(&[&lost, curves[1]]), choice(1, 30));
    // Without validation only what needs no choice is chosen.
    let mut without = curve(&[1.0, 2.0]);
    for point in &mut without.points {
        point.validation_nll = None;
    }
    assert_eq!(choice::at_end(&[&without]), choice(0, 20));
    assert_eq!(choice::at_end(&[&without, &without]), None);
    assert_eq!(choice::early(&[&without]), None);
}

#[test]
fn two_levels_are_resampled() {
    // The number of a seed is the weighted mean of its units.
    let intervals = |seeds: &[Vec<f64>]| {
        let mean = |seed: usize, weights: &[f64], values: &mut [f64]| {
            let sum: f64 = seeds[seed].iter().zip(weights).map(|(v, w)| v * w).sum();
            values[0] = sum / weights.iter().sum::<f64>();
            values[1] = -values[0];
        };
        let units: Vec<usize> = seeds.iter().map(Vec::len).collect();
        nested_bootstrap(&units, 2, mean)
    };
    // Units that are alike leave the seeds, one seed leaves the units.
    let values: Vec<f64> = (0..10).map(|i| f64::from(i * i)).collect();
    let by_seeds: Vec<Vec<f64>> = values.iter().map(|&value| vec![value; 3]).collect();
    let expected = bootstrap(&values).unwrap();
    for interval in [
        intervals(&by_seeds)[0],
        intervals(std::slice::from_ref(&values))[0],
    ] {
        assert!((interval.mean - expected.mean).abs() < 1e-9, "{interval:?}");
        assert!((interval.low - expected.low).abs() < 1.0, "{interval:?}");
        assert!((interval.high - expected.high).abs() < 1.0, "{interval:?}");
    }
    // Both vary: the variances add up. Seeds are 0 and 20 ± 10, of 100 units each.
    let seeds: Vec<Vec<f64>> = (0..8)
        .map(|seed| {
            let unit = |i: usize| 20.0 * f64::from(seed % 2) + [-10.0, 10.0][i % 2];
            (0..4).map(unit).collect()
        })
        .collect();
    let [interval, negative] = intervals(&seeds)[..] else {
        panic!("two numbers")
    };
    let deviation = ((100.0 + 100.0 / 4.0) / 8f64).sqrt();
    for (low, high) in [
        (interval.low, interval.high),
        (-negative.high, -negative.low),
    ] {
        assert!((low - (10.0 - 1.96 * deviation)).abs() < 0.7, "{low}");
        assert!((high - (10.0 + 1.96 * deviation)).abs() < 0.7, "{high}");
    }
    assert!(intervals(&[]).is_empty());
    // A number that resampling makes larger: its interval is moved back.
    let gap = |_: usize, weights: &[f64], values: &mut [f64]| {
        values[0] = (weights[..50].iter().sum::<f64>() - weights[50..].iter().sum::<f64>()).abs();
    };
    let interval = nested_bootstrap(&[100], 1, gap)[0];
    assert!(interval.mean == 0.0 && interval.low < -5.0, "{interval:?}");
}

#[test]
fn units_come_to_the_metrics_of_their_rows() {
    let row = |i: usize| Row {
        uncertainty: 0.1 * i as f32,
        group: 0,
        nll: 1.0 + i as f64,
        entropy: 1.0,
        confidence: [0.31, 0.35, 0.9, 0.05][i % 4],
        correct: [1.0, 0.0, 1.0][i % 3],
        brier: 0.2 * i as f64,
        kl: Some(0.5 * i as f64),
    };
    // The first and the last sample have one prompt.
    let samples = [
        sample(&[1, 2, 3, 4]),
        sample(&[1, 1, 3]),
        sample(&[1, 2, 5, 4, 3]),
    ];
    let samples: Vec<&Sample> = samples.iter().collect();
    let rows = [
        vec![row(0), row(1)],
        vec![row(2)],
        (3..6).map(row).collect(),
    ];
    let all = units(&samples, &rows, |_| true);
    assert_eq!(all.len(), 2);
    let of = |units: &[candle_ual::report::units::Unit]| {
        let mut sums = [0.0; COLUMNS];
        for unit in units {
            let columns = unit.columns();
            sums.iter_mut().zip(columns).for_each(|(s, c)| *s += c);
        }
        metrics(&sums)
    };
    let near = |actual: [f64; 5], rows: &[Row]| {
        let s = summarise(rows).unwrap();
        let expected = [s.nll, s.kl.unwrap(), s.ece, s.brier, s.accuracy];
        for (a, e) in actual.iter().zip(expected) {
            assert!((a - e).abs() < 1e-12, "{actual:?}, not {expected:?}");
        }
    };
    near(of(&all), &rows.concat());
    let mut one = units(&samples[1..2], &rows[1..2], |_| true);
    near(of(&one), &rows[1]);
    let certain = units(&samples, &rows, |row| row.uncertainty < 0.15);
    assert_eq!(certain.len(), 1); // a prompt without rows has no unit
    near(of(&certain), &rows[0]);
    // What a checkpoint keeps, keeps its bits; an unknown divergence stays unknown.
    one[0].kl = f64::NAN;
    one[0].nll = 0.1 + 0.2;
    let text = serde_json::to_string(&one[0]).unwrap();
    let read: candle_ual::report::units::Unit = serde_json::from_str(&text).unwrap();
    assert!(read.kl.is_nan() && read.nll.to_bits() == one[0].nll.to_bits());
}

#[test]
fn validation_is_set_aside_by_prompts() {
    // Three samples a prompt.
    let train: Vec<Sample> = (0..30).map(|i| sample(&[1, i / 3, 50 + i])).collect();
    let data = || Dataset {
        vocab: 100,
        pretrain: train.clone(),
        train: train.clone(),
        validation: Vec::new(),
        held_out: vec![sample(&[1, 99, 7])],
        groups: Vec::new(),
        description: String::new(),
    };
    let aside = |share: f64, seed: u64| {
        let mut data = data();
        data.set_aside(share, seed).map(|()| data)
    };
    let of =
        |samples: &[Sample]| -> BTreeSet<u32> { samples.iter().map(|s| s.tokens[1]).collect() };
    let parted = aside(0.3, 1).unwrap();
    assert_eq!((parted.train.len(), parted.validation.len()), (21, 9));
    assert!(of(&parted.train).is_disjoint(&of(&parted.validation)));
    assert_eq!(of(&parted.pretrain), of(&parted.train));
    assert_ne!(
        of(&aside(0.3, 2).unwrap().validation),
        of(&parted.validation)
    );
    assert_ne!(parted.digest(), data().digest());
    // Less than a prompt's samples, or all of them.
    assert!(aside(0.05, 1).is_err() && aside(0.95, 1).is_ok() && aside(1.0, 1).is_err());
}

#[test]
fn each_arm_is_reported_at_its_best() {
    let folder = TempDir::new().unwrap();
    let data = folder.path().join("data.jsonl");
    // Nothing to learn but the numbers' digits, at a rate at which they are soon learned by heart.
    let line = |i: usize| {
        json!({"prompt": format!("question {i}"), "response": (i * i * 7919 % 9973).to_string(),
               "uncertainty": 0.2 + 0.4 * (i % 2) as f64})
    };
    let lines: Vec<String> = (0..40).map(|i| line(i).to_string()).collect();
    fs::write(&data, lines.join("\n")).unwrap();
    let options = [
        "--data",
        data.to_str().unwrap(),
        "--vocab",
        "300",
        "--steps",
        "16",
        "--lr",
        "0.1",
        "--smoothings",
        "0.05,0.3",
        "--validation",
        "0.25",
    ];
    let (report, outcomes) = study(&folder.path().join("a"), &options);
    assert_eq!(outcomes.len(), 2 * (1 + 8 * 2));
    let nll = |groups: &Value| groups[0]["summary"]["nll"].as_f64().unwrap();
    let (mut at_end, mut early) = (Vec::new(), Vec::new());
    for seed in 1..=2 {
        let of_ual = outcomes
            .iter()
            .filter(|o| o["seed"] == seed && o["run"]["method"] == "UAL");
        let of_ual: Vec<&Value> = of_ual.collect();
        assert_eq!(of_ual.len(), 2);
        let points = |outcome: &Value| -> Vec<(u64, f64)> {
            let points = outcome["run"]["training"]["points"].as_array().unwrap();
            let point = |p: &Value| {
                let nll = p["validation_nll"].as_f64();
                (p["step"].as_u64().unwrap(), nll.unwrap())
            };
            points.iter().map(point).collect()
        };
        let validation =
            |outcome: &Value| -> Vec<f64> { points(outcome).iter().map(|p| p.1).collect() };
        let least = |values: &[f64]| values.iter().copied().fold(f64::INFINITY, f64::min);
        for outcome in &of_ual {
            let stopped = &outcome["stopped"];
            let step = stopped["step"].as_u64().unwrap();
            let least = least(&validation(outcome));
            assert_eq!(points(outcome).len(), 15);
            assert_eq!(stopped["validation_nll"], least);
            assert!(points(outcome).contains(&(step, least)));
            assert_eq!(outcome["run"]["training"]["stopped"], Value::Null);
            let same = nll(&stopped["groups"]) == nll(&outcome["run"]["groups"]);
            assert_eq!(same, step == 16);
        }
        let by = |value: &dyn Fn(&Value) -> f64| {
            let values = of_ual.iter().min_by(|a, b| value(a).total_cmp(&value(b)));
            *values.unwrap()
        };
        at_end.push(by(&|o| validation(o)[14]));
        early.push(by(&|o| least(&validation(o))));
    }
    let mut stopped = outcomes.iter().map(|o| &o["stopped"]["step"]);
    assert!(stopped.any(|step| *step != 16), "none stops early");
    let mean = |chosen: &[&Value], groups: fn(&Value) -> &Value| {
        chosen.iter().map(|o| nll(groups(o))).sum::<f64>() / 2.0
    };
    let all = report.split("\n## ").nth(1).unwrap();
    let line = |name: &str| all.lines().find(|l| l.starts_with(name)).unwrap();
    let expected = mean(&at_end, |o| &o["run"]["groups"]);
    let row = line("| UAL | ");
    assert!(row.contains(&format!("| 16 | {expected:.4} ±")), "{row}");
    let expected = mean(&early, |o| &o["stopped"]["groups"]);
    let row = line("| UAL, early stopping | ");
    assert!(row.contains(&format!(" | {expected:.4} ±")), "{row}");
    assert!(line("| SFT, early stopping | 0 |").contains(" ± "));
    let largest = |chosen: &[&Value]| chosen.iter().filter(|o| o["smoothing"] == 0.3).count();
    let edge = report.lines().find(|line| line.starts_with("The largest"));
    for (name, chosen) in [("UAL", &at_end), ("UAL, early stopping", &early)] {
        let there = largest(chosen);
        assert!(there > 0, "this test needs one at the edge");
        let noted = edge.is_some_and(|e| e.contains(&format!(" {name} ({there} of 2)")));
        assert_eq!(noted, there > 0, "{name}: {edge:?}");
    }
    for part in [
        "8 are set aside for validation, 24 are trained on",
        "34 trainings: 9 arms, those that smooth with 2 mean smoothings each, over 2 seeds",
        "Compared are 300 differences", // 25 pairs, 3 groups, and no KL
        "### With early stopping",
        "| all | less SFT |",
        "| all | UAL, unigram less constant, unigram |",
        "| all | less SFT, early stopping |",
        "\nWith early stopping:\n\n- Beside SFT: UAL is better in ",
        "| constant | 0.3 | ",
    ] {
        assert!(report.contains(part), "{part}\n{report}");
    }

    // Killed in a training, it goes on to the same; done, it says the same without training.
    let out = folder.path().join("b");
    let resumable = [&options[..], &["--checkpoint-every", "1", "--resume"]].concat();
    let mut command = start(&out, &resumable);
    command.stdout(Stdio::null()).stderr(Stdio::null());
    let mut child = command.spawn().unwrap();
    let checkpoint = out.join("seed-1").join("checkpoint-UAL 0.3.safetensors");
    while !checkpoint.exists() && child.try_wait().unwrap().is_none() {
        std::thread::sleep(std::time::Duration::from_millis(1));
    }
    child.kill().unwrap();
    child.wait().unwrap();
    assert!(checkpoint.exists());
    let results = |outcomes: &[Value]| -> Vec<Value> {
        let of = |o: &Value| {
            json!([
                o["run"]["groups"],
                o["stopped"],
                o["run"]["training"]["points"],
                o["clusters"]
            ])
        };
        outcomes.iter().map(of).collect()
    };
    for _ in 0..2 {
        let (_, resumed) = study(&out, &resumable);
        assert_eq!(results(&resumed), results(&outcomes));
    }
}

#[test]
fn what_cannot_be_compared_is_refused_at_once() {
    let folder = TempDir::new().unwrap();
    let out = folder.path().join("out");
    for (options, expected) in [
        (
            &["--smoothings", "0.1,0.2"][..],
            "needs --validation above 0",
        ),
        (
            &["--smoothings", "0.1,0.6", "--validation", "0.2"],
            "--smoothings has 0.6; each must be in [0, 0.5]",
        ),
        (
            &["--smoothings", "0.1,0.2,0.1", "--validation", "0.2"],
            "--smoothings has 0.1 twice",
        ),
        (
            &["--smoothings", "0.1", "--mean-smoothing", "0.2"],
            "cannot be used with",
        ),
        (&["--validation", "1"], "--validation is 1; it must be"),
        (&["--validation", "0.0001"], "0 would be for validation"),
        // A sixth of the synthetic samples have no uncertainty.
        (
            &["--smoothings", "0.1,0.49", "--validation", "0.2"],
            "the arm \"shuffled\" with a mean smoothing of 0.49",
        ),
    ] {
        let refused = command(&out, options);
        let stderr = String::from_utf8_lossy(&refused.stderr);
        assert!(
            !refused.status.success() && stderr.contains(expected),
            "{options:?}: {stderr}"
        );
        assert!(!out.exists());
    }
}
