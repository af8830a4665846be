//! From samples to rows: the padded and the packed layout hold the same rows, those of a direct enumeration, the loss
//! over both is the same, and bad arguments are named.

use crate::common::{assert_close, bits, cases, normal, rng, scalar, uniform};
use candle_core::{DType, Device, Tensor};
use candle_cross_entropy::{
    CrossEntropy, Reduction,
    ual::{Layout, SmoothingMap},
};
use rand::{Rng, rngs::StdRng};

const CPU: &Device = &Device::Cpu;
const VOCAB: usize = 13;

/// A sample: its tokens, how many are prompt, its uncertainty and that of every token.
#[derive(Clone, Debug)]
struct Sample {
    tokens: Vec<u32>,
    prompt: usize,
    uncertainty: f32,
    of_tokens: Vec<f32>,
}

fn sample(rng: &mut StdRng) -> Sample {
    let length = rng.random_range(0..9);
    Sample {
        tokens: (0..length)
            .map(|_| rng.random_range(0..VOCAB as u32))
            .collect(),
        prompt: rng.random_range(0..=length),
        uncertainty: uniform(rng, 0.0..1.0),
        of_tokens: (0..length).map(|_| uniform(rng, 0.0..1.0)).collect(),
    }
}

fn samples(rng: &mut StdRng) -> Vec<Sample> {
    (0..rng.random_range(1..8)).map(|_| sample(rng)).collect()
}

/// A batch in both layouts.
struct Batch {
    samples: Vec<Sample>,
    map: SmoothingMap,
    padded: Layout,
    packed: Layout,
}

impl Batch {
    fn new(samples: Vec<Sample>) -> Self {
        let lengths: Vec<usize> = samples.iter().map(|s| s.tokens.len()).collect();
        Self {
            samples,
            map: SmoothingMap::fit(&[0.25, 0.5, 1.0], 0.2, 0.4).unwrap(),
            padded: Layout::padded(&lengths).unwrap(),
            packed: Layout::packed(&lengths).unwrap(),
        }
    }

    fn column<T: Clone>(&self, field: impl Fn(&Sample) -> T) -> Vec<T> {
        self.samples.iter().map(field).collect()
    }

    fn targets(&self, layout: &Layout) -> Tensor {
        let (tokens, prompts) = (self.column(|s| s.tokens.clone()), self.column(|s| s.prompt));
        layout.targets(&tokens, &prompts, -100, CPU).unwrap()
    }

    /// Of targets' shape: one value a sample, or one a token.
    fn smoothing(&self, layout: &Layout, of_tokens: bool) -> Tensor {
        let smoothing = if of_tokens {
            let uncertainties = self.column(|s| s.of_tokens.clone());
            layout.token_smoothing(&self.map, &uncertainties, CPU)
        } else {
            layout.smoothing(&self.map, &self.column(|s| s.uncertainty), CPU)
        };
        smoothing.unwrap().broadcast_as(layout.shape()).unwrap()
    }

    /// The rows (target, bits of smoothing) that count, in the layout's order.
    fn rows(&self, layout: &Layout, of_tokens: bool) -> Vec<(i64, u64)> {
        let targets = self.targets(layout).flatten_all().unwrap();
        let smoothing = bits(&self.smoothing(layout, of_tokens));
        let rows = targets.to_vec1::<i64>().unwrap().into_iter().zip(smoothing);
        rows.filter(|(target, _)| *target != -100).collect()
    }

    /// The same from the samples: a row of every response token but a sequence's first token.
    fn enumerated(&self, of_tokens: bool) -> Vec<(i64, u64)> {
        let mut rows = Vec::new();
        for sample in &self.samples {
            for t in sample.prompt.max(1)..sample.tokens.len() {
                let of_sample = [sample.uncertainty, sample.of_tokens[t]][usize::from(of_tokens)];
                let smoothing = self.map.smoothing(of_sample).unwrap();
                rows.push((i64::from(sample.tokens[t]), smoothing.to_bits().into()));
            }
        }
        rows
    }

    /// Random logits of every token, in both layouts; padding gets other values.
    fn logits(&self, seed: u64) -> (Tensor, Tensor) {
        let rng = &mut rng(seed);
        let width = self.padded.shape().dims()[1];
        let mut row = || -> Vec<f32> {
            let row = normal(rng, VOCAB, 2.0);
            row.into_iter().map(|x| x as f32).collect()
        };
        let (mut padded, mut packed) = (Vec::new(), Vec::new());
        for length in self.packed.lengths() {
            for t in 0..width {
                let row = row();
                if t < length {
                    packed.extend_from_slice(&row);
                }
                padded.extend(row);
            }
        }
        let count = packed.len() / VOCAB;
        (
            Tensor::from_vec(padded, (self.samples.len(), width, VOCAB), CPU).unwrap(),
            Tensor::from_vec(packed, (count, VOCAB), CPU).unwrap(),
        )
    }
}

#[test]
fn both_layouts_hold_the_rows_of_the_samples() {
    cases(|rng| {
        let (samples, of_tokens) = (samples(rng), rng.random());
        let batch = Batch::new(samples);
        // Both keep the samples' order, so their lists are equal, not only their multisets.
        assert_eq!(
            batch.rows(&batch.padded, of_tokens),
            batch.enumerated(of_tokens)
        );
        assert_eq!(
            batch.rows(&batch.packed, of_tokens),
            batch.enumerated(of_tokens)
        );
    });
}

#[test]
fn a_row_with_a_target_is_followed_by_it_in_its_own_sequence() {
    cases(|rng| {
        let batch = Batch::new(samples(rng));
        let tokens = batch
            .packed
            .tokens(&batch.column(|s| s.tokens.clone()), 0, CPU)
            .unwrap();
        let tokens = tokens.to_vec1::<u32>().unwrap();
        let targets = batch.targets(&batch.packed).to_vec1::<i64>().unwrap();
        let ends = &batch.packed.cu_seqlens()[1..];
        for (row, &target) in targets
            .iter()
            .enumerate()
            .filter(|(_, target)| **target != -100)
        {
            assert!(
                !ends.contains(&(row as u32 + 1)),
                "row {row} ends a sequence and has target {target}"
            );
            assert_eq!(target, i64::from(tokens[row + 1]));
        }
    });
}

#[test]
fn padded_tokens_are_the_packed_ones_and_padding() {
    cases(|rng| {
        let batch = Batch::new(samples(rng));
        let tokens = batch.column(|s| s.tokens.clone());
        let padded = batch.padded.tokens(&tokens, 99, CPU).unwrap();
        assert_eq!(padded.shape(), &batch.padded.shape());
        let padded = padded.flatten_all().unwrap().to_vec1::<u32>().unwrap();
        let packed = batch
            .packed
            .tokens(&tokens, 99, CPU)
            .unwrap()
            .to_vec1::<u32>()
            .unwrap();
        assert_eq!(&packed, &tokens.concat());
        assert_eq!(
            padded
                .into_iter()
                .filter(|&token| token != 99)
                .collect::<Vec<_>>(),
            packed
        );
    });
}

#[test]
fn the_loss_over_packed_rows_is_that_over_padded_rows() {
    cases(|rng| {
        let batch = loop {
            let samples = samples(rng);
            if samples.iter().any(|s| !s.tokens.is_empty()) {
                break Batch::new(samples);
            }
        };
        let (of_tokens, seed) = (rng.random(), rng.random());
        let (padded, packed) = batch.logits(seed);
        let loss = |layout: &Layout, logits: &Tensor, reduction| {
            let options = CrossEntropy::new()
                .smoothing(batch.smoothing(layout, of_tokens))
                .reduction(reduction);
            options.forward(logits, batch.targets(layout)).unwrap()
        };
        for reduction in [Reduction::Mean, Reduction::Sum] {
            let (a, b) = (
                loss(&batch.padded, &padded, reduction),
                loss(&batch.packed, &packed, reduction),
            );
            assert_close(scalar(&a), scalar(&b), 1e-5); // the sums are taken in other orders
        }
        // Rows without a target are 0 in both; the others have the same bits in the same order.
        let rows = |loss: Tensor| {
            bits(&loss)
                .into_iter()
                .filter(|&bits| bits != 0)
                .collect::<Vec<_>>()
        };
        assert_eq!(
            rows(loss(&batch.padded, &padded, Reduction::None)),
            rows(loss(&batch.packed, &packed, Reduction::None))
        );
    });
}

#[test]
fn offsets_say_what_lengths_say() {
    cases(|rng| {
        let count = rng.random_range(0..20);
        let lengths: Vec<usize> = (0..count).map(|_| rng.random_range(0..100)).collect();
        let packed = Layout::packed(&lengths).unwrap();
        assert_eq!(packed.lengths().collect::<Vec<_>>(), lengths);
        assert_eq!(
            &Layout::from_cu_seqlens(packed.cu_seqlens()).unwrap(),
            &packed
        );
    });
}

#[test]
fn a_padded_column_of_samples_broadcasts_over_tokens() {
    let layout = Layout::padded(&[3, 5]).unwrap();
    let column = layout.per_sample(&[0.1, 0.2], CPU).unwrap();
    assert_eq!((column.dims(), column.dtype()), (&[2, 1][..], DType::F32));
    assert_eq!(layout.shape().dims(), [2, 5]);
    assert_eq!(Layout::packed(&[3, 5]).unwrap().shape().dims(), [8]);
}

#[test]
fn another_ignore_index_takes_its_place() {
    let layout = Layout::packed(&[3]).unwrap();
    let targets = layout.targets(&[[1, 2, 3]], &[2], 0, CPU).unwrap();
    assert_eq!(targets.to_vec1::<i64>().unwrap(), [0, 3, 0]);
}

fn refused<T>(result: candle_core::Result<T>, wanted: &str) {
    let text = result.err().expect("must be refused").to_string();
    assert!(text.contains(wanted), "{text}");
}

#[test]
fn errors_name_the_argument_and_the_sample() {
    let map = SmoothingMap::fit(&[1.0], 0.1, 0.5).unwrap();
    for layout in [Layout::padded(&[3, 2]), Layout::packed(&[3, 2])] {
        let layout = layout.unwrap();
        let tokens = [vec![1, 2, 3], vec![4, 5]];
        let targets =
            |tokens: &[Vec<u32>], prompts: &[usize]| layout.targets(tokens, prompts, -100, CPU);
        refused(
            targets(&tokens[..1], &[1, 1]),
            "tokens has 1 samples; it must have 2",
        );
        refused(
            targets(&[vec![1, 2, 3], vec![4]], &[1, 1]),
            "tokens[1] has 1 values; it must have 2",
        );
        refused(targets(&tokens, &[1]), "prompts has 1 samples");
        refused(
            targets(&tokens, &[1, 3]),
            "prompts[1] is 3; it must be at most 2",
        );
        refused(
            layout.per_sample(&[0.1], CPU),
            "values has 1 samples; it must have 2",
        );
        refused(
            layout.per_token(&[vec![0.1; 3], vec![0.1; 3]], CPU),
            "values[1] has 3 values; it must have 2",
        );
        refused(
            layout.smoothing(&map, &[0.1, f32::NAN], CPU),
            "uncertainties[1] is NaN",
        );
        refused(
            layout.token_smoothing(&map, &[vec![0.1; 3], vec![0.1, f32::INFINITY]], CPU),
            "uncertainties[1][1] is inf; it must be finite",
        );
    }
    refused(Layout::from_cu_seqlens(&[]), "cu_seqlens is empty");
    refused(Layout::from_cu_seqlens(&[1, 2]), "cu_seqlens[0] is 1");
    refused(
        Layout::from_cu_seqlens(&[0, 4, 3]),
        "cu_seqlens[2] is 3; it must be at least the one before, 4",
    );
    refused(
        Layout::packed(&[1, u32::MAX as usize]),
        "lengths[1] is 4294967295",
    );
}
