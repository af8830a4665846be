//! The oracle: the loss in f64 on the CPU by plain loops, to be read beside the formulas in the crate's
//! documentation. Speed is no concern here; every other path is tested against it.

use candle_core::{DType, Device, Result, Tensor};

use crate::{
    call::{Call, Row},
    options::{CrossEntropy, Reduction, Smoothing},
    results::{LossAndGrad, RowStats},
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
    targets: &Tensor,
) -> Result<LossAndGrad> {
    let cpu = |t: &Tensor| t.detach().to_device(&Device::Cpu);
    let mut options = options.clone();
    if let Smoothing::PerRow(values) = &options.smoothing {
        options.smoothing = Smoothing::PerRow(cpu(values)?);
    }
    options.row_weights = options.row_weights.as_ref().map(cpu).transpose()?;
    let (logits, targets) = (cpu(logits)?, cpu(targets)?);
    let call = Call::new(&options, &logits, &targets)?;
    let rows = call.read_rows()?;
    let x = logits
        .to_dtype(DType::F64)?
        .flatten_all()?
        .to_vec1::<f64>()?;

    let mut grad = vec![0.0; x.len()];
    let mut results = vec![RowResult::default(); call.rows];
    for (i, row) in rows.iter().enumerate() {
        if let Some(row) = row {
            let columns = i * call.width..i * call.width + call.vocab; // padding is neither read nor written
            results[i] = one_row(&call, row, &x[columns.clone()], &mut grad[columns]);
        }
    }

    let total_weight: f64 = rows.iter().flatten().map(|row| row.weight).sum();
    let divisor = match call.reduction {
        Reduction::None | Reduction::Sum => 1.0,
        Reduction::Mean if total_weight == 0.0 => 1.0, // no rows, or none that counts: every loss is 0
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

/// Loss and statistics of the logits `x` of one row; their gradient goes to `grad`, which holds zeros.
fn one_row(call: &Call, row: &Row, x: &[f64], grad: &mut [f64]) -> RowResult {
    let &Row {
        target: y,
        smoothing: eps,
        weight: w,
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
    let classes: Vec<usize> = (0..x.len()).filter(|&k| !masked(k)).collect();
    let k_count = classes.len() as f64; // K
    if classes.is_empty() {
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
    // The target is left out of the sum so that its log-probability keeps its digits when p_y is near 1.
    let others: f64 = (0..x.len()).filter(|&k| k != y).map(|k| d(k).exp()).sum();
    let e_y = d(y).exp();
    let sum = others + e_y;
    let lse = z(largest) + sum.ln();
    let p = |k: usize| d(k).exp() / sum;
    let nll = if e_y == 1.0 {
        others.ln_1p()
    } else {
        sum.ln() - d(y)
    };
    // What has no weight counts nothing, even if it is infinite.
    let part = |weight: f64, value: f64| if weight == 0.0 { 0.0 } else { weight * value };
    let smooth = sum.ln() - classes.iter().map(|&k| d(k)).sum::<f64>() / k_count;
    let loss = if w == 0.0 {
        0.0
    } else if masked(y) {
        f64::INFINITY
    } else {
        w * (part(1.0 - eps, nll) + part(eps, smooth) + part(lambda, lse * lse))
    };

    let mut grad_norm_sq = 0.0;
    for &k in &classes {
        // p_k − 1[k=y] without cancellation, then the smoothed target's other parts.
        let p_minus_hit = if k == y { -others / sum } else { p(k) };
        let p_minus_q = p_minus_hit + if k == y { eps } else { 0.0 } - eps / k_count;
        grad_norm_sq += p_minus_q * p_minus_q;
        let dz = w * (p_minus_q + 2.0 * part(lambda, lse) * p(k));
        grad[k] = dz * scale * softcap.map_or(1.0, |c| (scale * x[k] / c).cosh().powi(-2));
    }
    RowResult {
        loss,
        nll,
        lse,
        entropy: classes.iter().map(|&k| part(p(k), sum.ln() - d(k))).sum(),
        max_prob: p(predicted),
        grad_norm_sq,
        predicted: predicted as u32,
    }
}
