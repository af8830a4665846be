//! How much memory each entry point takes beside the logits, counted by this binary's allocator.

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};

use candle_core::{DType, Device, Tensor, Var};
use candle_cross_entropy::{CrossEntropy, Reduction};

struct Counting;

static LIVE: AtomicUsize = AtomicUsize::new(0);
static PEAK: AtomicUsize = AtomicUsize::new(0);

fn grow(bytes: usize) {
    let live = LIVE.fetch_add(bytes, SeqCst) + bytes;
    PEAK.fetch_max(live, SeqCst);
}

// SAFETY: passes everything to the system's allocator unchanged.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        grow(layout.size());
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, memory: *mut u8, layout: Layout) {
        LIVE.fetch_sub(layout.size(), SeqCst);
        unsafe { System.dealloc(memory, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// What `run` returned, and the bytes live after it and at its peak, beyond those before it.
fn measure<T>(run: impl FnOnce() -> T) -> (T, usize, usize) {
    let before = LIVE.load(SeqCst);
    PEAK.store(before, SeqCst);
    let result = run();
    (
        result,
        LIVE.load(SeqCst).saturating_sub(before),
        PEAK.load(SeqCst).saturating_sub(before),
    )
}

// One test: the counters are the process's.
#[test]
fn bytes_beside_the_logits() {
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
