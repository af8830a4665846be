//! AdamW (Loshchilov and Hutter, arXiv 1711.05101) with a state that can be saved; candle-nn's keeps its to itself.

use candle_core::{Result, Tensor, Var, backprop::GradStore};

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
