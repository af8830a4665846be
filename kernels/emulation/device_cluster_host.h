// The part of `namespace dev` that needs sm_90: clusters, mbarriers, bulk copies, kernels that overlap.
#pragma once
#include "emulator.h"

namespace dev {

DEVICE void begin_kernel() { emu::begin_kernel(); }
DEVICE void cluster_arrive_relaxed(emu::Site site = emu::Site::current()) { emu::cluster_arrive_relaxed(site); }
DEVICE void cluster_wait(emu::Site site = emu::Site::current()) { emu::cluster_wait(site); }
DEVICE void mbarrier_init(uint64_t* mbarrier, unsigned arrivals, emu::Site site = emu::Site::current()) {
  emu::mbarrier_init(mbarrier, arrivals, site);
}
DEVICE void mbarrier_fence_init() { emu::mbarrier_fence_init(); }
DEVICE void mbarrier_arrive_expect(uint64_t* mbarrier, unsigned bytes, emu::Site site = emu::Site::current()) {
  emu::mbarrier_arrive_expect(mbarrier, bytes, site);
}
DEVICE void mbarrier_wait(uint64_t* mbarrier, unsigned parity, emu::Site site = emu::Site::current()) {
  emu::mbarrier_wait(mbarrier, parity, site);
}
DEVICE void mbarrier_wait_cluster(uint64_t* mbarrier, unsigned parity, emu::Site site = emu::Site::current()) {
  emu::mbarrier_wait_cluster(mbarrier, parity, site);
}
DEVICE void bulk_copy(void* shared, const void* global, unsigned bytes, uint64_t* mbarrier,
                      emu::Site site = emu::Site::current()) {
  emu::bulk_copy(shared, global, bytes, mbarrier, site);
}
template <class T>
DEVICE void send(T* place, const T& value, unsigned rank, uint64_t* mbarrier, emu::Site site = emu::Site::current()) {
  static_assert(sizeof(T) % 16 == 0 && alignof(T) >= 16, "sent 16 bytes at once");
  emu::send(place, &value, sizeof(T), rank, mbarrier, site);
}

}  // namespace dev
