//! Each step is compared with its formula, and each training shows what the method is for.

use candle_core::{DType, Tensor, Var};
use candle_cross_entropy::{CrossEntropy, Reduction, cross_entropy};
use candle_nn::ops::softmax;
use rand::{SeedableRng, rngs::StdRng};

use crate::{
    adaptation, confidence, dro, feasible, gradient_norm,
    problem::{CLASSES, DEVICE, Data, Model},
    pseudo_labels, reliable, runs,
};

/// Samples, and a model that is neither trained nor uniform.
fn setting() -> (Data, Model) {
    (
        Data::clusters(40, 0.6, 0.0, 11).unwrap(),
        Model::new(8, 12).unwrap(),
    )
}

fn logits(data: &Data, model: &Model) -> Var {
    let logits = (model.logits(&data.inputs).unwrap() * 12.0).unwrap();
    Var::from_tensor(&logits.detach()).unwrap()
}

fn row_losses(logits: &Tensor, data: &Data) -> Vec<f32> {
    let options = CrossEntropy::new().reduction(Reduction::None);
    let losses = options.forward(logits, data.targets().unwrap()).unwrap();
    losses.to_vec1().unwrap()
}

fn values(tensor: &Tensor) -> Vec<f32> {
    tensor.flatten_all().unwrap().to_vec1().unwrap()
}

#[track_caller]
fn assert_close(actual: &[f32], expected: &[f32], tolerance: f32) {
    assert_eq!(actual.len(), expected.len());
    for (a, e) in actual.iter().zip(expected) {
        assert!(
            (a - e).abs() <= tolerance * e.abs().max(1.0),
            "{a}, not {e}"
        );
    }
}

#[test]
fn dro_weights_follow_the_losses_and_the_gradient_the_weights() {
    let (data, model) = setting();
    let logits = logits(&data, &model);
    let (loss, weights) = dro::loss(&logits, &data.targets().unwrap(), 0.7).unwrap();
    let losses = row_losses(&logits, &data);
    let total: f32 = losses.iter().map(|l| (l / 0.7).exp()).sum();
    let wanted: Vec<f32> = losses.iter().map(|l| (l / 0.7).exp() / total).collect();
    assert_close(&values(&weights), &wanted, 1e-5);

    let gradient = loss.backward().unwrap();
    let plain = CrossEntropy::new()
        .row_weights(&weights)
        .reduction(Reduction::Sum);
    let plain = plain
        .loss_and_grad(&logits, data.targets().unwrap())
        .unwrap();
    assert_close(
        &values(gradient.get(&logits).unwrap()),
        &values(&plain.grad),
        1e-6,
    );
}

#[test]
fn dro_lowers_the_loss_of_the_hard_group() {
    let run = runs::dro().unwrap();
    // A share of 1/11 would be its own. The adversary's answer is a higher one, throughout.
    assert!(
        run.minority_weight[1] > 2.0 / 11.0,
        "{:?}",
        run.minority_weight
    );
    let [plain, robust] = run.minority_loss;
    assert!(robust < 0.9 * plain, "{robust}, plainly trained {plain}");
}

#[test]
fn multipliers_ascend_by_the_violation_and_weigh_the_loss() {
    let (data, model) = setting();
    let logits = logits(&data, &model);
    let losses = row_losses(&logits, &data);
    let (bound, dual_rate) = (1.0, 0.5);
    let start: Vec<f32> = (0..40).map(|i| i as f32 / 100.0).collect();
    let multipliers = Tensor::new(&start[..], DEVICE).unwrap();
    let mut method = feasible::Feasible {
        multipliers,
        bound,
        dual_rate,
        alpha: 0.5,
    };
    let loss = method.loss(&logits, &data.targets().unwrap()).unwrap();
    let wanted: Vec<f32> = start
        .iter()
        .zip(&losses)
        .map(|(m, l)| (m + 0.5 * (l - 1.0 - m / 0.5)).max(0.0))
        .collect();
    assert!(wanted.contains(&0.0) && wanted.iter().any(|m| *m > 0.0));
    assert_close(&values(&method.multipliers), &wanted, 1e-6);

    let gradient = loss.backward().unwrap();
    let gradient = values(gradient.get(&logits).unwrap());
    for (row, multiplier) in gradient.chunks(CLASSES).zip(&wanted) {
        assert_eq!(row.iter().any(|g| *g != 0.0), *multiplier > 0.0);
    }
}

/// Of samples that cannot meet the bound: their slack is worth what it costs.
#[test]
fn resilient_multipliers_settle() {
    let (data, model) = setting();
    let logits = logits(&data, &model).detach();
    let losses = row_losses(&logits, &data);
    let mut method = feasible::Feasible {
        multipliers: Tensor::zeros(40, DType::F32, DEVICE).unwrap(),
        bound: 0.5,
        dual_rate: 0.3,
        alpha: 2.0,
    };
    for _ in 0..100 {
        method.loss(&logits, &data.targets().unwrap()).unwrap();
    }
    let wanted: Vec<f32> = losses.iter().map(|l| (2.0 * (l - 0.5)).max(0.0)).collect();
    assert!(wanted.iter().any(|m| *m > 0.0));
    assert_close(&values(&method.multipliers), &wanted, 1e-4);
}

#[test]
fn feasible_learning_meets_the_bound_and_leaves_satisfied_samples_alone() {
    let run = runs::feasible().unwrap();
    let [plain, feasible] = run.largest_loss;
    assert!(f64::from(feasible) < 1.05 * run.bound, "{feasible}");
    assert!(
        f64::from(plain) > 1.2 * run.bound,
        "the bound is no constraint: {plain}"
    );
    let satisfied = run
        .multipliers
        .iter()
        .zip(&run.always_satisfied)
        .filter(|(_, always)| **always);
    for (multiplier, _) in satisfied {
        assert_eq!(*multiplier, 0.0);
    }
    assert!(run.multipliers.iter().any(|m| *m > 0.0));
}

#[test]
fn certain_rows_get_labels_and_others_soft_targets() {
    let (data, model) = setting();
    let logits = logits(&data, &model);
    let counts = Tensor::new(&[6u32, 1, 2, 1], DEVICE).unwrap();
    let log_frequencies = pseudo_labels::log_frequencies(&counts).unwrap();
    let expected = [0.6f32, 0.1, 0.2, 0.1].map(f32::ln);
    assert_close(&values(&log_frequencies), &expected, 1e-6);
    let labeller = pseudo_labels::Labeller {
        adjustment: (log_frequencies * 0.5).unwrap(),
        temperature: 2.0,
        threshold: 0.85,
        hardness: 0.25,
    };
    let labels = labeller.label(&logits).unwrap();
    let targets = labels.targets.to_vec2::<f32>().unwrap();
    let accepted = labels.accepted.to_vec1::<u8>().unwrap();
    let weights = values(&labels.weights);
    for (i, z) in logits.to_vec2::<f32>().unwrap().into_iter().enumerate() {
        let powers: Vec<f32> = z
            .iter()
            .zip(expected)
            .map(|(z, log_frequency)| ((z - 0.5 * log_frequency) / 2.0).exp())
            .collect();
        let sum: f32 = powers.iter().sum();
        let q: Vec<f32> = powers.iter().map(|power| power / sum).collect();
        let entropy: f32 = q.iter().map(|q| -q * q.ln()).sum::<f32>() / (CLASSES as f32).ln();
        let best = (0..CLASSES).max_by(|&a, &b| q[a].total_cmp(&q[b])).unwrap();
        assert_eq!(accepted[i] != 0, entropy <= 0.85, "entropy {entropy}");
        let wanted: Vec<f32> = match accepted[i] {
            0 => q,
            _ => (0..CLASSES).map(|class| f32::from(class == best)).collect(),
        };
        assert_close(&targets[i], &wanted, 1e-5);
        assert!((weights[i] - (0.75 + 0.25 * entropy)).abs() < 1e-5);
    }
    let count = accepted.iter().filter(|a| **a != 0).count();
    assert!((1..40).contains(&count), "{count}");

    // Both kinds of rows pull towards their targets by their weights.
    let labelled = Tensor::zeros((1, CLASSES), DType::F32, DEVICE).unwrap();
    let target = Tensor::zeros(1, DType::U32, DEVICE).unwrap();
    let loss = pseudo_labels::loss((&labelled, &target), (&logits, &labels)).unwrap();
    let gradient = loss.backward().unwrap();
    let p = values(&softmax(&logits, 1).unwrap());
    let wanted: Vec<f32> = p
        .iter()
        .zip(targets.concat())
        .enumerate()
        .map(|(i, (p, t))| weights[i / CLASSES] * (p - t) / 40.0)
        .collect();
    assert_close(&values(gradient.get(&logits).unwrap()), &wanted, 1e-6);
}

#[test]
fn pseudo_labels_help_and_so_does_the_adjustment() {
    let run = runs::pseudo_labels().unwrap();
    let [accepted, all] = run.accuracy;
    assert!((1..400).contains(&run.accepted), "{}", run.accepted);
    assert!(
        accepted > all + 0.01,
        "{accepted} of accepted are right, {all} of all"
    );
    let [before, after, unadjusted] = run.test_accuracy;
    assert!(
        after > before + 0.01 && after > unadjusted + 0.01,
        "{:?}",
        run.test_accuracy
    );
}

#[test]
fn disagreement_of_passes_is_bald() {
    let (data, model) = setting();
    let rng = &mut StdRng::seed_from_u64(13);
    let passes: Vec<Tensor> = (0..5)
        .map(|_| model.logits_dropped(&data.inputs, 0.5, rng).unwrap())
        .collect();
    let scores = reliable::scores(&passes, 0.3).unwrap();
    let probabilities: Vec<Vec<Vec<f32>>> = passes
        .iter()
        .map(|l| softmax(l, 1).unwrap().to_vec2().unwrap())
        .collect();
    let entropy = |p: &[f32]| -p.iter().map(|p| p * p.ln()).sum::<f32>();
    let (mut disagreement, mut score) = (Vec::new(), Vec::new());
    for i in 0..40 {
        let mean: Vec<f32> = (0..CLASSES)
            .map(|k| probabilities.iter().map(|p| p[i][k]).sum::<f32>() / 5.0)
            .collect();
        let of_passes = probabilities.iter().map(|p| entropy(&p[i])).sum::<f32>() / 5.0;
        let b = entropy(&mean) - of_passes;
        let confidence = mean.iter().copied().fold(0.0, f32::max);
        disagreement.push(b);
        score.push(0.3 * confidence + 0.7 * (1.0 - b / (CLASSES as f32).ln()));
    }
    assert_close(&values(&scores.disagreement), &disagreement, 1e-5);
    assert_close(&values(&scores.score), &score, 1e-5);
    let same = reliable::scores(&[passes[0].clone(), passes[0].clone()], 0.3).unwrap();
    assert!(values(&same.disagreement).iter().all(|b| b.abs() < 1e-5));

    let targets = reliable::select(&scores, 12)
        .unwrap()
        .to_vec1::<i64>()
        .unwrap();
    let worst_selected = (0..40)
        .filter(|&i| targets[i] >= 0)
        .map(|i| score[i])
        .fold(1.0, f32::min);
    let best_left = (0..40)
        .filter(|&i| targets[i] < 0)
        .map(|i| score[i])
        .fold(0.0, f32::max);
    assert_eq!(targets.iter().filter(|t| **t >= 0).count(), 12);
    assert!(
        worst_selected >= best_left - 1e-5,
        "{worst_selected}, {best_left}"
    );
}

#[test]
fn reliable_samples_have_better_labels() {
    let run = runs::reliable().unwrap();
    assert!(
        run.accuracy[0] > run.accuracy[1] + 0.02,
        "{:?}",
        run.accuracy
    );
    assert!(
        run.disagreement[0] < run.disagreement[1],
        "{:?}",
        run.disagreement
    );
    assert!(
        run.test_accuracy[1] >= run.test_accuracy[0] - 0.01,
        "{:?}",
        run.test_accuracy
    );
}

/// The sum of the rows', by candle's operations.
fn entropy(logits: &Tensor) -> Tensor {
    let log_p = candle_nn::ops::log_softmax(logits, 1).unwrap();
    let terms = (log_p.exp().unwrap() * &log_p).unwrap();
    terms.sum_all().unwrap().neg().unwrap()
}

#[test]
fn adaptation_descends_the_entropy() {
    let (data, model) = setting();
    let logits = logits(&data, &model);
    let loss = adaptation::loss(&logits).unwrap();
    let wanted = (entropy(&logits) / 40.0).unwrap();
    let scalar = |loss: &Tensor| loss.to_scalar::<f32>().unwrap();
    assert_close(&[scalar(&loss)], &[scalar(&wanted)], 1e-6);
    let gradient = |loss: Tensor| values(loss.backward().unwrap().get(&logits).unwrap());
    assert_close(&gradient(loss), &gradient(wanted), 1e-6);
}

#[test]
fn adaptation_helps_on_turned_data() {
    let run = runs::adaptation().unwrap();
    assert!(run.entropy[1] < run.entropy[0], "{:?}", run.entropy);
    assert!(
        run.accuracy[1] > run.accuracy[0] + 0.02,
        "{:?}",
        run.accuracy
    );
}

#[test]
fn the_largest_gradient_norms_are_selected() {
    let (data, model) = setting();
    let hidden = model.hidden(&data.inputs).unwrap().detach();
    let weight = Var::from_tensor(&model.output().detach()).unwrap();
    // Norms by candle's own backward, a sample at a time.
    let norms = |loss: fn(&Tensor) -> Tensor| -> Vec<f32> {
        let norm = |i| {
            let sample = hidden.narrow(0, i, 1).unwrap();
            let loss = loss(&sample.matmul(&weight.t().unwrap()).unwrap());
            let gradient = loss.backward().unwrap();
            let gradient = values(gradient.get(&weight).unwrap());
            gradient.iter().map(|g| g * g).sum()
        };
        (0..40).map(norm).collect()
    };
    let at_predicted = norms(|logits| cross_entropy(logits, logits.argmax(1).unwrap()).unwrap());
    let scores = gradient_norm::scores(&hidden, &weight).unwrap();
    assert_close(&values(&scores), &at_predicted, 1e-5);
    let mut order: Vec<u32> = (0..40).collect();
    order.sort_by(|&a, &b| at_predicted[b as usize].total_cmp(&at_predicted[a as usize]));
    assert_eq!(gradient_norm::select(&scores, 9).unwrap(), order[..9]);

    let scores = gradient_norm::entropy_scores(&hidden, &weight).unwrap();
    assert_close(&values(&scores), &norms(entropy), 1e-5);
    let no_preference = Tensor::zeros((CLASSES, 4), DType::F32, DEVICE).unwrap();
    let even = gradient_norm::entropy_scores(&hidden.narrow(1, 0, 4).unwrap(), &no_preference);
    assert!(values(&even.unwrap()).iter().all(|s| *s < 1e-12));
}

#[test]
fn samples_with_large_gradients_are_those_worth_asking_for() {
    let run = runs::gradient_norm().unwrap();
    assert_eq!([run.by_loss.selected, run.by_entropy.selected], [20, 20]);
    assert!(run.by_loss.wrong > run.wrong + 0.1, "{}", run.by_loss.wrong);
    let accuracy = run.by_loss.test_accuracy;
    assert!(accuracy >= run.test_accuracy - 0.01, "{accuracy}");
    // The entropy's own gradient passes over the most uncertain.
    let [by_entropy, by_loss] = [run.by_entropy.entropy, run.by_loss.entropy];
    assert!(by_entropy < by_loss, "{by_entropy}, {by_loss}");
}

#[test]
fn alignment_is_the_product_of_gradients_and_leaves_the_model_as_it_was() {
    let (data, model) = setting();
    let trusted = Data::clusters(8, 0.3, 0.0, 14).unwrap();
    let parameters = model.parameters();
    let before: Vec<Vec<f32>> = parameters.iter().map(|p| values(p)).collect();
    // Every third label is wrong.
    let labels: Vec<u32> = (0..40).map(|i| (i + u32::from(i % 3 == 0)) % 4).collect();
    let (targets, logits) = (Tensor::new(labels, DEVICE).unwrap(), || {
        model.logits(&data.inputs)
    });
    let loss = || cross_entropy(&model.logits(&trusted.inputs)?, &trusted.targets()?);
    let alignment =
        confidence::alignment(&parameters, logits, &targets, &loss().unwrap(), 0.01).unwrap();
    let after: Vec<Vec<f32>> = parameters.iter().map(|p| values(p)).collect();
    assert_eq!(after, before);

    let flat = |loss: Tensor| -> Vec<f32> {
        let gradients = loss.backward().unwrap();
        parameters
            .iter()
            .flat_map(|p| values(gradients.get(p).unwrap()))
            .collect()
    };
    let direction = flat(loss().unwrap());
    let rows = CrossEntropy::new().reduction(Reduction::None);
    let wanted: Vec<f32> = (0..40)
        .map(|i| {
            let losses = rows.forward(&logits().unwrap(), &targets).unwrap();
            let gradient = flat(losses.get(i).unwrap());
            gradient.iter().zip(&direction).map(|(a, b)| a * b).sum()
        })
        .collect();
    assert!(wanted.iter().any(|a| *a < 0.0) && wanted.iter().any(|a| *a > 0.0));
    assert_close(&values(&alignment), &wanted, 2e-3);
    let weights = values(&confidence::weights(&alignment).unwrap());
    assert!((weights.iter().sum::<f32>() - 1.0).abs() < 1e-5);
    for (weight, alignment) in weights.iter().zip(values(&alignment)) {
        assert_eq!(*weight > 0.0, alignment > 0.0);
    }
}

#[test]
fn wrong_labels_lose_their_weight() {
    let run = runs::confidence().unwrap();
    let [wrong, right] = run.weight;
    assert!(wrong < 0.5 * right, "{wrong}, {right}");
    assert!(
        run.test_accuracy[1] > run.test_accuracy[0] + 0.02,
        "{:?}",
        run.test_accuracy
    );
}
