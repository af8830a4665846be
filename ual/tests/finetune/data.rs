//! Batches, the synthetic truth and estimated uncertainties.

use candle_core::Device;
use candle_ual::{
    data::{
        batches::{Batch, Batches, IGNORED},
        ngram::{NGram, Ranks},
        packing::Packing,
        samples::Sample,
        synthetic,
    },
    training::smoothing::Prior,
};

fn sample(tokens: &[u32], prompt: usize, uncertainty: f32) -> Sample {
    Sample {
        tokens: tokens.to_vec(),
        prompt,
        between: Vec::new(),
        uncertainty,
        group: 0,
        truth: Vec::new(),
    }
}

#[test]
fn only_responses_are_targets() {
    let (long, short) = (
        sample(&[7, 8, 9, 10], 2, 0.25),
        sample(&[7, 8, 11], 1, 0.75),
    );
    let batch = Batch::new(&[&long, &short], &Device::Cpu).unwrap();
    assert_eq!(
        batch.targets.to_vec2::<i64>().unwrap(),
        [[IGNORED, 9, 10, IGNORED], [8, 11, IGNORED, IGNORED]]
    );
    assert_eq!(
        (batch.rows, &batch.uncertainties[..]),
        (4, &[0.25, 0.75][..])
    );
    // Both begin with 7 and 8, which are one row each.
    let tokens = batch.packing.tokens(&Device::Cpu).unwrap();
    assert_eq!(tokens.to_vec1::<u32>().unwrap(), [7, 8, 9, 10, 11]);
    let rows = |tensor: &candle_core::Tensor| tensor.to_vec1::<u32>().unwrap();
    assert_eq!(rows(&batch.padded), [0, 1, 2, 3, 0, 1, 4, 0]);
    assert_eq!(rows(&batch.chosen), [1, 2, 0, 1]);
    let compact = batch.compact().unwrap();
    assert_eq!(compact.targets.to_vec1::<i64>().unwrap(), [9, 10, 8, 11]);
    assert_eq!(compact.layout.cu_seqlens(), [0, 2, 4]);
}

#[test]
fn what_all_sequences_begin_with_is_there_once() {
    /// Sequences, and the rows of each's tokens.
    type Case<'a> = (&'a [&'a [u32]], &'a [&'a [usize]]);
    let cases: [Case; 6] = [
        (&[], &[]),
        (&[&[5, 6]], &[&[0, 1]]),
        (&[&[5, 6], &[6, 5, 5]], &[&[0, 1], &[2, 3, 4]]),
        (&[&[5, 6], &[5, 6, 7]], &[&[0, 1], &[0, 1, 2]]),
        (&[&[5, 6, 7], &[5, 6]], &[&[0, 1, 2], &[0, 1]]),
        (
            &[&[5, 6, 7], &[5, 6, 7], &[5, 9]],
            &[&[0, 1, 2], &[0, 3, 4], &[0, 5]],
        ),
    ];
    for (sequences, rows) in cases {
        let packing = Packing::new(sequences.to_vec());
        let spans = packing.spans();
        assert_eq!(spans.sequences(), sequences.len());
        let tokens = packing.tokens(&Device::Cpu).unwrap();
        let tokens = tokens.to_vec1::<u32>().unwrap();
        assert_eq!(tokens.len(), spans.rows());
        for (i, (sequence, rows)) in sequences.iter().zip(rows).enumerate() {
            assert_eq!(spans.length(i), sequence.len());
            for (t, token) in sequence.iter().enumerate() {
                assert_eq!(
                    (spans.row(i, t), tokens[spans.row(i, t)]),
                    (rows[t], *token)
                );
            }
        }
    }
}

#[test]
fn what_stands_between_responses_is_no_target() {
    let conversation = Sample {
        between: std::iter::once(3..5).collect(),
        ..sample(&[7, 8, 9, 10, 11, 12, 13], 2, 0.25)
    };
    let batch = Batch::new(&[&conversation], &Device::Cpu).unwrap();
    assert_eq!(
        batch.targets.to_vec2::<i64>().unwrap(),
        [[IGNORED, 9, IGNORED, IGNORED, 12, 13, IGNORED]]
    );
    assert_eq!((batch.rows, conversation.of_rows().count()), (3, 3));
    // Nor does it count as a prediction.
    let mut model = NGram::new(20);
    model.add(&conversation);
    let apart = |from: usize, to: usize| {
        let tokens = &conversation.tokens[..to];
        model.cross_entropy(&sample(tokens, from, 0.0)) * (to - from) as f64
    };
    let expected = (apart(2, 3) + apart(5, 7)) / 3.0;
    assert!((model.cross_entropy(&conversation) - expected).abs() < 1e-12);
}

#[test]
fn frequencies_are_those_of_responses() {
    let mut conversation = sample(&[0, 1, 5, 3, 5, 1], 2, 0.5);
    conversation.between = std::iter::once(3..4).collect();
    let samples = [sample(&[1, 5, 5, 2], 1, 0.5), conversation];
    let shares = |prior: Prior| prior.shares(&samples, 7, &Device::Cpu).unwrap();
    let of = |prior| shares(prior).unwrap().to_vec1::<f32>().unwrap();
    // 5, 5, 2 and 5, 5, 1.
    let wanted = [0.0, 1.0 / 6.0, 1.0 / 6.0, 0.0, 0.0, 4.0 / 6.0, 0.0];
    assert_eq!(of(Prior::Unigram), wanted);
    let third = 1.0 / 3.0;
    let wanted = [0.0, third, third, 0.0, 0.0, third, 0.0];
    assert_eq!(of(Prior::Responses), wanted);
    assert!(shares(Prior::Even).is_none());
}

#[test]
fn an_epoch_has_every_sample_once_in_an_order_of_the_seed() {
    let samples: Vec<Sample> = (0..25)
        .map(|i| sample(&vec![i; 2 + i as usize % 3], 1, 0.0))
        .collect();
    let epoch = |batches: &mut Batches| -> Vec<u32> {
        (0..4)
            .flat_map(|_| batches.next_batch())
            .map(|sample| sample.tokens[0])
            .collect()
    };
    let (mut a, mut b, mut other) = (
        Batches::new(&samples, 7, 3),
        Batches::new(&samples, 7, 3),
        Batches::new(&samples, 7, 4),
    );
    let (first, second) = (epoch(&mut a), epoch(&mut a));
    assert_eq!(first, epoch(&mut b));
    assert_ne!(first, epoch(&mut other));
    assert_ne!(first, second);
    for mut order in [first, second] {
        order.sort_unstable();
        assert_eq!(order, (0..25).collect::<Vec<_>>());
    }
}

#[test]
fn synthetic_uncertainty_is_the_truths_entropy() {
    let data = synthetic::generate(5);
    assert!(data.longest() > 0 && !data.pretrain.is_empty());
    for sample in data
        .pretrain
        .iter()
        .chain(&data.train)
        .chain(&data.held_out)
    {
        let response = &sample.tokens[sample.prompt..];
        assert_eq!(response.len(), sample.truth.len());
        let mut entropy = 0.0;
        for (token, truth) in response.iter().zip(&sample.truth) {
            assert!(
                truth.iter().any(|(word, _)| word == token),
                "an answer that has no probability"
            );
            assert!((truth.iter().map(|(_, p)| p).sum::<f32>() - 1.0).abs() < 1e-5);
            entropy -=
                truth.iter().map(|(_, p)| p * p.ln()).sum::<f32>() / sample.truth.len() as f32;
        }
        assert!((sample.uncertainty - entropy / 32f32.ln()).abs() < 1e-5);
        assert!((0.0..=1.0).contains(&sample.uncertainty));
    }
    assert!(
        data.train.iter().any(|s| s.uncertainty == 0.0)
            && data.train.iter().any(|s| s.uncertainty > 0.8)
    );
    // Held-out prompts are not trained on.
    let prompt = |s: &Sample| s.tokens[..s.prompt].to_vec();
    let seen: std::collections::HashSet<_> = data
        .pretrain
        .iter()
        .chain(&data.train)
        .map(prompt)
        .collect();
    assert!(data.held_out.iter().all(|s| !seen.contains(&prompt(s))));
}

#[test]
fn the_reference_model_is_a_distribution() {
    let mut model = NGram::new(6);
    model.add(&sample(&[0, 3, 4, 3, 4, 5], 1, 0.0));
    for context in [&[0][..], &[0, 3], &[3, 4], &[5, 5]] {
        let total: f64 = (0..6)
            .map(|token| {
                let tokens = [context, &[token]].concat();
                (-model.cross_entropy(&sample(&tokens, context.len(), 0.0))).exp()
            })
            .sum();
        assert!((total - 1.0).abs() < 1e-12, "after {context:?}: {total}");
    }
}

#[test]
fn a_sample_is_not_judged_by_itself() {
    let regular = sample(&[0, 3, 4, 5, 3, 4, 5], 1, 0.0);
    let odd = sample(&[0, 9, 7, 8, 6, 3, 9], 1, 0.0);
    let mut without = NGram::new(10);
    (0..4).for_each(|_| without.add(&regular));
    let mut model = NGram::new(10);
    (0..4).for_each(|_| model.add(&regular));
    model.add(&odd);
    assert!(model.cross_entropy(&odd) < without.cross_entropy(&odd));
    assert_eq!(
        model.cross_entropy_without(&odd),
        without.cross_entropy(&odd)
    );
    assert!(model.cross_entropy_without(&regular) < model.cross_entropy_without(&odd));
}

#[test]
fn ranks_are_shares() {
    let scores = [3.0, 1.0, 2.0, 2.0];
    let ranks = Ranks::new(scores.to_vec());
    assert_eq!(
        scores.map(|score| ranks.of(score)),
        [0.875, 0.125, 0.5, 0.5]
    );
    assert_eq!((ranks.of(0.0), ranks.of(9.0)), (0.0, 1.0));
}
