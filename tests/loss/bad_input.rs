//! Bad arguments and bad values: an error that names the argument, what it was and what it must be, from every entry
//! point, with nothing written.

use crate::common::*;
use candle_core::{DType, Device, Tensor, Var};
use candle_cross_entropy::{CrossEntropy, Reduction, cross_entropy};

/// Expects an error containing `parts` from every entry point, and the logits untouched.
#[track_caller]
fn refused(loss: &CrossEntropy, logits: &Tensor, targets: &Tensor, parts: &[&str]) {
    let float = matches!(
        logits.dtype(),
        DType::F32 | DType::F64 | DType::F16 | DType::BF16
    );
    let before = float.then(|| bits(logits));
    assert_error(loss.forward(logits, targets), parts);
    assert_error(loss.forward_with_stats(logits, targets), parts);
    assert_error(loss.loss_and_grad(logits, targets), parts);
    assert_error(loss.loss_and_grad_without_stats(logits, targets), parts);
    assert_error(
        loss.loss_and_grad_inplace_without_stats(logits.clone(), targets),
        parts,
    );
    assert_error(loss.loss_and_grad_inplace(logits.clone(), targets), parts);
    assert_error(loss.reference(logits, targets), parts);
    assert_error(
        loss.clone().check_inputs(true).forward(logits, targets),
        parts,
    );
    if float {
        let tracked = (Var::from_tensor(logits).unwrap().as_tensor() * 1.0).unwrap();
        assert_error(
            loss.clone()
                .inplace_backward(true)
                .forward(&tracked, targets),
            parts,
        );
        assert_eq!(bits(logits), before.unwrap(), "nothing may be written");
    }
}

fn logits(dtype: DType) -> Tensor {
    tensor(normal(&mut rng(1), 24, 2.0), &[4, 6], dtype)
}

fn y(values: [i64; 4]) -> Tensor {
    targets(values.to_vec(), &[4], DType::I64)
}

fn f32s(values: &[f32]) -> Tensor {
    Tensor::new(values, CPU).unwrap()
}

#[test]
fn logits_of_a_wrong_shape() {
    let loss = CrossEntropy::new();
    let scalar = Tensor::new(1f32, CPU).unwrap();
    let zero = Tensor::new(0u32, CPU).unwrap();
    refused(
        &loss,
        &scalar,
        &zero,
        &["logits: a scalar", "must have shape (…, V)"],
    );
    let no_classes = Tensor::zeros((4, 0), DType::F32, CPU).unwrap();
    refused(
        &loss,
        &no_classes,
        &y([0; 4]),
        &["logits: rows of length 0", "must be 1 to 2147467263"],
    );
}

#[test]
fn logits_of_a_wrong_type() {
    for dtype in [DType::U8, DType::U32, DType::I64] {
        let logits = Tensor::zeros((4, 6), dtype, CPU).unwrap();
        let name = format!("logits: {}", dtype.as_str());
        refused(
            &CrossEntropy::new(),
            &logits,
            &y([0; 4]),
            &[&name, "must be f32, f16, bf16 or (on the CPU) f64"],
        );
    }
}

#[test]
fn targets_of_a_wrong_shape() {
    for shape in [&[3usize][..], &[4, 1], &[1, 4], &[2, 2], &[], &[5]] {
        let targets = Tensor::zeros(shape, DType::U32, CPU).unwrap();
        let was = format!("targets: shape {shape:?}");
        refused(
            &CrossEntropy::new(),
            &logits(DType::F32),
            &targets,
            &[&was, "must be [4]", "logits of shape [4, 6]"],
        );
    }
}

#[test]
fn targets_of_a_wrong_type() {
    for dtype in [DType::I32, DType::F32, DType::F64, DType::BF16] {
        let targets = Tensor::zeros(4, dtype, CPU).unwrap();
        let was = format!("targets: {}", dtype.as_str());
        refused(
            &CrossEntropy::new(),
            &logits(DType::F32),
            &targets,
            &[&was, "must be u8, u32 or i64"],
        );
    }
}

#[test]
fn scalars_out_of_range() {
    let (x, y) = (&logits(DType::BF16), &y([0; 4]));
    let loss = CrossEntropy::new;
    for (bad, was) in [
        (-0.1, "-0.1"),
        (1.5, "1.5"),
        (f32::NAN, "NaN"),
        (f32::INFINITY, "inf"),
    ] {
        refused(
            &loss().smoothing(bad),
            x,
            y,
            &[&format!("smoothing: {was}"), "must be in [0, 1]"],
        );
    }
    for (bad, was) in [
        (-1e-4, "-0.0001"),
        (f32::NAN, "NaN"),
        (f32::INFINITY, "inf"),
    ] {
        refused(
            &loss().z_loss(bad),
            x,
            y,
            &[&format!("z_loss: {was}"), "must be finite and not negative"],
        );
    }
    for (bad, was) in [
        (0.0, "0"),
        (-30.0, "-30"),
        (f32::NAN, "NaN"),
        (f32::INFINITY, "inf"),
    ] {
        refused(
            &loss().softcap(bad),
            x,
            y,
            &[
                &format!("softcap: {was}"),
                "must be finite and greater than 0",
            ],
        );
        let was = format!("logit_scale: {was}");
        refused(
            &loss().logit_scale(bad),
            x,
            y,
            &[&was, "must be finite and greater than 0"],
        );
    }
    for (bad, was) in [(0, "0"), (7, "7"), (usize::MAX, "18446744073709551615")] {
        refused(
            &loss().vocab_size(bad),
            x,
            y,
            &[&format!("vocab_size: {was}"), "must be 1 to 6"],
        );
    }
    for (bad, was) in [
        (0.0, "0"),
        (-2.0, "-2"),
        (f64::NAN, "NaN"),
        (f64::INFINITY, "inf"),
    ] {
        let was = format!("reduction: SumOver({was})");
        refused(
            &loss().reduction(Reduction::SumOver(bad)),
            x,
            y,
            &[&was, "must be finite and greater than 0"],
        );
    }
}

#[test]
fn row_values_of_a_wrong_shape_or_type() {
    let (x, y) = (&logits(DType::F32), &y([0; 4]));
    for shape in [&[3usize][..], &[4, 1], &[1, 4, 1], &[2]] {
        let values = Tensor::zeros(shape, DType::F32, CPU).unwrap();
        let parts = |name: &str| {
            format!("{name}: shape {shape:?}, must be broadcastable to the targets' shape [4]")
        };
        refused(
            &CrossEntropy::new().smoothing(&values),
            x,
            y,
            &[&parts("smoothing")],
        );
        refused(
            &CrossEntropy::new().row_weights(&values),
            x,
            y,
            &[&parts("row_weights")],
        );
    }
    for dtype in [DType::U8, DType::U32, DType::I64] {
        let values = Tensor::zeros(4, dtype, CPU).unwrap();
        let parts = |name: &str| format!("{name}: {}, must be a float type", dtype.as_str());
        refused(
            &CrossEntropy::new().smoothing(&values),
            x,
            y,
            &[&parts("smoothing")],
        );
        // A u8 tensor is a mask.
        if dtype != DType::U8 {
            refused(
                &CrossEntropy::new().row_weights(&values),
                x,
                y,
                &[&parts("row_weights"), "or a u8 mask"],
            );
        }
    }
}

#[test]
fn a_u32_target_of_all_ones_has_a_hint() {
    let x = logits(DType::F32);
    let targets = Tensor::new(&[0u32, u32::MAX, 1, 2], CPU).unwrap();
    refused(
        &CrossEntropy::new(),
        &x,
        &targets,
        &["row 1 has 4294967295", ".ignore_index(u32::MAX.into())"],
    );
    let loss = CrossEntropy::new().ignore_index(u32::MAX.into());
    assert!(loss.forward(&x, &targets).is_ok());
    // Another value out of range is no such attempt.
    let targets = Tensor::new(&[0u32, 9, 1, 2], CPU).unwrap();
    let error = CrossEntropy::new().forward(&x, &targets).unwrap_err();
    assert!(!error.to_string().contains("ignore_index("), "{error}");
}

/// The first bad row is the one named, with its value.
#[test]
fn targets_outside_the_vocabulary() {
    for dtype in FLOATS {
        let x = &logits(dtype);
        let loss = CrossEntropy::new();
        let range = "must be 0 to 5 or the ignore_index -100";
        refused(&loss, x, &y([0, 6, 7, 0]), &["targets: row 1 has 6", range]);
        refused(
            &loss,
            x,
            &y([0, 5, 0, -1]),
            &["targets: row 3 has -1", range],
        );
        refused(
            &loss,
            x,
            &y([i64::MAX, -100, 0, -1]),
            &["targets: row 0 has 9223372036854775807", range],
        );
        refused(
            &loss,
            x,
            &y([0, 0, i64::MIN, 0]),
            &["targets: row 2 has -9223372036854775808", range],
        );
        // 2³² + 3 is 3 only to code that cuts it to 32 bits.
        refused(
            &loss,
            x,
            &y([0, 0, (1 << 32) + 3, 0]),
            &["targets: row 2 has 4294967299", range],
        );
        let padded = loss.clone().vocab_size(4).ignore_index(5);
        let range = "must be 0 to 3 or the ignore_index 5";
        refused(
            &padded,
            x,
            &y([3, 5, 0, 4]),
            &["targets: row 3 has 4", range],
        );
        refused(
            &padded,
            x,
            &y([-100, 5, 0, 4]),
            &["targets: row 0 has -100", range],
        );

        let large = targets(vec![0, 0, u32::MAX.into(), 0], &[4], DType::U32);
        refused(&loss, x, &large, &["targets: row 2 has 4294967295"]);
        // −100 read as u32 is no ignore_index.
        let wrapped = targets(vec![0, i64::from(-100i32 as u32), 0, 0], &[4], DType::U32);
        refused(&loss, x, &wrapped, &["targets: row 1 has 4294967196"]);
        assert_error(cross_entropy(x, y([0, 0, 0, 6])), &["targets: row 3 has 6"]);
    }
}

#[test]
fn smoothing_out_of_range_in_a_row() {
    for dtype in FLOATS {
        let (x, y) = (&logits(dtype), &y([0; 4]));
        let with = |values: &[f32]| CrossEntropy::new().smoothing(f32s(values));
        let rule = "must be in [0, 1]";
        refused(
            &with(&[0.0, 0.5, 1.5, -1.0]),
            x,
            y,
            &["smoothing: row 2 has 1.5", rule],
        );
        refused(
            &with(&[-0.25, 0.5, 1.5, -1.0]),
            x,
            y,
            &["smoothing: row 0 has -0.25", rule],
        );
        refused(
            &with(&[0.0, 1.0, 0.5, f32::NAN]),
            x,
            y,
            &["smoothing: row 3 has NaN", rule],
        );
        refused(
            &with(&[0.0, f32::INFINITY, 0.5, 0.0]),
            x,
            y,
            &["smoothing: row 1 has inf", rule],
        );
        refused(&with(&[2.0]), x, y, &["smoothing: row 0 has 2", rule]);
    }
}

#[test]
fn weights_out_of_range_in_a_row() {
    for dtype in FLOATS {
        let (x, y) = (&logits(dtype), &y([0; 4]));
        let with = |values: &[f32]| CrossEntropy::new().row_weights(&f32s(values));
        let rule = "must be finite and not negative";
        refused(
            &with(&[0.0, -0.5, 1.5, -1.0]),
            x,
            y,
            &["row_weights: row 1 has -0.5", rule],
        );
        refused(
            &with(&[0.0, 1.0, f32::NAN, -1.0]),
            x,
            y,
            &["row_weights: row 2 has NaN", rule],
        );
        refused(
            &with(&[f32::INFINITY, 1.0, 1.0, 1.0]),
            x,
            y,
            &["row_weights: row 0 has inf", rule],
        );
    }
}

/// Nothing of an ignored row is read, its smoothing and weight included: packed batches need not fill them in.
#[test]
fn ignored_rows_may_hold_anything() {
    let x = logits(DType::F32);
    let clean = CrossEntropy::new()
        .smoothing(0.5)
        .loss_and_grad(&x, y([0, -100, 1, 2]))
        .unwrap();
    let loss = CrossEntropy::new()
        .smoothing(f32s(&[0.5, f32::NAN, 0.5, 0.5]))
        .row_weights(&f32s(&[1.0, -3.0, 1.0, 1.0]));
    let got = loss.loss_and_grad(&x, y([0, -100, 1, 2])).unwrap();
    assert_eq!(bits(&got.loss), bits(&clean.loss));
    assert_eq!(bits(&got.grad), bits(&clean.grad));
    assert_eq!(
        bits(&loss.forward(&x, y([0, -100, 1, 2])).unwrap()),
        bits(&clean.loss)
    );
}

/// The limits themselves are fine.
#[test]
fn edges_of_the_ranges() {
    let (x, y) = (&logits(DType::F32), &y([0, 5, -100, 3]));
    for loss in [
        CrossEntropy::new().smoothing(0.0),
        CrossEntropy::new().smoothing(1.0),
        CrossEntropy::new().smoothing(f32s(&[0.0, 1.0, 0.5, -0.0])),
        CrossEntropy::new().row_weights(&f32s(&[0.0, 1e30, 0.5, -0.0])),
        CrossEntropy::new().vocab_size(6),
        CrossEntropy::new().z_loss(0.0),
        CrossEntropy::new().softcap(f32::MAX),
        CrossEntropy::new().reduction(Reduction::SumOver(1e-3)),
    ] {
        for value in [
            loss.forward(x, y).unwrap(),
            loss.loss_and_grad(x, y).unwrap().loss,
        ] {
            assert!(scalar(&value).is_finite(), "{loss:?} {value:?}");
        }
    }
}

/// A bad value far down a large batch, where other threads are at work.
#[test]
fn nothing_is_written_before_the_rows_are_checked() {
    let rows = 3000;
    let x = Tensor::randn(0f32, 1f32, (rows, 64), &Device::Cpu).unwrap();
    let mut labels = vec![1i64; rows];
    labels[rows - 1] = 64;
    let y = targets(labels, &[rows], DType::I64);
    refused(
        &CrossEntropy::new(),
        &x,
        &y,
        &["targets: row 2999 has 64", "must be 0 to 63"],
    );
}
