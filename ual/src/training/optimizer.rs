//! AdamW (Loshchilov and Hutter, arXiv 1711.05101) with a state that can be saved; candle-nn's keeps its to itself.

use candle_core::{
    CpuStorage, DType, InplaceOp2, InplaceOp3, Layout, Result, Tensor, Var, backprop::GradStore,
    bail,
};
use rayon::prelude::*;

const BETA: [f64; 2] = [0.9, 0.999];
const EPSILON: f64 = 1e-8;

/// First and second moments of a variable's gradient.
pub struct Moments {
    pub first: Tensor,
    pub second: Tensor,
}

pub struct AdamW {
    vars: Vec<Var>,
    pub moments: Vec<Moments>,
    /// Steps taken.
    pub steps: usize,
    weight_decay: f64,
}

impl AdamW {
    pub fn new(vars: &[Var], weight_decay: f64) -> Result<Self> {
        let zeros = |var: &Var| {
            Ok(Moments {
                first: var.zeros_like()?,
                second: var.zeros_like()?,
            })
        };
        Ok(Self {
            moments: vars.iter().map(zeros).collect::<Result<_>>()?,
            vars: vars.to_vec(),
            steps: 0,
            weight_decay,
        })
    }

    pub fn step(&mut self, gradients: &GradStore, learning_rate: f64) -> Result<()> {
        self.steps += 1;
        let [first_beta, second_beta] = BETA;
        // The moments start at 0: undoes what that leaves.
        let bias = BETA.map(|beta| 1.0 - beta.powi(self.steps as i32));
        for (var, moments) in self.vars.iter().zip(&mut self.moments) {
            let Some(gradient) = gradients.get(var) else {
                continue;
            };
            let gradient = &gradient.detach(); // or the moments would keep every step's graph
            if in_place(var, gradient) {
                let gradient = gradient.contiguous()?;
                for (moment, beta, squared) in [
                    (&moments.first, first_beta, false),
                    (&moments.second, second_beta, true),
                ] {
                    moment.inplace_op2(&gradient, &Decay { beta, squared })?;
                }
                let step = Step {
                    decay: 1.0 - learning_rate * self.weight_decay,
                    learning_rate,
                    bias,
                };
                var.inplace_op3(&moments.first, &moments.second, &step)?;
                continue;
            }
            let Moments { first, second } = moments;
            *first = ((&*first * first_beta)? + (gradient * (1.0 - first_beta))?)?;
            *second = ((&*second * second_beta)? + (gradient.sqr()? * (1.0 - second_beta))?)?;
            let scale = ((&*second / bias[1])?.sqrt()? + EPSILON)?;
            let step = ((&*first / bias[0])? / scale)?;
            let decayed = (var.as_tensor() * (1.0 - learning_rate * self.weight_decay))?;
            var.set(&(decayed - (step * learning_rate)?)?)?;
        }
        Ok(())
    }
}

/// Whether one pass over memory does for a variable what a dozen of candle's operations do, with the same bits.
fn in_place(var: &Var, gradient: &Tensor) -> bool {
    let on_cpu = var.device().is_cpu() && gradient.device().is_cpu();
    on_cpu && var.dtype() == DType::F32 && gradient.dtype() == DType::F32 && var.is_contiguous()
}

/// Elements of a task.
const TASK: usize = 1 << 15;

/// A moment to β·moment + (1 − β)·gradient, or of the gradient's square.
struct Decay {
    beta: f64,
    squared: bool,
}

impl InplaceOp2 for Decay {
    fn name(&self) -> &'static str {
        "decay of a moment"
    }

    fn cpu_fwd(
        &self,
        moment: &mut CpuStorage,
        own: &Layout,
        gradient: &CpuStorage,
        other: &Layout,
    ) -> Result<()> {
        let (moments, gradients) = (values_mut(moment, own)?, values(gradient, other)?);
        let (keep, add) = (self.beta as f32, (1.0 - self.beta) as f32);
        let squared = self.squared;
        let tasks = moments.par_chunks_mut(TASK).zip(gradients.par_chunks(TASK));
        tasks.for_each(|(moments, gradients)| {
            for (moment, gradient) in moments.iter_mut().zip(gradients) {
                let gradient = if squared {
                    gradient * gradient
                } else {
                    *gradient
                };
                *moment = *moment * keep + gradient * add;
            }
        });
        Ok(())
    }
}

/// A variable less its step, by its moments.
struct Step {
    decay: f64,
    learning_rate: f64,
    bias: [f64; 2],
}

impl InplaceOp3 for Step {
    fn name(&self) -> &'static str {
        "step of AdamW"
    }

    fn cpu_fwd(
        &self,
        var: &mut CpuStorage,
        own: &Layout,
        first: &CpuStorage,
        of_first: &Layout,
        second: &CpuStorage,
        of_second: &Layout,
    ) -> Result<()> {
        let weights = values_mut(var, own)?;
        let (first, second) = (values(first, of_first)?, values(second, of_second)?);
        let [first_scale, second_scale] = self.bias.map(|bias| (1.0 / bias) as f32);
        let (decay, rate, epsilon) = (self.decay as f32, self.learning_rate as f32, EPSILON as f32);
        let moments = first.par_chunks(TASK).zip(second.par_chunks(TASK));
        let tasks = weights.par_chunks_mut(TASK).zip(moments);
        tasks.for_each(|(weights, (first, second))| {
            for ((weight, first), second) in weights.iter_mut().zip(first).zip(second) {
                let step = first * first_scale / ((second * second_scale).sqrt() + epsilon);
                *weight = *weight * decay - step * rate;
            }
        });
        Ok(())
    }
}

fn values<'a>(storage: &'a CpuStorage, layout: &Layout) -> Result<&'a [f32]> {
    let Some((start, end)) = layout.contiguous_offsets() else {
        bail!("the optimizer's tensors must be contiguous")
    };
    Ok(&storage.as_slice::<f32>()?[start..end])
}

fn values_mut<'a>(storage: &'a mut CpuStorage, layout: &Layout) -> Result<&'a mut [f32]> {
    let (CpuStorage::F32(all), Some((start, end))) = (storage, layout.contiguous_offsets()) else {
        bail!("the optimizer's tensors must be contiguous and f32")
    };
    Ok(&mut all[start..end])
}
