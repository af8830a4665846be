//! Communicators of threads: gathered in rank order, summed once, never waiting for a rank that is gone.

use std::{thread, time::Duration};

use candle_core::{DType, Result, Tensor, Var};

use crate::{
    common::*,
    ranks::{Comm, assert_all_say, errors, ranks},
};

#[test]
fn threads_gather_in_rank_order_and_sum() {
    for size in [1, 2, 3, 5] {
        for dtype in FLOATS {
            let results = ranks(size, |comm| {
                assert_eq!(comm.size(), size);
                let mine = (Tensor::ones((2, 3), dtype, CPU)? * (1.0 + comm.rank() as f64))?;
                let mut last = None;
                // Round after round, some ranks faster than others.
                for round in 0..50 {
                    if (round + comm.rank()) % 7 == 0 {
                        thread::sleep(Duration::from_micros(200));
                    }
                    let all = comm.all_gather(&(&mine + round as f64)?)?;
                    let sum = comm.all_reduce_sum(&mine)?;
                    assert_eq!(all.dims(), [size, 2, 3]);
                    for rank in 0..size {
                        let wanted = 1.0 + rank as f64 + round as f64;
                        assert!(values(&all.get(rank)?).iter().all(|v| *v == wanted));
                    }
                    last = Some(sum);
                }
                Result::Ok(last.expect("there were rounds"))
            });
            for sum in results {
                let sum = sum.unwrap();
                assert_eq!((sum.dtype(), sum.dims()), (dtype, &[2, 3][..]));
                let wanted = (size * (size + 1) / 2) as f64;
                assert!(values(&sum).iter().all(|v| *v == wanted));
            }
        }
    }
}

/// What a rank gives may change as soon as it has the result.
#[test]
fn what_is_given_is_a_copy() {
    for results in ranks(3, |comm| {
        let var = Var::from_tensor(&Tensor::full(comm.rank() as f32, 100_000, CPU)?)?;
        for _ in 0..30 {
            let mean = (comm.all_reduce_sum(&var)? / comm.size() as f64)?;
            assert!(values(&mean).iter().all(|m| *m == 1.0));
            var.set(&(mean + (comm.rank() as f64 - 1.0))?)?;
        }
        let all = comm.all_gather(&var)?;
        var.set(&var.zeros_like()?)?;
        Result::Ok(values(&all))
    }) {
        let all = results.unwrap();
        assert!(
            all.chunks(100_000)
                .zip([0.0, 1.0, 2.0])
                .all(|(part, v)| part.iter().all(|x| *x == v))
        );
    }
    for sum in ranks(1, |comm| {
        let var = Var::ones(2, DType::F32, CPU)?;
        var.set(&comm.all_reduce_sum(&var)?)?;
        Result::Ok(values(&var))
    }) {
        assert_eq!(sum.unwrap(), [1.0, 1.0]);
    }
}

/// 256 + 1 + 1 + … in bf16 would stay 256.
#[test]
fn sums_of_narrow_types_are_rounded_once() {
    for sum in ranks(5, |comm| {
        let mine = if comm.rank() == 0 { 256f32 } else { 1.0 };
        let mine = Tensor::new(&[mine], CPU)?.to_dtype(DType::BF16)?;
        comm.all_reduce_sum(&mine)
    }) {
        assert_eq!(values(&sum.unwrap()), [260.0]);
    }
}

#[test]
fn tensors_that_differ_and_ranks_that_are_gone_are_errors() {
    let errors_of = |f: fn(Comm) -> Result<Tensor>| errors(3, |comm| f(comm).map(drop));
    let errors = errors_of(|comm| {
        let shape = if comm.rank() == 2 { (1, 4) } else { (2, 2) };
        comm.all_gather(&Tensor::zeros(shape, DType::F32, CPU)?)
    });
    assert_all_say(
        &errors,
        &["rank 2 gave f32 of shape [1, 4], rank 0 f32 of shape [2, 2]"],
    );
    let errors = errors_of(|comm| {
        let dtype = if comm.rank() == 1 {
            DType::F64
        } else {
            DType::F32
        };
        comm.all_reduce_sum(&Tensor::zeros(2, dtype, CPU)?)
    });
    assert_all_say(&errors, &["rank 1 gave f64", "rank 0 f32"]);
    // One leaves after the first round.
    let left = ranks(3, |comm| {
        let mine = Tensor::zeros(1, DType::F32, CPU)?;
        comm.all_gather(&mine)?;
        match comm.rank() {
            1 => Ok(mine),
            _ => comm.all_gather(&mine),
        }
    });
    assert!(left[1].is_ok());
    for result in [&left[0], &left[2]] {
        let error = result.as_ref().expect_err("it is gone").to_string();
        assert!(error.contains("gone"), "{error}");
    }
}
