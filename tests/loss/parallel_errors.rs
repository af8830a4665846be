//! Whatever a rank does wrong is an error on every rank, and none waits.

use candle_core::{DType, Result, Tensor, Var};
use candle_cross_entropy::{CrossEntropy, Reduction, Targets, parallel::threads};

use crate::{
    common::*,
    ranks::{assert_all_say, errors, ranks},
};

/// Logits (2, `count`) of zeros, targets 0 and 1.
fn simple(count: usize) -> (Tensor, Tensor) {
    (
        Tensor::zeros((2, count), DType::F32, CPU).unwrap(),
        Tensor::new(&[0u32, 1], CPU).unwrap(),
    )
}

#[test]
fn slices_that_do_not_cover_the_vocabulary_once_are_an_error_everywhere() {
    let run = |firsts: [usize; 3], vocabulary: [usize; 3]| {
        errors(3, |comm| {
            let (logits, targets) = simple(4);
            let (first, vocabulary) = (firsts[comm.rank()], vocabulary[comm.rank()]);
            let loss = CrossEntropy::new().vocab_shard(comm, first, vocabulary);
            loss.loss_and_grad_inplace(logits, &targets).map(drop)
        })
    };
    let say = |firsts, vocabulary, parts: &[&str]| assert_all_say(&run(firsts, vocabulary), parts);
    say(
        [0, 4, 9],
        [13; 3],
        &["no rank has class 8", "rank 2 begins at 9"],
    );
    say(
        [0, 4, 8],
        [13; 3],
        &["no rank has class 12 of a vocabulary of 13"],
    );
    say(
        [1, 5, 9],
        [13; 3],
        &["no rank has class 0", "rank 0 begins at 1"],
    );
    say([0, 4, 7], [12; 3], &["ranks 1 and 2 both have class 7"]);
    say([8, 0, 0], [12; 3], &["ranks 1 and 2 both have class 0"]);
    say(
        [0, 4, 8],
        [12, 12, 13],
        &["vocabulary is 13 on rank 2, 12 on rank 0"],
    );
    // The last one's own arguments are wrong: it says how, the others that it has failed.
    let errors = run([0, 4, 9], [12; 3]);
    assert!(
        errors[2].contains("4 classes from 9 on of a vocabulary of 12"),
        "{errors:?}"
    );
    assert_all_say(&errors[..2], &["vocab_shard", "rank 2", "has failed"]);
}

#[test]
fn arguments_that_differ_are_an_error_everywhere() {
    type Change = fn(CrossEntropy, Tensor) -> (CrossEntropy, Targets);
    fn prior() -> Tensor {
        Tensor::new(&[1f32, 2.0, 0.5, 1.0, 1.0, 1.0, 1.0, 1.0], CPU).unwrap()
    }
    let cases: [(Change, &str); 11] = [
        (
            |loss, t| (loss.z_loss(0.5), t.into()),
            "z_loss is 0.5 on rank 1, 0 on rank 0",
        ),
        (
            |loss, t| (loss.softcap(8.0), t.into()),
            "softcap is 8 on rank 1, 0 on rank 0",
        ),
        (
            |loss, t| (loss.logit_scale(2.0), t.into()),
            "logit_scale is 2 on rank 1, 1 on rank 0",
        ),
        (
            |loss, t| (loss.ignore_index(7), t.into()),
            "ignore_index is 7 on rank 1, -100 on rank 0",
        ),
        (
            |loss, t| (loss.reduction(Reduction::Sum), t.into()),
            "reduction on rank 1",
        ),
        (
            |loss, t| (loss.smoothing(0.1), t.into()),
            "smoothing on rank 1",
        ),
        (
            |loss, t| {
                (
                    loss.row_weights(&Tensor::new(&[1f32, 0.5], CPU).unwrap()),
                    t.into(),
                )
            },
            "row_weights on rank 1",
        ),
        (
            |loss, t| (loss, (t + 1.0).unwrap().into()),
            "targets on rank 1",
        ),
        (|loss, t| (loss.class_weights(&prior()), t.into()), "rank 1"),
        (
            |loss, t| (loss.smoothing_prior(&prior()), t.into()),
            "rank 1",
        ),
        (|loss, t| (loss.entropy_weight(0.1), t.into()), "rank 1"),
    ];
    for (change, says) in cases {
        let errors = errors(2, |comm| {
            let (logits, targets) = simple(4);
            let rank = comm.rank();
            let loss = CrossEntropy::new().vocab_shard(comm, 4 * rank, 8);
            let (loss, targets) = match rank {
                1 => change(loss, targets),
                _ => (loss, targets.into()),
            };
            loss.forward(&logits, targets).map(drop)
        });
        assert_all_say(&errors[..1], &["vocab_shard", says]);
        assert!(
            errors[1].contains("rank 1") || errors[1].contains("row 1"),
            "{errors:?}"
        );
    }
    // General both, but not alike.
    for (name, change) in [
        (
            "class_weights",
            (|l, u| l.class_weights(u)) as fn(CrossEntropy, &Tensor) -> CrossEntropy,
        ),
        ("smoothing_prior", |l, u| l.smoothing_prior(u)),
        ("entropy_weight", |l, u| {
            l.entropy_weight(u.narrow(0, 1, 2).unwrap())
        }),
    ] {
        let errors = errors(2, |comm| {
            let (logits, targets) = simple(4);
            let rank = comm.rank();
            let loss = CrossEntropy::new().vocab_shard(comm, 4 * rank, 8);
            let values = (prior() * (1.0 + rank as f64 * prior().to_vec1::<f32>()?[2] as f64))?;
            let values = match rank {
                0 => values,
                _ => Tensor::cat(&[&values.narrow(0, 1, 7)?, &values.narrow(0, 0, 1)?], 0)?,
            };
            change(loss, &values).forward(&logits, &targets).map(drop)
        });
        assert_all_say(&errors, &["vocab_shard", name, "on rank 1"]);
    }
    // Statistics on one rank alone, rows of another number, logits of another type.
    let run = |f: fn(CrossEntropy, usize) -> Result<()>| {
        errors(2, |comm| {
            let rank = comm.rank();
            f(CrossEntropy::new().vocab_shard(comm, 4 * rank, 8), rank)
        })
    };
    let errors = run(|loss, rank| {
        let (logits, targets) = simple(4);
        match rank {
            0 => loss.forward(&logits, &targets).map(drop),
            _ => loss.forward_with_stats(&logits, &targets).map(drop),
        }
    });
    assert_all_say(&errors, &["vocab_shard", "rank 1"]);
    let errors = run(|loss, rank| {
        let logits = Tensor::zeros((2 + rank, 4), DType::F32, CPU)?;
        let targets = Tensor::zeros(2 + rank, DType::U32, CPU)?;
        loss.forward(&logits, &targets).map(drop)
    });
    assert_all_say(&errors, &["vocab_shard", "rank 1"]);
    let errors = run(|loss, rank| {
        let logits = Tensor::zeros((2, 4), [DType::F32, DType::F64][rank], CPU)?;
        loss.forward(&logits, simple(4).1).map(drop)
    });
    assert_all_say(&errors, &["type of the logits on rank 1"]);
}

/// Rows that ranks leave out of the products, as they are ignored or have no weight, must be the same ones.
#[test]
fn other_rows_that_count_are_an_error() {
    type Change = fn(CrossEntropy, usize) -> (CrossEntropy, [i64; 4]);
    let cases: [Change; 3] = [
        |loss, rank| (loss, [[1, 2, 3, -100], [-100, 1, 2, 3]][rank]),
        |loss, rank| {
            let weights = Tensor::new(
                [[1f32, 0.0, 1.0, 1.0], [0.0, 1.0, 1.0, 1.0]][rank].as_slice(),
                CPU,
            );
            (loss.row_weights(&weights.unwrap()), [1, 1, 2, 3])
        },
        |loss, rank| (loss, [[1, 2, 3, 4], [1, 2, 3, 5]][rank]),
    ];
    for change in cases {
        let errors = errors(2, |comm| {
            let rank = comm.rank();
            let hidden = Tensor::ones((4, 3), DType::F32, CPU)?;
            let weight = Tensor::ones((4, 3), DType::F32, CPU)?;
            let loss = CrossEntropy::new().vocab_shard(comm, 4 * rank, 8);
            let (loss, targets) = change(loss, rank);
            let targets = Tensor::new(targets.as_slice(), CPU)?;
            loss.forward_linear(&hidden, &weight, None, &targets)
                .map(drop)
        });
        assert_all_say(&errors, &["vocab_shard", "on rank 1: not what rank 0 has"]);
    }
}

/// One rank of four, in two groups, fails: both of its groups hear of it, and so does the fourth.
#[test]
fn a_rank_of_two_groups_fails() {
    for probabilities in [false, true] {
        let vocabulary = [threads(2), threads(2)];
        let data = [threads(2), threads(2)];
        let (vocabulary, data) = (&vocabulary, &data);
        for error in errors(4, |comm| {
            let (group, column) = (comm.rank() / 2, comm.rank() % 2);
            let loss = CrossEntropy::new()
                .vocab_shard(vocabulary[group][column].clone(), 3 * column, 6)
                .data_parallel(data[column][group].clone());
            let logits = Tensor::zeros((1, 3), DType::F32, CPU)?;
            let targets: Targets = match probabilities {
                true => Tensor::new(
                    &[[0.5f32, if comm.rank() == 3 { -1.0 } else { 0.0 }, 0.0]],
                    CPU,
                )?
                .into(),
                false => Tensor::new(&[if group == 1 { 60u32 } else { 2 }], CPU)?.into(),
            };
            loss.forward(&logits, targets).map(drop)
        }) {
            assert!(error.contains("targets: row 0"), "{error}");
        }
    }
}

#[test]
fn rows_in_parallel_agree_on_what_is_done() {
    let run = |f: fn(CrossEntropy, usize) -> Result<()>| {
        errors(2, |comm| {
            let rank = comm.rank();
            f(CrossEntropy::new().data_parallel(comm), rank)
        })
    };
    let errors = run(|loss, rank| {
        let reduction = [Reduction::Mean, Reduction::Sum][rank];
        loss.reduction(reduction)
            .forward(&simple(4).0, simple(4).1)
            .map(drop)
    });
    assert_all_say(&errors, &["data_parallel: reduction on rank 1"]);
    let errors = run(|loss, rank| {
        let reduction = Reduction::SumOver([2.0, 3.0][rank]);
        loss.reduction(reduction)
            .forward(&simple(4).0, simple(4).1)
            .map(drop)
    });
    assert_all_say(&errors, &["data_parallel: reduction on rank 1"]);
    let errors = run(|loss, rank| match rank {
        0 => loss.forward(&simple(4).0, simple(4).1).map(drop),
        _ => loss
            .forward(&simple(4).0, Tensor::ones((2, 4), DType::F32, CPU)?)
            .map(drop),
    });
    assert_all_say(&errors, &["data_parallel: form of the targets on rank 1"]);
    // Seen as it is used, and told then.
    let errors = run(|loss, rank| {
        let t = Tensor::full([0.25f32, -1.0][rank], (2, 4), CPU)?;
        loss.loss_and_grad(&simple(4).0, &t).map(drop)
    });
    assert_all_say(&errors, &["targets: row 0 has probability -1 for class 0"]);
}

/// A hidden gradient that one rank alone would sum would wait for ever.
#[test]
fn hidden_states_are_tracked_on_all_ranks_or_none() {
    let run = |tracked: [bool; 2]| {
        ranks(2, |comm| {
            let hidden = Var::ones((2, 3), DType::F32, CPU)?;
            let hidden = match tracked[comm.rank()] {
                true => hidden.as_tensor().clone(),
                false => hidden.as_tensor().detach(),
            };
            let weight = Var::ones((4, 3), DType::F32, CPU)?;
            let loss = CrossEntropy::new().vocab_shard(comm.clone(), 4 * comm.rank(), 8);
            let loss = loss.forward_linear(&hidden, &weight, None, simple(4).1)?;
            let gradients = loss.backward()?;
            Result::Ok(gradients.get(&weight).is_some())
        })
    };
    for result in run([true, false]) {
        let error = result.expect_err("an error on every rank").to_string();
        assert!(
            error.contains("gradient of the hidden states on rank 1"),
            "{error}"
        );
    }
    for tracked in [[true; 2], [false; 2]] {
        assert!(run(tracked).into_iter().all(|result| result.unwrap()));
    }
}

/// Bad input on one rank: its own words there, and on the others that it has failed, and why where it knew its rows.
#[test]
fn a_rank_that_fails_keeps_no_other_waiting() {
    type Call = fn(CrossEntropy, bool) -> Result<()>;
    let cases: [(Call, &str, &str); 6] = [
        (
            |loss, bad| {
                let targets = Tensor::new(&[0u32, if bad { 70 } else { 1 }], CPU)?;
                loss.forward(&simple(4).0, &targets).map(drop)
            },
            "targets: row 1 has 70",
            "rank 1 failed: targets: row 1 has 70",
        ),
        (
            |loss, bad| {
                let smoothing = Tensor::new(&[if bad { 2f32 } else { 0.0 }, 0.0], CPU)?;
                let (logits, targets) = simple(4);
                loss.smoothing(smoothing)
                    .loss_and_grad(&logits, &targets)
                    .map(drop)
            },
            "smoothing: row 0 has 2",
            "rank 1 failed: smoothing: row 0 has 2",
        ),
        (
            |loss, bad| {
                let targets = Tensor::zeros(if bad { 3 } else { 2 }, DType::U32, CPU)?;
                loss.forward(&simple(4).0, &targets).map(drop)
            },
            "targets: shape [3]",
            "rank 1",
        ),
        (
            |loss, bad| {
                let (logits, targets) = simple(4);
                let logits = if bad {
                    logits.narrow(0, 0, 1)?.broadcast_as((2, 4))?
                } else {
                    logits
                };
                loss.loss_and_grad_inplace(logits, &targets).map(drop)
            },
            "overlap",
            "rank 1",
        ),
        (
            |loss, bad| {
                let hidden = Tensor::zeros((2, 3), DType::F32, CPU)?;
                let weight = Tensor::zeros((4, if bad { 5 } else { 3 }), DType::F32, CPU)?;
                loss.forward_linear(&hidden, &weight, None, simple(4).1)
                    .map(drop)
            },
            "weight: shape [4, 5]",
            "rank 1",
        ),
        (
            |loss, bad| {
                let hidden = Tensor::zeros((2, 3), DType::F32, CPU)?;
                let weight = Tensor::zeros((4, 3), DType::F32, CPU)?;
                let targets = Tensor::new(&[if bad { 80u32 } else { 7 }, 0], CPU)?;
                loss.forward_linear(&hidden, &weight, None, &targets)
                    .map(drop)
            },
            "targets: row 0 has 80",
            "rank 1",
        ),
    ];
    for (call, own, others) in cases {
        for data_parallel in [false, true] {
            let errors = errors(3, |comm| {
                let rank = comm.rank();
                let loss = match data_parallel {
                    true => CrossEntropy::new().data_parallel(comm),
                    false => CrossEntropy::new().vocab_shard(comm, 4 * rank, 12),
                };
                // With rows in parallel a vocabulary of four.
                call(loss, rank == 1)
            });
            if data_parallel && errors[0].contains("must be 0 to 3") {
                continue; // the vocabulary of this case is larger
            }
            assert!(errors[1].contains(own), "{errors:?}");
            for error in [&errors[0], &errors[2]] {
                assert!(error.contains(others), "{errors:?}");
                assert!(
                    error.contains(["vocab_shard", "data_parallel"][usize::from(data_parallel)]),
                    "{error}"
                );
            }
        }
    }
    // A probability is seen where it is used: on the rank that has it, and on the others by what it does.
    let errors = errors(2, |comm| {
        let rank = comm.rank();
        let t = Tensor::new(
            &[[0.5f32, 0.0], [0.5, if rank == 1 { -1.0 } else { 0.0 }]],
            CPU,
        )?;
        let logits = Tensor::zeros((2, 2), DType::F32, CPU)?;
        CrossEntropy::new()
            .vocab_shard(comm, 2 * rank, 4)
            .forward(&logits, &t)
            .map(drop)
    });
    assert_all_say(&errors[1..], &["row 1 has probability -1 for class 3"]);
    assert_all_say(
        &errors[..1],
        &["row 1 has", "a bad one for a class of another rank"],
    );
}

#[test]
fn the_reference_is_of_whole_rows() {
    for error in errors(2, |comm| {
        let (logits, targets) = simple(4);
        let loss = CrossEntropy::new();
        let loss = match comm.rank() {
            0 => loss.data_parallel(comm),
            _ => loss.vocab_shard(comm, 0, 4),
        };
        loss.reference(&logits, &targets).map(drop)
    }) {
        assert!(error.contains("reference"), "{error}");
    }
}
