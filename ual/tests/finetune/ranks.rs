//! Several processes that train one model, here threads: what one alone with whole batches does, up to rounding.

use std::{path::Path, sync::Arc, thread};

use candle_core::{DType, Device, Result, Tensor, Var};
use candle_cross_entropy::parallel::{Communicator, threads};
use candle_ual::{
    data::{samples::Sample, synthetic},
    model::decoder::{Config, Decoder, Trained, Weights},
    report::curve::Curve,
    training::{
        args::Args,
        method::Method,
        plan::Loss,
        ranks::Ranks,
        setup::{Setup, fit},
        slice::Slice,
        train::Step,
    },
};
use clap::Parser;
use tempfile::TempDir;

#[derive(Parser)]
#[command(args_override_self = true)]
struct Command {
    #[command(flatten)]
    training: Args,
}

fn args(out: &Path, more: &[&str]) -> Args {
    let small = [
        "ual",
        "--dim",
        "16",
        "--layers",
        "1",
        "--heads",
        "2",
        "--pretrain-steps",
        "3",
        "--steps",
        "4",
        "--lr",
        "1e-2",
        "--out",
    ];
    let all = [&small[..], &[out.to_str().unwrap()], more].concat();
    Command::parse_from(all).training
}

/// The curves of pre-training and training, and the weights after them.
fn train(args: &Args, ranks: &Ranks) -> (Curve, Curve, Vec<Vec<f32>>) {
    let setup = Setup::new(args, synthetic::generate(1), None, ranks, &Device::Cpu).unwrap();
    let method = Method::Ual(setup.map.clone());
    let curve = setup.train("UAL", &method, &setup.data.train).unwrap();
    let weights = setup.model.weights().unwrap();
    (
        setup.pretraining.expect("made here"),
        curve,
        weights.iter().map(values).collect(),
    )
}

pub fn on_ranks<R: Send>(size: usize, f: impl Fn(Arc<dyn Communicator>) -> R + Sync) -> Vec<R> {
    thread::scope(|scope| {
        let f = &f;
        let ranks = threads(size).into_iter();
        let ranks: Vec<_> = ranks.map(|comm| scope.spawn(move || f(comm))).collect();
        ranks.into_iter().map(|rank| rank.join().unwrap()).collect()
    })
}

fn assert_close(actual: &[f32], expected: &[f32], tolerance: f32) {
    assert_eq!(actual.len(), expected.len());
    for (a, e) in actual.iter().zip(expected) {
        assert!((a - e).abs() <= tolerance * (1.0 + e.abs()), "{a}, not {e}");
    }
}

#[test]
fn several_train_as_one_does() {
    let folder = TempDir::new().unwrap();
    // Batches that do not come out even, smaller ones than there are processes, and several a step.
    for more in [
        &["--batch", "7"][..],
        &["--batch", "2", "--loss", "logits"],
        &["--batch", "3", "--accumulate", "2"],
    ] {
        let args = args(folder.path(), more);
        let (pretraining, curve, weights) = train(&args, &Ranks::alone());
        for (size, by_classes) in [(2, false), (3, false), (2, true), (3, true)] {
            let of_ranks = on_ranks(size, |comm| {
                train(&args, &Ranks::of(comm).by_classes(by_classes))
            });
            for (_, _, same) in &of_ranks {
                assert!(*same == of_ranks[0].2, "weights differ between processes");
            }
            let first = &of_ranks[0];
            // A gradient near 0 may have another sign, and AdamW's first steps follow signs.
            let near = |a: f64, e: f64, tolerance| {
                assert!(
                    (a - e).abs() < tolerance,
                    "{a}, not {e}: {more:?}, {size} processes, by classes: {by_classes}"
                );
            };
            for (actual, expected) in [(&first.0, &pretraining), (&first.1, &curve)] {
                assert_eq!(actual.points.len(), expected.points.len());
                for (a, e) in actual.points.iter().zip(&expected.points) {
                    assert_eq!(a.step, e.step);
                    near(a.train_nll, e.train_nll, 1e-3);
                    near(a.held_out_nll, e.held_out_nll, 1e-3);
                }
            }
            for (actual, expected) in first.2.iter().zip(&weights) {
                assert_close(actual, expected, 1e-2);
            }
            assert!(
                of_ranks[1].1.points.is_empty(),
                "the first process evaluates"
            );
        }
    }
}

/// From the first one's file: the others have none, and need not.
#[test]
fn all_go_on_from_the_checkpoint_of_the_first() {
    let folders: Vec<_> = (0..2).map(|_| TempDir::new().unwrap()).collect();
    let run = |folders: &[TempDir], steps: &str, resume: bool, by_classes: bool| {
        on_ranks(2, |comm| {
            let resume: &[&str] = if resume { &["--resume"] } else { &[] };
            let more = [
                &["--batch", "5", "--checkpoint-every", "2", "--steps", steps],
                resume,
            ]
            .concat();
            let args = args(folders[comm.rank()].path(), &more);
            train(&args, &Ranks::of(comm).by_classes(by_classes)).2
        })
    };
    let whole = run(&folders, "4", false, false);
    // With the last steps' file taken away only the pre-training is there.
    std::fs::remove_file(folders[0].path().join("checkpoint-UAL.safetensors")).unwrap();
    assert!(run(&folders, "4", true, false) == whole);
    for by_classes in [false, true] {
        assert!(
            run(&folders, "4", true, by_classes) == whole,
            "with nothing left to train"
        );
    }
    assert_eq!(std::fs::read_dir(folders[1].path()).unwrap().count(), 0);
}

#[test]
fn gradients_are_summed_whoever_has_them() {
    let sums = on_ranks(3, |comm| {
        let rank = comm.rank();
        let var = |shape: &[usize]| Var::ones(shape, DType::F32, &Device::Cpu).unwrap();
        // More than a bucket, a scalar, one that only one process uses, one that none does.
        let vars = [var(&[3000, 1500]), var(&[]), var(&[2, 2]), var(&[5])];
        let mut loss = (vars[0].sum_all().unwrap() * (1.0 + rank as f64)).unwrap();
        loss = (loss + (vars[1].as_tensor() * 10.0).unwrap()).unwrap();
        if rank == 1 {
            loss = (loss + vars[2].sum_all().unwrap()).unwrap();
        }
        let gradients = (rank < 2).then(|| loss.backward().unwrap());
        let mut numbers = [rank as f64, 0.5];
        let sum = Ranks::of(comm).sum(gradients, &mut numbers, &vars).unwrap();
        assert_eq!(numbers, [3.0, 1.5]);
        assert!(sum.get(&vars[3]).is_none());
        let of = |var: &Var| {
            sum.get(var)
                .unwrap()
                .flatten_all()
                .unwrap()
                .to_vec1::<f32>()
                .unwrap()
        };
        assert!(of(&vars[0]).iter().all(|g| *g == 3.0));
        (of(&vars[1]), of(&vars[2]))
    });
    for sum in sums {
        assert_eq!(sum, (vec![20.0], vec![1.0; 4]));
    }
}

#[test]
fn what_processes_are_given_must_be_alike() {
    let results = on_ranks(3, |comm| {
        let text = if comm.rank() == 2 { "other" } else { "one" };
        Ranks::of(comm).check_alike("data", text)
    });
    let ways = on_ranks(3, |comm| {
        let by_classes = comm.rank() == 2;
        let ranks = Ranks::of(comm).by_classes(by_classes);
        ranks.check_alike("data", "one")
    });
    for result in results.into_iter().chain(ways) {
        let error = result.unwrap_err().to_string();
        assert!(
            error.contains("process 2 has other data than process 0"),
            "{error}"
        );
    }
}

/// A prime, so that no slices are even, and more than the synthetic data have.
const VOCABULARY: usize = 647;

/// Models whose output projection is a variable (D, V) and one (V, D), is the embedding, and is not trained, none of whose
/// variables is 0.
fn models(longest: usize) -> Vec<(&'static str, Decoder)> {
    let (config, device) = (Config::small(VOCABULARY, (16, 1, 2), longest), &Device::Cpu);
    let made = Decoder::new(config, 1, device).unwrap();
    let untied = made.merged().unwrap();
    let projection = untied.projection.as_ref().unwrap().contiguous().unwrap();
    let untied = Weights {
        projection: Some(projection),
        ..untied
    };
    let tied = Weights {
        projection: None,
        ..untied.clone()
    };
    let given = |weights: &Weights, trained| {
        Decoder::from_weights(config, weights.clone(), trained, 1, device).unwrap()
    };
    let adapted = Trained::Lora {
        rank: 2,
        scale: 2.0,
    };
    let models = vec![
        ("untied", given(&untied, Trained::All)),
        ("tied", given(&tied, Trained::All)),
        ("adapted", given(&untied, adapted)),
        ("made here", made),
    ];
    for (_, model) in &models {
        let weights = model.weights().unwrap();
        let weights: Result<Vec<_>> = weights.iter().map(|weight| weight + 0.05).collect();
        model.set_weights(&weights.unwrap()).unwrap();
    }
    models
}

fn values(t: &Tensor) -> Vec<f32> {
    t.flatten_all().unwrap().to_vec1().unwrap()
}

#[test]
fn classes_in_slices_have_the_gradients_of_all() {
    let folder = TempDir::new().unwrap();
    let data = synthetic::generate(1);
    let map = fit(&data.train, &args(folder.path(), &[])).unwrap();
    let prior = Tensor::arange(1f32, VOCABULARY as f32 + 1.0, &Device::Cpu).unwrap();
    let method = Method::Spread(Box::new(Method::Ual(map)), prior);
    // Two batches a step.
    let samples: Vec<&Sample> = data.train.iter().take(8).collect();
    let batches: Vec<Vec<&Sample>> = samples.chunks(5).map(<[_]>::to_vec).collect();
    for (name, model) in models(data.longest()) {
        for loss in [Loss::Linear, Loss::Logits] {
            let step = |ranks: &Ranks| Step::new(&model, &method, loss, &batches, ranks).unwrap();
            let of_all = |step: &Step| -> Vec<Vec<f32>> {
                let gradients = model.vars().iter().map(|var| step.gradients.get(var));
                gradients
                    .map(|gradient| values(gradient.unwrap()))
                    .collect()
            };
            let expected = step(&Ranks::alone());
            for size in [1, 2, 3, 5] {
                let of_ranks = on_ranks(size, |comm| {
                    let step = step(&Ranks::of(comm).by_classes(true));
                    (step.loss, step.nll, of_all(&step))
                });
                let what = format!("{name}, {loss:?}, {size} processes");
                assert!(of_ranks.iter().all(|same| *same == of_ranks[0]), "{what}");
                let (loss, nll, gradients) = &of_ranks[0];
                assert!((loss / expected.loss - 1.0).abs() < 1e-5, "{what}");
                assert!((nll / expected.nll - 1.0).abs() < 1e-5, "{what}");
                for (i, (actual, expected)) in gradients.iter().zip(of_all(&expected)).enumerate() {
                    let largest = expected.iter().fold(0f32, |most, g| most.max(g.abs()));
                    let pairs = actual.iter().zip(&expected);
                    let error = pairs.fold(0f32, |most, (a, e)| most.max((a - e).abs()));
                    assert!(
                        largest > 0.0 && error < 1e-5 * largest,
                        "{what}: {error} of {largest} in variable {i}"
                    );
                }
            }
        }
    }
}

/// Where processes differ, a class's row of the projection is that of the process which has it, all else the first one's.
#[test]
fn each_process_gives_its_own_classes() {
    for (name, model) in models(8) {
        let of_ranks = on_ranks(3, |comm| {
            let scale = 1.0 + comm.rank() as f64;
            let sums = model.vars().iter().map(|var| var.sum_all().unwrap());
            let loss = sums.reduce(|a, b| (a + b).unwrap()).unwrap();
            let mut gradients = (loss * scale).unwrap().backward().unwrap();
            let slice = Slice::new(comm.clone(), VOCABULARY);
            slice.keep_own(&mut gradients, &model).unwrap();
            let ranks = Ranks::of(comm);
            let sum = ranks.sum(Some(gradients), &mut [], model.vars()).unwrap();
            let own = model.vars().iter().map(|var| sum.get(var).unwrap().clone());
            own.collect::<Vec<_>>()
        });
        // 647 · rank / 3
        let of_class =
            |class: usize| f32::from(1 + u8::from(class >= 215) + u8::from(class >= 431));
        let projection = model.trained_projection();
        assert_eq!(projection.is_none(), name == "adapted");
        for gradients in of_ranks {
            for (var, gradient) in model.vars().iter().zip(gradients) {
                let gradient = match projection {
                    Some((same, 0)) if same.id() == var.id() => gradient,
                    Some((same, _)) if same.id() == var.id() => gradient.t().unwrap(),
                    _ => {
                        assert!(values(&gradient).iter().all(|g| *g == 1.0), "{name}");
                        continue;
                    }
                };
                for (class, row) in gradient.to_vec2::<f32>().unwrap().iter().enumerate() {
                    assert!(row.iter().all(|g| *g == of_class(class)), "{name}, {class}");
                }
            }
        }
    }
}

#[test]
fn a_process_without_a_class_is_refused() {
    let slice = |vocabulary: usize, by_classes: bool| {
        let of_ranks = on_ranks(3, |comm| {
            let ranks = Ranks::of(comm).by_classes(by_classes);
            let slice = ranks.slice(vocabulary);
            slice
                .map(|slice| slice.is_some())
                .map_err(|e| e.to_string())
        });
        assert!(of_ranks.iter().all(|same| *same == of_ranks[0]));
        of_ranks.into_iter().next().unwrap()
    };
    assert_eq!(slice(3, true), Ok(true));
    assert_eq!(slice(2, false), Ok(false));
    assert!(slice(2, true).unwrap_err().contains("3 processes"));
    assert!(Ranks::alone().by_classes(true).slice(2).unwrap().is_none());
}
