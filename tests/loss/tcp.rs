//! Ranks over TCP: they give what ranks that are threads give, bit for bit; whatever one of them does wrong, in joining too, is an
//! error, and none waits.

use std::{
    fs,
    io::{Read, Write},
    net::{TcpListener, TcpStream},
    path::Path,
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use candle_core::{DType, Result, Tensor, Var};
use candle_cross_entropy::{
    CrossEntropy,
    parallel::{Communicator, Tcp, threads},
};

use crate::common::*;

type Comm = Arc<dyn Communicator>;

const LONG: Duration = Duration::from_secs(30);
const SHORT: Duration = Duration::from_millis(700);
/// Within which a rank hears of what has happened to another.
const SOON: Duration = Duration::from_secs(5);

/// What `f` gives on each of so many ranks, in rank order.
fn on_threads<R: Send>(size: usize, f: impl Fn(usize) -> R + Sync) -> Vec<R> {
    thread::scope(|scope| {
        let f = &f;
        let handles: Vec<_> = (0..size).map(|rank| scope.spawn(move || f(rank))).collect();
        let join = |handle: thread::ScopedJoinHandle<R>| handle.join().expect("no panic");
        handles.into_iter().map(join).collect()
    })
}

/// The same of ranks that have found each other by a file, which is gone then.
fn ranks<R: Send>(size: usize, f: impl Fn(Comm) -> R + Sync) -> Vec<R> {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("ranks");
    let results = on_threads(size, |rank| {
        let comm = Tcp::through_file(&path, rank, size, LONG).unwrap();
        assert_eq!((comm.rank(), comm.size()), (rank, size));
        f(Arc::new(comm))
    });
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
    results
}

fn of_threads<R: Send>(size: usize, f: impl Fn(Comm) -> R + Sync) -> Vec<R> {
    let comms = threads(size);
    on_threads(size, |rank| f(comms[rank].clone()))
}

/// Without a backtrace.
fn first_line(error: &candle_core::Error) -> String {
    error.to_string().lines().next().unwrap_or_default().into()
}

/// A port that nobody listens at.
fn free_address() -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    listener.local_addr().unwrap().to_string()
}

fn messages<T>(results: Vec<Result<T>>) -> Vec<String> {
    let message = |result: Result<T>| result.err().expect("an error on every rank").to_string();
    results.into_iter().map(message).collect()
}

const TYPES: [DType; 7] = [
    DType::F32,
    DType::F64,
    DType::F16,
    DType::BF16,
    DType::U8,
    DType::U32,
    DType::I64,
];

#[test]
fn operations_are_those_of_threads() {
    for size in 1..=4 {
        let work = |comm: Comm| -> Vec<(DType, Vec<usize>, Vec<u64>)> {
            let mut results = Vec::new();
            for dtype in TYPES {
                let mut shapes = vec![vec![2, 3], vec![], vec![5], vec![0, 4]];
                if dtype == DType::F32 {
                    shapes.push(vec![1 << 20]); // more than a socket holds
                }
                for shape in shapes {
                    let count: usize = shape.iter().product();
                    let mut rng = rng(comm.rank() as u64);
                    let values = normal(&mut rng, count.min(1000), 30.0);
                    let values: Vec<f64> = (0..count)
                        .map(|i| values[i % values.len()].abs().trunc() + 1.0 / 3.0)
                        .collect();
                    let mine = Tensor::from_vec(values, shape.as_slice(), CPU).unwrap();
                    let mine = mine.to_dtype(dtype).unwrap();
                    for result in [comm.all_gather(&mine), comm.all_reduce_sum(&mine)] {
                        let result = result.unwrap();
                        let bits = match dtype {
                            DType::U8 | DType::U32 | DType::I64 => values_of_integers(&result),
                            _ => bits(&result),
                        };
                        results.push((result.dtype(), result.dims().to_vec(), bits));
                    }
                }
            }
            // Columns of a matrix.
            let matrix = Tensor::arange(0f32, 12.0, CPU).unwrap();
            let matrix = (matrix.reshape((3, 4)).unwrap() + comm.rank() as f64).unwrap();
            let view = matrix.t().unwrap().narrow(0, 1, 2).unwrap();
            let all = comm.all_gather(&view).unwrap();
            results.push((all.dtype(), all.dims().to_vec(), bits(&all)));
            results
        };
        let expected = of_threads(size, work);
        for (results, expected) in ranks(size, work).iter().zip(&expected) {
            assert!(results == expected, "{size} ranks");
        }
    }
}

fn values_of_integers(tensor: &Tensor) -> Vec<u64> {
    values(tensor).into_iter().map(|v| v as u64).collect()
}

#[test]
fn what_is_given_is_a_copy() {
    for results in ranks(2, |comm| {
        let var = Var::from_tensor(&Tensor::full(comm.rank() as f32, 1000, CPU)?)?;
        let sum = comm.all_reduce_sum(&var)?;
        let all = comm.all_gather(&var)?;
        var.set(&Tensor::full(7f32, 1000, CPU)?)?;
        Result::Ok((values(&sum), values(&all)))
    }) {
        let (sum, all) = results.unwrap();
        assert!(sum.iter().all(|v| *v == 1.0));
        assert!((0..2000).all(|i| all[i] == (i / 1000) as f64));
    }
    for sum in ranks(1, |comm| {
        let var = Var::ones(2, DType::F32, CPU)?;
        let sum = comm.all_reduce_sum(&var)?;
        var.set(&var.zeros_like()?)?;
        Result::Ok(values(&sum))
    }) {
        assert_eq!(sum.unwrap(), [1.0, 1.0]);
    }
}

#[test]
fn a_vocabulary_in_slices_is_that_of_threads() {
    let problem = Problem::random(
        3,
        &[5, 24],
        DType::F32,
        Setup {
            eps: Eps::Uniform(0.1),
            ..Setup::default()
        },
    );
    let work = |comm: Comm| {
        let (first, count) = [(0, 1), (1, 12), (13, 11)][comm.rank()];
        let logits = problem.logits.narrow(1, first, count).unwrap();
        let loss = CrossEntropy::new()
            .smoothing(0.1)
            .vocab_shard(comm, first, 24);
        let result = loss.loss_and_grad(&logits, &problem.targets).unwrap();
        let stats = stats_bits(&result.stats);
        (bits(&result.loss), bits(&result.grad), stats)
    };
    assert_eq!(ranks(3, work), of_threads(3, work));
}

#[test]
fn what_differs_is_an_error_on_every_rank() {
    let zeros = |shape: &[usize], dtype| Tensor::zeros(shape, dtype, CPU).unwrap();
    let results = ranks(3, |comm| {
        let last = comm.rank() == 2;
        let dims: &[usize] = if last { &[1, 4] } else { &[2, 2] };
        let shapes = comm.all_gather(&zeros(dims, DType::F32));
        let dtype = if comm.rank() == 1 {
            DType::F64
        } else {
            DType::F32
        };
        let types = comm.all_reduce_sum(&zeros(&[2], dtype));
        let dims: &[usize] = if last { &[1; 9] } else { &[1] };
        let dims = comm.all_gather(&zeros(dims, DType::F32));
        let operations = match comm.rank() {
            0 => comm.all_reduce_sum(&zeros(&[2], DType::F32)),
            _ => comm.all_gather(&zeros(&[2], DType::F32)),
        };
        // And go on.
        let sum = comm.all_reduce_sum(&Tensor::ones(1, DType::F32, CPU)?)?;
        assert_eq!(values(&sum), [3.0]);
        Result::Ok(messages(vec![shapes, types, dims, operations]))
    });
    for (rank, messages) in results.into_iter().enumerate() {
        let messages = messages.unwrap();
        let shapes = "rank 2 gave f32 of shape [1, 4], rank 0 f32 of shape [2, 2]";
        let types = "rank 1 gave f64 of shape [2], rank 0 f32 of shape [2]";
        let dims = match rank {
            2 => "9 dimensions, must be at most 8",
            _ => "rank 2 gave a tensor of a type that is not sent",
        };
        let operations = "rank 1 called all_gather, rank 0 all_reduce_sum";
        for (message, expected) in messages.iter().zip([shapes, types, dims, operations]) {
            assert!(message.contains(expected), "{message}");
        }
    }
}

#[test]
fn a_rank_that_is_gone_is_an_error_on_the_others() {
    for lost in 0..3 {
        let results = ranks(3, |comm| {
            let mine = Tensor::zeros(100_000, DType::F32, CPU)?;
            comm.all_gather(&mine)?;
            if comm.rank() == lost {
                return Ok(());
            }
            let start = Instant::now();
            let error = comm.all_gather(&mine).expect_err("a rank is gone");
            assert!(start.elapsed() < SOON);
            let again = comm.all_reduce_sum(&mine).expect_err("for ever");
            assert_eq!(first_line(&error), first_line(&again));
            Err(error)
        });
        for (rank, result) in results.into_iter().enumerate() {
            match result {
                Ok(()) => assert_eq!(rank, lost),
                Err(e) => assert!(
                    e.to_string().contains(&format!("rank {lost} is gone")),
                    "{e}"
                ),
            }
        }
    }
}

/// Although the rank that it waits for first is there, and does not call.
#[test]
fn a_rank_hears_at_once_that_another_is_gone() {
    let results = ranks(3, |comm| {
        let mine = Tensor::zeros(3, DType::F32, CPU)?;
        match comm.rank() {
            0 => {
                let start = Instant::now();
                let result = comm.all_gather(&mine);
                assert!(
                    start.elapsed() < Duration::from_secs(2),
                    "{:?}",
                    start.elapsed()
                );
                result
            }
            1 => {
                thread::sleep(Duration::from_secs(3));
                comm.all_gather(&mine)
            }
            _ => Ok(mine),
        }
    });
    for result in &results[..2] {
        let error = result.as_ref().expect_err("it is gone").to_string();
        assert!(error.contains("rank 2 is gone"), "{error}");
    }
}

#[test]
fn ranks_must_fit_together() {
    let message = |result: Result<Tcp>| result.err().expect("an error").to_string();
    assert!(message(Tcp::connect("127.0.0.1:1", 2, 2, SHORT)).contains("rank 2 of 2"));
    assert!(message(Tcp::connect("127.0.0.1:1", 0, 0, SHORT)).contains("rank 0 of 0"));
    Tcp::connect("none", 0, 1, SHORT).unwrap();
    // Another size, a rank twice, strangers: they are told, and the group comes together.
    let address = free_address();
    let results = on_threads(6, |i| {
        let late = || thread::sleep(Duration::from_millis(300));
        match i {
            0 | 1 => Tcp::connect(&address, i, 3, LONG),
            2 => {
                thread::sleep(Duration::from_secs(2));
                Tcp::connect(&address, 2, 3, LONG)
            }
            3 => {
                late();
                Tcp::connect(&address, 1, 4, LONG)
            }
            4 => {
                late();
                Tcp::connect(&address, 1, 3, LONG)
            }
            _ => {
                late();
                drop(TcpStream::connect(&address).unwrap());
                let mut stranger = TcpStream::connect(&address).unwrap();
                stranger
                    .write_all(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
                    .unwrap();
                let mut answer = Vec::new();
                // More may have been sent than was read, which resets the connection behind the answer.
                let _ = stranger.read_to_end(&mut answer);
                let answer = String::from_utf8_lossy(&answer).into_owned();
                assert!(answer.contains("not a rank"), "{answer:?}");
                Err(candle_core::Error::Msg(answer))
            }
        }
    });
    let [first, second, third, size, twice, _] = results.try_into().map_err(|_| "six").unwrap();
    assert!(message(size).contains("rank 1 is of 4 ranks, rank 0 of 3"));
    assert!(message(twice).contains("there is a rank 1 already"));
    let comms = [first, second, third].map(|comm| comm.unwrap());
    for sum in on_threads(3, |rank| {
        comms[rank].all_reduce_sum(&Tensor::ones(1, DType::F32, CPU)?)
    }) {
        assert_eq!(values(&sum.unwrap()), [3.0]);
    }
}

#[test]
fn a_rank_that_never_comes_is_an_error_on_the_others() {
    let address = free_address();
    let start = Instant::now();
    let results = on_threads(2, |rank| Tcp::connect(&address, rank, 3, SHORT));
    for message in messages(results) {
        assert!(
            message.contains("ranks [2] of 3 did not come within 700ms"),
            "{message}"
        );
    }
    let without_rank_0 = Tcp::connect(&free_address(), 1, 2, SHORT);
    let folder = tempfile::tempdir().unwrap();
    let without_file = Tcp::through_file(folder.path().join("none"), 1, 2, SHORT);
    let alone = Tcp::through_file(folder.path().join("one"), 0, 2, SHORT);
    assert!(start.elapsed() < SOON);
    let messages = messages(vec![without_rank_0, without_file, alone]);
    assert!(
        messages[0].contains("rank 1 did not find rank 0 within 700ms"),
        "{messages:?}"
    );
    assert!(
        messages[1].contains("did not find rank 0 within 700ms"),
        "{messages:?}"
    );
    assert!(messages[1].contains("none"), "{messages:?}");
    assert!(
        messages[2].contains("ranks [1] of 2 did not come"),
        "{messages:?}"
    );
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
    // Who is refused is named, for it may be the one that is missing.
    let address = free_address();
    let results = on_threads(2, |rank| Tcp::connect(&address, rank, 2 + rank, SHORT));
    let error = results[0].as_ref().err().expect("no rank 1").to_string();
    assert!(
        error.contains("rank 1 is of 3 ranks, rank 0 of 2"),
        "{error}"
    );
    assert!(Tcp::connect("127.0.0.1:x", 0, 2, SHORT).is_err());
    assert!(Tcp::through_file("/no such folder/ranks", 0, 2, SHORT).is_err());
}

/// Of an earlier run, whose port is closed, is a stranger's now, or that of another run.
#[test]
fn a_file_that_was_left_does_not_matter() {
    let stranger = TcpListener::bind("127.0.0.1:0").unwrap();
    let strangers = stranger.local_addr().unwrap();
    thread::spawn(move || {
        for connection in stranger.incoming() {
            let _ = connection.unwrap().write_all(b"220 mail ready\r\n");
        }
    });
    let folder = tempfile::tempdir().unwrap();
    let other = folder.path().join("other");
    let run = |path: &Path, left: Option<String>| {
        if let Some(left) = left {
            fs::write(path, left).unwrap();
        }
        let sums = on_threads(2, |rank| {
            if rank == 0 {
                thread::sleep(Duration::from_millis(500)); // the other one finds what was left
            }
            let comm = Tcp::through_file(path, rank, 2, LONG)?;
            comm.all_reduce_sum(&Tensor::ones(1, DType::F32, CPU)?)
        });
        for sum in sums {
            assert_eq!(values(&sum.unwrap()), [2.0]);
        }
    };
    let path = folder.path().join("ranks");
    for left in [
        format!("17\n{}\n", free_address()),
        format!("17\n{strangers}\n"),
        String::new(),
    ] {
        run(&path, Some(left));
    }
    // A run that waits for its ranks at the port that was an earlier one's.
    thread::scope(|scope| {
        let waiting = scope.spawn(|| Tcp::through_file(&other, 0, 2, LONG));
        let place = loop {
            match fs::read_to_string(&other) {
                Ok(place) => break place,
                Err(_) => thread::sleep(Duration::from_millis(10)),
            }
        };
        let (_, addresses) = place.split_once('\n').unwrap();
        run(&path, Some(format!("17\n{addresses}")));
        Tcp::through_file(&other, 1, 2, LONG).unwrap();
        waiting.join().unwrap().unwrap();
    });
}
