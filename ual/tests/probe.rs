//! `ual probe`: heads, arms, scores, choices, and a run of it.

#[allow(dead_code, reason = "other tests use more of it")]
#[path = "elicit/model.rs"]
mod model;

use std::{
    collections::BTreeMap,
    fs,
    path::Path,
    process::{Command, Output},
};

use candle_core::{DType, Device, Tensor};
use candle_ual::{
    commands::probe::{
        arms::{Known, Method, Spread, arms},
        compare::{ArmName, METRICS, difference},
        heads::{Heads, Plan, Samples, Shape},
        hidden,
        outcome::{Curve, Ending, Outcome, Point},
        questions::{self, Question},
        scores::Measured,
        stretches::{OfStretch, best, best_of_seeds, quintiles},
        trainings::{PARTS, parts},
    },
    data::form::Turn,
    files,
    model::pretrained::Overrides,
    report::metrics::Summary,
};
use rand::{SeedableRng, rngs::StdRng};
use safetensors::SafeTensors;
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::model::write_model_for;

fn pseudo(count: usize, seed: usize) -> Vec<f32> {
    (0..count)
        .map(|i| ((i * 7919 + seed * 104_729) % 1009) as f32 / 504.5 - 1.0)
        .collect()
}

/// Heads that train side by side become what each would become alone, whatever stands beside it.
#[test]
fn heads_do_not_see_one_another() {
    let (samples, input, outputs) = (40, 6, 3);
    let states = Tensor::from_vec(pseudo(samples * input, 1), (samples, input), &Device::Cpu);
    let states = states.unwrap();
    let smoothing = [0.0, 0.3, 0.7];
    for prior in [None, Some([0.0f32, 3.0, 1.0])] {
        let trained = |own: &[f32]| {
            let shape = Shape {
                heads: own.len(),
                input,
                hidden: 4,
                outputs,
            };
            let heads = Heads::new(shape, 5, &Device::Cpu).unwrap();
            let of_sample = |i: usize| own.iter().map(|most| most * (i % 3) as f32 / 2.0).collect();
            let samples = Samples {
                states: states.clone(),
                answers: (0..samples as u32).map(|i| i * i % 3).collect(),
                smoothing: (0..samples).map(of_sample).collect(),
                prior: prior.map(|prior| Tensor::new(&prior, &Device::Cpu).unwrap()),
            };
            let plan = Plan {
                epochs: 5,
                batch: 16,
                learning_rate: 0.03,
                weight_decay: 0.01,
                seed: 2,
            };
            let mut measured = Vec::new();
            heads
                .train(&samples, &plan, |epoch| {
                    measured.push(epoch);
                    Ok(())
                })
                .unwrap();
            assert_eq!(measured, [1, 2, 3, 4, 5]);
            heads.logits(&states).unwrap().to_vec3::<f32>().unwrap()
        };
        let together = trained(&smoothing);
        for (head, most) in smoothing.iter().enumerate() {
            let alone = &trained(&[*most])[0];
            for (row, expected) in together[head].iter().zip(alone) {
                for (value, expected) in row.iter().zip(expected) {
                    assert!((value - expected).abs() < 2e-4, "{value} {expected}");
                }
            }
        }
        // Smoothing makes a difference at all.
        let pairs = together[0].concat().into_iter().zip(together[2].concat());
        let largest = pairs.map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        assert!(largest > 0.02, "{largest}");
    }
}

#[test]
fn epochs_are_measured_twice_a_doubling() {
    let plan = Plan {
        epochs: 40,
        batch: 1,
        learning_rate: 1.0,
        weight_decay: 0.0,
        seed: 0,
    };
    let measured: Vec<usize> = (1..=40).filter(|&epoch| plan.is_measured(epoch)).collect();
    assert_eq!(measured, [1, 2, 3, 4, 6, 8, 11, 16, 23, 32, 40]);
}

#[test]
fn scores_are_expectations_over_people() {
    let truths = vec![vec![0.5, 0.25, 0.25], vec![0.0, 0.0, 1.0]];
    let members = vec![("all", vec![0, 1]), ("first", vec![0]), ("none", vec![])];
    let measured = Measured::new(truths.clone(), 4, members).unwrap();
    let logits = [[1.0f32, 0.0, -1.0, 0.5], [0.0, 2.0, 1.0, -3.0]];
    let tensor = Tensor::new(&logits, &Device::Cpu).unwrap();
    let summaries = measured.summaries(&tensor).unwrap();
    let probabilities = logits.map(|row| {
        let sum: f64 = row.iter().map(|&z| f64::from(z).exp()).sum();
        row.map(|z| f64::from(z).exp() / sum)
    });
    let mut expected = [0.0; 4];
    for (p, q) in probabilities.iter().zip(&truths) {
        let q = [q[0], q[1], q[2], 0.0];
        for y in 0..4 {
            // Of a person who gives y.
            let brier = |k: usize| (p[k] - f64::from(u8::from(k == y))).powi(2);
            expected[0] -= q[y] * p[y].ln() / 2.0;
            expected[1] += q[y] * (0..4).map(brier).sum::<f64>() / 2.0;
            if q[y] > 0.0 {
                expected[2] += q[y] * (q[y] / p[y]).ln() / 2.0;
            }
        }
    }
    expected[3] = (0.5 + 0.0) / 2.0; // 0.5 give what the first row predicts, nobody what the second does
    let all = summaries[0].unwrap();
    let found = [all.nll, all.brier, all.kl.unwrap(), all.accuracy];
    for (found, expected) in found.iter().zip(expected) {
        assert!((found - expected).abs() < 1e-6, "{found} {expected}");
    }
    let confidence = probabilities[0][0];
    assert!((summaries[1].unwrap().ece - (confidence - 0.5).abs()).abs() < 1e-6);
    assert!(summaries[2].is_none());
    let nll = measured.nll(&tensor).unwrap();
    assert!((nll - expected[0]).abs() < 1e-6);
}

#[test]
fn parts_are_by_agreement() {
    let truths = vec![
        vec![1.0, 0.0],
        vec![0.9, 0.1],
        vec![0.5, 0.5],
        vec![0.0, 1.0],
        vec![0.2, 0.8],
        vec![0.4, 0.6],
    ];
    let parts = parts(&truths);
    assert_eq!(parts.iter().map(|part| part.0).collect::<Vec<_>>(), PARTS);
    let members: Vec<_> = parts.into_iter().map(|part| part.1).collect();
    assert_eq!(
        members,
        [vec![0, 1, 2, 3, 4, 5], vec![0, 3], vec![1, 4], vec![2, 5]]
    );
}

#[test]
fn arms_have_the_means_they_are_compared_at() {
    let uncertainties: Vec<f32> = (0..40)
        .map(|i| if i < 10 { 0.0 } else { i as f32 / 50.0 })
        .collect();
    let own: Vec<f32> = (0..40).map(|i| 0.3 + 0.001 * i as f32).collect();
    let kinds: Vec<usize> = (0..40).map(|i| i / 10).collect();
    let known = Known {
        uncertainties: &uncertainties,
        own_entropies: &own,
        kinds: Some(&kinds),
    };
    let made = |spread| arms(spread, &known, &[0.05, 0.4], &mut StdRng::seed_from_u64(3)).unwrap();
    let all = made(Spread::Responses);
    let mut found = BTreeMap::new();
    for arm in &all {
        let mean = arm.smoothing.iter().sum::<f32>() / 40.0;
        assert!((mean - arm.mean).abs() < 1e-6, "{arm:?}: {mean}");
        if arm.mean == 0.05 {
            found.insert(arm.method, arm.smoothing.clone());
        }
    }
    assert_eq!((all.len(), found.len()), (19, 9));
    let sorted = |values: &[f32]| {
        let mut values = values.to_vec();
        values.sort_by(f32::total_cmp);
        values
    };
    let ual = &found[&Method::Ual];
    for control in [Method::Shuffled, Method::WithinKind] {
        assert_eq!(sorted(&found[&control]), sorted(ual), "the same values");
        assert_ne!(&found[&control], ual, "dealt anew");
    }
    for kind in 0..4 {
        let of = |values: &[f32]| sorted(&values[10 * kind..10 * kind + 10]);
        assert_eq!(of(&found[&Method::WithinKind]), of(ual));
    }
    assert!(
        found[&Method::Constant]
            .iter()
            .all(|&smoothing| smoothing == 0.05)
    );
    let threshold = &found[&Method::Threshold];
    assert_eq!(*threshold, [[0.0; 20], [0.1; 20]].concat());
    let ratio = |method: Method| found[&method][39] / found[&method][20];
    assert!((ratio(Method::Ual) - 39.0 / 20.0).abs() < 1e-5);
    assert!((ratio(Method::Squared) - (39f32 / 20.0).powi(2)).abs() < 1e-4);
    let mean = uncertainties.iter().sum::<f32>() / 40.0;
    assert!((ratio(Method::Floor) - (0.78 + mean) / (0.4 + mean)).abs() < 1e-5);
    assert!((found[&Method::Floor][0] - 0.025).abs() < 1e-6, "half");
    assert!((ratio(Method::Rank) - 39.5 / 20.5).abs() < 1e-5);
    assert!((ratio(Method::OwnEntropy) - own[39] / own[20]).abs() < 1e-5);
    // The same deal where smoothing is spread otherwise, and a plain training but with the same outputs as another.
    let others = made(Spread::Frequencies);
    let dealt = others
        .iter()
        .find(|arm| arm.method == Method::Shuffled)
        .unwrap();
    assert_eq!(dealt.smoothing, found[&Method::Shuffled]);
    assert_eq!(others.len(), 10);
    assert_eq!(made(Spread::Vocabulary).len(), 11);
}

fn summary(kl: f64) -> Option<Summary> {
    Some(Summary {
        rows: 1,
        nll: kl,
        ece: 0.0,
        brier: 0.0,
        entropy: 0.0,
        accuracy: 0.0,
        kl: Some(kl),
    })
}

/// Points of (validation loss, divergence).
fn curve(method: Method, mean_smoothing: f32, points: &[(f64, f64)]) -> Curve {
    let point = |(i, &(validation_nll, kl)): (usize, &(f64, f64))| Point {
        epoch: i + 1,
        validation_nll,
        parts: vec![summary(kl); 4],
    };
    Curve {
        method,
        spread: Spread::Responses,
        mean_smoothing,
        points: points.iter().enumerate().map(point).collect(),
    }
}

#[test]
fn the_validation_part_chooses_and_not_the_held_out_samples() {
    let outcome = |seed, shift: f64| Outcome {
        seed,
        size: 10,
        curves: vec![
            curve(Method::Plain, 0.0, &[(2.0, 1.5), (3.0, 1.0 + shift)]),
            curve(Method::Ual, 0.1, &[(1.5, 0.9), (2.5, 0.1)]),
            curve(Method::Ual, 0.2, &[(1.4, 0.8), (2.6, 0.2)]),
        ],
    };
    let (ual, plain) = (
        ArmName(Method::Ual, Spread::Responses),
        ArmName(Method::Plain, Spread::Responses),
    );
    let one = outcome(1, 0.0);
    let chosen = |ending| {
        let (curve, end) = one
            .chosen((Method::Ual, Spread::Responses), ending)
            .unwrap();
        (curve.mean_smoothing, end.epoch)
    };
    assert_eq!(chosen(Ending::Last), (0.1, 2));
    assert_eq!(chosen(Ending::Early), (0.2, 1));
    assert!(
        one.chosen((Method::Rank, Spread::Responses), Ending::Last)
            .is_none()
    );
    let other = outcome(2, 0.2);
    let (_, kl) = METRICS[0];
    let of = |ending| difference(&[&one, &other], (ual, plain), ending, 0, kl).unwrap();
    let last = of(Ending::Last);
    assert!((last.mean - -1.0).abs() < 1e-12);
    assert!(
        (last.low - -1.1).abs() < 1e-12 && (last.high - -0.9).abs() < 1e-12,
        "{last:?}"
    );
    assert!((of(Ending::Early).mean - -0.7).abs() < 1e-12);
}

fn question(uncertainty: f32) -> Question {
    Question {
        turns: vec![Turn::new("user", "?"), Turn::new("assistant", "1")],
        answer: 0,
        uncertainty,
        kind: None,
        truth: Vec::new(),
    }
}

#[test]
fn stretches_are_quintiles_and_have_their_best_smoothing() {
    let all: Vec<Question> = (0..60)
        .map(|i| question((i as f32 - 10.0).max(0.0) / 100.0))
        .collect();
    let stretches = quintiles(&all, 4).unwrap();
    assert_eq!(stretches.len(), 6);
    assert_eq!(
        (stretches[0].above, stretches[0].to, stretches[0].mean),
        (-1.0, 0.0, 0.0)
    );
    assert!(stretches.windows(2).all(|pair| pair[0].to == pair[1].above));
    assert_eq!(stretches[5].to, 0.49);
    let error = quintiles(&all, 6).unwrap_err().to_string();
    assert!(
        error.contains("--stretch-size is 6: with a validation part 12 samples are needed"),
        "{error}"
    );

    let of = |seed, kl: [f64; 3]| OfStretch {
        seed,
        stretch: 0,
        curves: [0.0, 0.1, 0.2]
            .into_iter()
            .zip(kl)
            .map(|(mean, kl)| curve(Method::Constant, mean, &[(1.0, kl)]))
            .collect(),
    };
    let (one, other) = (of(1, [3.0, 1.0, 2.0]), of(2, [9.0, 4.0, 2.0]));
    assert_eq!(best(&[&one], Ending::Last), Some(0.1));
    assert_eq!(best(&[&one, &other], Ending::Last), Some(0.2)); // 12, 5, 4
    let interval = best_of_seeds(&[&one, &other], Ending::Last).unwrap();
    let near = |a: f64, b: f64| (a - b).abs() < 1e-6;
    assert!(near(interval.mean, 0.2) && near(interval.low, 0.1) && near(interval.high, 0.2));
}

/// Questions whose answer follows from their last word, and questions whose answer nobody agrees on; and a model beside them.
fn write_data(path: &Path, samples: usize) {
    let line = |i: usize| {
        let (certain, answer) = (i.is_multiple_of(2), i / 2 % 3);
        let held_out = i % 5 == 4;
        let counts = match certain {
            true => json!({answer.to_string(): 1}),
            false => json!({"0": 2 + i % 3, "1": 2, "2": 1}),
        };
        let mut line = json!({
            "prompt": format!("{} {i} {answer}", if certain { "What is" } else { "How is" }),
            "response": answer.to_string(),
            "uncertainty": if certain { 0.0 } else { 0.5 + 0.01 * (i % 40) as f32 },
            "kind": if certain { "exact" } else { "open" },
            "held_out": held_out,
        });
        if held_out {
            line["response_counts"] = counts;
        }
        format!("{line}\n")
    };
    fs::write(path, (0..samples).map(line).collect::<String>()).unwrap();
    write_model_for(&path.with_file_name("small.gguf"), 128);
}

fn probe(folder: &Path, more: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_ual"))
        .current_dir(folder)
        .args([
            "probe",
            "--data",
            "data.jsonl",
            "--out",
            "out",
            "--model",
            "small.gguf",
        ])
        .args(more)
        .output()
        .unwrap()
}

const SMALL: [&str; 14] = [
    "--group",
    "kind",
    "--sizes",
    "20,40",
    "--seeds",
    "2",
    "--smoothings",
    "0.1,0.3",
    "--epochs",
    "4",
    "--width",
    "4",
    "--stretch-size",
    "10",
];

#[test]
fn a_run_writes_a_report_and_does_so_again() {
    let folder = TempDir::new().unwrap();
    write_data(&folder.path().join("data.jsonl"), 400);
    let run = |more: &[&str]| {
        let run = probe(folder.path(), &[&SMALL, more].concat());
        let stderr = String::from_utf8(run.stderr).unwrap();
        assert!(run.status.success(), "{stderr}");
        let read = |name: &str| fs::read_to_string(folder.path().join("out").join(name)).unwrap();
        (read("report.md"), read("outcomes.jsonl"), stderr)
    };
    let (report, outcomes, stderr) = run(&[]);
    assert!(stderr.contains("400 of 400 prompts read"), "{stderr}");
    for picture in ["sizes", "epochs", "smoothing", "uncertainty"] {
        assert!(report.contains(&format!("({picture}.svg)")));
        let svg = folder.path().join(format!("out/{picture}.svg"));
        assert!(fs::read_to_string(svg).unwrap().len() > 2000);
    }
    // 19 + 10 + 11 arms of two smoothings, two sizes and seeds; six stretches of 12 smoothings.
    assert!(
        report.contains(&format!("{} trainings", 2 * (2 * 40 + 6 * 12))),
        "{report}"
    );
    assert!(report.contains("| UAL − plain |") && report.contains("| UAL, over frequencies |"));
    let parsed = outcomes.lines().map(serde_json::from_str::<Value>);
    let parsed: Vec<Value> = parsed.collect::<Result<_, _>>().unwrap();
    assert_eq!(parsed.len(), 4);
    let points = parsed[0]["curves"][0]["points"].as_array().unwrap();
    assert_eq!(points.len(), 4);
    for point in points {
        let parts = point["parts"].as_array().unwrap();
        assert!(parts.iter().all(|part| part["kl"].as_f64().unwrap() > 0.0));
    }

    // The states are not computed again, and the numbers are the same.
    let (again, same, stderr) = run(&[]);
    assert!(!stderr.contains("prompts read"), "{stderr}");
    assert_eq!((&again, &same), (&report, &outcomes));
    // Of other samples they are.
    let (_, other, stderr) = run(&["--limit", "390"]);
    assert!(stderr.contains("390 of 390 prompts read"), "{stderr}");
    assert_ne!(other, outcomes);
}

/// The states are those at the end of each prompt by itself, in the order of the questions, also where a run goes on from what
/// another kept.
#[test]
fn hidden_states_are_those_of_single_prompts() {
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("data.jsonl");
    write_data(&path, 40);
    let read = questions::read(&path, None, None, 1).unwrap();
    let all: Vec<&Question> = read.train.iter().chain(&read.held_out).collect();
    let model = folder.path().join("small.gguf");
    let states = |questions: &[&Question]| {
        let out = TempDir::new().unwrap();
        let found = hidden::of(questions, (&model, &Overrides::default()), out.path()).unwrap();
        assert_eq!(found.states.dtype(), DType::F32);
        (found.states.to_vec2::<f32>().unwrap(), found.entropies)
    };
    let (together, entropies) = states(&all);
    for i in [0, 7, 39] {
        let (alone, entropy) = states(&all[i..=i]);
        for (found, expected) in together[i].iter().zip(&alone[0]) {
            assert!((found - expected).abs() < 1e-4, "{found} {expected}");
        }
        assert!((entropies[i] - entropy[0]).abs() < 1e-5);
        assert!(entropy[0] > 0.01 && entropy[0] <= 1.0);
    }
    assert_ne!(together[0], together[7]);

    // What a killed run had kept: the states of the first 32.
    let out = TempDir::new().unwrap();
    let of = || hidden::of(&all, (&model, &Overrides::default()), out.path()).unwrap();
    of();
    let file = out.path().join("hidden.safetensors");
    let bytes = fs::read(&file).unwrap();
    let (_, metadata) = SafeTensors::read_metadata(&bytes).unwrap();
    let metadata = metadata.metadata().clone().unwrap();
    let tensors = candle_core::safetensors::load_buffer(&bytes, &Device::Cpu).unwrap();
    let mark = Tensor::ones(
        (1, tensors["states"].dim(1).unwrap()),
        DType::F32,
        &Device::Cpu,
    )
    .unwrap();
    let kept = tensors["states"].narrow(0, 1, 31).unwrap();
    let kept = [
        ("states".to_string(), Tensor::cat(&[mark, kept], 0).unwrap()),
        (
            "entropies".to_string(),
            tensors["entropies"].narrow(0, 0, 32).unwrap(),
        ),
    ];
    let mut partial = Vec::new();
    files::write_safetensors(&mut partial, &kept, metadata).unwrap();
    fs::write(&file, partial).unwrap();
    let gone_on = of().states.to_vec2::<f32>().unwrap();
    let different: Vec<usize> = (0..40).filter(|&i| gone_on[i] != together[i]).collect();
    assert_eq!(different.len(), 1, "the rest is as before");
    assert!(
        gone_on[different[0]].iter().all(|&x| x == 1.0),
        "what was kept is taken"
    );
}

#[test]
fn what_cannot_be_studied_is_refused() {
    let folder = TempDir::new().unwrap();
    let data = folder.path().join("data.jsonl");
    let refusal = |more: &[&str]| {
        let run = probe(folder.path(), more);
        assert!(!run.status.success());
        String::from_utf8(run.stderr).unwrap()
    };
    write_data(&data, 100);
    for (options, expected) in [
        (
            &["--sizes", "41"][..],
            "--sizes has 41: with a validation part 82 samples are needed, and there are 80",
        ),
        (
            &["--smoothings", "0.1,1"],
            "--smoothings has 1; a mean smoothing must be above 0 and below 1",
        ),
        (&["--seeds", "0"], "--seeds is 0; it must be at least 1"),
        (
            &["--outputs", "2", "--sizes", "10"],
            "--outputs is 2; there are 3 responses",
        ),
        (
            &["--group", "sort"],
            "\"sort\", the field of --group, is missing",
        ),
        (&["--sizes", "10"], "--stretch-size is 500"),
    ] {
        let found = refusal(options);
        assert!(found.contains(expected), "{found}");
    }
    for (line, expected) in [
        (
            json!({"prompt": "a", "response": "b", "held_out": false}),
            "it has no \"uncertainty\"",
        ),
        (
            json!({"prompt": "a", "response": "b", "uncertainty": 0.5, "held_out": true}),
            "\"held_out\" is true; it must be true where there are \"response_counts\" and false where there are none",
        ),
        (
            json!({"prompt": "a", "response": "b", "uncertainty": 1.5, "held_out": false}),
            "\"uncertainty\" is 1.5; it must be in [0, 1]",
        ),
        (
            json!({"prompt": "a", "response": "b", "uncertainty": 0.5, "held_out": false}),
            "1 different responses; a head tells from 2 to 256 apart",
        ),
    ] {
        fs::write(&data, format!("{line}\n")).unwrap();
        let found = refusal(&[]);
        assert!(found.contains(expected), "{found}");
    }
    assert!(!folder.path().join("out").exists());
}
