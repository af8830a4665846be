//! `--train-last`: what is kept of the frozen layers gives what computing it each time gives, only the last layers change, and
//! evaluation of some rows is that of all.

use std::{collections::HashMap, sync::Arc};

use candle_core::{Device, Tensor};
use candle_cross_entropy::ual::SmoothingMap;
use candle_ual::{
    data::{packing::Packing, samples::Sample},
    model::{
        decoder::{Config, Decoder, Last, LayerWeights, Trained, Weights},
        states::States,
    },
    report::curve::Curve,
    training::{
        checkpoint::Checkpoints,
        evaluate::evaluate,
        method::Method,
        plan::{Loss, Plan},
        ranks::Ranks,
        train::{Step, Training},
        watch::Watch,
    },
};
use rand::{Rng, SeedableRng, rngs::StdRng};

use crate::ranks::on_ranks;

const CPU: &Device = &Device::Cpu;
const VOCAB: usize = 31;
const LAYERS: usize = 3;
const LONGEST: usize = 14;
const LORA: Trained = Trained::Lora {
    rank: 2,
    scale: 2.0,
};

fn config() -> Config {
    Config::small(VOCAB, (16, LAYERS, 2), LONGEST)
}

fn weights() -> Weights {
    let made = Decoder::new(config(), 1, CPU).unwrap().merged().unwrap();
    let projection = made.projection.as_ref().unwrap().contiguous().unwrap();
    Weights {
        projection: Some(projection),
        ..made
    }
}

fn decoder(trained: Trained, layers: usize, states: Option<Arc<States>>) -> Decoder {
    let last = Last { layers, states };
    Decoder::training_last(config(), weights(), (trained, last), 1, CPU).unwrap()
}

/// Long prompts that begin alike, short responses, of other lengths each; the truth of every response token is known.
fn samples(count: usize, seed: u64) -> Vec<Sample> {
    let mut rng = StdRng::seed_from_u64(seed);
    let token = |rng: &mut StdRng| rng.random_range(0..VOCAB as u32);
    let samples = (0..count).map(|_| {
        let (prompt, response) = (rng.random_range(3..=10), rng.random_range(1..=4));
        let mut tokens: Vec<u32> = (0..prompt + response).map(|_| token(&mut rng)).collect();
        tokens[..2].copy_from_slice(&[5, 3]);
        let truth = tokens[prompt..].iter().map(|&one| {
            let p = rng.random_range(0.2f32..0.8);
            vec![(one, p), ((one + 7) % VOCAB as u32, 1.0 - p)]
        });
        let truth = truth.collect();
        Sample {
            tokens,
            prompt,
            between: Vec::new(),
            uncertainty: rng.random_range(0.0..1.0),
            group: 0,
            truth,
        }
    });
    samples.collect()
}

fn ual(samples: &[Sample]) -> Method {
    let of_rows: Vec<f32> = samples.iter().flat_map(Sample::of_rows).collect();
    Method::Ual(SmoothingMap::fit(&of_rows, 0.1, 0.5).unwrap())
}

fn trained(model: &Decoder, loss: Loss, ranks: &Ranks) -> Curve {
    let (samples, held_out) = (samples(20, 1), samples(8, 2));
    let plan = Plan {
        steps: 12, // more than an epoch
        batch: 3,
        accumulate: 1,
        loss,
        learning_rate: 0.01,
        weight_decay: 0.01,
        clip: 1.0,
        seed: 1,
        points: 4,
        curve_samples: 8,
    };
    let none = Checkpoints {
        folder: "nowhere".into(),
        every: 0,
        resume: false,
        fingerprint: String::new(),
    };
    let watch = Watch {
        held_out: &held_out,
        ..Watch::default()
    };
    let training = Training {
        name: "test",
        model,
        method: &ual(&samples),
        samples: &samples,
        watch,
        plan: &plan,
        checkpoints: &none,
        ranks,
    };
    training.run().unwrap()
}

fn values(t: &Tensor) -> Vec<f32> {
    t.flatten_all().unwrap().to_vec1().unwrap()
}

#[track_caller]
fn assert_near(actual: &[f32], expected: &[f32], tolerance: f32) {
    assert_eq!(actual.len(), expected.len());
    let largest = expected.iter().fold(0f32, |most, e| most.max(e.abs()));
    for (a, e) in actual.iter().zip(expected) {
        assert!(
            (a - e).abs() <= tolerance * largest,
            "{a}, not {e}, of {largest}"
        );
    }
}

fn numbers(curve: &Curve) -> Vec<f32> {
    let points = curve.points.iter();
    points
        .flat_map(|point| [point.train_nll as f32, point.held_out_nll as f32])
        .collect()
}

#[test]
fn what_is_kept_changes_no_training() {
    for kind in [Trained::All, LORA] {
        for loss in [Loss::Linear, Loss::Logits] {
            for layers in 1..=LAYERS {
                let states = Arc::new(States::default());
                let [kept, computed] = [Some(states.clone()), None].map(|states| {
                    let model = decoder(kind, layers, states);
                    let curve = trained(&model, loss, &Ranks::alone());
                    (numbers(&curve), model)
                });
                assert_eq!(kept.0.len(), 8);
                assert_near(&kept.0, &computed.0, 1e-3);
                let all = [kept.1, computed.1].map(|model| model.weights().unwrap());
                for (kept, computed) in all[0].iter().zip(&all[1]) {
                    // A gradient near 0 may have another sign, and AdamW's first steps follow signs.
                    assert_near(&values(kept), &values(computed), 2e-2);
                }
                let all = [samples(20, 1), samples(8, 2)].concat();
                let tokens: usize = all.iter().map(|sample| sample.tokens.len()).sum();
                assert_eq!(states.bytes(), tokens * config().dim * 4);
            }
        }
    }
}

/// The gradients of the last layers and of the final norm are those where everything is trained.
#[test]
fn gradients_are_those_where_all_is_trained() {
    let samples = samples(9, 3);
    let method = ual(&samples);
    let samples: Vec<&Sample> = samples.iter().collect();
    let batches: Vec<Vec<&Sample>> = samples.chunks(5).map(<[_]>::to_vec).collect();
    let step = |model: &Decoder, loss, ranks: &Ranks| {
        Step::new(model, &method, loss, &batches, ranks).unwrap()
    };
    let gradients = |model: &Decoder, step: &Step| -> Vec<Vec<f32>> {
        let of_vars = model.vars().iter().map(|var| step.gradients.get(var));
        of_vars.map(|gradient| values(gradient.unwrap())).collect()
    };
    let whole = Decoder::from_weights(config(), weights(), Trained::All, 1, CPU).unwrap();
    let of_whole = step(&whole, Loss::Logits, &Ranks::alone());
    let expected = gradients(&whole, &of_whole);
    let of_layer = 6;
    assert_eq!(expected.len(), 1 + of_layer * LAYERS + 2); // embedding, layers, norm, projection
    for loss in [Loss::Linear, Loss::Logits] {
        for layers in 1..=LAYERS {
            let check = |ranks: &Ranks| {
                let model = decoder(Trained::All, layers, Some(Arc::default()));
                let found = step(&model, loss, ranks);
                assert_near(&[found.loss], &[of_whole.loss], 1e-5);
                assert_near(&[found.nll as f32], &[of_whole.nll as f32], 1e-5);
                let found = gradients(&model, &found);
                assert_eq!(found.len(), of_layer * layers + 1);
                let first = 1 + of_layer * (LAYERS - layers);
                for (found, expected) in found.iter().zip(&expected[first..]) {
                    assert_near(found, expected, 1e-4);
                }
            };
            check(&Ranks::alone());
            for by_classes in [false, true] {
                on_ranks(3, |comm| check(&Ranks::of(comm).by_classes(by_classes)));
            }
        }
    }
}

/// Some begin with the same response token too, and one is there twice.
#[test]
fn a_batch_has_the_gradients_of_its_samples() {
    let mut samples = samples(4, 6);
    for sample in &mut samples {
        sample.prompt = 4;
        sample.tokens.splice(..2, [5, 3, 9, 9, 7, 2]);
        sample.tokens.truncate(LONGEST);
    }
    samples.push(samples[1].clone());
    let method = ual(&samples);
    let references: Vec<&Sample> = samples.iter().collect();
    let model = Decoder::from_weights(config(), weights(), Trained::All, 1, CPU).unwrap();
    let step = |size: usize, loss| {
        let batches: Vec<Vec<&Sample>> = references.chunks(size).map(<[_]>::to_vec).collect();
        let alone = Ranks::alone();
        let step = Step::new(&model, &method, loss, &batches, &alone).unwrap();
        let gradients = model.vars().iter().map(|var| step.gradients.get(var));
        let gradients: Vec<Vec<f32>> = gradients.map(|g| values(g.unwrap())).collect();
        (step.loss, gradients)
    };
    let (loss, expected) = step(1, Loss::Logits);
    for (size, kind) in [(5, Loss::Linear), (5, Loss::Logits), (2, Loss::Linear)] {
        let (found_loss, found) = step(size, kind);
        assert_near(&[found_loss], &[loss], 1e-5);
        for (found, expected) in found.iter().zip(&expected) {
            assert_near(found, expected, 1e-4);
        }
    }
}

#[test]
fn processes_train_the_last_layers_as_one_does() {
    let train = |ranks: &Ranks| {
        let model = decoder(LORA, 2, Some(Arc::default()));
        let curve = trained(&model, Loss::Linear, ranks);
        let weights = model.weights().unwrap();
        let weights: Vec<Vec<f32>> = weights.iter().map(values).collect();
        (numbers(&curve), weights)
    };
    let (curve, _) = train(&Ranks::alone());
    for by_classes in [false, true] {
        let of_ranks = on_ranks(2, |comm| train(&Ranks::of(comm).by_classes(by_classes)));
        assert!(of_ranks[0].1 == of_ranks[1].1, "weights differ");
        assert_near(&of_ranks[0].0, &curve, 1e-3);
    }
}

/// By name, as bits.
fn bits(weights: &Weights) -> HashMap<String, Vec<u32>> {
    let mut all = HashMap::new();
    let mut add = |name: String, tensor: &Tensor| {
        let bits = values(tensor).iter().map(|value| value.to_bits()).collect();
        all.insert(name, bits);
    };
    add("embedding".into(), &weights.embedding);
    add("norm".into(), &weights.norm);
    add("projection".into(), weights.projection.as_ref().unwrap());
    for (i, layer) in weights.layers.iter().enumerate() {
        let LayerWeights {
            attention_norm,
            qkv,
            output,
            mlp_norm,
            gate_up,
            down,
            ..
        } = layer;
        add(format!("{i} attention norm"), attention_norm);
        add(format!("{i} MLP norm"), mlp_norm);
        for (name, map) in [
            ("qkv", qkv),
            ("output", output),
            ("gate, up", gate_up),
            ("down", down),
        ] {
            add(format!("{i} {name}"), &map.matrix.full().unwrap());
        }
    }
    all
}

#[test]
fn only_the_last_layers_change() {
    for kind in [Trained::All, LORA] {
        for layers in 1..=LAYERS {
            let model = decoder(kind, layers, Some(Arc::default()));
            let before = bits(&model.merged().unwrap());
            assert!(before == bits(&weights()));
            trained(&model, Loss::Linear, &Ranks::alone());
            let after = bits(&model.merged().unwrap());
            for (name, before) in &before {
                let layer = name.split(' ').next().and_then(|i| i.parse::<usize>().ok());
                let is_trained = match (layer, kind) {
                    (Some(i), _) if i < LAYERS - layers => false,
                    (Some(_), Trained::All) => true,
                    (Some(_), _) => !name.ends_with("norm"),
                    (None, _) => kind == Trained::All && name == "norm",
                };
                let is_other = *before != after[name];
                assert_eq!(is_other, is_trained, "{name}, {kind:?}, last {layers}");
            }
        }
    }
    let last = |layers| Last {
        layers,
        states: None,
    };
    for layers in [0, LAYERS + 1] {
        let weights = (Trained::All, last(layers));
        assert!(Decoder::training_last(config(), self::weights(), weights, 1, CPU).is_err());
    }
}

/// What is kept of a sequence has the same bits whatever was in the batches that it first came in, as it must for a run that
/// goes on from a checkpoint; and those of another layout are near.
#[test]
fn states_do_not_depend_on_the_batch() {
    let samples = samples(5, 4);
    let sequences: Vec<&[u32]> = samples.iter().map(|s| s.tokens.as_slice()).collect();
    let hidden = |model: &Decoder, sequences: &[&[u32]]| {
        let packing = Packing::new(sequences.to_vec());
        let states = model.hidden(&packing, None).unwrap();
        let states: Vec<Vec<f32>> = states.to_vec2().unwrap();
        let of_sequences = sequences.iter().enumerate().map(|(i, tokens)| {
            let rows = (0..tokens.len()).map(|t| &states[packing.spans().row(i, t)][..]);
            rows.collect::<Vec<_>>().concat()
        });
        of_sequences.collect::<Vec<Vec<f32>>>()
    };
    let kept = || decoder(Trained::All, 2, Some(Arc::default()));
    let (one, other) = (kept(), kept());
    let mut order = sequences.clone();
    order.reverse();
    order.chunks(2).for_each(|part| {
        hidden(&other, part);
    });
    let expected = hidden(&one, &sequences);
    assert!(hidden(&other, &sequences) == expected);
    let computed = decoder(Trained::All, 2, None);
    for sequences in [&sequences[..], &sequences[..1], &sequences[1..3]] {
        let start = usize::from(sequences.len() == 2);
        for model in [&one, &computed] {
            for (found, expected) in hidden(model, sequences).iter().zip(&expected[start..]) {
                assert_near(found, expected, 1e-5);
            }
        }
    }
}

/// Against the logits of one sample at a time, in f64.
#[test]
fn evaluation_is_that_of_all_logits() {
    let mut samples = samples(11, 5);
    samples.sort_by(|a, b| a.tokens.cmp(&b.tokens));
    for with_truth in [true, false] {
        if !with_truth {
            samples[3].truth.clear();
        }
        for model in [
            decoder(Trained::All, 2, Some(Arc::default())),
            Decoder::from_weights(config(), weights(), LORA, 1, CPU).unwrap(),
        ] {
            let references: Vec<&Sample> = samples.iter().collect();
            let rows = evaluate(&model, &references, 4).unwrap();
            let mut rows = rows.into_iter();
            for (number, sample) in samples.iter().enumerate() {
                let hidden = model.hidden(&Packing::new(vec![&sample.tokens]), None);
                let projection = model.output_projection().t().unwrap();
                let logits = hidden.unwrap().matmul(&projection).unwrap();
                let logits: Vec<Vec<f32>> = logits.to_vec2().unwrap();
                for next in sample.prompt..sample.tokens.len() {
                    let row = rows.next().unwrap();
                    let z: Vec<f64> = logits[next - 1].iter().map(|&z| f64::from(z)).collect();
                    let lse = z.iter().map(|z| z.exp()).sum::<f64>().ln();
                    let log_p: Vec<f64> = z.iter().map(|z| z - lse).collect();
                    let target = sample.tokens[next] as usize;
                    let near = |found: f64, expected: f64| {
                        assert!((found - expected).abs() < 1e-5, "{found}, not {expected}");
                    };
                    assert_eq!(row.uncertainty, sample.uncertainty);
                    near(row.nll, -log_p[target]);
                    near(row.entropy, -log_p.iter().map(|l| l.exp() * l).sum::<f64>());
                    let most = log_p.iter().fold(f64::MIN, |most, l| most.max(*l));
                    near(row.confidence, most.exp());
                    assert_eq!(row.correct == 1.0, log_p[target] == most);
                    let brier = log_p.iter().enumerate().map(|(k, l)| {
                        let hit = if k == target { 1.0 } else { 0.0 };
                        (l.exp() - hit).powi(2)
                    });
                    near(row.brier, brier.sum());
                    // Of a batch with a sample whose truth is not known, none has a divergence.
                    assert_eq!(row.kl.is_some(), with_truth || number >= 4);
                    if let Some(kl) = row.kl {
                        let truth = sample.truth[next - sample.prompt].iter();
                        let terms = truth.map(|&(token, p)| {
                            let p = f64::from(p);
                            p * (p.ln() - log_p[token as usize])
                        });
                        near(kl, terms.sum());
                    }
                }
            }
            assert!(rows.next().is_none());
        }
    }
}
