//! Runs the model over samples and collects what the metrics need.

use candle_core::{D, Device, Result, Tensor};
use candle_cross_entropy::CrossEntropy;

use crate::{
    data::{
        batches::{Batch, IGNORED},
        samples::Sample,
    },
    model::decoder::Decoder,
    report::metrics::Row,
};

/// A row of every response token. All but the divergence comes with the loss, from one pass.
pub fn evaluate(
    model: &Decoder,
    samples: &[&Sample],
    batch: usize,
    device: &Device,
) -> Result<Vec<Row>> {
    let mut by_length = samples.to_vec();
    by_length.sort_by_key(|sample| sample.tokens.len()); // less padding
    let mut rows = Vec::new();
    for samples in by_length.chunks(batch) {
        let Batch {
            inputs, targets, ..
        } = Batch::new(samples, device)?;
        let loss = CrossEntropy::new();
        // The divergence from a known truth needs all logits.
        let (stats, kl) = if samples.iter().any(|sample| sample.truth.is_empty()) {
            let (hidden, weight) = (model.hidden(&inputs)?, model.output_projection());
            let (hidden, weight) = (hidden.detach(), weight.detach());
            let (_, stats) = loss.forward_linear_with_stats(&hidden, &weight, None, &targets)?;
            (stats, None)
        } else {
            let logits = model.forward(&inputs)?.detach();
            let (_, stats) = loss.forward_with_stats(&logits, &targets)?;
            let kl = divergence(&logits, &stats.lse, samples)?;
            (stats, Some(kl))
        };
        let targets = targets.to_vec2::<i64>()?;
        let predicted = stats.predicted.to_vec2::<u32>()?;
        let columns = [
            &stats.nll,
            &stats.entropy,
            &stats.max_prob,
            &stats.grad_norm_sq,
        ];
        let [nll, entropy, confidence, brier] = columns.map(|column| column.to_vec2::<f32>());
        let (nll, entropy, confidence, brier) = (nll?, entropy?, confidence?, brier?);
        for (i, sample) in samples.iter().enumerate() {
            for (t, &target) in targets[i]
                .iter()
                .enumerate()
                .filter(|(_, target)| **target != IGNORED)
            {
                rows.push(Row {
                    uncertainty: sample.uncertainty,
                    group: sample.group,
                    nll: f64::from(nll[i][t]),
                    entropy: f64::from(entropy[i][t]),
                    confidence: f64::from(confidence[i][t]),
                    correct: f64::from(u8::from(i64::from(predicted[i][t]) == target)),
                    brier: f64::from(brier[i][t]), // ‖p − q‖² where q, without smoothing, is the target alone
                    kl: kl.as_ref().map(|kl| f64::from(kl[i][t])),
                });
            }
        }
    }
    Ok(rows)
}

/// The rows of each sample, in the samples' order.
pub fn evaluate_each(
    model: &Decoder,
    samples: &[&Sample],
    batch: usize,
    device: &Device,
) -> Result<Vec<Vec<Row>>> {
    let mut order: Vec<usize> = (0..samples.len()).collect();
    order.sort_by_key(|&i| samples[i].tokens.len()); // stable, as that of `evaluate`, which keeps it
    let sorted: Vec<&Sample> = order.iter().map(|&i| samples[i]).collect();
    let mut rows = evaluate(model, &sorted, batch, device)?.into_iter();
    let mut each = vec![Vec::new(); samples.len()];
    for i in order {
        each[i] = rows.by_ref().take(samples[i].rows()).collect();
    }
    Ok(each)
}

/// Σ q log q + lse − Σ q z for the true distributions q, (B, T).
fn divergence(logits: &Tensor, lse: &Tensor, samples: &[&Sample]) -> Result<Vec<Vec<f32>>> {
    let (batch, length, vocab) = logits.dims3()?;
    let mut truth = vec![0f32; batch * length * vocab];
    let mut negative_entropy = vec![0f32; batch * length];
    for (i, sample) in samples.iter().enumerate() {
        for (offset, distribution) in sample.truth.iter().enumerate() {
            let row = i * length + sample.prompt - 1 + offset;
            for &(token, p) in distribution {
                truth[row * vocab + token as usize] = p;
                negative_entropy[row] += p * p.ln();
            }
        }
    }
    let truth = Tensor::from_vec(truth, logits.shape(), logits.device())?;
    let negative_entropy = Tensor::from_vec(negative_entropy, (batch, length), logits.device())?;
    let expected = (truth * logits)?.sum(D::Minus1)?;
    ((negative_entropy + lse)? - expected)?.to_vec2()
}
