//! One training: AdamW, a warm-up and cosine schedule, gradients accumulated over batches and clipped by their global
//! norm.

use std::time::Instant;

use anyhow::{Context, Result, bail};
use candle_core::{Tensor, Var, backprop::GradStore};
use candle_cross_entropy::{CrossEntropy, Reduction, RowStats};

use crate::{
    data::{
        batches::{Batch, Batches},
        samples::Sample,
    },
    model::decoder::Decoder,
    report::{
        curve::{Curve, Point},
        metrics,
    },
    training::{
        checkpoint::{self, Checkpoints, Sums},
        evaluate::evaluate,
        method::Method,
        optimizer::AdamW,
        plan::{Loss, Plan},
        progress::Progress,
        ranks::Ranks,
        slice::Slice,
        watch::Watch,
    },
};

/// What is trained, on what, and how.
pub struct Training<'a> {
    /// In its progress and its errors.
    pub name: &'a str,
    pub model: &'a Decoder,
    pub method: &'a Method,
    pub samples: &'a [Sample],
    pub watch: Watch<'a>,
    pub plan: &'a Plan,
    pub checkpoints: &'a Checkpoints,
    pub ranks: &'a Ranks,
}

impl Training<'_> {
    /// From the weights that the model has, or those of a checkpoint; the model keeps what it learned.
    pub fn run(self) -> Result<Curve> {
        let Self {
            name,
            model,
            method,
            samples,
            watch,
            plan,
            checkpoints,
            ranks,
        } = self;
        let vars = model.vars();
        let mut optimizer = AdamW::new(vars, plan.weight_decay)?;
        let mut batches = Batches::new(samples, plan.batch, plan.seed);
        let saved = match ranks.is_first() {
            true => checkpoints.load(name, vars, &mut optimizer)?,
            false => None,
        };
        let (done, mut curve, mut sums) = match saved {
            Some(saved) => (saved.step, saved.curve, saved.since_point),
            None => (0, Curve::default(), Sums::default()),
        };
        let done = ranks.number_of_first(done)?;
        if done > 0 && ranks.size() > 1 {
            optimizer.steps = done;
            for (var, moments) in vars.iter().zip(&mut optimizer.moments) {
                var.set(&ranks.of_first(var)?)?;
                moments.first = ranks.of_first(&moments.first)?;
                moments.second = ranks.of_first(&moments.second)?;
            }
        }
        for _ in 0..done * plan.accumulate {
            batches.next_batch();
        }
        let mut progress = ranks.is_first().then(|| Progress::new(name, plan.steps));
        let held_out: Vec<&Sample> = watch
            .held_out
            .iter()
            .step_by(watch.held_out.len().div_ceil(plan.curve_samples).max(1))
            .collect();
        for step in done + 1..=plan.steps {
            let start = Instant::now();
            let parts: Vec<_> = (0..plan.accumulate).map(|_| batches.next_batch()).collect();
            let Step {
                mut gradients,
                loss,
                nll,
                rows,
            } = Step::new(model, method, plan.loss, &parts, ranks)?;
            sums.nll += nll;
            if !loss.is_finite() {
                bail!("{name}: the loss is {loss} in step {step}; a smaller --lr may help");
            }
            let norm = clip(&mut gradients, vars, plan.clip)?;
            if !norm.is_finite() {
                bail!(
                    "{name}: the gradients' norm is {norm} in step {step}; a smaller --lr may help"
                );
            }
            let learning_rate = plan.learning_rate_of(step);
            optimizer.step(&gradients, learning_rate)?;

            sums.rows += rows;
            let tokens = parts.iter().flatten().map(|sample| sample.tokens.len());
            sums.tokens += tokens.sum::<usize>();
            curve.seconds += start.elapsed().as_secs_f64();
            curve.tokens_per_second = sums.tokens as f64 / curve.seconds;
            if let Some(progress) = &mut progress {
                progress.step(step, loss, curve.tokens_per_second);
            }
            // Evenly spaced, the last at the last step.
            let points = |step: usize| step * plan.points / plan.steps;
            let is_point = points(step) > points(step - 1) && !held_out.is_empty();
            if is_point && ranks.is_first() {
                let held_out = evaluate(model, &held_out, plan.batch)?;
                let held_out_nll = metrics::mean(held_out.iter().map(|row| row.nll))
                    .context("no held-out rows")?;
                let stopped = &mut curve.stopped;
                let validation_nll = watch.after(step, stopped, model, plan.batch)?;
                curve.points.push(Point {
                    step,
                    train_nll: sums.nll / sums.rows as f64,
                    held_out_nll,
                    validation_nll,
                });
                (sums.nll, sums.rows) = (0.0, 0);
            }
            if ranks.is_first() && checkpoints.is_due(step, plan.steps) {
                let state = checkpoint::Progress {
                    step,
                    curve,
                    since_point: sums,
                };
                checkpoints.save(name, vars, &optimizer, &state)?;
                curve = state.curve;
            }
        }
        if let Some(progress) = progress {
            progress.finish();
        }
        Ok(curve)
    }
}

/// What a step's batches come to, of all processes and with the same bits on each.
pub struct Step {
    pub gradients: GradStore,
    pub loss: f32,
    /// Summed over the rows.
    pub nll: f64,
    /// That are not ignored.
    pub rows: usize,
}

impl Step {
    pub fn new(
        model: &Decoder,
        method: &Method,
        loss: Loss,
        batches: &[Vec<&Sample>],
        ranks: &Ranks,
    ) -> Result<Self> {
        let vars = model.vars();
        let rows = batches.iter().flatten().map(|sample| sample.rows()).sum();
        let slice = ranks.slice(model.output_projection().dim(0)?)?;
        let mut gradients: Option<GradStore> = None;
        let mut numbers = [0.0; 2];
        for batch in batches {
            let part = ranks.part(batch);
            if part.is_empty() {
                continue;
            }
            let part = Batch::new(&part, model.device())?;
            let (loss, stats) = forward(model, method, loss, (&part, rows), slice.as_ref())?;
            add(&mut gradients, loss.backward()?, vars)?;
            numbers[0] += f64::from(loss.to_scalar::<f32>()?);
            numbers[1] += f64::from(stats.nll.sum_all()?.to_scalar::<f32>()?);
        }
        if let (Some(slice), Some(gradients)) = (&slice, &mut gradients) {
            slice.keep_own(gradients, model)?;
            if !ranks.is_first() {
                numbers = [0.0; 2]; // each has those of all classes
            }
        }
        let gradients = ranks.sum(gradients, &mut numbers, vars)?;
        let [loss, nll] = numbers;
        Ok(Self {
            gradients,
            loss: loss as f32,
            nll,
            rows,
        })
    }
}

/// Adds the gradients of the variables. candle's hold on to the activations they were computed from, these do not.
fn add(sum: &mut Option<GradStore>, mut more: GradStore, vars: &[Var]) -> candle_core::Result<()> {
    let gradients = vars.iter().map(|var| more.remove(var).map(|g| g.detach()));
    let gradients: Vec<_> = gradients.collect();
    let Some(sum) = sum else {
        for (var, gradient) in vars.iter().zip(gradients) {
            if let Some(gradient) = gradient {
                more.insert(var, gradient);
            }
        }
        *sum = Some(more);
        return Ok(());
    };
    for (var, gradient) in vars.iter().zip(gradients) {
        if let Some(gradient) = gradient {
            let total = match sum.remove(var) {
                Some(before) => (before + gradient)?,
                None => gradient,
            };
            sum.insert(var, total);
        }
    }
    Ok(())
}

/// The loss of a batch, a part of a step with so many `rows` that are not ignored, and its rows' statistics. With a slice of the
/// classes the loss is that of all classes, and all processes must call this, and the backward, together.
pub fn forward(
    model: &Decoder,
    method: &Method,
    loss: Loss,
    (batch, rows): (&Batch, usize),
    slice: Option<&Slice>,
) -> candle_core::Result<(Tensor, RowStats)> {
    let hidden = |chosen| model.hidden(&batch.packing, chosen);
    let options = |batch: &Batch| -> candle_core::Result<CrossEntropy> {
        let options = method.loss(batch)?;
        Ok(options.reduction(Reduction::SumOver(rows.max(1) as f64)))
    };
    let projection = model.output_projection();
    match loss {
        Loss::Linear => {
            let hidden = hidden(Some(&batch.chosen))?;
            let batch = batch.compact()?;
            let (options, projection) = match slice {
                Some(slice) => (slice.shard(options(&batch)?), slice.rows(&projection)?),
                None => (options(&batch)?, projection),
            };
            options.forward_linear_with_stats(&hidden, &projection, None, &batch.targets)
        }
        // As a usual trainer does: of all tokens, and of padding.
        Loss::Logits => {
            let (samples, length) = batch.targets.dims2()?;
            let hidden = hidden(None)?.index_select(&batch.padded, 0)?;
            let (options, logits) = match slice {
                Some(slice) => {
                    let logits = slice.logits(&hidden, &projection)?;
                    (slice.shard(options(batch)?), logits)
                }
                None => (options(batch)?, hidden.matmul(&projection.t()?)?),
            };
            let logits = logits.reshape((samples, length, ()))?;
            options.forward_with_stats(&logits, &batch.targets)
        }
    }
}

/// The batch with the most tokens, padding among them, of the first epoch.
pub fn largest_batch<'a>(samples: &'a [Sample], plan: &Plan) -> Vec<&'a Sample> {
    let mut batches = Batches::new(samples, plan.batch, plan.seed);
    let size = |batch: &Vec<&Sample>| {
        batch.len() * batch.iter().map(|s| s.tokens.len()).max().unwrap_or(0)
    };
    (0..samples.len().div_ceil(plan.batch))
        .map(|_| batches.next_batch())
        .max_by_key(size)
        .expect("a data set is not empty")
}

/// The norm that the gradients had.
fn clip(gradients: &mut GradStore, vars: &[Var], largest: f64) -> candle_core::Result<f64> {
    let squares = vars
        .iter()
        .filter_map(|var| gradients.get(var))
        .map(|g| g.sqr()?.sum_all());
    let squares = squares.collect::<candle_core::Result<Vec<_>>>()?;
    let norm = f64::from(Tensor::stack(&squares, 0)?.sum_all()?.to_scalar::<f32>()?).sqrt();
    if norm > largest {
        for var in vars {
            if let Some(gradient) = gradients.remove(var) {
                gradients.insert(var, (gradient * (largest / norm))?);
            }
        }
    }
    Ok(norm)
}
