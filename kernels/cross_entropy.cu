// Cross-entropy with a label-smoothing coefficient a row: the kernels. One block computes one row; which threads do
// what depends on the row's length and type only, so a row's bits do not depend on its neighbours.
//
//   ce_forward_*   row losses (and statistics) from one read of the logits, or of a slice of the vocabulary after another
//   ce_backward_*  gradient from the forward's normalisers: one read, one write
//   ce_fused_*     both in one launch: the second read of a row finds it in the cache
//   ce_onchip_*    forward and fused from sm_90 on, a cluster of blocks a row: no second read (on_chip.cuh)
//   ce_distribution_forward_*, _backward_*, _fused_*   the same of any target distribution (distribution.cuh)
//   ce_merge_*, ce_distribution_merge_*   the forward's results of slices that ranks have, to losses (ranks.cuh)
//   ce_classes     looks at the classes' weights and prior
//   ce_reduce      row losses to the result, in a fixed order
//
// Line by line the mathematics is that of src/reference.rs.
#include "distribution.cuh"
#include "on_chip.cuh"
#include "ranks.cuh"
#include "row.cuh"

// Merges a slice of the vocabulary into what is known of its row; true when that is all of it.
template <bool STATS, bool SOFTCAP>
DEVICE bool continue_row(const Params& p, uint64_t row, const RowInputs& in, const Stretch& slice, Partial& others, float& x_y,
                         bool has_target, const Transform<SOFTCAP>& transform) {
  Running& running = static_cast<Running*>(p.running)[row];
  if (slice.begin > static_cast<int>(p.first_class)) {
    others = merge<STATS>(running.others, others, transform);
    if (!has_target) x_y = running.target_logit;
  }
  if (p.ranks == 0 && slice.begin + slice.classes == static_cast<int>(p.vocab)) return true;
  running.others = others;
  running.target_logit = x_y;
  if (p.ranks != 0) running.digest = digest_of(in);
  return false;
}

template <class T, bool STATS, bool SOFTCAP, bool GRAD> DEVICE void row_loss(const Params& p) {
  dev::begin_kernel();
  const uint64_t row = p.first_row + blockIdx.x;
  const Stretch stored = stored_row(p);
  const RowInputs in = read_inputs(p, row);
  if (in.kind != RowKind::kCounted) {  // the whole block
    const float value = in.kind == RowKind::kIgnored ? 0.f : NAN;
    finish_unused_row<STATS>(p, row, value);
    if constexpr (GRAD) fill_gradient<T>(p, row, value, stored);
    return;
  }
  const Transform<SOFTCAP> transform(p);
  const T* x = static_cast<const T*>(p.logits) + row_offset<uint64_t>(p.logits_rows, blockIdx.x);
  const int target = in.target - stored.begin;
  const bool has_target = target >= 0 && target < stored.classes;
  float x_y = has_target ? widen_one(x[target]) : NAN;
  Partial others = sum_row<T, STATS, SOFTCAP, !GRAD>(x, stored.classes, target, transform);
  const bool writes = threadIdx.x == 0;
  if (STATS && writes) find_column(others, x, stored);
  if constexpr (GRAD) {
    SHARED_ARRAY(GradientFactors, factors, 1);
    if (threadIdx.x < 32) {
      const RowState state = finish_row<STATS, SOFTCAP>(p, row, in, others, x_y, transform, writes);
      const GradientFactors f = gradient_factors<SOFTCAP>(p, in, state, gradient_scale(p, row), transform);
      if (writes) factors[0] = f;
    }
    dev::sync_block();  // the factors are there; and in place, nothing may be overwritten before it is read
    write_gradient<T, SOFTCAP, false>(p, row, x, stored, in.target, factors[0], transform);
  } else if (writes && (!p.running || continue_row<STATS>(p, row, in, stored, others, x_y, has_target, transform))) {
    finish_row<STATS, SOFTCAP>(p, row, in, others, x_y, transform, true);
  }
}

template <class T, bool SOFTCAP> DEVICE void row_gradient(const Params& p) {
  dev::begin_kernel();
  const uint64_t row = p.first_row + blockIdx.x;
  const Stretch stored = stored_row(p);
  const RowInputs in = read_inputs(p, row);
  if (in.kind != RowKind::kCounted) {
    fill_gradient<T>(p, row, in.kind == RowKind::kIgnored ? 0.f : NAN, stored);
    return;
  }
  const T* x = static_cast<const T*>(p.logits) + row_offset<uint64_t>(p.logits_rows, blockIdx.x);
  const Transform<SOFTCAP> transform(p);
  SHARED_ARRAY(GradientFactors, factors, 1);
  if (threadIdx.x < 32) {
    const GradientFactors f = gradient_factors<SOFTCAP>(p, in, static_cast<const RowState*>(p.state)[row], gradient_scale(p, row), transform);
    if (threadIdx.x == 0) factors[0] = f;
  }
  dev::sync_block();  // the factors are there
  write_gradient<T, SOFTCAP, false>(p, row, x, stored, in.target, factors[0], transform);
}

// Threads a row at the most (src/kernels/select.rs chooses), and how many such blocks an SM must hold. Without statistics three
// took up to a quarter less time than two on an H200; elsewhere some would spill.
#define ROW_KERNEL KERNEL void __launch_bounds__(256, 2)
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800  // where bf16 is converted by hand
#define GRADIENT_KERNEL ROW_KERNEL
#else
#define GRADIENT_KERNEL KERNEL void __launch_bounds__(256, 3)
#endif
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 1000
#define LEAN_KERNEL GRADIENT_KERNEL
#else
#define LEAN_KERNEL ROW_KERNEL
#endif
#define ON_CHIP_KERNEL KERNEL void __launch_bounds__(256, 4)

#define INSTANTIATE_SOFTCAP(TYPE, SUFFIX, SOFTCAP, LEAN)                                                           \
  LEAN ce_forward_##TYPE##SUFFIX(Params p) { row_loss<TYPE, false, SOFTCAP, false>(p); }                          \
  ROW_KERNEL ce_forward_##TYPE##_stats##SUFFIX(Params p) { row_loss<TYPE, true, SOFTCAP, false>(p); }             \
  LEAN ce_fused_##TYPE##SUFFIX(Params p) { row_loss<TYPE, false, SOFTCAP, true>(p); }                             \
  ROW_KERNEL ce_fused_##TYPE##_stats##SUFFIX(Params p) { row_loss<TYPE, true, SOFTCAP, true>(p); }                \
  ON_CHIP_KERNEL ce_onchip_forward_##TYPE##SUFFIX(Params p) { row_on_chip<TYPE, false, SOFTCAP, false>(p); }       \
  ON_CHIP_KERNEL ce_onchip_forward_##TYPE##_stats##SUFFIX(Params p) { row_on_chip<TYPE, true, SOFTCAP, false>(p); } \
  ON_CHIP_KERNEL ce_onchip_fused_##TYPE##SUFFIX(Params p) { row_on_chip<TYPE, false, SOFTCAP, true>(p); }          \
  ON_CHIP_KERNEL ce_onchip_fused_##TYPE##_stats##SUFFIX(Params p) { row_on_chip<TYPE, true, SOFTCAP, true>(p); }   \
  GRADIENT_KERNEL ce_backward_##TYPE##SUFFIX(Params p) { row_gradient<TYPE, SOFTCAP>(p); }                         \
  ROW_KERNEL ce_distribution_forward_##TYPE##SUFFIX(Params p) { distribution_loss<TYPE, SOFTCAP, false>(p); }       \
  ROW_KERNEL ce_distribution_fused_##TYPE##SUFFIX(Params p) { distribution_loss<TYPE, SOFTCAP, true>(p); }          \
  ROW_KERNEL ce_distribution_backward_##TYPE##SUFFIX(Params p) { distribution_gradient<TYPE, SOFTCAP>(p); }
#define INSTANTIATE(TYPE)                          \
  INSTANTIATE_SOFTCAP(TYPE, , false, LEAN_KERNEL)  \
  INSTANTIATE_SOFTCAP(TYPE, _softcap, true, ROW_KERNEL)

using f32 = float;
INSTANTIATE(f32)
INSTANTIATE(f16)
INSTANTIATE(bf16)

#define MERGE_KERNEL KERNEL void __launch_bounds__(32)
#define INSTANTIATE_MERGE(SUFFIX, SOFTCAP)                                                      \
  MERGE_KERNEL ce_merge##SUFFIX(Params p) { merge_ranks<false, SOFTCAP>(p); }                   \
  MERGE_KERNEL ce_merge_stats##SUFFIX(Params p) { merge_ranks<true, SOFTCAP>(p); }              \
  MERGE_KERNEL ce_distribution_merge##SUFFIX(Params p) { merge_distributions<SOFTCAP>(p); }
INSTANTIATE_MERGE(, false)
INSTANTIATE_MERGE(_softcap, true)

// Checks the classes' values, and finds the largest of the prior. One block.
KERNEL void __launch_bounds__(1024) ce_classes(Params p) {
  dev::begin_kernel();
  SHARED_ARRAY(int, largest_of_warps, 32);
  SHARED_ARRAY(unsigned, digests, 32);
  constexpr int kBad = 0x7fffffff;  // finite numbers that are not negative have smaller bits, in the same order
  constexpr int kAhead = 8;  // loads in flight: nothing but latency
  int largest = 0;
  unsigned digest = 0;
  for (unsigned first = threadIdx.x; first < p.vocab; first += kAhead * blockDim.x) {
    float c[kAhead], u[kAhead];
    UNROLL for (int i = 0; i < kAhead; i++) {
      const unsigned k = first + i * blockDim.x;
      c[i] = p.class_weights && k < p.vocab ? p.class_weights[k] : 1.f;
      u[i] = p.prior && k < p.vocab ? p.prior[k] : p.prior ? 0.f : 1.f;
    }
    UNROLL for (int i = 0; i < kAhead; i++) {
      const bool good = c[i] >= 0.f && c[i] < INFINITY && u[i] >= 0.f && u[i] < INFINITY;
      const int bits = good ? static_cast<int>(dev::bits_from_float(u[i] + 0.f)) : kBad;
      largest = bits > largest ? bits : largest;
      const unsigned k = first + i * blockDim.x;
      if (p.ranks != 0 && k < p.vocab) digest += digest_with(digest_with(k, c[i]), u[i]);
    }
  }
  largest = dev::reduce_max(largest);
  digest = dev::reduce_add(digest);
  if (threadIdx.x % 32 == 0) {
    largest_of_warps[threadIdx.x / 32] = largest;
    digests[threadIdx.x / 32] = digest;
  }
  dev::sync_block();
  if (threadIdx.x >= 32) return;
  const bool is_warp = threadIdx.x < blockDim.x / 32;
  largest = dev::reduce_max(is_warp ? largest_of_warps[threadIdx.x] : 0);
  digest = dev::reduce_add(is_warp ? digests[threadIdx.x] : 0u);
  if (threadIdx.x != 0) return;
  const bool good = largest != kBad && largest != 0;  // a prior of zeros spreads nothing
  const float scale = 1.f / fmaxf(dev::float_from_bits(static_cast<unsigned>(largest)), 0x1p-126f);
  *p.class_check = {good ? 1.f : NAN, scale, digest};
  if (!good && p.first_error) dev::atomic_min(p.first_error, 0);
}

// The first class that a row's target names, or the ignore_index where it names none.
DEVICE long long first_named_class(const Params& p, uint64_t row) {
  for (unsigned j = 0; j < p.entries; j++) {
    const long long target = named_class(p, row, j);
    if (target != p.ignore_index) return target;
  }
  return p.ignore_index;
}

// The sums of loss and of w, times c of the class where a row has one, over rows in f64, every thread's rows and all merges
// in a fixed order. One block.
KERNEL void __launch_bounds__(1024) ce_reduce(Params p) {
  dev::begin_kernel();
  SHARED_ARRAY(double, losses, 32);
  SHARED_ARRAY(double, weights, 32);
  double loss = 0.0, weight = 0.0;
  const bool one_class = p.entries == 1 && !p.probabilities;
  const auto add = [&](long long target, float w, float l) {
    if (target == p.ignore_index) return;
    const bool has_weight = one_class && p.class_weights && target >= 0 && target < static_cast<long long>(p.vocab);
    if (has_weight) w *= p.class_weights[target];
    if (w >= 0.f && w < INFINITY) weight += w;
    loss += l;
  };
  const auto weight_of = [&](uint64_t row) { return p.weights ? p.weights[row_offset<unsigned>(p.weight_rows, row)] : 1.f; };
  const auto loss_of = [&](uint64_t row) { return p.reduced ? p.loss[row] : 0.f; };
  if (p.entries == 1) {
    constexpr int kAhead = 4;  // rows whose loads are in flight: this kernel is nothing but latency
    for (uint64_t first = threadIdx.x; first < p.rows; first += kAhead * blockDim.x) {
      long long target[kAhead];
      float w[kAhead], l[kAhead];
      UNROLL for (int u = 0; u < kAhead; u++) {
        const uint64_t row = first + u * blockDim.x;
        target[u] = row < p.rows ? read_target(p, row) : p.ignore_index;
        w[u] = row < p.rows ? weight_of(row) : 1.f;
        l[u] = row < p.rows ? loss_of(row) : 0.f;
      }
      UNROLL for (int u = 0; u < kAhead; u++) add(target[u], w[u], l[u]);
    }
  } else {
    for (uint64_t row = threadIdx.x; row < p.rows; row += blockDim.x) {
      add(p.entries == 0 ? !p.ignore_index : first_named_class(p, row), weight_of(row), loss_of(row));
    }
  }
  UNROLL for (int lane = 16; lane > 0; lane >>= 1) {
    loss += dev::shuffle_xor(loss, lane);
    weight += dev::shuffle_xor(weight, lane);
  }
  if (threadIdx.x % 32 == 0) {
    losses[threadIdx.x / 32] = loss;
    weights[threadIdx.x / 32] = weight;
  }
  dev::sync_block();
  if (threadIdx.x != 0) return;
  loss = weight = 0.0;
  for (unsigned warp = 0; warp < blockDim.x / 32; warp++) {
    loss += losses[warp];
    weight += weights[warp];
  }
  if (p.divisor) weight = *p.divisor;  // of all ranks' rows
  else p.total_weight[0] = static_cast<float>(weight);
  if (p.reduced) {
    const double mean = p.mean && weight != 0.0 ? loss / weight : loss;
    p.reduced[0] = static_cast<float>(mean * p.result_scale);
  }
}
