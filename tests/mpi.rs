//! `parallel::Mpi` under `mpirun` with 1, 2, 3 and 4 ranks: this program starts itself there, and each rank compares what it gets
//! with what one process alone computes.
//!
//!     cargo test --release --features mpi --test mpi
//!
//! Needs `mpirun`, `libopenmpi-dev` and `libclang-dev`.

use std::{
    env,
    process::{Command, ExitCode, Stdio},
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use candle_core::{DType, Device, Result, Tensor, Var};
use candle_cross_entropy::{
    CrossEntropy, Reduction, RowStats, Targets,
    parallel::{Communicator, Mpi},
};
use mpi::{Threading, traits::Communicator as _};

const CPU: &Device = &Device::Cpu;
/// What a rank does, in the environment.
const ROLE: &str = "CANDLE_CROSS_ENTROPY_MPI_TEST";
/// A run that takes longer waits for something that never comes.
const LIMIT: Duration = Duration::from_secs(120);
/// Within which a rank that is killed ends the others.
const END: Duration = Duration::from_secs(30);

fn main() -> ExitCode {
    match env::var(ROLE).as_deref() {
        Ok("work") => work(Threading::Serialized),
        Ok("one thread") => work(Threading::Funneled),
        Ok("die") => die(),
        _ => return start_all(),
    }
    ExitCode::SUCCESS
}

fn start_all() -> ExitCode {
    let mut failed = false;
    for ranks in 1..=4 {
        let started = Instant::now();
        let ok = run(ranks, "work", LIMIT);
        println!(
            "{} {ranks} ranks ({:.1} s)",
            if ok { "ok  " } else { "FAIL" },
            started.elapsed().as_secs_f64()
        );
        failed |= !ok;
    }
    let ok = run(2, "one thread", LIMIT);
    println!("{} ranks of one thread", if ok { "ok  " } else { "FAIL" });
    failed |= !ok;
    let started = Instant::now();
    let ended_well = run(3, "die", END);
    let ok = !ended_well && started.elapsed() < END;
    println!(
        "{} a killed rank ends the others ({:.1} s)",
        if ok { "ok  " } else { "FAIL" },
        started.elapsed().as_secs_f64()
    );
    failed |= !ok;
    match failed {
        true => ExitCode::FAILURE,
        false => ExitCode::SUCCESS,
    }
}

/// Whether all ranks end well, and in time.
fn run(ranks: usize, role: &str, limit: Duration) -> bool {
    let program = env::current_exe().expect("this program");
    let mut child = Command::new("mpirun")
        .args(["--oversubscribe", "--allow-run-as-root", "-n"])
        .arg(ranks.to_string())
        .arg(program)
        .env(ROLE, role)
        .env("RAYON_NUM_THREADS", "1")
        .stdin(Stdio::null())
        .spawn()
        .expect("mpirun, of the package openmpi-bin");
    let started = Instant::now();
    loop {
        if let Some(status) = child.try_wait().expect("a child") {
            return status.success();
        }
        if started.elapsed() > limit {
            let _ = child.kill();
            println!("no end after {} s", limit.as_secs());
            return false;
        }
        thread::sleep(Duration::from_millis(20));
    }
}

/// A rank is killed in the middle of a step; the others wait for it then.
fn die() {
    let universe = mpi::initialize().expect("MPI");
    let comm = Mpi::new(universe.world().duplicate());
    let local = Tensor::ones(3, DType::F32, CPU).unwrap();
    comm.all_gather(&local).unwrap();
    if comm.rank() == 1 {
        std::process::abort();
    }
    let gathered = comm.all_gather(&local);
    panic!("a rank is gone: {gathered:?}");
}

fn work(threading: Threading) {
    let (universe, _) = mpi::initialize_with_threading(threading).expect("MPI");
    let comm: Arc<dyn Communicator> = Arc::new(Mpi::new(universe.world().duplicate()));
    collectives(&*comm).unwrap();
    threads(&comm, threading);
    logits(&comm).unwrap();
    hidden_states(&comm).unwrap();
    rows(&comm).unwrap();
    errors(&comm);
}

fn values(tensor: &Tensor) -> Vec<f64> {
    let tensor = tensor.to_dtype(DType::F64).unwrap();
    tensor.flatten_all().unwrap().to_vec1().unwrap()
}

fn assert_close(a: &Tensor, b: &Tensor, tolerance: f64) {
    assert_eq!(a.dims(), b.dims());
    for (a, b) in values(a).into_iter().zip(values(b)) {
        assert!(
            a == b || (a - b).abs() <= tolerance * b.abs().max(1.0),
            "{a}, not {b}"
        );
    }
}

/// Every type that is sent, views, nothing, and what differs.
fn collectives(comm: &dyn Communicator) -> Result<()> {
    let (rank, size) = (comm.rank(), comm.size());
    for dtype in [
        DType::F32,
        DType::F64,
        DType::F16,
        DType::BF16,
        DType::U8,
        DType::U32,
        DType::I64,
    ] {
        for shape in [vec![2, 3], vec![], vec![5], vec![0, 4]] {
            let local = (Tensor::ones(shape.as_slice(), DType::F32, CPU)? * (1.0 + rank as f64))?;
            let local = local.to_dtype(dtype)?;
            let all = comm.all_gather(&local)?;
            assert_eq!(all.dims(), [&[size], &shape[..]].concat());
            assert_eq!(all.dtype(), dtype);
            if local.elem_count() > 0 {
                for from in 0..size {
                    assert!(
                        values(&all.get(from)?)
                            .iter()
                            .all(|v| *v == 1.0 + from as f64)
                    );
                }
            }
            let sum = comm.all_reduce_sum(&local)?;
            assert_eq!((sum.dims(), sum.dtype()), (&shape[..], dtype));
            let wanted = (size * (size + 1) / 2) as f64;
            assert!(values(&sum).iter().all(|v| *v == wanted));
        }
    }
    let matrix = Tensor::arange(0f32, 12.0, CPU)?.reshape((3, 4))?;
    let view = matrix.t()?.narrow(0, 1, 2)?;
    let all = comm.all_gather(&view)?;
    assert_eq!(values(&all.get(size - 1)?), [1.0, 5.0, 9.0, 2.0, 6.0, 10.0]);
    if size > 1 {
        let last = rank == size - 1;
        let shapes = comm.all_gather(&Tensor::zeros(2 + usize::from(last), DType::F32, CPU)?);
        let message = shapes.expect_err("shapes differ").to_string();
        assert!(
            message.contains(&format!("rank {} gave f32 of shape [3]", size - 1)),
            "{message}"
        );
        let dtype = if last { DType::U32 } else { DType::F32 };
        let types = comm.all_reduce_sum(&Tensor::zeros(2, dtype, CPU)?);
        assert!(
            types
                .expect_err("types differ")
                .to_string()
                .contains("gave u32")
        );
        let dims: &[usize] = if last { &[1; 9] } else { &[1] };
        let refused = comm.all_gather(&Tensor::zeros(dims, DType::F32, CPU)?);
        let message = refused.expect_err("too many dimensions").to_string();
        let says = if last {
            "9 dimensions"
        } else {
            "of a type that is not sent"
        };
        assert!(message.contains(says), "{message}");
    }
    Ok(())
}

/// From another thread only where MPI was told of threads.
fn threads(comm: &Arc<dyn Communicator>, threading: Threading) {
    let other = comm.clone();
    let result = thread::spawn(move || other.all_gather(&Tensor::zeros(1, DType::F32, CPU)?));
    let result = result.join().expect("no panic");
    match threading {
        Threading::Funneled => {
            let message = result.expect_err("of one thread").to_string();
            assert!(message.contains("Threading::Serialized"), "{message}");
        }
        _ => assert!(result.is_ok()),
    }
}

/// Uneven slices: one class for the last rank.
fn slice(comm: &dyn Communicator, vocabulary: usize) -> (usize, usize) {
    let (rank, size) = (comm.rank(), comm.size());
    if size == 1 {
        return (0, vocabulary);
    }
    let most = (vocabulary - 1) / (size - 1);
    let first = rank * most;
    let count = match rank + 1 {
        last if last == size => 1,
        last if last + 1 == size => vocabulary - 1 - first,
        _ => most,
    };
    (
        if rank + 1 == size {
            vocabulary - 1
        } else {
            first
        },
        count,
    )
}

/// The same on every rank: a sequence that repeats after no less than it has.
fn sequence(count: usize, seed: u64) -> Vec<f32> {
    let mut state = seed;
    let mut next = || {
        state = state
            .wrapping_mul(6364136223846793005)
            .wrapping_add(1442695040888963407);
        (state >> 40) as f32 / (1u64 << 24) as f32
    };
    (0..count).map(|_| 8.0 * next() - 4.0).collect()
}

fn random(shape: &[usize], seed: u64) -> Tensor {
    Tensor::from_vec(sequence(shape.iter().product(), seed), shape, CPU).unwrap()
}

const ROWS: usize = 6;
const VOCABULARY: usize = 37;

/// Losses with every kind of option, and targets of every kind.
fn losses() -> Vec<(CrossEntropy, Targets)> {
    let classes = Tensor::new(&[0i64, 36, -100, 12, 35, 36], CPU).unwrap();
    let eps = random(&[ROWS], 1).abs().unwrap().affine(0.2, 0.0).unwrap();
    let per_class = |seed| random(&[VOCABULARY], seed).abs().unwrap();
    let few = Tensor::new(
        &[
            [0i64, 36, 5],
            [1, -100, 2],
            [3, 3, 3],
            [36, 35, 34],
            [9, 20, 30],
            [-100; 3],
        ],
        CPU,
    );
    let shares = random(&[ROWS, 3], 2)
        .abs()
        .unwrap()
        .affine(0.2, 0.0)
        .unwrap();
    let plain = CrossEntropy::new().smoothing(&eps);
    let all = plain
        .clone()
        .z_loss(1e-3)
        .logit_scale(0.7)
        .softcap(20.0)
        .row_weights(&random(&[ROWS], 3).abs().unwrap())
        .class_weights(&per_class(4))
        .smoothing_prior(&per_class(5))
        .entropy_weight(0.1)
        .reduction(Reduction::Sum);
    let few = Targets::top_k(&few.unwrap(), &shares);
    let t = random(&[ROWS, VOCABULARY], 6)
        .abs()
        .unwrap()
        .affine(0.02, 0.0)
        .unwrap();
    let mut losses = Vec::new();
    for loss in [plain, all] {
        for targets in [classes.clone().into(), few.clone(), t.clone().into()] {
            losses.push((loss.clone(), targets));
        }
    }
    losses
}

fn part(targets: &Targets, first: usize, count: usize) -> Targets {
    match targets {
        Targets::Probabilities(t) => t.narrow(1, first, count).unwrap().into(),
        targets => targets.clone(),
    }
}

fn check_stats(actual: &RowStats, expected: &RowStats) {
    let pairs = [
        (&actual.nll, &expected.nll),
        (&actual.lse, &expected.lse),
        (&actual.entropy, &expected.entropy),
        (&actual.max_prob, &expected.max_prob),
        (&actual.grad_norm_sq, &expected.grad_norm_sq),
        (&actual.predicted, &expected.predicted),
    ];
    for (actual, expected) in pairs {
        assert_close(actual, expected, 1e-5);
    }
}

/// The same bits on every rank.
fn assert_same(comm: &dyn Communicator, tensor: &Tensor) {
    let all = comm.all_gather(tensor).unwrap();
    for rank in 1..comm.size() {
        assert!(
            values(&all.get(rank).unwrap()) == values(&all.get(0).unwrap()),
            "bits differ"
        );
    }
}

fn logits(comm: &Arc<dyn Communicator>) -> Result<()> {
    let whole = random(&[ROWS, VOCABULARY], 10);
    let (first, count) = slice(&**comm, VOCABULARY);
    for (loss, targets) in losses() {
        let expected = loss.reference(&whole, &targets)?;
        let loss = loss.vocab_shard(comm.clone(), first, VOCABULARY);
        let (mine, targets) = (whole.narrow(1, first, count)?, part(&targets, first, count));
        let actual = loss.loss_and_grad(&mine, &targets)?;
        assert_close(&actual.loss, &expected.loss, 1e-5);
        assert_close(&actual.grad, &expected.grad.narrow(1, first, count)?, 1e-6);
        check_stats(&actual.stats, &expected.stats);
        assert_same(&**comm, &actual.loss);
        let variable = Var::from_tensor(&mine)?;
        let (forward, stats) = loss.forward_with_stats(&variable, &targets)?;
        assert_close(&forward, &expected.loss, 1e-5);
        check_stats(&stats, &expected.stats);
        let gradients = forward.backward()?;
        let gradient = gradients.get(&variable).expect("a gradient");
        assert_close(gradient, &expected.grad.narrow(1, first, count)?, 1e-6);
    }
    Ok(())
}

fn hidden_states(comm: &Arc<dyn Communicator>) -> Result<()> {
    let (first, count) = slice(&**comm, VOCABULARY);
    for dtype in [DType::F32, DType::BF16] {
        let hidden = Var::from_tensor(&random(&[ROWS, 16], 20).to_dtype(dtype)?)?;
        let whole = Var::from_tensor(
            &random(&[VOCABULARY, 16], 21)
                .affine(0.2, 0.0)?
                .to_dtype(dtype)?,
        )?;
        let mine = Var::from_tensor(&whole.narrow(0, first, count)?)?;
        for (loss, targets) in losses() {
            let expected = loss.forward_linear(&hidden, &whole, None, &targets)?;
            let expected_gradients = expected.backward()?;
            let loss = loss.vocab_shard(comm.clone(), first, VOCABULARY);
            let targets = part(&targets, first, count);
            let actual = loss.forward_linear(&hidden, &mine, None, &targets)?;
            let gradients = actual.backward()?;
            assert_close(&actual, &expected, 1e-5);
            assert_same(&**comm, gradients.get(&hidden).expect("a gradient"));
            let tolerance = if dtype == DType::F32 { 1e-5 } else { 1e-2 };
            for (variable, whole, narrowed) in [(&hidden, &hidden, false), (&mine, &whole, true)] {
                let mut wanted = expected_gradients.get(whole).expect("a gradient").clone();
                if narrowed {
                    wanted = wanted.narrow(0, first, count)?;
                }
                assert_close(
                    gradients.get(variable).expect("a gradient"),
                    &wanted,
                    tolerance,
                );
            }
        }
    }
    Ok(())
}

/// Rank r has r rows: none, one, two, …
fn rows(comm: &Arc<dyn Communicator>) -> Result<()> {
    let (rank, size) = (comm.rank(), comm.size());
    let all = size * (size - 1) / 2;
    let logits = random(&[all.max(1), VOCABULARY], 30).narrow(0, 0, all)?;
    let targets: Vec<u32> = (0..all as u32).map(|i| 7 * i % 37).collect();
    let targets = Tensor::from_vec(targets, all, CPU)?;
    let expected = match all {
        0 => return Ok(()),
        _ => CrossEntropy::new().reference(&logits, &targets)?,
    };
    let start = rank * rank.saturating_sub(1) / 2;
    let loss = CrossEntropy::new().data_parallel(comm.clone());
    let mine = loss.loss_and_grad(
        &logits.narrow(0, start, rank)?,
        targets.narrow(0, start, rank)?,
    )?;
    let sum = comm.all_reduce_sum(&mine.loss)?;
    assert_close(&sum, &expected.loss, 1e-5);
    if rank > 0 {
        assert_close(&mine.grad, &expected.grad.narrow(0, start, rank)?, 1e-6);
    }
    Ok(())
}

/// What one rank does wrong, all hear.
fn errors(comm: &Arc<dyn Communicator>) {
    let (rank, size) = (comm.rank(), comm.size());
    let last = rank == size - 1;
    let logits = Tensor::zeros((2, 3), DType::F32, CPU).unwrap();
    let shard =
        |first, vocabulary| CrossEntropy::new().vocab_shard(comm.clone(), first, vocabulary);
    let targets = |bad: bool| Tensor::new(&[0u32, if bad { 99 } else { 1 }], CPU).unwrap();
    let message = |result: Result<Tensor>| result.expect_err("an error on every rank").to_string();

    let bad_target = shard(3 * rank, 3 * size).forward(&logits, targets(last));
    let says = message(bad_target);
    assert!(says.contains("targets: row 1 has 99"), "{says}");
    if !last {
        assert!(
            says.contains(&format!("rank {} failed", size - 1)),
            "{says}"
        );
    }
    let gap = shard(3 * rank, 3 * size + 1).forward(&logits, targets(false));
    assert!(message(gap).contains("no rank has class"));
    if size > 1 {
        let bad_shape = match last {
            true => shard(3 * rank, 3 * size)
                .forward(&logits, Tensor::zeros(5, DType::U32, CPU).unwrap()),
            false => shard(3 * rank, 3 * size).forward(&logits, targets(false)),
        };
        assert!(message(bad_shape).contains(if last {
            "targets: shape [5]"
        } else {
            "vocab_shard"
        }));
        let options = shard(3 * rank, 3 * size).z_loss(if last { 0.5 } else { 0.0 });
        assert!(
            message(options.forward(&logits, targets(false))).contains("z_loss is 0.5 on rank")
        );
    }
    let rows = CrossEntropy::new()
        .data_parallel(comm.clone())
        .forward(&logits, targets(last));
    assert!(message(rows).contains("targets: row 1 has 99"));
    // And go on.
    let fine = shard(3 * rank, 3 * size)
        .forward(&logits, targets(false))
        .unwrap();
    assert_close(
        &fine,
        &Tensor::new((3.0 * size as f32).ln(), CPU).unwrap(),
        1e-6,
    );
}
