//! Runs the model over samples and collects what the metrics need.

use candle_core::{D, Result, Tensor};
use candle_cross_entropy::CrossEntropy;

use crate::{
    data::{batches::Batch, samples::Sample},
    model::decoder::Decoder,
    report::metrics::Row,
};

/// A row of every response token. All but the divergence comes with the loss, from one pass.
pub fn evaluate(model: &Decoder, samples: &[&Sample], batch: usize) -> Result<Vec<Row>> {
    let mut sorted = samples.to_vec();
    sorted.sort_by(|a, b| a.tokens.cmp(&b.tokens)); // those that begin alike share rows
    let mut rows = Vec::new();
    for samples in sorted.chunks(batch) {
        let batch = Batch::new(samples, model.device())?;
        let hidden = model.hidden(&batch.packing, Some(&batch.chosen))?;
        let (hidden, weight) = (hidden.detach(), model.output_projection().detach());
        let targets = batch.learned;
        let loss = CrossEntropy::new();
        // The divergence from a known truth needs all logits of these rows.
        let (stats, kl) = if samples.iter().any(|sample| sample.truth.is_empty()) {
            let (_, stats) = loss.forward_linear_with_stats(&hidden, &weight, None, &targets)?;
            (stats, None)
        } else {
            let logits = hidden.matmul(&weight.t()?)?;
            let (_, stats) = loss.forward_with_stats(&logits, &targets)?;
            let kl = divergence(&logits, &stats.lse, samples)?;
            (stats, Some(kl))
        };
        let targets = targets.to_vec1::<i64>()?;
        let predicted = stats.predicted.to_vec1::<u32>()?;
        let columns = [
            &stats.nll,
            &stats.entropy,
            &stats.max_prob,
            &stats.grad_norm_sq,
        ];
        let [nll, entropy, confidence, brier] = columns.map(|column| column.to_vec1::<f32>());
        let (nll, entropy, confidence, brier) = (nll?, entropy?, confidence?, brier?);
        let of_rows = samples
            .iter()
            .flat_map(|sample| std::iter::repeat_n(sample, sample.rows()));
        for (i, sample) in of_rows.enumerate() {
            rows.push(Row {
                uncertainty: sample.uncertainty,
                group: sample.group,
                nll: f64::from(nll[i]),
                entropy: f64::from(entropy[i]),
                confidence: f64::from(confidence[i]),
                correct: f64::from(u8::from(i64::from(predicted[i]) == targets[i])),
                brier: f64::from(brier[i]), // ‖p − q‖² where q, without smoothing, is the target alone
                kl: kl.as_ref().map(|kl| f64::from(kl[i])),
            });
        }
    }
    Ok(rows)
}

/// The rows of each sample, in the samples' order.
pub fn evaluate_each(model: &Decoder, samples: &[&Sample], batch: usize) -> Result<Vec<Vec<Row>>> {
    let mut order: Vec<usize> = (0..samples.len()).collect();
    order.sort_by(|&a, &b| samples[a].tokens.cmp(&samples[b].tokens)); // stable, as that of `evaluate`, which keeps it
    let sorted: Vec<&Sample> = order.iter().map(|&i| samples[i]).collect();
    let mut rows = evaluate(model, &sorted, batch)?.into_iter();
    let mut each = vec![Vec::new(); samples.len()];
    for i in order {
        each[i] = rows.by_ref().take(samples[i].rows()).collect();
    }
    Ok(each)
}

/// Σ q log q + lse − Σ q z for the true distributions q of the samples' rows (n).
fn divergence(logits: &Tensor, lse: &Tensor, samples: &[&Sample]) -> Result<Vec<f32>> {
    let (rows, vocab) = logits.dims2()?;
    let mut truth = vec![0f32; rows * vocab];
    let mut negative_entropy = vec![0f32; rows];
    let mut first = 0;
    for sample in samples {
        for (row, distribution) in (first..).zip(&sample.truth) {
            for &(token, p) in distribution {
                truth[row * vocab + token as usize] = p;
                negative_entropy[row] += p * p.ln();
            }
        }
        first += sample.rows();
    }
    let truth = Tensor::from_vec(truth, logits.shape(), logits.device())?;
    let negative_entropy = Tensor::new(negative_entropy, logits.device())?;
    let expected = (truth * logits)?.sum(D::Minus1)?;
    ((negative_entropy + lse)? - expected)?.to_vec1()
}
