//! The oracle: the loss in f64 on the CPU by plain loops, to be read beside the formulas in the crate's
//! documentation. Speed is no concern here; every other path is tested against it.

use candle_core::{DType, Device, Result, Tensor, bail};

use crate::{
    call::{Call, ClassValues, Row, RowTarget},
    options::{CrossEntropy, Reduction, RowValue, Smoothing},
    results::{LossAndGrad, RowStats},
    targets::Targets,
};

/// What one row contributes. All zero for an ignored row.
#[derive(Clone, Default)]
struct RowResult {
    loss: f64,
    nll: f64,
    lse: f64,
    entropy: f64,
    max_prob: f64,
    grad_norm_sq: f64,
    predicted: u32,
}

pub(crate) fn loss_and_grad(
    options: &CrossEntropy,
    logits: &Tensor,
    targets: &Targets,
) -> Result<LossAndGrad> {
    if options.vocab_shard.is_some() || options.data_parallel.is_some() {
        bail!(
            "reference: of whole rows on one rank, must have neither vocab_shard nor data_parallel"
        );
    }
    let cpu = |t: &Tensor| t.detach().to_device(&Device::Cpu);
    let options = on_cpu(options)?;
    let (logits, targets) = (cpu(logits)?, targets.try_map(cpu)?);
    let call = Call::new(&options, &logits, &targets)?;
    let classes = call.read_classes()?;
    let rows = call.read_rows(&classes)?;
    let probabilities = match &call.targets {
        Targets::Probabilities(values) => Some(call.probability_reader(values)?),
        _ => None,
    };
    let x = logits
        .to_dtype(DType::F64)?
        .flatten_all()?
        .to_vec1::<f64>()?;

    let mut grad = vec![0.0; x.len()];
    let mut results = vec![RowResult::default(); call.rows];
    for (i, row) in rows.rows.iter().enumerate() {
        if let Some(row) = row {
            let mut t = vec![0.0; call.vocab]; // the target distribution
            match &row.target {
                &RowTarget::Class(y) => t[y] = 1.0,
                RowTarget::Entries { .. } => {
                    for &(y, probability) in rows.named(row.target) {
                        t[y] = probability;
                    }
                }
                RowTarget::Probabilities => {
                    let read = probabilities
                        .as_ref()
                        .expect("that is what the targets are");
                    t = read(i)?;
                }
            }
            let columns = i * call.width..i * call.width + call.vocab; // padding is neither read nor written
            let (x, grad) = (&x[columns.clone()], &mut grad[columns]);
            results[i] = one_row(&call, row, &t, &classes, x, grad);
        }
    }

    let total_weight: f64 = rows.rows.iter().flatten().map(|row| row.count).sum();
    let divisor = match call.reduction {
        Reduction::None | Reduction::Sum => 1.0,
        Reduction::Mean if total_weight == 0.0 => 1.0, // no rows, or none that counts
        Reduction::Mean => total_weight,
        Reduction::SumOver(n) => n,
    };
    grad.iter_mut().for_each(|g| *g /= divisor);
    let per_row = |value: fn(&RowResult) -> f64| {
        Tensor::from_vec(
            results.iter().map(value).collect::<Vec<_>>(),
            call.shape.as_slice(),
            &Device::Cpu,
        )
    };
    let loss = match call.reduction {
        Reduction::None => per_row(|r| r.loss)?,
        _ => Tensor::new(
            (0.0 + results.iter().map(|r| r.loss).sum::<f64>()) / divisor, // of no rows, `sum` is −0
            &Device::Cpu,
        )?,
    };
    Ok(LossAndGrad {
        loss,
        grad: Tensor::from_vec(grad, logits.shape(), &Device::Cpu)?,
        stats: RowStats {
            nll: per_row(|r| r.nll)?,
            lse: per_row(|r| r.lse)?,
            entropy: per_row(|r| r.entropy)?,
            max_prob: per_row(|r| r.max_prob)?,
            grad_norm_sq: per_row(|r| r.grad_norm_sq)?,
            predicted: Tensor::from_vec(
                results.iter().map(|r| r.predicted).collect::<Vec<_>>(),
                call.shape.as_slice(),
                &Device::Cpu,
            )?,
        },
    })
}

/// The options with their tensors on the CPU.
fn on_cpu(options: &CrossEntropy) -> Result<CrossEntropy> {
    let cpu = |t: &Tensor| t.detach().to_device(&Device::Cpu);
    let mut options = options.clone();
    if let Smoothing::PerRow(values) = &options.smoothing {
        options.smoothing = Smoothing::PerRow(cpu(values)?);
    }
    if let RowValue::PerRow(values) = &options.entropy_weight {
        options.entropy_weight = RowValue::PerRow(cpu(values)?);
    }
    for values in [
        &mut options.row_weights,
        &mut options.class_weights,
        &mut options.smoothing_prior,
    ] {
        *values = values.as_ref().map(cpu).transpose()?;
    }
    Ok(options)
}

/// Loss and statistics of the logits `x` of one row, whose target distribution is `t`; their gradient goes to `grad`, which
/// holds zeros.
fn one_row(
    call: &Call,
    row: &Row,
    t: &[f64],
    classes: &ClassValues,
    x: &[f64],
    grad: &mut [f64],
) -> RowResult {
    let &Row {
        smoothing: eps,
        weight: w,
        entropy_weight: beta,
        ..
    } = row;
    let (scale, lambda) = (f64::from(call.logit_scale), f64::from(call.z_loss));
    let softcap = call.softcap.map(f64::from);

    if x.iter().any(|v| v.is_nan() || *v == f64::INFINITY) {
        if w != 0.0 {
            grad.fill(f64::NAN);
        }
        let nan = f64::NAN;
        let loss = if w == 0.0 { 0.0 } else { nan };
        return RowResult {
            loss,
            nll: nan,
            lse: nan,
            entropy: nan,
            max_prob: nan,
            grad_norm_sq: nan,
            predicted: 0,
        };
    }
    let masked = |k: usize| x[k] == f64::NEG_INFINITY;
    let here: Vec<usize> = (0..x.len()).filter(|&k| !masked(k)).collect();
    if here.is_empty() {
        let loss = if w == 0.0 { 0.0 } else { f64::INFINITY };
        return RowResult {
            loss,
            nll: f64::INFINITY,
            lse: f64::NEG_INFINITY,
            ..Default::default()
        };
    }

    // By the logits themselves: a softcap may make distinct ones equal by rounding.
    let largest = x.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let predicted = x
        .iter()
        .position(|&v| v == largest)
        .expect("the maximum is one of them");
    let z = |v: f64| match softcap {
        Some(c) => c * (scale * v / c).tanh(),
        None => scale * v,
    };
    // Exponents are relative to the largest logit, which cancels in everything below: exp stays in range. The difference
    // comes before the scale: of large numbers it is exact, their multiples are not.
    let d = |k: usize| match softcap {
        _ if masked(k) => f64::NEG_INFINITY,
        // tanh a − tanh b = 2·(e^(2a−2b) − 1) / ((1 + e^2a)·(1 + e^−2b)): tanh itself is all but equal near the cap.
        Some(c) => {
            let (a, b) = (scale * x[k] / c, scale * largest / c);
            let distance = 2.0 * (x[k] - largest) * scale / c;
            c * (2.0 * distance.exp_m1() / ((1.0 + (2.0 * a).exp()) * (1.0 + (-2.0 * b).exp())))
        }
        None => (x[k] - largest) * scale,
    };
    let d: Vec<f64> = (0..x.len()).map(d).collect();
    // The largest is left out of the sum so that its log-probability keeps its digits when p is near 1: its own term is 1.
    let others = sum_of(without(predicted, &d).map(|d| d.exp()));
    let sum = 1.0 + others;
    let log_sum = others.ln_1p();
    let lse = z(largest) + log_sum;
    let p: Vec<f64> = d.iter().map(|d| d.exp() / sum).collect();
    let surprisal = |k: usize| log_sum - d[k]; // −log p_k = lse − z_k
    // What has no weight counts nothing, even if it is infinite.
    let part = |weight: f64, value: f64| if weight == 0.0 { 0.0 } else { weight * value };

    let prior_mass = sum_of(here.iter().map(|&k| classes.prior(k)));
    let u = |k: usize| match classes.prior(k) {
        mass if mass == 0.0 || masked(k) => 0.0,
        mass => mass / prior_mass,
    };
    let q: Vec<f64> = (0..x.len())
        .map(|k| (1.0 - eps) * t[k] + eps * u(k))
        .collect();
    let cq: Vec<f64> = (0..x.len()).map(|k| classes.weight(k) * q[k]).collect();
    let over_classes = |f: &dyn Fn(usize) -> f64| sum_of(here.iter().map(|&k| f(k)));
    let entropy = over_classes(&|k| part(p[k], surprisal(k)));
    let out_of_reach = (0..x.len()).any(|k| masked(k) && t[k] > 0.0);
    let loss = if w == 0.0 {
        0.0
    } else if out_of_reach {
        f64::INFINITY
    } else {
        let cross_entropy = over_classes(&|k| part(cq[k], surprisal(k)));
        w * (cross_entropy + part(lambda, lse * lse) + part(beta, entropy))
    };
    let nll = if out_of_reach {
        f64::INFINITY
    } else {
        over_classes(&|k| part(t[k], surprisal(k)))
    };

    // (Σ_j q_j)·p_k − q_k. Of the largest class, whose p may be near 1, by 1 − p and the other classes' q.
    let less = |k: usize, q: &[f64], total: f64| {
        if k == predicted {
            sum_of(without(k, q)) - total * (others / sum)
        } else {
            total * p[k] - q[k]
        }
    };
    let totals = [&q, &cq].map(|q| sum_of(q.iter().copied()));
    let mut grad_norm_sq = 0.0;
    for &k in &here {
        grad_norm_sq += less(k, &q, totals[0]).powi(2);
        let dz = w
            * (less(k, &cq, totals[1]) + 2.0 * part(lambda, lse) * p[k]
                - part(beta * p[k], entropy - surprisal(k)));
        grad[k] = dz * scale * softcap.map_or(1.0, |c| (scale * x[k] / c).cosh().powi(-2));
    }
    RowResult {
        loss,
        nll,
        lse,
        entropy,
        max_prob: p[predicted],
        grad_norm_sq,
        predicted: predicted as u32,
    }
}

/// All but element `k`.
fn without(k: usize, values: &[f64]) -> impl Iterator<Item = f64> {
    let (before, rest) = values.split_at(k);
    before.iter().chain(&rest[1..]).copied()
}

/// The sum without the rounding errors of its steps (Neumaier, "Rundungsfehleranalyse einiger Verfahren zur Summation
/// endlicher Summen", 1974): tens of thousands of equal shares must make 1.
fn sum_of(values: impl Iterator<Item = f64>) -> f64 {
    let (mut sum, mut lost) = (0.0f64, 0.0);
    for value in values {
        let next = sum + value;
        lost += if sum.abs() >= value.abs() {
            (sum - next) + value
        } else {
            (value - next) + sum
        };
        sum = next;
    }
    if sum.is_finite() { sum + lost } else { sum }
}
