// The part of `namespace dev` that needs sm_90: clusters, mbarriers, bulk copies, kernels that overlap. Below, a kernel
// that uses it traps, but for begin_kernel, which every kernel does.
#pragma once

namespace dev {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
DEVICE void begin_kernel() {}
DEVICE void cluster_arrive_relaxed() { __trap(); }
DEVICE void cluster_wait() { __trap(); }
DEVICE void mbarrier_init(uint64_t*, unsigned) { __trap(); }
DEVICE void mbarrier_fence_init() { __trap(); }
DEVICE void mbarrier_arrive_expect(uint64_t*, unsigned) { __trap(); }
DEVICE void mbarrier_wait(uint64_t*, unsigned) { __trap(); }
DEVICE void mbarrier_wait_cluster(uint64_t*, unsigned) { __trap(); }
DEVICE void bulk_copy(void*, const void*, unsigned, uint64_t*) { __trap(); }
template <class T> DEVICE void send(T*, const T&, unsigned, uint64_t*) { __trap(); }
#else
// The first thing in every kernel, in all its threads: waits until the kernels before it in the stream have ended and what
// they wrote can be seen, then lets the next one start, whose blocks come to wait here (programmatic dependent launch).
//
// No access to global memory comes before it, and no block leaves without it: a kernel waits for the one before it alone,
// so one that had not waited could end, and let the next one go on, while its own predecessor still runs. The next one
// may start after the wait only: so one that reads before it waits, as others' may, runs beside no other kernel than this.
DEVICE void begin_kernel() { asm volatile("griddepcontrol.wait;\n\tgriddepcontrol.launch_dependents;" ::: "memory"); }

DEVICE unsigned shared_address(const void* p) { return static_cast<unsigned>(__cvta_generic_to_shared(p)); }

// A barrier of the cluster's threads in two halves. It orders no memory but the mbarriers that `mbarrier_fence_init`
// released: it says that all blocks have started.
DEVICE void cluster_arrive_relaxed() { asm volatile("barrier.cluster.arrive.relaxed;" ::: "memory"); }
DEVICE void cluster_wait() { asm volatile("barrier.cluster.wait.acquire;" ::: "memory"); }
DEVICE void mbarrier_init(uint64_t* mbarrier, unsigned arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(mbarrier)), "r"(arrivals) : "memory");
}
// Lets bulk copies, and blocks behind the cluster's barrier, see the mbarriers that this thread initialised.
DEVICE void mbarrier_fence_init() {
  asm volatile("fence.mbarrier_init.release.cluster;\n\tfence.proxy.async.shared::cta;" ::: "memory");
}
DEVICE void mbarrier_arrive_expect(uint64_t* mbarrier, unsigned bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(mbarrier)), "r"(bytes) : "memory");
}
// Until the phase of this parity has ended; the second form sees what other blocks of the cluster sent.
DEVICE void mbarrier_wait(uint64_t* mbarrier, unsigned parity) {
  asm volatile(
      "{\n\t.reg .pred ended;\n"
      "again_%=:\n\tmbarrier.try_wait.parity.shared::cta.b64 ended, [%0], %1;\n\t@!ended bra again_%=;\n\t}" ::"r"(
          shared_address(mbarrier)),
      "r"(parity)
      : "memory");
}
DEVICE void mbarrier_wait_cluster(uint64_t* mbarrier, unsigned parity) {
  asm volatile(
      "{\n\t.reg .pred ended;\n"
      "again_%=:\n\tmbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 ended, [%0], %1;\n\t"
      "@!ended bra again_%=;\n\t}" ::"r"(shared_address(mbarrier)),
      "r"(parity)
      : "memory");
}
// Starts a copy of global memory, multiples of 16 bytes, that completes on the mbarrier. The L2 need not keep it.
DEVICE void bulk_copy(void* shared, const void* global, unsigned bytes, uint64_t* mbarrier) {
  uint64_t policy;
  asm volatile("createpolicy.fractional.L2::evict_first.b64 %0;" : "=l"(policy));
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;" ::"r"(
          shared_address(shared)),
      "l"(__cvta_generic_to_global(global)), "r"(bytes), "r"(shared_address(mbarrier)), "l"(policy)
      : "memory");
}
// Sends a value to the same place in the shared memory of block `rank` of the cluster; its bytes complete on the mbarrier
// of that block. Whoever waits there knows that this thread has read what it read before; of what it wrote nothing is said.
template <class T> DEVICE void send(T* place, const T& value, unsigned rank, uint64_t* mbarrier) {
  static_assert(sizeof(T) % 16 == 0 && alignof(T) >= 16, "sent 16 bytes at once");
  unsigned to, completes;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(to) : "r"(shared_address(place)), "r"(rank));
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(completes) : "r"(shared_address(mbarrier)), "r"(rank));
  UNROLL for (unsigned i = 0; i < sizeof(T) / 16; i++) {
    uint4 v;
    memcpy(&v, reinterpret_cast<const char*>(&value) + i * 16, 16);
    asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [%0], {%1, %2, %3, %4}, [%5];" ::"r"(
                     to + i * 16),
                 "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w), "r"(completes)
                 : "memory");
  }
}
#endif
}  // namespace dev
