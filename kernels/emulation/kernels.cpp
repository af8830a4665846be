// The kernels' own source, compiled for the host: the only file that is instrumented in the race build.
#include "../cross_entropy.cu"
#include "kernels.h"

#define ENTRY(name) {#name, name}
#define ENTRIES_FOR_VARIANT(element, softcap)                                                                          \
  ENTRY(ce_forward_##element##softcap), ENTRY(ce_forward_##element##_stats##softcap),                                  \
      ENTRY(ce_backward_##element##softcap), ENTRY(ce_fused_##element##softcap),                                       \
      ENTRY(ce_fused_##element##_stats##softcap),                                                                      \
      ENTRY(ce_onchip_forward_##element##softcap), ENTRY(ce_onchip_forward_##element##_stats##softcap),                \
      ENTRY(ce_onchip_fused_##element##softcap), ENTRY(ce_onchip_fused_##element##_stats##softcap),                 \
      ENTRY(ce_distribution_forward_##element##softcap), ENTRY(ce_distribution_fused_##element##softcap),              \
      ENTRY(ce_distribution_backward_##element##softcap)
#define ENTRIES_FOR(element) ENTRIES_FOR_VARIANT(element, ), ENTRIES_FOR_VARIANT(element, _softcap)
#define MERGES(softcap) ENTRY(ce_merge##softcap), ENTRY(ce_merge_stats##softcap), ENTRY(ce_distribution_merge##softcap)

const KernelEntry kKernels[] = {ENTRIES_FOR(f32), ENTRIES_FOR(f16), ENTRIES_FOR(bf16), MERGES(), MERGES(_softcap), ENTRY(ce_classes), ENTRY(ce_reduce), {nullptr, nullptr}};
