//! A global allocator that counts: how much memory a piece of work takes.
//!
//! ```
//! use counting_allocator::{Counting, measure};
//!
//! #[global_allocator]
//! static ALLOCATOR: Counting = Counting;
//!
//! let (bytes, usage) = measure(|| vec![0u8; 1000]);
//! assert!(usage.live >= bytes.len() && usage.peak >= usage.live);
//! ```

use std::{
    alloc::{GlobalAlloc, Layout, System},
    sync::atomic::{AtomicUsize, Ordering::SeqCst},
};

/// To be the program's `#[global_allocator]`: else nothing is counted.
pub struct Counting;

static LIVE: AtomicUsize = AtomicUsize::new(0);
static PEAK: AtomicUsize = AtomicUsize::new(0);
static LARGEST: AtomicUsize = AtomicUsize::new(0);

fn grow(bytes: usize) {
    let live = LIVE.fetch_add(bytes, SeqCst) + bytes;
    PEAK.fetch_max(live, SeqCst);
    LARGEST.fetch_max(bytes, SeqCst);
}

// SAFETY: passes everything to the system's allocator unchanged. What GlobalAlloc would make of `alloc` is passed on
// too: the system zeroes and resizes large blocks without touching them.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        grow(layout.size());
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        grow(layout.size());
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn realloc(&self, memory: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        grow(size); // before the old block is gone: both exist where one is copied
        LIVE.fetch_sub(layout.size(), SeqCst);
        unsafe { System.realloc(memory, layout, size) }
    }

    unsafe fn dealloc(&self, memory: *mut u8, layout: Layout) {
        LIVE.fetch_sub(layout.size(), SeqCst);
        unsafe { System.dealloc(memory, layout) }
    }
}

/// Bytes beyond those in use before.
#[derive(Clone, Copy, Debug)]
pub struct Usage {
    /// Still in use afterwards.
    pub live: usize,
    pub peak: usize,
    /// The largest single allocation.
    pub largest: usize,
}

/// What `work` returns, and the memory that the whole process took meanwhile.
pub fn measure<T>(work: impl FnOnce() -> T) -> (T, Usage) {
    let before = LIVE.load(SeqCst);
    PEAK.store(before, SeqCst);
    LARGEST.store(0, SeqCst);
    let result = work();
    let beyond = |bytes: &AtomicUsize| bytes.load(SeqCst).saturating_sub(before);
    let usage = Usage {
        live: beyond(&LIVE),
        peak: beyond(&PEAK),
        largest: LARGEST.load(SeqCst),
    };
    (result, usage)
}
