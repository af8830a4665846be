//! Several processes that train one model, here threads: what one alone with whole batches does, up to rounding.

use std::{path::Path, sync::Arc, thread};

use candle_core::{DType, Device, Tensor, Var};
use candle_cross_entropy::parallel::{Communicator, threads};
use candle_ual::{
    data::synthetic,
    report::curve::Curve,
    training::{args::Args, method::Method, ranks::Ranks, setup::Setup},
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
    let curve = setup
        .train(args, "UAL", &method, &setup.data.train, ranks, &Device::Cpu)
        .unwrap();
    let weights = setup.model.weights().unwrap();
    let values = |t: &Tensor| t.flatten_all().unwrap().to_vec1().unwrap();
    (
        setup.pretraining.expect("made here"),
        curve,
        weights.iter().map(values).collect(),
    )
}

fn on_ranks<R: Send>(size: usize, f: impl Fn(Arc<dyn Communicator>) -> R + Sync) -> Vec<R> {
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
fn parts_of_batches_train_as_whole_ones_do() {
    let folder = TempDir::new().unwrap();
    // Batches that do not come out even, smaller ones than there are processes, and several a step.
    for more in [
        &["--batch", "7"][..],
        &["--batch", "2"],
        &["--batch", "3", "--accumulate", "2"],
    ] {
        let args = args(folder.path(), more);
        let (pretraining, curve, weights) = train(&args, &Ranks::alone());
        for size in [2, 3] {
            let of_ranks = on_ranks(size, |comm| train(&args, &Ranks::of(comm)));
            for (_, _, same) in &of_ranks {
                assert!(*same == of_ranks[0].2, "weights differ between processes");
            }
            let first = &of_ranks[0];
            // A gradient near 0 may have another sign, and AdamW's first steps follow signs.
            let near = |a: f64, e: f64, tolerance| {
                assert!(
                    (a - e).abs() < tolerance,
                    "{a}, not {e}: {more:?}, {size} processes"
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
    let run = |folders: &[TempDir], steps: &str, resume: bool| {
        on_ranks(2, |comm| {
            let resume: &[&str] = if resume { &["--resume"] } else { &[] };
            let more = [
                &["--batch", "5", "--checkpoint-every", "2", "--steps", steps],
                resume,
            ]
            .concat();
            train(&args(folders[comm.rank()].path(), &more), &Ranks::of(comm)).2
        })
    };
    let whole = run(&folders, "4", false);
    // With the last steps' file taken away only the pre-training is there.
    std::fs::remove_file(folders[0].path().join("checkpoint-UAL.safetensors")).unwrap();
    assert!(run(&folders, "4", true) == whole);
    assert!(
        run(&folders, "4", true) == whole,
        "with nothing left to train"
    );
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
    for result in results {
        let error = result.unwrap_err().to_string();
        assert!(
            error.contains("process 2 has other data than process 0"),
            "{error}"
        );
    }
}
