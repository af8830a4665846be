//! Targets that are distributions, and the options that go with them.

use std::ops::Range;

use anyhow::Result;
use candle_core::{D, DType, Device, Tensor};
use candle_cross_entropy::{CrossEntropy, Targets};
use rand::{Rng, rngs::StdRng};

use crate::cases::values;

/// What a row's target is, given one class of it.
#[derive(Clone, Copy, Default)]
pub enum Form {
    /// That class.
    #[default]
    Class,
    /// It and so many others, some named twice, some absent.
    TopK(usize),
    /// It above all others.
    Probabilities(Option<DType>),
}

/// A column of the grid beside the other options.
#[derive(Clone, Copy, Default)]
pub struct Distribution {
    pub form: Form,
    pub class_weights: bool,
    pub prior: bool,
    pub entropy: Option<f32>,
}

/// Tensors of a call, on the CPU.
#[derive(Clone)]
pub struct Given {
    pub targets: Targets,
    class_weights: Option<Tensor>,
    prior: Option<Tensor>,
    entropy: Option<f32>,
    /// What a row counts in a mean beside its weight; 0 for an ignored one.
    pub counts: Vec<f64>,
    /// What multiplies probabilities, at the most.
    pub magnitude: f64,
}

impl Given {
    /// `classes` is one a row, or `ignored`.
    pub fn new(
        distribution: Option<Distribution>,
        classes: &Tensor,
        vocab: usize,
        ignored: i64,
        rng: &mut StdRng,
    ) -> Result<Self> {
        let cpu = &Device::Cpu;
        let Distribution {
            form,
            class_weights,
            prior,
            entropy,
        } = distribution.unwrap_or_default();
        let shape = classes.dims();
        let of_rows: Vec<i64> = values(classes)?.into_iter().map(|t| t as i64).collect();
        let with = |last: usize| [shape, &[last]].concat();
        let mut counts: Vec<f64> = (of_rows.iter())
            .map(|&t| if t == ignored { 0.0 } else { 1.0 })
            .collect();
        let mut vector = || -> Result<Tensor> {
            let values = (0..vocab).map(|k| match k % 5 {
                2 => 0.0,
                _ => rng.random_range(0.1f32..2.0),
            });
            Ok(Tensor::from_iter(values, cpu)?)
        };
        let class_weights = class_weights.then(&mut vector).transpose()?;
        let prior = prior.then(&mut vector).transpose()?;
        let targets = match form {
            Form::Class => {
                if let Some(weights) = &class_weights {
                    let weights = values(weights)?;
                    for (count, &t) in counts.iter_mut().zip(&of_rows) {
                        *count *=
                            usize::try_from(t).map_or(1.0, |t| weights.get(t).map_or(1.0, |c| *c));
                    }
                }
                classes.into()
            }
            Form::TopK(k) => {
                let (mut named, mut t) = (Vec::new(), Vec::new());
                for &class in &of_rows {
                    for j in 0..k {
                        named.push(match j % 4 {
                            0 => class,
                            _ if class == ignored => ignored,
                            3 => ignored,
                            _ => rng.random_range(0..vocab as i64),
                        });
                        let share = 0.75f32 / k as f32;
                        t.push(if j == 0 { 0.25 } else { share });
                    }
                }
                let named = Tensor::from_vec(named, with(k), cpu)?.to_dtype(classes.dtype())?;
                Targets::top_k(&named, &Tensor::from_vec(t, with(k), cpu)?)
            }
            Form::Probabilities(dtype) => {
                counts.fill(1.0);
                let mut t = vec![0f32; of_rows.len() * vocab];
                for (row, &class) in t.chunks_mut(vocab).zip(&of_rows) {
                    row.fill_with(|| rng.random_range(0.0..1.0) / vocab as f32);
                    if let Some(t) = usize::try_from(class).ok().and_then(|t| row.get_mut(t)) {
                        *t += 0.5;
                    }
                }
                let t = Tensor::from_vec(t, with(vocab), cpu)?;
                Targets::from(t.to_dtype(dtype.unwrap_or(DType::F32))?)
            }
        };
        let largest = class_weights.as_ref().map_or(1.0, |_| 2.0);
        Ok(Self {
            targets,
            class_weights,
            prior,
            entropy,
            counts,
            magnitude: largest + f64::from(entropy.unwrap_or(0.0).abs()),
        })
    }

    /// For who has these classes alone.
    pub fn of_classes(&self, classes: Range<usize>) -> Result<Self> {
        let targets = match &self.targets {
            Targets::Probabilities(values) => {
                Targets::Probabilities(values.narrow(D::Minus1, classes.start, classes.len())?)
            }
            targets => targets.clone(),
        };
        Ok(Self {
            targets,
            ..self.clone()
        })
    }

    /// The loss with these options.
    pub fn on(&self, device: &Device, mut loss: CrossEntropy) -> Result<CrossEntropy> {
        if let Some(weights) = &self.class_weights {
            loss = loss.class_weights(&weights.to_device(device)?);
        }
        if let Some(prior) = &self.prior {
            loss = loss.smoothing_prior(&prior.to_device(device)?);
        }
        if let Some(weight) = self.entropy {
            loss = loss.entropy_weight(weight);
        }
        Ok(loss)
    }
}

pub fn targets_on(targets: &Targets, device: &Device) -> Result<Targets> {
    Ok(match targets {
        Targets::Classes(classes) => Targets::Classes(classes.to_device(device)?),
        Targets::Probabilities(values) => Targets::Probabilities(values.to_device(device)?),
        Targets::TopK {
            classes,
            probabilities,
        } => Targets::TopK {
            classes: classes.to_device(device)?,
            probabilities: probabilities.to_device(device)?,
        },
    })
}
