//! Code compiled for each instruction set, of which the best is chosen at run time.

/// Work for one thread.
pub(super) trait Task {
    fn run<const FUSED: bool, S: pulp::Simd>(self, simd: S);
}

struct Dispatched<K>(K);

impl<K: Task> pulp::WithSimd for Dispatched<K> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: pulp::Simd>(self, simd: S) {
        if S::IS_SCALAR {
            self.0.run::<false, S>(simd)
        } else {
            self.0.run::<true, S>(simd)
        }
    }
}

pub(super) fn dispatch<K: Task>(task: K) {
    pulp::Arch::new().dispatch(Dispatched(task))
}
