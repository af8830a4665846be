//! An output projection in slices: each rank holds some of its rows, and trains them. Ranks are two threads, or, with MPI,
//! processes:
//!
//! ```sh
//! cargo run --release --example vocab_parallel
//! cargo build --release --features mpi --example vocab_parallel
//! mpirun -n 4 target/release/examples/vocab_parallel
//! ```
//!
//! Numbers after the program's name are the rows (512), the hidden width (256), the vocabulary (32000) and the steps (5).

use std::{sync::Arc, thread, time::Instant};

use candle_core::{DType, Device, Result, Tensor, Var};
use candle_cross_entropy::{CrossEntropy, parallel::Communicator};

fn main() -> Result<()> {
    #[cfg(feature = "mpi")]
    {
        use candle_cross_entropy::parallel::Mpi;
        use mpi::traits::Communicator as _;
        let universe = mpi::initialize().expect("MPI is not initialised yet");
        let world = universe.world();
        if world.size() > 1 || std::env::var_os("OMPI_COMM_WORLD_SIZE").is_some() {
            let result = train(Arc::new(Mpi::new(world.duplicate())));
            if let Err(error) = &result {
                eprintln!("rank {}: {error}", world.rank());
                world.abort(1); // the others would wait for this one
            }
            return result;
        }
    }
    // A thread owns its end of the group: whoever ends, by an error too, keeps no other waiting.
    let ranks = candle_cross_entropy::parallel::threads(2).into_iter();
    let ranks: Vec<_> = ranks.map(|comm| thread::spawn(|| train(comm))).collect();
    ranks
        .into_iter()
        .try_for_each(|rank| rank.join().expect("no panic"))
}

fn train(comm: Arc<dyn Communicator>) -> Result<()> {
    let device = &Device::Cpu;
    let number = |n: usize, default: usize| {
        let given = std::env::args().nth(n);
        given.map_or(default, |given| given.parse().expect("a number"))
    };
    let (rows, dim, vocab, steps) = (
        number(1, 512),
        number(2, 256),
        number(3, 32000),
        number(4, 5),
    );
    let (rank, size) = (comm.rank(), comm.size());
    let (first, end) = (rank * vocab / size, (rank + 1) * vocab / size);

    // On every rank the same: hidden states, as the layers below would leave them, and targets of the whole vocabulary.
    let all = Tensor::arange(0u32, (rows * dim) as u32, device)?.to_dtype(DType::F32)?;
    let hidden = Var::from_tensor(&(all * 0.7)?.sin()?.reshape((rows, dim))?)?;
    let targets: Vec<u32> = (0..rows).map(|i| (i * 7919 % vocab) as u32).collect();
    let targets = Tensor::from_vec(targets, rows, device)?;
    // This rank's alone.
    let projection = Var::zeros((end - first, dim), DType::F32, device)?;

    let loss = CrossEntropy::new()
        .smoothing(0.1)
        .vocab_shard(comm, first, vocab);
    for step in 0..steps {
        let start = Instant::now();
        let loss = loss.forward_linear(&hidden, &projection, None, &targets)?;
        let gradients = loss.backward()?;
        // The gradient of the hidden states, for the layers below, is whole on every rank.
        let of_hidden = gradients.get(&hidden).expect("tracked").sqr()?.sum_all()?;
        let of_projection = gradients.get(&projection).expect("tracked");
        projection.set(&(projection.as_tensor() - (of_projection * 5.0)?)?)?;
        if rank == 0 {
            println!(
                "{size} ranks, step {step}: loss {:.5}, hidden gradient {:.5}, {:.0} ms",
                loss.to_scalar::<f32>()?,
                of_hidden.to_scalar::<f32>()?.sqrt(),
                start.elapsed().as_secs_f64() * 1e3
            );
        }
    }
    Ok(())
}
