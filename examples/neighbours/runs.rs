//! Trainings on the small problem, one a method, and what is worth knowing about each.

use candle_core::{DType, Result, Tensor};
use candle_cross_entropy::{CrossEntropy, Reduction, cross_entropy};
use candle_nn::{AdamW, Optimizer};
use rand::{Rng, SeedableRng, rngs::StdRng};

use crate::{
    adaptation, confidence, dro,
    feasible::Feasible,
    gradient_norm,
    problem::{CLASSES, DEVICE, Data, Model},
    pseudo_labels, reliable,
};

const WIDTH: usize = 16;
const SEED: u64 = 1;

/// Trains a fresh model on the loss that `step` computes of it.
fn train(steps: usize, mut step: impl FnMut(&Model) -> Result<Tensor>) -> Result<Model> {
    let model = Model::new(WIDTH, SEED)?;
    proceed(&model, steps, &mut step)?;
    Ok(model)
}

fn proceed(
    model: &Model,
    steps: usize,
    mut step: impl FnMut(&Model) -> Result<Tensor>,
) -> Result<()> {
    let mut optimizer = AdamW::new_lr(model.parameters(), 0.02)?;
    for _ in 0..steps {
        optimizer.backward_step(&step(model)?)?;
    }
    Ok(())
}

fn plain(model: &Model, data: &Data) -> Result<Tensor> {
    cross_entropy(&model.logits(&data.inputs)?, &data.targets()?)
}

fn row_losses(model: &Model, data: &Data) -> Result<Vec<f32>> {
    CrossEntropy::new()
        .reduction(Reduction::None)
        .forward(&model.logits(&data.inputs)?, &data.targets()?)?
        .to_vec1()
}

fn mean(values: &[f32]) -> f32 {
    values.iter().sum::<f32>() / values.len() as f32
}

fn largest(values: &[f32]) -> f32 {
    values.iter().copied().fold(f32::MIN, f32::max)
}

/// Two groups, a majority of 200 and a minority of 20, turned by a quarter: where one has a class, the other has the next.
/// No model can be right about both.
fn two_groups() -> Result<(Data, usize)> {
    let majority = Data::clusters(200, 0.3, 0.0, 2)?;
    let minority = Data::clusters(20, 0.3, std::f64::consts::FRAC_PI_2, 3)?;
    Ok((majority.and(&minority)?, 200))
}

pub struct Dro {
    /// Share of the weights that the minority, a share of 1/11, gets in the first and in the last step.
    pub minority_weight: [f32; 2],
    /// Mean loss of the minority after plain training, and after this.
    pub minority_loss: [f32; 2],
}

pub fn dro() -> Result<Dro> {
    let (data, majority) = two_groups()?;
    let mut shares = Vec::new();
    let robust = train(150, |model| {
        let (loss, weights) = dro::loss(&model.logits(&data.inputs)?, &data.targets()?, 0.5)?;
        shares.push(weights.to_vec1::<f32>()?[majority..].iter().sum());
        Ok(loss)
    })?;
    let erm = train(150, |model| plain(model, &data))?;
    let minority =
        |model: &Model| -> Result<f32> { Ok(mean(&row_losses(model, &data)?[majority..])) };
    Ok(Dro {
        minority_weight: [shares[0], shares[shares.len() - 1]],
        minority_loss: [minority(&erm)?, minority(&robust)?],
    })
}

pub struct FeasibleLearning {
    pub bound: f64,
    /// Largest loss after plain training, and after going on with this.
    pub largest_loss: [f32; 2],
    /// By sample: the largest of all steps.
    pub multipliers: Vec<f32>,
    /// By sample: whether its loss was at most the bound in every step.
    pub always_satisfied: Vec<bool>,
}

pub fn feasible() -> Result<FeasibleLearning> {
    let mut data = Data::clusters(80, 0.1, 0.0, 2)?;
    // A fifth of one class has another label: plain training gives it up, and a loss of ln 2 for all is possible.
    data.classes
        .iter_mut()
        .step_by(20)
        .for_each(|class| *class = 1);
    let bound = 1.0;
    let mut method = Feasible {
        multipliers: Tensor::zeros(80, DType::F32, DEVICE)?,
        bound,
        dual_rate: 0.05,
        alpha: f64::INFINITY,
    };
    let mut always_satisfied = vec![true; 80];
    let mut multipliers = method.multipliers.clone();
    let model = train(100, |model| plain(model, &data))?;
    let plainly = largest(&row_losses(&model, &data)?);
    proceed(&model, 800, |model| {
        for (always, loss) in always_satisfied.iter_mut().zip(row_losses(model, &data)?) {
            *always &= f64::from(loss) <= bound;
        }
        let loss = method.loss(&model.logits(&data.inputs)?, &data.targets()?)?;
        multipliers = multipliers.maximum(&method.multipliers)?;
        Ok(loss)
    })?;
    Ok(FeasibleLearning {
        bound,
        largest_loss: [plainly, largest(&row_losses(&model, &data)?)],
        multipliers: multipliers.to_vec1()?,
        always_satisfied,
    })
}

/// Few labelled samples, many unlabelled ones, and others to test on.
fn few_labels() -> Result<[Data; 3]> {
    Ok([
        Data::clusters(12, 0.6, 0.0, 4)?,
        Data::clusters(400, 0.6, 0.0, 5)?,
        Data::clusters(400, 0.6, 0.0, 6)?,
    ])
}

/// Share of pseudo-labels, −100 where there is none, that are right.
fn right(targets: &[i64], data: &Data) -> f64 {
    let labelled = targets.iter().zip(&data.classes).filter(|(t, _)| **t >= 0);
    let (right, all) = labelled.fold((0, 0), |(right, all), (t, c)| {
        (right + usize::from(*t == i64::from(*c)), all + 1)
    });
    right as f64 / f64::from(all)
}

pub struct PseudoLabels {
    /// Samples with a class as their target in the first step, of 400.
    pub accepted: usize,
    /// Share of right ones among these, and among the predictions of all samples.
    pub accuracy: [f64; 2],
    /// On other samples: of the model trained on labelled samples alone, of this, and of this without the adjustment.
    pub test_accuracy: [f64; 3],
}

pub fn pseudo_labels() -> Result<PseudoLabels> {
    let [_, unlabelled, test] = few_labels()?;
    let counts = [16, 2, 2, 2];
    let labelled = Data::clusters(64, 0.6, 0.0, 4)?.first_of_each(counts)?;
    let log_frequencies = pseudo_labels::log_frequencies(&Tensor::new(&counts, DEVICE)?)?;
    // The first step's labels; the accuracy on unlabelled samples before, on others before and after.
    let trained = |tau: f64| -> Result<(pseudo_labels::PseudoLabels, [f64; 3])> {
        let labeller = pseudo_labels::Labeller {
            adjustment: (&log_frequencies * tau)?,
            temperature: 1.0,
            threshold: 0.5,
            hardness: 0.5,
        };
        let model = train(40, |model| plain(model, &labelled))?;
        let accuracy = |data: &Data| data.accuracy(&model.logits(&data.inputs)?);
        let (all, before) = (accuracy(&unlabelled)?, accuracy(&test)?);
        let mut first = None;
        proceed(&model, 60, |model| {
            let logits = model.logits(&unlabelled.inputs)?;
            let labels = labeller.label(&logits)?;
            let loss = pseudo_labels::loss(
                (&model.logits(&labelled.inputs)?, &labelled.targets()?),
                (&logits, &labels),
            )?;
            first.get_or_insert(labels);
            Ok(loss)
        })?;
        let first = first.expect("there were steps");
        Ok((first, [all, before, accuracy(&test)?]))
    };
    let (labels, [all, before, after]) = trained(1.0)?;
    let (_, [_, _, unadjusted]) = trained(0.0)?;
    let accepted = labels.accepted.to_vec1::<u8>()?;
    let predicted = labels.targets.argmax(1)?.to_vec1::<u32>()?;
    let targets = accepted.iter().zip(predicted);
    let targets: Vec<i64> = targets
        .map(|(&accepted, class)| if accepted != 0 { class.into() } else { -100 })
        .collect();
    Ok(PseudoLabels {
        accepted: accepted.iter().filter(|a| **a != 0).count(),
        accuracy: [right(&targets, &unlabelled), all],
        test_accuracy: [before, after, unadjusted],
    })
}

pub struct Reliable {
    /// Share of right ones among the selected pseudo-labels, and among all.
    pub accuracy: [f64; 2],
    /// Mean disagreement of the passes, in nats: of selected samples, and of all.
    pub disagreement: [f32; 2],
    /// On other samples: of the teacher, and of the student trained on labelled and selected samples.
    pub test_accuracy: [f64; 2],
}

pub fn reliable() -> Result<Reliable> {
    let [labelled, unlabelled, test] = few_labels()?;
    let teacher = train(40, |model| plain(model, &labelled))?;
    let rng = &mut StdRng::seed_from_u64(7);
    let passes: Vec<Tensor> = (0..10)
        .map(|_| teacher.logits_dropped(&unlabelled.inputs, 0.3, rng))
        .collect::<Result<_>>()?;
    let scores = reliable::scores(&passes, 0.5)?;
    let targets = reliable::select(&scores, 200)?;
    let student = train(100, |model| {
        plain(model, &labelled)? + cross_entropy(&model.logits(&unlabelled.inputs)?, &targets)?
    })?;

    let selected = targets.to_vec1::<i64>()?;
    let disagreement = scores.disagreement.to_vec1::<f32>()?;
    let of_selected: Vec<f32> = selected
        .iter()
        .zip(&disagreement)
        .filter_map(|(t, d)| (*t >= 0).then_some(*d))
        .collect();
    let all: Vec<i64> = scores
        .predicted
        .to_vec1::<u32>()?
        .into_iter()
        .map(i64::from)
        .collect();
    Ok(Reliable {
        accuracy: [right(&selected, &unlabelled), right(&all, &unlabelled)],
        disagreement: [mean(&of_selected), mean(&disagreement)],
        test_accuracy: [
            test.accuracy(&teacher.logits(&test.inputs)?)?,
            test.accuracy(&student.logits(&test.inputs)?)?,
        ],
    })
}

pub struct GradientNorm {
    /// By the gradient of the loss at the predicted class.
    pub by_loss: Asked,
    /// By that of the entropy.
    pub by_entropy: Asked,
    /// Share of wrong predictions among all unlabelled samples.
    pub wrong: f64,
    /// On other samples, before any is asked for.
    pub test_accuracy: f64,
}

pub struct Asked {
    pub selected: usize,
    /// Share of wrong predictions among the selected samples.
    pub wrong: f64,
    /// Mean entropy of their predictions, in nats.
    pub entropy: f32,
    /// On other samples, once trained on these too.
    pub test_accuracy: f64,
}

pub fn gradient_norm() -> Result<GradientNorm> {
    let [labelled, unlabelled, test] = few_labels()?;
    let trained = || train(40, |model| plain(model, &labelled));
    let asked = |scores: fn(&Tensor, &Tensor) -> Result<Tensor>| -> Result<Asked> {
        let model = trained()?;
        let scores = scores(&model.hidden(&unlabelled.inputs)?, model.output())?;
        let chosen = gradient_norm::select(&scores, 20)?;
        let asked = unlabelled.select(&chosen)?;
        let logits = model.logits(&asked.inputs)?;
        let entropy = adaptation::loss(&logits)?.to_scalar()?;
        let wrong = 1.0 - asked.accuracy(&logits)?;
        let more = labelled.and(&asked)?;
        proceed(&model, 100, |model| plain(model, &more))?;
        Ok(Asked {
            selected: chosen.len(),
            wrong,
            entropy,
            test_accuracy: test.accuracy(&model.logits(&test.inputs)?)?,
        })
    };
    let model = trained()?;
    Ok(GradientNorm {
        by_loss: asked(gradient_norm::scores)?,
        by_entropy: asked(gradient_norm::entropy_scores)?,
        wrong: 1.0 - unlabelled.accuracy(&model.logits(&unlabelled.inputs)?)?,
        test_accuracy: test.accuracy(&model.logits(&test.inputs)?)?,
    })
}

pub struct Confidence {
    /// Mean weight of samples with a wrong label, and with the right one, over all steps; × the number of samples.
    pub weight: [f32; 2],
    /// On other samples: after plain training, and after this.
    pub test_accuracy: [f64; 2],
}

pub fn confidence() -> Result<Confidence> {
    let [_, data, test] = few_labels()?;
    let trusted = Data::clusters(40, 0.6, 0.0, 9)?;
    let rng = &mut StdRng::seed_from_u64(8);
    // Nearly half of the labels are wrong, all in one direction.
    let mislabelled: Vec<bool> = data.classes.iter().map(|_| rng.random_bool(0.45)).collect();
    let targets = data.classes.iter().zip(&mislabelled);
    let targets: Vec<u32> = targets
        .map(|(c, wrong)| (c + u32::from(*wrong)) % CLASSES as u32)
        .collect();
    let targets = Tensor::new(targets, DEVICE)?;
    let mut weight = [0f32; 2];
    let steps = 60;
    let model = train(steps, |model| {
        let logits = || model.logits(&data.inputs);
        let alignment = confidence::alignment(
            &model.parameters(),
            logits,
            &targets,
            &plain(model, &trusted)?,
            0.01,
        )?;
        let weights = confidence::weights(&alignment)?;
        for (wrong, w) in mislabelled.iter().zip(weights.to_vec1::<f32>()?) {
            let count = mislabelled.iter().filter(|m| *m == wrong).count();
            weight[usize::from(!wrong)] += w * 400.0 / (count * steps) as f32;
        }
        confidence::loss(&logits()?, &targets, &weights)
    })?;
    let erm = train(steps, |model| {
        cross_entropy(&model.logits(&data.inputs)?, &targets)
    })?;
    Ok(Confidence {
        weight,
        test_accuracy: [
            test.accuracy(&erm.logits(&test.inputs)?)?,
            test.accuracy(&model.logits(&test.inputs)?)?,
        ],
    })
}

pub struct Adaptation {
    /// On data turned by a quarter of a quarter: before, and after.
    pub accuracy: [f64; 2],
    /// Mean entropy there, in nats.
    pub entropy: [f32; 2],
}

pub fn adaptation() -> Result<Adaptation> {
    let data = Data::clusters(400, 0.3, 0.0, 2)?;
    let turned = Data::clusters(400, 0.3, std::f64::consts::FRAC_PI_8 * 1.5, 3)?;
    let model = train(60, |model| plain(model, &data))?;
    let state = || -> Result<(f64, f32)> {
        let logits = model.logits(&turned.inputs)?;
        let entropy = adaptation::loss(&logits)?.to_scalar()?;
        Ok((turned.accuracy(&logits)?, entropy))
    };
    let before = state()?;
    let mut optimizer = AdamW::new_lr(model.first(), 0.01)?;
    for _ in 0..60 {
        optimizer.backward_step(&adaptation::loss(&model.logits(&turned.inputs)?)?)?;
    }
    let after = state()?;
    Ok(Adaptation {
        accuracy: [before.0, after.0],
        entropy: [before.1, after.1],
    })
}
