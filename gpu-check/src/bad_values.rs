//! Bad values in tensors: with `check_inputs` the CPU's error, word for word; without, on CUDA, NaN in that row alone, or
//! in all rows where a class has it.

use anyhow::{Result, bail, ensure};
use candle_core::{DType, Device, Tensor};
use candle_cross_entropy::{CrossEntropy, Reduction, Targets};

use crate::{
    cases::values,
    properties::{Inputs, message},
    targets::targets_on,
};

const ROWS: usize = 6;
const CLASSES: usize = 100;
/// Which row is bad.
const BAD: usize = 3;

/// What a call is given, on the CPU.
#[derive(Clone)]
struct Given {
    targets: Targets,
    smoothing: Tensor,
    weights: Tensor,
    entropy_weight: Option<Tensor>,
    class_weights: Option<Tensor>,
    prior: Option<Tensor>,
}

impl Given {
    fn on(&self, device: &Device) -> Result<(CrossEntropy, Targets)> {
        let mut loss = CrossEntropy::new()
            .reduction(Reduction::None)
            .smoothing(self.smoothing.to_device(device)?)
            .row_weights(&self.weights.to_device(device)?);
        if let Some(weights) = &self.entropy_weight {
            loss = loss.entropy_weight(weights.to_device(device)?);
        }
        if let Some(weights) = &self.class_weights {
            loss = loss.class_weights(&weights.to_device(device)?);
        }
        if let Some(prior) = &self.prior {
            loss = loss.smoothing_prior(&prior.to_device(device)?);
        }
        Ok((loss, targets_on(&self.targets, device)?))
    }
}

/// A call with a bad value.
struct Kind {
    name: String,
    given: Given,
    /// The same without it.
    good: Given,
    /// Whether a class has it.
    of_class: bool,
}

fn put(values: &Tensor, at: usize, value: f64) -> Result<Tensor> {
    let mut all = values
        .flatten_all()?
        .to_dtype(DType::F64)?
        .to_vec1::<f64>()?;
    all[at] = value;
    let all = Tensor::from_vec(all, values.dims(), &Device::Cpu)?;
    Ok(all.to_dtype(values.dtype())?)
}

fn kinds(cpu: &Inputs) -> Result<Vec<Kind>> {
    let device = &Device::Cpu;
    let ones = |shape: &[usize]| Tensor::ones(shape, DType::F32, device);
    let classes = cpu.targets.to_dtype(DType::I64)?;
    let plain = Given {
        targets: classes.clone().into(),
        smoothing: cpu.smoothing.clone(),
        weights: ones(&[ROWS])?,
        entropy_weight: None,
        class_weights: None,
        prior: None,
    };
    let mut kinds = Vec::new();
    let mut add = |name: String, good: &Given, given: Given, of_class| {
        kinds.push(Kind {
            name,
            given,
            good: good.clone(),
            of_class,
        });
    };
    for value in [100, 1 << 40, i64::MAX, -1, i64::MIN] {
        let mut bad = classes.to_vec1::<i64>()?;
        bad[BAD] = value;
        let targets = Tensor::new(bad, device)?.into();
        let given = Given {
            targets,
            ..plain.clone()
        };
        add(format!("target {value}"), &plain, given, false);
    }
    for value in [-0.5, 1.5, f64::NAN, f64::INFINITY] {
        let smoothing = put(&plain.smoothing, BAD, value)?;
        let given = Given {
            smoothing,
            ..plain.clone()
        };
        add(format!("smoothing {value}"), &plain, given, false);
    }
    let negative = [-1.0, f64::NAN, f64::INFINITY];
    for value in negative {
        let weights = put(&plain.weights, BAD, value)?;
        let given = Given {
            weights,
            ..plain.clone()
        };
        add(format!("weight {value}"), &plain, given, false);
    }
    let weighed = Given {
        entropy_weight: Some(ones(&[ROWS])?),
        ..plain.clone()
    };
    for value in [f64::NAN, f64::INFINITY, f64::NEG_INFINITY] {
        let weights = put(&ones(&[ROWS])?, BAD, value)?;
        let given = Given {
            entropy_weight: Some(weights),
            ..plain.clone()
        };
        add(format!("entropy weight {value}"), &weighed, given, false);
    }
    let named = Tensor::stack(&[&classes, &Tensor::zeros_like(&classes)?], 1)?;
    let halves = (ones(&[ROWS, 2])? * 0.5)?;
    let few = Given {
        targets: Targets::top_k(&named, &halves),
        ..plain.clone()
    };
    for value in negative {
        let probabilities = put(&halves, 2 * BAD + 1, value)?;
        let given = Given {
            targets: Targets::top_k(&named, &probabilities),
            ..plain.clone()
        };
        add(format!("probability {value} of two"), &few, given, false);
    }
    let beyond = put(&named, 2 * BAD + 1, CLASSES as f64)?;
    let given = Given {
        targets: Targets::top_k(&beyond, &halves),
        ..plain.clone()
    };
    add("second class of two".into(), &few, given, false);
    for dtype in [DType::F32, DType::F16, DType::BF16] {
        let even = (ones(&[ROWS, CLASSES])? / CLASSES as f64)?.to_dtype(dtype)?;
        let all = Given {
            targets: even.clone().into(),
            ..plain.clone()
        };
        for value in negative {
            let targets = put(&even, BAD * CLASSES + 41, value)?.into();
            let given = Given {
                targets,
                ..plain.clone()
            };
            let name = format!("probability {value} of {}", dtype.as_str());
            add(name, &all, given, false);
        }
    }
    let vector = ones(&[CLASSES])?;
    for value in negative {
        let bad = Some(put(&vector, 57, value)?);
        let given = Given {
            class_weights: bad.clone(),
            ..plain.clone()
        };
        add(format!("class weight {value}"), &plain, given, true);
        let given = Given {
            prior: bad,
            ..few.clone()
        };
        add(format!("prior {value}"), &few, given, true);
    }
    let given = Given {
        prior: Some(vector.zeros_like()?),
        ..plain.clone()
    };
    add("a prior of zeros".into(), &plain, given, true);
    Ok(kinds)
}

pub fn check(device: &Device) -> Result<String> {
    let cpu = Inputs::new(DType::F32, ROWS, CLASSES, &Device::Cpu)?;
    let logits = cpu.logits.to_device(device)?;
    let kinds = kinds(&cpu)?;
    for Kind {
        name,
        given,
        good,
        of_class,
    } in &kinds
    {
        let (loss, targets) = given.on(&Device::Cpu)?;
        let Err(expected) = loss.forward(&cpu.logits, targets) else {
            bail!("{name}: no error on the CPU")
        };
        let expected = message(&expected);
        ensure!(
            *of_class || expected.contains(&format!("row {BAD}")),
            "{name}: {expected}"
        );
        let (loss, targets) = given.on(device)?;
        let checked = loss.clone().check_inputs(true);
        let inplace = checked.loss_and_grad_inplace(logits.copy()?, &targets);
        for (what, result) in [
            ("forward", checked.forward(&logits, &targets).map(|_| ())),
            (
                "loss_and_grad",
                checked.loss_and_grad(&logits, &targets).map(|_| ()),
            ),
            ("loss_and_grad_inplace", inplace.map(|_| ())),
        ] {
            let Err(error) = result else {
                bail!("{name}: no error from {what} with check_inputs")
            };
            ensure!(
                message(&error) == expected,
                "{name}: {what} says {:?} for {expected:?}",
                message(&error)
            );
        }
        if !device.is_cuda() {
            continue;
        }
        let result = loss.loss_and_grad(&logits, &targets)?;
        let (good, good_targets) = good.on(device)?;
        let clean = good.loss_and_grad(&logits, good_targets)?;
        for (what, got, clean) in [
            ("loss", &result.loss, &clean.loss),
            ("gradient", &result.grad, &clean.grad),
        ] {
            let (got, clean) = (values(got)?, values(clean)?);
            let of_row = got.len() / ROWS;
            for (i, (value, clean)) in got.into_iter().zip(clean).enumerate() {
                let is_bad = *of_class || i / of_row == BAD;
                let right = match is_bad {
                    true => value.is_nan(),
                    false => value.to_bits() == clean.to_bits(),
                };
                ensure!(right, "{name}: {what} {i} is {value}");
            }
        }
    }
    Ok(format!(
        "{} kinds, the error says what the CPU's does",
        kinds.len()
    ))
}
