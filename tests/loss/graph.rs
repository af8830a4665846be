//! Through candle's graph: gradients reach what is below the loss and nothing else, and in-place backward writes the
//! logits' memory exactly when it may.

use crate::{accuracy::ulp, common::*};
use candle_core::{DType, Tensor, Var, backprop::GradStore};
use candle_cross_entropy::{CrossEntropy, Reduction, cross_entropy};

struct Model {
    hidden: Var,
    weight: Var,
    targets: Tensor,
}

fn model(dtype: DType) -> Model {
    let mut rng = rng(1);
    let mut var = |shape: &[usize]| {
        let values = normal(&mut rng, shape.iter().product(), 1.0);
        Var::from_tensor(&tensor(values, shape, dtype)).unwrap()
    };
    let (hidden, weight) = (var(&[6, 8]), var(&[8, 21]));
    Model {
        hidden,
        weight,
        targets: targets(vec![3, 20, 0, 7, 7, 11], &[6], DType::I64),
    }
}

impl Model {
    fn logits(&self) -> Tensor {
        self.hidden.matmul(&self.weight).unwrap()
    }

    /// Bits of both variables' gradients.
    fn bits(&self, gradients: &GradStore) -> [Vec<u64>; 2] {
        [&self.hidden, &self.weight].map(|var| bits(gradients.get(var).expect("a gradient")))
    }
}

/// The loss of candle's own differentiable operations.
fn composite(logits: &Tensor, targets: &Tensor, eps: f64) -> Tensor {
    let z = logits.to_dtype(DType::F64).unwrap();
    let lse = z.log_sum_exp(1).unwrap();
    let hit = z
        .gather(&targets.unsqueeze(1).unwrap(), 1)
        .unwrap()
        .squeeze(1)
        .unwrap();
    let spread = z.mean(1).unwrap();
    (lse - ((hit * (1.0 - eps)).unwrap() + (spread * eps).unwrap()).unwrap())
        .unwrap()
        .mean(0)
        .unwrap()
}

#[test]
fn gradient_reaches_variables_below() {
    for (dtype, tolerance) in [
        (DType::F64, 1e-13),
        (DType::F32, 2e-6),
        (DType::F16, 4e-3),
        (DType::BF16, 3e-2),
    ] {
        let model = model(dtype);
        let ours = CrossEntropy::new()
            .smoothing(0.1)
            .forward(&model.logits(), &model.targets)
            .unwrap();
        let theirs = composite(&model.logits(), &model.targets, f64::from(0.1f32));
        assert_close(
            scalar(&ours),
            scalar(&theirs),
            if dtype == DType::F64 { 1e-13 } else { 1e-5 },
        );
        let (ours, theirs) = (ours.backward().unwrap(), theirs.backward().unwrap());
        for var in [&model.hidden, &model.weight] {
            let (ours, theirs) = (ours.get(var).unwrap(), theirs.get(var).unwrap());
            assert_eq!(ours.dtype(), dtype);
            assert_all_close(ours, theirs, tolerance);
        }
    }
}

#[test]
fn logits_of_several_operations() {
    let model = model(DType::F64);
    let bias = Var::new(vec![0.25f64; 21], CPU).unwrap();
    let logits = || {
        (model.logits().broadcast_add(&bias).unwrap() * 0.5)
            .unwrap()
            .tanh()
            .unwrap()
            .reshape((2, 3, 21))
            .unwrap()
    };
    let targets = model.targets.reshape((2, 3)).unwrap();
    let ours = CrossEntropy::new()
        .forward(&logits(), &targets)
        .unwrap()
        .backward()
        .unwrap();
    let flat = logits().reshape((6, 21)).unwrap();
    let theirs = composite(&flat, &model.targets, 0.0).backward().unwrap();
    for var in [&model.hidden, &model.weight, &bias] {
        assert_all_close(ours.get(var).unwrap(), theirs.get(var).unwrap(), 1e-13);
    }
}

/// The same logits in two losses, and the same loss object used twice.
#[test]
fn losses_add_up() {
    let model = model(DType::F64);
    let logits = model.logits();
    let loss = CrossEntropy::new();
    let one = loss.forward(&logits, &model.targets).unwrap();
    let two = loss
        .clone()
        .smoothing(0.5)
        .forward(&logits, &model.targets)
        .unwrap();
    let gradients = (&one + two * 2.0).unwrap().backward().unwrap();
    let composite = |eps| composite(&model.logits(), &model.targets, eps);
    let expected = (composite(0.0) + composite(0.5) * 2.0)
        .unwrap()
        .backward()
        .unwrap();
    for var in [&model.hidden, &model.weight] {
        assert_all_close(
            gradients.get(var).unwrap(),
            expected.get(var).unwrap(),
            1e-13,
        );
    }
    // A second backward of the same loss gives the same.
    let (a, b) = (one.backward().unwrap(), one.backward().unwrap());
    assert_eq!(model.bits(&a), model.bits(&b));
}

/// Targets, smoothing and weights that are results of operations, on variables too: constants of the loss.
#[test]
fn other_arguments_are_constants() {
    let model = model(DType::F32);
    let logits = model.logits();
    let predicted = logits.argmax(1).unwrap();
    assert_eq!(predicted.dtype(), DType::U32);
    let shifted = (predicted.to_dtype(DType::I64).unwrap() * 1.0).unwrap();
    let knob = Var::new(vec![0.5f32; 6], CPU).unwrap();
    let eps = (knob.as_tensor() * 0.25).unwrap();
    let weights = candle_nn::ops::sigmoid(&knob).unwrap();
    for targets in [&predicted, &shifted] {
        let loss = CrossEntropy::new().smoothing(&eps).row_weights(&weights);
        let gradients = loss.forward(&logits, targets).unwrap().backward().unwrap();
        assert!(gradients.get(&knob).is_none());
        let same = CrossEntropy::new()
            .smoothing(0.125)
            .row_weights(&weights.detach());
        let expected = same
            .forward(&logits, targets.detach())
            .unwrap()
            .backward()
            .unwrap();
        assert_eq!(model.bits(&gradients), model.bits(&expected));
    }
}

/// Weights by multiplying row losses do take part in the graph.
#[test]
fn gradient_into_weights_by_row_losses() {
    let model = model(DType::F32);
    let weights = Var::new(vec![0.5f32; 6], CPU).unwrap();
    let row_losses = CrossEntropy::new()
        .reduction(Reduction::None)
        .forward(&model.logits(), &model.targets)
        .unwrap();
    let gradients = (&row_losses * weights.as_tensor())
        .unwrap()
        .sum_all()
        .unwrap()
        .backward()
        .unwrap();
    assert_all_close(gradients.get(&weights).unwrap(), &row_losses, 1e-7);
}

/// Statistics never take part in a gradient.
#[test]
fn statistics_are_constants() {
    let model = model(DType::F32);
    let (loss, stats) = CrossEntropy::new()
        .forward_with_stats(&model.logits(), &model.targets)
        .unwrap();
    let with_stats = (&loss
        + (stats.entropy.sum_all().unwrap() + stats.nll.sum_all().unwrap()).unwrap())
    .unwrap();
    let gradients = with_stats.backward().unwrap();
    assert_eq!(
        model.bits(&gradients),
        model.bits(&loss.backward().unwrap())
    );
}

#[test]
fn forward_with_stats_has_the_same_gradient() {
    for dtype in FLOATS {
        let model = model(dtype);
        let loss = CrossEntropy::new().smoothing(0.1);
        let plain = loss.forward(&model.logits(), &model.targets).unwrap();
        let (with_stats, _) = loss
            .forward_with_stats(&model.logits(), &model.targets)
            .unwrap();
        assert_eq!(
            model.bits(&plain.backward().unwrap()),
            model.bits(&with_stats.backward().unwrap())
        );
    }
}

#[test]
fn untracked_logits_give_no_gradient_and_are_never_written() {
    for dtype in FLOATS {
        let model = model(dtype);
        let untracked = model.logits().detach();
        let before = bits(&untracked);
        for inplace in [false, true] {
            let loss = CrossEntropy::new().inplace_backward(inplace);
            let forward = loss.forward(&untracked, &model.targets).unwrap();
            let gradients = forward.backward().unwrap();
            assert!(gradients.get(&untracked).is_none());
            assert!(gradients.get(&model.hidden).is_none());
            loss.forward_with_stats(&untracked, &model.targets).unwrap();
            loss.loss_and_grad(&untracked, &model.targets).unwrap();
            loss.reference(&untracked, &model.targets).unwrap();
            assert_eq!(bits(&untracked), before);
        }
    }
}

#[test]
fn loss_and_grad_stays_out_of_the_graph() {
    let model = model(DType::F32);
    let loss = CrossEntropy::new();
    for result in [
        loss.loss_and_grad(&model.logits(), &model.targets).unwrap(),
        loss.loss_and_grad_inplace(model.logits(), &model.targets)
            .unwrap(),
    ] {
        let sum = (result.loss + result.grad.sum_all().unwrap()).unwrap();
        let gradients = sum.backward().unwrap();
        assert!(gradients.get(&model.hidden).is_none() && gradients.get(&model.weight).is_none());
    }
}

#[test]
fn inplace_backward_gives_the_same_gradient_in_the_logits_memory() {
    for dtype in FLOATS {
        let model = model(dtype);
        for reduction in [Reduction::Mean, Reduction::None] {
            let loss = CrossEntropy::new().smoothing(0.1).reduction(reduction);
            let run = |inplace: bool| {
                let logits = model.logits();
                let before = bits(&logits);
                let forward = loss
                    .clone()
                    .inplace_backward(inplace)
                    .forward(&logits, &model.targets)
                    .unwrap();
                assert_eq!(bits(&logits), before, "the forward writes nothing");
                let gradients = forward.sum_all().unwrap().backward().unwrap();
                (model.bits(&gradients), before, bits(&logits))
            };
            let (want, before, after) = run(false);
            assert_eq!(before, after, "off by default");
            let (got, before, after) = run(true);
            assert_eq!(got, want);
            assert_ne!(before, after);
            let own = loss
                .loss_and_grad(&model.logits(), &model.targets)
                .unwrap()
                .grad;
            let written = tensor(
                after.iter().map(|&b| from_bits(b, dtype)).collect(),
                &[6, 21],
                dtype,
            );
            for (a, e) in values(&written).into_iter().zip(values(&own)) {
                assert!(
                    (a - e).abs() <= 1e-7 + ulp(e, dtype),
                    "the logits' memory holds their gradient"
                );
            }
        }
    }
}

fn from_bits(bits: u64, dtype: DType) -> f64 {
    match dtype {
        DType::F32 => f32::from_bits(bits as u32).into(),
        DType::F64 => f64::from_bits(bits),
        DType::F16 => half::f16::from_bits(bits as u16).to_f64(),
        _ => half::bf16::from_bits(bits as u16).to_f64(),
    }
}

/// Strided views of the logits are overwritten where they lie; rows that share memory are not.
#[test]
fn inplace_backward_of_views() {
    let views: [fn(&Tensor) -> Tensor; 4] = [
        |logits| logits.narrow(1, 2, 15).unwrap(),
        |logits| logits.reshape((2, 3, 21)).unwrap().transpose(0, 1).unwrap(),
        |logits| {
            logits
                .narrow(0, 1, 1)
                .unwrap()
                .broadcast_as((6, 21))
                .unwrap()
        },
        |logits| logits.narrow(0, 0, 0).unwrap(),
    ];
    for dtype in FLOATS {
        for view in views {
            let model = model(dtype);
            let run = |inplace: bool| {
                let logits = view(&model.logits());
                let shape = logits.dims()[..logits.rank() - 1].to_vec();
                let y = Tensor::full(3u32, shape, CPU).unwrap();
                let loss = CrossEntropy::new()
                    .inplace_backward(inplace)
                    .reduction(Reduction::Sum);
                let gradients = loss.forward(&logits, &y).unwrap().backward().unwrap();
                model.bits(&gradients)
            };
            assert_eq!(run(true), run(false));
        }
    }
}

/// A Var is a parameter: its memory is the optimizer's.
#[test]
fn inplace_backward_never_writes_a_variable() {
    for dtype in FLOATS {
        let logits = Var::from_tensor(&model(dtype).logits().detach()).unwrap();
        let y = model(dtype).targets;
        let before = bits(&logits);
        let gradients = CrossEntropy::new()
            .inplace_backward(true)
            .forward(&logits, &y)
            .unwrap()
            .backward()
            .unwrap();
        assert_eq!(bits(&logits), before);
        let expected = CrossEntropy::new()
            .forward(&logits, &y)
            .unwrap()
            .backward()
            .unwrap();
        assert_eq!(
            bits(gradients.get(&logits).unwrap()),
            bits(expected.get(&logits).unwrap())
        );
    }
}

/// Logits of which nothing is asked: candle walks past them, so they are not written.
#[test]
fn inplace_backward_of_another_branch() {
    let model = model(DType::F32);
    let logits = model.logits();
    let before = bits(&logits);
    let _loss = CrossEntropy::new()
        .inplace_backward(true)
        .forward(&logits, &model.targets)
        .unwrap();
    logits.sum_all().unwrap().backward().unwrap();
    assert_eq!(bits(&logits), before);
}

#[test]
fn takes_the_place_of_candle_nn() {
    for (dtype, tolerance) in [(DType::F64, 1e-13), (DType::F32, 1e-6)] {
        let model = model(dtype);
        for targets in [
            model.targets.to_dtype(DType::U32).unwrap(),
            model.targets.clone(),
        ] {
            let ours = cross_entropy(&model.logits(), &targets).unwrap();
            // candle-nn's log_softmax differentiates; its gather wants the targets as they are.
            let theirs = candle_nn::loss::cross_entropy(&model.logits(), &targets).unwrap();
            assert_eq!((ours.dtype(), ours.dims()), (theirs.dtype(), theirs.dims()));
            assert_close(scalar(&ours), scalar(&theirs), tolerance);
            let (ours, theirs) = (ours.backward().unwrap(), theirs.backward().unwrap());
            for var in [&model.hidden, &model.weight] {
                assert_all_close(ours.get(var).unwrap(), theirs.get(var).unwrap(), tolerance);
            }
        }
    }
    // (B, T, V) as they come.
    let logits = model(DType::F32).logits();
    let flat = cross_entropy(&logits, &model(DType::F32).targets).unwrap();
    let shaped = cross_entropy(
        &logits.reshape((2, 3, 21)).unwrap(),
        model(DType::F32).targets.reshape((2, 3)).unwrap(),
    );
    assert_eq!(bits(&flat), bits(&shaped.unwrap()));
}

#[test]
fn shared_between_threads() {
    fn send_sync_clone<T: Send + Sync + Clone + 'static>(value: &T) -> T {
        value.clone()
    }
    let loss = send_sync_clone(&CrossEntropy::new().smoothing(0.1));
    let model = model(DType::F32);
    let logits = model.logits().detach();
    let want = bits(&loss.loss_and_grad(&logits, &model.targets).unwrap().grad);
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                for _ in 0..20 {
                    assert_eq!(
                        bits(&loss.loss_and_grad(&logits, &model.targets).unwrap().grad),
                        want
                    );
                }
            });
        }
    });
}

#[test]
fn a_step_of_gradient_descent_lowers_the_loss() {
    let model = model(DType::F32);
    let loss = CrossEntropy::new().smoothing(0.1).inplace_backward(true);
    let mut losses = Vec::new();
    for _ in 0..20 {
        let forward = loss.forward(&model.logits(), &model.targets).unwrap();
        losses.push(scalar(&forward));
        let gradients = forward.backward().unwrap();
        for var in [&model.hidden, &model.weight] {
            var.set(&(var.as_tensor() - (gradients.get(var).unwrap() * 0.5).unwrap()).unwrap())
                .unwrap();
        }
    }
    assert!(
        losses.windows(2).all(|pair| pair[1] < pair[0]),
        "{losses:?}"
    );
}

/// In place, the logits are locked for writing: values a row that live in their memory must have been read before.
#[test]
fn smoothing_may_be_a_view_of_the_logits() {
    let x = tensor(vec![0.25, 1.0, -2.0, 0.5, 3.0, 0.5], &[2, 3], DType::F64);
    let y = targets(vec![1, 2], &[2], DType::U32);
    let inplace = |x: Tensor, smoothing: Tensor| {
        let loss = CrossEntropy::new()
            .smoothing(smoothing.clone())
            .row_weights(&smoothing);
        loss.loss_and_grad_inplace(x, &y).unwrap()
    };
    let apart = inplace(
        x.copy().unwrap(),
        x.narrow(1, 0, 1)
            .unwrap()
            .squeeze(1)
            .unwrap()
            .copy()
            .unwrap(),
    );
    let shared = inplace(x.clone(), x.narrow(1, 0, 1).unwrap().squeeze(1).unwrap());
    assert_eq!(
        apart.loss.to_scalar::<f64>().unwrap(),
        shared.loss.to_scalar::<f64>().unwrap()
    );
    assert_eq!(
        apart.grad.to_vec2::<f64>().unwrap(),
        shared.grad.to_vec2::<f64>().unwrap()
    );
}
