//! `parallel::Nccl` with as many ranks as there are GPUs, three at the most: threads of this process, that find each other as
//! threads and over TCP.
//!
//!     cargo test --release --features nccl --test nccl
//!
//! On a machine without a GPU through `scripts/emulated-gpu.sh`, with `EMULATED_GPU_COUNT=3`.

use std::{
    process::abort,
    sync::{
        Arc,
        mpsc::{self, RecvTimeoutError},
    },
    thread,
    time::{Duration, Instant},
};

use candle_core::{
    DType, Device, Result, Tensor, Var,
    cuda_backend::{WrapErr, cudarc::driver::sys},
};
use candle_cross_entropy::{
    CrossEntropy,
    parallel::{Communicator, Nccl, Tcp, threads},
};

type Comm = Arc<dyn Communicator>;

const CPU: &Device = &Device::Cpu;
/// A run that takes longer waits for something that never comes.
const LIMIT: Duration = Duration::from_secs(120);

fn main() {
    let most = (0..3).take_while(|i| Device::new_cuda(*i).is_ok()).count();
    assert!(most > 0, "no GPU");
    for over_tcp in [false, true] {
        for size in 1..=most {
            let run = |name: &str, f: fn(Comm, &Device) -> Result<()>| {
                let start = Instant::now();
                for result in ranks(size, over_tcp, f) {
                    result.unwrap();
                }
                let host = if over_tcp { "TCP" } else { "threads" };
                let seconds = start.elapsed().as_secs_f64();
                println!("ok   {name}, {size} ranks over {host} ({seconds:.1} s)");
            };
            run("operations", operations);
            run("sums of narrow types", sums_of_narrow_types);
            run("tensors on the CPU", on_the_cpu);
            run("what differs", what_differs);
            run("losses", losses);
            run("a CUDA graph", graph);
            run("a rank that is gone", gone);
            not_all_have_a_gpu(size, over_tcp);
        }
    }
}

/// What `f` gives on each rank, in rank order, its host's end and its GPU's number.
fn on_hosts<R: Send>(size: usize, over_tcp: bool, f: impl Fn(Comm, usize) -> R + Sync) -> Vec<R> {
    let (done, end) = mpsc::channel();
    thread::spawn(move || {
        if end.recv_timeout(LIMIT) == Err(RecvTimeoutError::Timeout) {
            eprintln!("a rank waits for another one");
            abort();
        }
    });
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("ranks");
    let (f, path) = (&f, &path);
    let results = thread::scope(|scope| {
        let spawn = |(rank, host): (usize, Comm)| {
            scope.spawn(move || {
                let host = match over_tcp {
                    true => Arc::new(Tcp::through_file(path, rank, size, LIMIT).unwrap()),
                    false => host,
                };
                f(host, rank)
            })
        };
        let handles: Vec<_> = threads(size).into_iter().enumerate().map(spawn).collect();
        let join = |handle: thread::ScopedJoinHandle<R>| handle.join().expect("no panic");
        handles.into_iter().map(join).collect()
    });
    let _ = done.send(());
    results
}

fn ranks(
    size: usize,
    over_tcp: bool,
    f: impl Fn(Comm, &Device) -> Result<()> + Sync,
) -> Vec<Result<()>> {
    on_hosts(size, over_tcp, |host, rank| {
        // On a stream of its own, which can be captured.
        let device = Device::new_cuda_with_stream(rank)?;
        // SAFETY: all that has to do with this device's tensors happens on its one stream.
        unsafe { device.as_cuda_device()?.disable_event_tracking() };
        let comm = Nccl::new(host, &device)?;
        assert_eq!((comm.rank(), comm.size()), (rank, size));
        f(Arc::new(comm), &device)
    })
}

fn values(tensor: &Tensor) -> Vec<f64> {
    let tensor = tensor.to_device(CPU).unwrap();
    let tensor = tensor.to_dtype(DType::F64).unwrap();
    tensor.flatten_all().unwrap().to_vec1().unwrap()
}

fn message<T>(result: Result<T>) -> String {
    result.err().expect("an error on every rank").to_string()
}

/// Every type that is sent, views, and nothing.
fn operations(comm: Comm, device: &Device) -> Result<()> {
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
        for shape in [vec![2, 3], vec![], vec![1025]] {
            let count: usize = shape.iter().product();
            let of = |rank: usize| (0..count).map(move |i| (10 * rank + i % 7) as f64);
            let local = Tensor::from_iter(of(rank), CPU)?.to_dtype(dtype)?;
            let local = local.reshape(shape.as_slice())?.to_device(device)?;
            let all = comm.all_gather(&local)?;
            assert_eq!(all.dims(), [&[size], &shape[..]].concat());
            assert_eq!(all.dtype(), dtype);
            assert!(all.device().same_device(device));
            let expected: Vec<f64> = (0..size).flat_map(of).collect();
            assert_eq!(values(&all), expected);
            let sum = comm.all_reduce_sum(&local)?;
            assert_eq!((sum.dims(), sum.dtype()), (&shape[..], dtype));
            assert!(sum.device().same_device(device));
            let first_of_all: f64 = (0..size).map(|rank| 10.0 * rank as f64).sum();
            let expected = (0..count).map(|i| first_of_all + (size * (i % 7)) as f64);
            assert_eq!(values(&sum), expected.collect::<Vec<_>>());
            // What was given is as it was.
            assert_eq!(values(&local), of(rank).collect::<Vec<_>>());
        }
    }
    let matrix = Tensor::arange(0f32, 12.0, device)?.reshape((3, 4))?;
    let all = comm.all_gather(&matrix.t()?.narrow(0, 1, 2)?)?;
    assert_eq!(values(&all.get(size - 1)?), [1.0, 5.0, 9.0, 2.0, 6.0, 10.0]);
    let all = comm.all_gather(&matrix.narrow(0, 2, 1)?)?;
    assert_eq!(values(&all.get(size - 1)?), [8.0, 9.0, 10.0, 11.0]);
    let nothing = comm.all_gather(&matrix.narrow(0, 0, 0)?)?;
    assert_eq!(nothing.dims(), [size, 0, 4]);
    // Of a variable: no graph comes with it.
    let var = Var::from_tensor(&matrix)?;
    assert!(!comm.all_reduce_sum(&var.affine(2.0, 0.0)?)?.track_op());
    Ok(())
}

/// 256 + 1 + 1 in bf16 would stay 256, and 2048 + 1 + 1 in f16 2048.
fn sums_of_narrow_types(comm: Comm, device: &Device) -> Result<()> {
    for (dtype, large) in [(DType::BF16, 256.0), (DType::F16, 2048.0)] {
        let mine = if comm.rank() == 0 { large } else { 1.0 };
        let mine = Tensor::new(&[mine], CPU)?
            .to_dtype(dtype)?
            .to_device(device)?;
        let others = (comm.size() - 1) as f64;
        // 257 and 2049 lie between two numbers.
        let expected = if comm.size() == 2 {
            large
        } else {
            large + others
        };
        assert_eq!(values(&comm.all_reduce_sum(&mine)?), [expected]);
    }
    Ok(())
}

/// By the host's communicator, a loss's own messages among them.
fn on_the_cpu(comm: Comm, _: &Device) -> Result<()> {
    let (rank, size) = (comm.rank(), comm.size());
    let all = comm.all_gather(&Tensor::new(&[rank as f64], CPU)?)?;
    assert!(all.device().is_cpu());
    assert_eq!(
        values(&all),
        (0..size).map(|r| r as f64).collect::<Vec<_>>()
    );
    let sum = comm.all_reduce_sum(&Tensor::new(&[1u32], CPU)?)?;
    assert_eq!(values(&sum), [size as f64]);
    let logits = Tensor::zeros((2, 3), DType::F32, CPU)?;
    let targets = Tensor::new(&[0u32, 1], CPU)?;
    let loss = CrossEntropy::new().vocab_shard(comm, 3 * rank, 3 * size);
    let loss = loss.forward(&logits, &targets)?.to_scalar::<f32>()?;
    assert!((loss - (3.0 * size as f32).ln()).abs() < 1e-6);
    Ok(())
}

/// An error on every rank; and they go on.
fn what_differs(comm: Comm, device: &Device) -> Result<()> {
    let (rank, size) = (comm.rank(), comm.size());
    let last = rank == size - 1;
    let dims: &[usize] = if last { &[1; 9] } else { &[1] };
    let says = message(comm.all_gather(&Tensor::zeros(dims, DType::F32, device)?));
    assert!(
        says.contains(if last {
            "9 dimensions"
        } else {
            "of a type that is not sent"
        }) || size == 1
    );
    let another = Device::new_cuda_with_stream(rank)?;
    let says = message(comm.all_gather(&Tensor::zeros(1, DType::F32, &another)?));
    assert!(says.contains("the device that was given"), "{says}");
    if size > 1 {
        let given = Tensor::zeros(2 + usize::from(last), DType::F32, device)?;
        let says = message(comm.all_gather(&given));
        let expected = format!(
            "rank {} gave f32 of shape [3], rank 0 f32 of shape [2]",
            size - 1
        );
        assert!(says.contains(&expected), "{says}");
        // In f32, as sums of bf16 are, they are alike.
        let dtype = if last { DType::BF16 } else { DType::F32 };
        let says = message(comm.all_reduce_sum(&Tensor::zeros(2, dtype, device)?));
        assert!(says.contains("gave bf16"), "{says}");
        let given = Tensor::zeros(2, DType::F32, device)?;
        let says = message(match last {
            true => comm.all_reduce_sum(&given),
            false => comm.all_gather(&given),
        });
        assert!(
            says.contains("called all_reduce_sum, rank 0 all_gather"),
            "{says}"
        );
        let given = Tensor::zeros(2, DType::F32, if last { CPU } else { device })?;
        let says = message(comm.all_reduce_sum(&given));
        // The host's communicator sees another operation, or values of another type.
        assert!(says.contains(&format!("rank {} ", size - 1)), "{says}");
    }
    let sum = comm.all_reduce_sum(&Tensor::ones(1, DType::F32, device)?)?;
    assert_eq!(values(&sum), [size as f64]);
    Ok(())
}

/// Classes of a vocabulary, and rows of a batch, each rank's on its GPU: what one GPU gives of all.
fn losses(comm: Comm, device: &Device) -> Result<()> {
    let (rank, size) = (comm.rank(), comm.size());
    let (rows, classes, depth) = (3 * size, 11, 8);
    let vocab = classes * size;
    let some = |shape: (usize, usize), scale: f64| {
        let values = (0..shape.0 * shape.1).map(|i| (scale * (i as f64).sin()) as f32);
        Tensor::from_iter(values, device)?.reshape(shape)
    };
    let close = |got: &Tensor, expected: &Tensor| {
        let (got, expected) = (values(got), values(expected));
        assert_eq!(got.len(), expected.len());
        for (a, e) in got.into_iter().zip(expected) {
            assert!((a - e).abs() <= 2e-6 * (1.0 + e.abs()), "{a} for {e}");
        }
    };
    let loss = CrossEntropy::new().smoothing(0.1);
    let targets = Tensor::from_iter((0..rows).map(|i| (i * 13 % vocab) as u32), device)?;
    let hidden = Var::from_tensor(&some((rows, depth), 1.0)?)?;
    let whole = Var::from_tensor(&some((vocab, depth), 2.0)?)?;
    let expected = loss.forward_linear(&hidden, &whole, None, &targets)?;
    let gradients = expected.backward()?;
    let own = |of: &Tensor| of.narrow(0, classes * rank, classes);

    let slice = Var::from_tensor(&own(&whole)?)?;
    let sharded = (loss.clone()).vocab_shard(comm.clone(), classes * rank, vocab);
    let got = sharded.forward_linear(&hidden, &slice, None, &targets)?;
    let of_slice = got.backward()?;
    close(&got, &expected);
    close(
        of_slice.get(&hidden).unwrap(),
        gradients.get(&hidden).unwrap(),
    );
    close(
        of_slice.get(&slice).unwrap(),
        &own(gradients.get(&whole).unwrap())?,
    );

    let logits = hidden.matmul(&whole.t()?)?.detach();
    let expected = loss.loss_and_grad(&logits, &targets)?;
    let columns = |of: &Tensor| of.narrow(1, classes * rank, classes);
    let got = sharded.loss_and_grad(&columns(&logits)?, &targets)?;
    close(&got.loss, &expected.loss);
    close(&got.grad, &columns(&expected.grad)?);
    close(&got.stats.entropy, &expected.stats.entropy);

    // The last rank has most rows.
    let part = |of: &Tensor| match rank + 1 == size {
        true => of.narrow(0, rank, rows - rank),
        false => of.narrow(0, rank, 1),
    };
    let got = loss
        .data_parallel(comm.clone())
        .loss_and_grad(&part(&logits)?, &part(&targets)?)?;
    close(&comm.all_reduce_sum(&got.loss)?, &expected.loss);
    close(&got.grad, &part(&expected.grad)?);
    Ok(())
}

/// Captured once, and run with other values.
fn graph(comm: Comm, device: &Device) -> Result<()> {
    let cuda = device.as_cuda_device()?;
    let _uploads = cuda.enable_cuda_graph_htod_cache();
    let size = comm.size();
    let var = Var::zeros(5, DType::F32, device)?;
    let step = || {
        let all = comm.all_gather(&var)?;
        Result::Ok((all, comm.all_reduce_sum(&var)?))
    };
    step()?;
    let stream = cuda.cuda_stream();
    stream.synchronize().w()?;
    let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
    stream.begin_capture(mode).w()?;
    let captured = step();
    let flags = sys::CUgraphInstantiate_flags::CUDA_GRAPH_INSTANTIATE_FLAG_AUTO_FREE_ON_LAUNCH;
    let graph = stream.end_capture(flags).w()?.expect("a graph");
    let (all, sum) = captured?;
    for round in 1..4 {
        let of = |rank: usize| (round * (rank + 1)) as f32;
        var.set(&Tensor::full(of(comm.rank()), 5, device)?)?;
        graph.launch().w()?;
        stream.synchronize().w()?;
        let wanted: Vec<f64> = (0..size)
            .flat_map(|rank| [f64::from(of(rank)); 5])
            .collect();
        assert_eq!(values(&all), wanted);
        let wanted: f64 = (0..size).map(|rank| f64::from(of(rank))).sum();
        assert_eq!(values(&sum), [wanted; 5]);
    }
    Ok(())
}

/// The others hear of it, and come to an end.
fn gone(comm: Comm, device: &Device) -> Result<()> {
    let (rank, size) = (comm.rank(), comm.size());
    let mine = Tensor::ones(3, DType::F32, device)?;
    comm.all_gather(&mine)?;
    if rank == size - 1 {
        return Ok(());
    }
    let says = message(comm.all_reduce_sum(&mine));
    assert!(
        says.contains(&format!("rank {} is gone", size - 1)),
        "{says}"
    );
    Ok(())
}

fn not_all_have_a_gpu(size: usize, over_tcp: bool) {
    let results = on_hosts(size, over_tcp, |host, rank| match rank + 1 == size {
        true => Nccl::new(host, CPU),
        false => Nccl::new(host, &Device::new_cuda(rank)?),
    });
    for (rank, result) in results.into_iter().enumerate() {
        let says = message(result.map(|_| ()));
        let expected = match rank + 1 == size {
            true => "a rank on Cpu".into(),
            false => format!("did not start on rank {}", size - 1),
        };
        assert!(says.contains(&expected), "{says}");
    }
}
