//! PyTorch's own answers (fixtures/make_pytorch.py), against the reference and the fast path.

use crate::common::*;
use candle_core::{DType, Tensor, Var};
use candle_cross_entropy::{CrossEntropy, Reduction, Targets};
use serde_json::Value;

struct Case {
    name: String,
    dtype: DType,
    logits: Tensor,
    targets: Targets,
    loss: CrossEntropy,
    json: Value,
}

/// Numbers; null is −inf.
fn numbers(value: &Value) -> Vec<f64> {
    value
        .as_array()
        .unwrap()
        .iter()
        .map(|v| v.as_f64().unwrap_or(f64::NEG_INFINITY))
        .collect()
}

fn cases() -> Vec<Case> {
    let text = std::fs::read_to_string(concat!(
        env!("CARGO_MANIFEST_DIR"),
        "/tests/fixtures/pytorch.json"
    ))
    .unwrap();
    let document: Value = serde_json::from_str(&text).unwrap();
    let cases: Vec<Case> = document["cases"]
        .as_array()
        .unwrap()
        .iter()
        .map(case)
        .collect();
    assert!(cases.len() > 80, "only {} cases", cases.len());
    cases
}

fn case(json: &Value) -> Case {
    let [rows, width] = ["rows", "width"].map(|key| json[key].as_u64().unwrap() as usize);
    let dtype = if json["dtype"] == "bf16" {
        DType::BF16
    } else {
        DType::F32
    };
    let mut loss = CrossEntropy::new();
    let number = |key: &str| json[key].as_f64().map(|v| v as f32);
    if json["smoothing"].is_array() {
        loss = loss.smoothing(tensor(numbers(&json["smoothing"]), &[rows], DType::F64));
    } else if let Some(value) = json["smoothing"].as_f64() {
        // As f64: 0.1 in f32 is another number than torch's.
        loss = loss.smoothing(tensor(vec![value], &[1], DType::F64));
    }
    if json["row_weights"].is_array() {
        loss = loss.row_weights(&tensor(numbers(&json["row_weights"]), &[rows], DType::F64));
    }
    if let Some(value) = number("z_loss") {
        loss = loss.z_loss(value);
    }
    if let Some(value) = number("softcap") {
        loss = loss.softcap(value);
    }
    if let Some(value) = number("logit_scale") {
        loss = loss.logit_scale(value);
    }
    if let Some(value) = json["vocab_size"].as_u64() {
        loss = loss.vocab_size(value as usize);
    }
    if let Some(value) = json["ignore_index"].as_i64() {
        loss = loss.ignore_index(value);
    }
    let vector = |key: &str| tensor(numbers(&json[key]), &[width], DType::F64);
    if json["class_weights"].is_array() {
        loss = loss.class_weights(&vector("class_weights"));
    }
    if json["prior"].is_array() {
        loss = loss.smoothing_prior(&vector("prior"));
    }
    if json["entropy_weight"].is_array() {
        loss = loss.entropy_weight(tensor(
            numbers(&json["entropy_weight"]),
            &[rows],
            DType::F64,
        ));
    }
    // (rows, …) by rows.
    let matrix = |key: &str| -> Vec<f64> {
        let rows = json[key].as_array().unwrap().iter();
        rows.flat_map(numbers).collect()
    };
    let given: Targets = if json["probabilities"].is_array() {
        tensor(matrix("probabilities"), &[rows, width], DType::F32).into()
    } else if json["top_k"].is_array() {
        let classes = matrix("top_k")
            .into_iter()
            .map(|k| k as i64)
            .collect::<Vec<_>>();
        let shape = [rows, classes.len() / rows];
        let t = tensor(matrix("top_k_probabilities"), &shape, DType::F32);
        Targets::top_k(&targets(classes, &shape, DType::I64), &t)
    } else {
        let y = numbers(&json["targets"]).into_iter().map(|y| y as i64);
        targets(y.collect(), &[rows], DType::I64).into()
    };
    Case {
        name: json["name"].as_str().unwrap().into(),
        dtype,
        logits: tensor(numbers(&json["logits"]), &[rows, width], dtype),
        targets: given,
        loss: loss.reduction(match json["reduction"].as_str().unwrap() {
            "none" => Reduction::None,
            "sum" => Reduction::Sum,
            "mean" => Reduction::Mean,
            other => panic!("reduction {other}"),
        }),
        json: json.clone(),
    }
}

/// Every element within `relative`, or `absolute`, of torch's.
fn compare(
    name: &str,
    what: &str,
    actual: &Tensor,
    expected: &Value,
    relative: f64,
    absolute: f64,
) {
    let (actual, expected) = (values(actual), numbers(expected));
    assert_eq!(actual.len(), expected.len(), "{name}: {what}");
    for (i, (a, e)) in actual.into_iter().zip(expected).enumerate() {
        let error = (a - e).abs();
        assert!(
            error <= relative * e.abs() || error <= absolute,
            "{name}: {what} {i} is {a:e}, torch has {e:e}"
        );
    }
}

#[test]
fn reference_agrees_in_f64() {
    for Case {
        name,
        logits,
        targets,
        loss,
        json,
        ..
    } in cases()
    {
        let ours = loss.reference(&logits, &targets).unwrap();
        // The absolute part is what torch itself loses: its gradient of a sure target is a difference of ones, and
        // its loss of a row far from 0 the difference of large numbers.
        compare(
            &name,
            "loss",
            &ours.loss,
            &json["f64"]["loss"],
            1e-12,
            2e-15,
        );
        compare(
            &name,
            "gradient",
            &ours.grad,
            &json["f64"]["grad"],
            1e-12,
            2e-15,
        );
    }
}

#[test]
fn fast_path_agrees() {
    for Case {
        name,
        dtype,
        logits,
        targets,
        loss,
        json,
    } in cases()
    {
        let (relative, absolute) = if dtype == DType::BF16 {
            (1.0 / 128.0, 1e-7)
        } else {
            (4e-6, 2.5e-7)
        };
        let ours = loss.loss_and_grad(&logits, &targets).unwrap();
        compare(&name, "loss", &ours.loss, &json["f64"]["loss"], 1e-5, 1e-15);
        compare(
            &name,
            "gradient",
            &ours.grad,
            &json["f64"]["grad"],
            relative,
            absolute,
        );

        let logits = Var::from_tensor(&logits).unwrap();
        let forward = loss.forward(&logits, &targets).unwrap();
        compare(
            &name,
            "forward",
            &forward,
            &json["f64"]["loss"],
            1e-5,
            1e-15,
        );
        let gradients = forward.sum_all().unwrap().backward().unwrap();
        compare(
            &name,
            "backward",
            gradients.get(&logits).unwrap(),
            &json["f64"]["grad"],
            relative,
            absolute,
        );
    }
}

#[test]
fn fast_path_agrees_in_f64() {
    for Case {
        name,
        dtype,
        logits,
        targets,
        loss,
        json,
    } in cases()
    {
        if dtype == DType::F32 {
            let ours = loss
                .loss_and_grad(&logits.to_dtype(DType::F64).unwrap(), &targets)
                .unwrap();
            compare(
                &name,
                "loss",
                &ours.loss,
                &json["f64"]["loss"],
                1e-12,
                2e-15,
            );
            compare(
                &name,
                "gradient",
                &ours.grad,
                &json["f64"]["grad"],
                1e-12,
                2e-15,
            );
        }
    }
}

/// torch's f32 answers are no more exact than ours, so this is the wider tolerance of two f32 computations.
#[test]
fn fast_path_agrees_with_torch_in_f32() {
    let mut compared = 0;
    for Case {
        name,
        logits,
        targets,
        loss,
        json,
        ..
    } in cases()
    {
        if json["f32"].is_object() {
            let ours = loss.loss_and_grad(&logits, &targets).unwrap();
            compare(&name, "loss", &ours.loss, &json["f32"]["loss"], 2e-5, 1e-6);
            compare(
                &name,
                "gradient",
                &ours.grad,
                &json["f32"]["grad"],
                1e-5,
                5e-7,
            );
            compared += 1;
        }
    }
    assert!(compared > 15);
}
