//! A step captured once in a CUDA graph and replayed: the results follow the inputs' memory. A capture fails at what
//! waits for the device or copies from it, so it also says that nothing does.

use anyhow::{Context, Result, ensure};
use candle_core::{DType, Device, Tensor, Var, cuda_backend::cudarc::driver::sys};
use candle_cross_entropy::{CrossEntropy, parallel::threads};

use crate::{cases::values, report::Report};

/// `linear` with graphs of `forward_linear`.
pub fn check(device: &Device, linear: bool, report: &mut Report) {
    report.holds("CUDA graph of forward and backward", || of_logits(device));
    report.holds("CUDA graph with a value a sample", || {
        let (batch, length, width) = (4, 16, 1000);
        let targets = Tensor::arange(0u32, 64, device)?.reshape((batch, length))?;
        let smoothing = Tensor::new(&[[0.1f32], [0.0], [0.3], [0.2]], device)?;
        let loss = CrossEntropy::new()
            .smoothing(&smoothing)
            .row_weights(&smoothing);
        replay(device, &[&[batch, length, width]], &|vars| {
            loss.forward(&vars[0], &targets)
        })
    });
    report.holds("CUDA graph on a stream of its own", || {
        let device = Device::new_cuda_with_stream(0)?;
        // SAFETY: all that has to do with this device's tensors happens on its one stream, or after it is waited for.
        unsafe { device.as_cuda_device()?.disable_event_tracking() };
        of_logits(&device)
    });
    report.holds("CUDA graph of a rank", || {
        let (rows, width) = (64, 4099);
        let targets = Tensor::arange(0u32, rows as u32, device)?;
        let loss = alone(CrossEntropy::new().smoothing(0.1), width);
        replay(device, &[&[rows, width]], &|vars| {
            loss.forward(&vars[0], &targets)
        })
    });
    if !linear {
        return;
    }
    report.holds("CUDA graph of forward_linear of a rank", || {
        let (rows, vocab, depth) = (64, 999, 72);
        let targets = Tensor::arange(0u32, rows as u32, device)?;
        let loss = alone(CrossEntropy::new().smoothing(0.1), vocab);
        replay(device, &[&[rows, depth], &[vocab, depth]], &|vars| {
            loss.forward_linear(&vars[0], &vars[1], None, &targets)
        })
    });
    // Slices of the vocabulary and blocks of rows; logits computed again and kept.
    for (rows, vocab) in [(64, 4099), (700, 129)] {
        for budget in [0, usize::MAX] {
            let name = format!("CUDA graph of forward_linear, {rows}×{vocab}, budget {budget}");
            report.holds(&name, || {
                let depth = 72;
                let targets: Vec<u32> = (0..rows).map(|i| (i * 31 % vocab) as u32).collect();
                let targets = Tensor::from_vec(targets, rows, device)?;
                let smoothing = Tensor::full(0.1f32, rows, device)?;
                let loss = CrossEntropy::new()
                    .smoothing(&smoothing)
                    .memory_budget(budget)
                    .tile_bytes(2 * rows * vocab / 5);
                replay(
                    device,
                    &[&[rows, depth], &[vocab, depth], &[vocab]],
                    &|vars| loss.forward_linear(&vars[0], &vars[1], Some(&vars[2]), &targets),
                )
            });
        }
    }
}

/// With a group of ranks of its own for classes and for rows, in which there is no other.
fn alone(loss: CrossEntropy, vocab: usize) -> CrossEntropy {
    let rank = || threads(1).remove(0);
    loss.vocab_shard(rank(), 0, vocab).data_parallel(rank())
}

fn of_logits(device: &Device) -> Result<String> {
    let (rows, width) = (64, 4099);
    let targets = Tensor::arange(0u32, rows as u32, device)?;
    let smoothing = Tensor::full(0.1f32, rows, device)?;
    let loss = CrossEntropy::new().smoothing(&smoothing);
    replay(device, &[&[rows, width]], &|vars| {
        loss.forward(&vars[0], &targets)
    })
}

/// `loss` of bf16 variables of some shapes, and its backward.
fn replay(
    device: &Device,
    shapes: &[&[usize]],
    loss: &dyn Fn(&[Var]) -> candle_core::Result<Tensor>,
) -> Result<String> {
    let cuda = device.as_cuda_device()?;
    // candle uploads shapes of its own kernels; during a capture it may only find them uploaded already.
    let _uploads = cuda.enable_cuda_graph_htod_cache();
    let random = |shape: &[usize], deviation: f32| {
        Tensor::randn(0f32, deviation, shape, device)?.to_dtype(DType::BF16)
    };
    let vars = shapes
        .iter()
        .map(|shape| Ok(Var::from_tensor(&random(shape, 1.0)?)?))
        .collect::<Result<Vec<_>>>()?;
    let step = || -> Result<Vec<Tensor>> {
        let value = loss(&vars)?;
        let mut store = value.backward()?;
        let mut results = vec![value];
        for var in &vars {
            results.push(store.remove(var).context("no gradient")?);
        }
        Ok(results)
    };
    let read = |results: &[Tensor]| results.iter().map(values).collect::<Result<Vec<_>>>();
    step()?; // loads modules, which a capture must not
    step()?;
    let stream = cuda.cuda_stream();
    stream.synchronize()?;
    stream.begin_capture(sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL)?;
    let captured = step();
    // The outputs are allocated by the graph, anew at each launch.
    let flags = sys::CUgraphInstantiate_flags::CUDA_GRAPH_INSTANTIATE_FLAG_AUTO_FREE_ON_LAUNCH;
    let graph = stream.end_capture(flags);
    let captured = captured?;
    let graph = graph?.context("nothing was captured")?;
    for replay in 0..3 {
        for (var, shape) in vars.iter().zip(shapes) {
            var.set(&random(shape, 0.5 + replay as f32)?)?;
        }
        graph.launch()?;
        stream.synchronize()?;
        let got = read(&captured)?;
        ensure!(
            got == read(&step()?)?,
            "replay {replay} differs from a step without the graph"
        );
    }
    Ok("3 replays with new inputs, bitwise as without".into())
}
