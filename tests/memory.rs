//! How much memory each entry point takes beside the logits, counted by this binary's allocator.

use std::sync::Mutex;

use candle_core::{DType, Device, Tensor, Var};
use candle_cross_entropy::{CrossEntropy, Reduction};
use counting_allocator::Counting;

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// What `run` returned, and the bytes live after it and at its peak, beyond those before it.
fn measure<T>(run: impl FnOnce() -> T) -> (T, usize, usize) {
    let (result, usage) = counting_allocator::measure(run);
    (result, usage.live, usage.peak)
}

/// Held by each test: the counters are the process's.
static ALONE: Mutex<()> = Mutex::new(());

#[track_caller]
fn at_most(what: &str, bytes: usize, limit: usize) {
    assert!(bytes <= limit, "{what}: {bytes} bytes, at most {limit}");
}

#[test]
fn bytes_beside_the_logits() {
    let _alone = ALONE.lock().unwrap();
    let (rows, width) = (160, 4099);
    let targets = Tensor::zeros(rows, DType::U32, &Device::Cpu).unwrap();
    let smoothing = Tensor::full(0.1f32, rows, &Device::Cpu).unwrap();
    for dtype in [DType::F32, DType::BF16, DType::F16, DType::F64] {
        let size = rows * width * dtype.size_in_bytes();
        let small = size / 8;
        let logits = || Tensor::zeros((rows, width), dtype, &Device::Cpu).unwrap();
        for reduction in [Reduction::Mean, Reduction::None] {
            let loss = CrossEntropy::new()
                .smoothing(&smoothing)
                .reduction(reduction);
            let untracked = logits();
            loss.loss_and_grad(&untracked, &targets).unwrap(); // starts the threads
            let check = |what: &str, bytes: usize, limit: usize| {
                assert!(
                    bytes <= limit,
                    "{what}, {dtype:?}: {bytes} bytes, at most {limit}"
                );
            };

            let (_, live, peak) = measure(|| loss.forward(&untracked, &targets).unwrap());
            check("forward keeps", live, small);
            check("forward's peak", peak, small);
            let (_, live, peak) =
                measure(|| loss.forward_with_stats(&untracked, &targets).unwrap());
            check("forward_with_stats keeps", live, small);
            check("forward_with_stats' peak", peak, small);
            let (_, live, peak) = measure(|| loss.loss_and_grad(&untracked, &targets).unwrap());
            check("loss_and_grad keeps", live, size + small);
            check("loss_and_grad's peak", peak, size + small);
            let (_, live, peak) =
                measure(|| loss.loss_and_grad_inplace(untracked, &targets).unwrap());
            check("loss_and_grad_inplace keeps", live, small);
            check("loss_and_grad_inplace's peak", peak, small);

            let tracked = Var::from_tensor(&logits()).unwrap();
            let (forward, live, peak) = measure(|| loss.forward(&tracked, &targets).unwrap());
            check("a tracked forward keeps", live, small);
            check("a tracked forward's peak", peak, small);
            // candle adds the gradient to zeros, giving a third tensor.
            let (gradients, live, peak) =
                measure(|| forward.sum_all().unwrap().backward().unwrap());
            check("backward keeps", live, size + small);
            check("backward's peak", peak, 3 * size + small);
            drop((forward, gradients));

            // The gradients keep nothing else alive, be it the logits or what the loss saved.
            let run = |inplace: bool| {
                measure(|| {
                    let variable = Var::from_tensor(&logits()).unwrap();
                    let scaled = if inplace {
                        (variable.as_tensor() * 1.0).unwrap()
                    } else {
                        variable.as_tensor().clone()
                    };
                    let loss = loss.clone().inplace_backward(inplace);
                    let forward = loss.forward(&scaled, &targets).unwrap().sum_all().unwrap();
                    forward.backward().unwrap()
                })
            };
            for inplace in [false, true] {
                let (gradients, live, _) = run(inplace);
                check("the gradients keep", live, size + small);
                drop(gradients);
            }

            // In place saves one tensor of the logits' size. Below them is a small tensor, so that the loss's backward
            // is the peak.
            let table = Var::zeros((8, width), dtype, &Device::Cpu).unwrap();
            let rows_of_table = Tensor::zeros(rows, DType::U32, &Device::Cpu).unwrap();
            let peak = |inplace: bool| {
                let selected = table.index_select(&rows_of_table, 0).unwrap();
                let loss = loss.clone().inplace_backward(inplace);
                let forward = loss
                    .forward(&selected, &targets)
                    .unwrap()
                    .sum_all()
                    .unwrap();
                measure(|| forward.backward().unwrap()).2
            };
            check("backward's peak", peak(false), 3 * size + small);
            check("inplace_backward's peak", peak(true), 2 * size + small);
        }
    }
}

/// Hidden states, projection and targets of N rows, V classes and depth D.
struct Linear {
    hidden: Var,
    weight: Var,
    targets: Tensor,
}

impl Linear {
    fn new(rows: usize, classes: usize, depth: usize, dtype: DType) -> Self {
        let var = |n| Var::ones((n, depth), dtype, &Device::Cpu).unwrap();
        Self {
            hidden: var(rows),
            weight: var(classes),
            targets: Tensor::zeros(rows, DType::U32, &Device::Cpu).unwrap(),
        }
    }

    fn forward(&self, loss: &CrossEntropy) -> Tensor {
        loss.forward_linear(&self.hidden, &self.weight, None, &self.targets)
            .unwrap()
    }

    /// Peaks of the forward and of the backward, and the largest allocation of both.
    fn peaks(&self, loss: &CrossEntropy) -> [usize; 3] {
        let (value, forward) = counting_allocator::measure(|| self.forward(loss));
        let (_, backward) = counting_allocator::measure(|| value.backward().unwrap());
        let largest = forward.largest.max(backward.largest);
        [forward.peak, backward.peak, largest]
    }
}

const MIB: usize = 1 << 20;
/// Inputs, results and normaliser of a row.
const ROW: usize = 300;

/// With a small budget there is a tile, and in the backward the sums of one side. candle adds each gradient to zeros, so
/// of the larger one there are three.
#[test]
fn forward_linear_never_holds_the_logits() {
    let _alone = ALONE.lock().unwrap();
    let depth = 8;
    for dtype in [DType::F32, DType::BF16, DType::F16, DType::F64] {
        let compute = if dtype == DType::F64 { 8 } else { 4 };
        for (rows, classes) in [(512, 32768), (32768, 512)] {
            let linear = Linear::new(rows, classes, depth, dtype);
            let loss = CrossEntropy::new().smoothing(0.1).memory_budget(0);
            linear.forward(&loss).backward().unwrap(); // starts threads, which have memory of their own
            let logits = rows * classes * compute;
            let (short, long) = (rows.min(classes) * depth, rows.max(classes) * depth);
            // The narrow types' factors are copied: the short one whole, of the long one what a tile needs.
            let gradients = 3 * (long + short) * dtype.size_in_bytes();
            let copies = 2 * short * compute;
            let small = MIB / 2 + rows * ROW;
            for (tile, tile_bytes) in [(MIB, MIB), (8 * MIB, 0)] {
                let what = format!("{dtype:?} {rows}×{classes}, tiles of {tile}");
                let loss = match tile_bytes {
                    0 => loss.clone(),
                    bytes => loss.clone().tile_bytes(bytes),
                };
                let tile = tile + tile / 8; // and what its factors' copies take
                assert!(tile + gradients + copies + small < logits / 2);
                let [forward, backward, largest] = linear.peaks(&loss);
                at_most(&format!("{what}: forward"), forward, tile + copies + small);
                let limit = tile + gradients + copies + small;
                at_most(&format!("{what}: backward"), backward, limit);
                at_most(&format!("{what}: one allocation"), largest, logits / 2);
            }
        }
    }
}

/// Without gradients that candle would copy: one factor is frozen, and the other small.
#[test]
fn forward_linear_does_not_grow_with_the_longer_side() {
    let _alone = ALONE.lock().unwrap();
    let loss = CrossEntropy::new().memory_budget(0).tile_bytes(MIB);
    let peak = |rows: usize, classes: usize| {
        let linear = Linear::new(rows, classes, 8, DType::F32);
        let (hidden, weight) = (linear.hidden.as_tensor(), linear.weight.as_tensor());
        let frozen = |tensor: &Tensor| tensor.detach();
        let run = || {
            let (hidden, weight) = if rows < classes {
                (hidden.clone(), frozen(weight))
            } else {
                (frozen(hidden), weight.clone())
            };
            let loss = loss.forward_linear(&hidden, &weight, None, &linear.targets);
            loss.unwrap().backward().unwrap()
        };
        run();
        measure(run).2
    };
    let (short, long) = (256, 16384);
    at_most("V", peak(short, 4 * long), peak(short, long) + MIB / 8);
    let more_rows = 3 * long * ROW;
    at_most("N", peak(4 * long, short), peak(long, short) + more_rows);
}

/// What the forward keeps is within the budget, gone after the backward, and nothing where nobody asks for a gradient.
#[test]
fn forward_linear_keeps_to_its_budget() {
    let _alone = ALONE.lock().unwrap();
    let (rows, classes) = (256, 16384);
    let linear = Linear::new(rows, classes, 8, DType::F32);
    let logits = rows * classes * 4;
    let small = MIB / 4;
    let loss = CrossEntropy::new().tile_bytes(MIB);
    linear.forward(&loss).backward().unwrap();
    for (budget, kept) in [
        (0, 0),
        (5 * MIB + 1, 5 * MIB),
        (logits, logits),
        (usize::MAX, logits),
    ] {
        let loss = loss.clone().memory_budget(budget);
        let (value, live, _) = measure(|| linear.forward(&loss));
        at_most("kept", live, kept + small);
        at_most("kept at least", kept, live);
        let (gradients, _, peak) = measure(|| value.backward().unwrap());
        let sizes = 3 * (rows + classes) * 8 * 4;
        at_most("backward", peak, MIB + sizes + small);
        let (_, live, _) = measure(|| drop((value, gradients)));
        assert_eq!(live, 0);
    }
    let run = || {
        let (hidden, weight) = (linear.hidden.detach(), linear.weight.detach());
        let loss = loss.clone().memory_budget(usize::MAX);
        loss.forward_linear(&hidden, &weight, None, &linear.targets)
    };
    let (_, live, peak) = measure(|| run().unwrap());
    at_most("an untracked forward keeps", live, small);
    at_most("an untracked forward", peak, MIB + small);
}
