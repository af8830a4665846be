// The part of `namespace dev` that needs sm_90: clusters, mbarriers, bulk copies, kernels that overlap.
#pragma once
#include "emulator.h"

namespace dev {

DEVICE void begin_kernel() { emu::begin_kernel(); }
DEVICE void sync_cluster(emu::Site site = emu::Site::current()) { emu::sync_cluster(site); }
DEVICE void cluster_arrive_relaxed(emu::Site site = emu::Site::current()) { emu::cluster_arrive_relaxed(site); }
DEVICE void cluster_wait(emu::Site site = emu::Site::current()) { emu::cluster_wait(site); }
template <class T> DEVICE T* map_to_rank(T* shared, unsigned rank, emu::Site site = emu::Site::current()) {
  return static_cast<T*>(emu::map_to_rank(shared, rank, site));
}
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
DEVICE void bulk_copy(void* shared, const void* global, unsigned bytes, uint64_t* mbarrier,
                      emu::Site site = emu::Site::current()) {
  emu::bulk_copy(shared, global, bytes, mbarrier, site);
}

}  // namespace dev
