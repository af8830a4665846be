// One row: its inputs, its loss and statistics from the merged partial result, its gradient.
#pragma once
#include "partial.cuh"

// Counted in Offset, 64 bits for logits and gradients: src/call.rs sees that 32 suffice for smoothing and weights.
template <class Offset> DEVICE Offset row_offset(const RowOffsets& rows, uint64_t number) {
  Offset offset = 0, row = static_cast<Offset>(number);
  ROLLED for (Offset d = 0; d + 1 < static_cast<Offset>(rows.dims); d++) {
    const Offset size = static_cast<Offset>(rows.sizes[d]);
    offset += row % size * static_cast<Offset>(rows.strides[d]);
    row /= size;
  }
  return offset + row * static_cast<Offset>(rows.strides[rows.dims - 1]);
}

enum class RowKind { kCounted, kIgnored, kBad };

struct RowInputs {
  RowKind kind;
  int target;
  float smoothing;
  float weight;
};

DEVICE long long read_target(const Params& p, uint64_t row) {
  if (p.targets_are_i64) return static_cast<const int64_t*>(p.targets)[row];
  return static_cast<const uint32_t*>(p.targets)[row];
}

// A row's inputs as they are in memory, whatever they are.
struct LoadedInputs {
  long long target;
  float smoothing;
  float weight;
};

DEVICE LoadedInputs load_inputs(const Params& p, uint64_t row) {
  return {read_target(p, row), p.smoothing ? p.smoothing[row_offset<unsigned>(p.smoothing_rows, row)] : p.uniform_smoothing,
          p.weights ? p.weights[row_offset<unsigned>(p.weight_rows, row)] : 1.f};
}

DEVICE void report_bad_row(const Params& p, uint64_t row) {
  if (p.first_error && threadIdx.x == 0) dev::atomic_min(p.first_error, row + 1);
}

DEVICE RowInputs check_inputs(const Params& p, uint64_t row, const LoadedInputs& loaded) {
  const long long target = loaded.target;
  RowInputs in = {RowKind::kCounted, 0, loaded.smoothing, loaded.weight};
  if (target == p.ignore_index) {
    in.kind = RowKind::kIgnored;
    return in;
  }
  // Comparisons that NaN fails.
  const bool target_good = target >= 0 && target < static_cast<long long>(p.vocab);
  const bool smoothing_good = in.smoothing >= 0.f && in.smoothing <= 1.f;
  const bool weight_good = in.weight >= 0.f && in.weight < INFINITY;
  if (target_good && smoothing_good && weight_good) {
    in.target = static_cast<int>(target);
    return in;
  }
  in.kind = RowKind::kBad;
  report_bad_row(p, row);
  return in;
}

DEVICE RowInputs read_inputs(const Params& p, uint64_t row) { return check_inputs(p, row, load_inputs(p, row)); }

// Ranks must be given the same beside their logits: adds a word to a digest of it.
DEVICE unsigned digest_with(unsigned digest, unsigned word) {
  digest = (digest ^ word) * 0x9e3779b1u;
  return digest ^ digest >> 15;
}
DEVICE unsigned digest_with(unsigned digest, float x) { return digest_with(digest, dev::bits_from_float(x + 0.f)); }  // -0 is 0

DEVICE unsigned digest_of(const RowInputs& in) {
  return digest_with(digest_with(digest_with(0u, static_cast<unsigned>(in.target)), in.smoothing), in.weight);
}

// Columns `begin` to `begin + width` of a row, of which the first `classes` are classes and the rest is padding.
struct Stretch {
  int begin;
  int classes;
  int width;
};

// What is in memory of every row: all of it, or a slice of the vocabulary.
DEVICE Stretch stored_row(const Params& p) {
  const int begin = static_cast<int>(p.first_column), width = static_cast<int>(p.width);
  const int classes = static_cast<int>(p.end_class) - begin;
  return {begin, classes < width ? classes : width, width};
}

// Sums keep no index: looks for `largest` in its group of the classes at `x` again, lowest index first.
template <class Sums, class T> DEVICE void find_column(Sums& a, const T* x, const Stretch& stretch) {
  const int start = static_cast<int>(a.at) * kGroup<T>;
  a.at = static_cast<unsigned>(stretch.begin + start);
  for (int k = kGroup<T> - 1; k >= 0; k--) {
    if (start + k < stretch.classes && widen_one(x[start + k]) == a.largest) {
      a.at = static_cast<unsigned>(stretch.begin + start + k);
    }
  }
}

// Loss, statistics and normaliser of a row whose classes but the target merge to `others`. The thread with `writes`
// writes them; with statistics it must know the column of the largest.
template <bool STATS, bool SOFTCAP>
DEVICE RowState finish_row(const Params& p, uint64_t row, const RowInputs& in, Partial others, float x_y,
                           const Transform<SOFTCAP>& transform, bool writes) {
  const bool target_masked = x_y == -INFINITY;
  const bool target_largest = x_y >= others.largest;
  const float largest = target_largest ? x_y : others.largest, reference = transform.reference(largest);
  if (target_largest && !target_masked) relate<STATS>(others, largest, reference, transform);
  const float d_y = transform.exact(x_y, largest, reference), e_y = dev::exp2_approx(d_y);
  const float sum = others.exp + e_y, inverse = 1.f / sum;
  const unsigned classes = others.classes + (target_masked ? 0u : 1u);
  const float count = static_cast<float>(classes);
  const bool nan = sum != sum;

  // Where the target is the largest, the sum is its own term and a little: log1p keeps the little.
  const float odds = others.exp / e_y;
  const float log2_sum = target_largest ? dev::fma(kLog2E, dev::log1p(odds), d_y) : kLog2E * dev::log(sum);
  float nll = target_largest ? dev::log1p(odds) : kLn2 * (log2_sum - d_y);
  if (!SOFTCAP && d_y == -INFINITY) nll = dev::fma(-2.f, transform.half_nats(x_y, largest), kLn2 * log2_sum);
  const float lse = transform.lse(largest, reference, log2_sum);
  RowState state = {nan ? NAN : largest, log2_sum, inverse, classes};
  if (classes == 0) state = {0.f, 0.f, 0.f, 0u};
  if (!writes) return state;

  // What has no weight counts nothing, even if it is infinite.
  const float linear = others.linear + (target_masked ? 0.f : transform.in_units(x_y, largest, d_y));
  float loss = in.smoothing != 1.f ? (1.f - in.smoothing) * nll : 0.f;
  if (in.smoothing != 0.f) {
    const float smooth = dev::fma(-linear / count, kLn2 / kUnit, kLn2 * log2_sum);
    loss = dev::fma(in.smoothing, smooth, loss);
  }
  if (p.z_loss != 0.f) loss = dev::fma(p.z_loss * lse, lse, loss);
  if (nan) loss = NAN;
  else if (target_masked) loss = INFINITY;
  p.loss[row] = in.weight == 0.f ? 0.f : in.weight * loss;
  if (p.state) static_cast<RowState*>(p.state)[row] = state;
  if constexpr (STATS) {
    const bool empty = classes == 0;
    p.nll[row] = nan ? NAN : target_masked ? INFINITY : nll;
    p.lse[row] = nan ? NAN : empty ? -INFINITY : lse;
    const float weighted = others.weighted + (e_y > 0.f ? d_y * e_y : 0.f);
    p.entropy[row] = nan ? NAN : empty ? 0.f : dev::max(kLn2 * (log2_sum - weighted * inverse), 0.f);
    const float e_largest = target_largest ? e_y : dev::exp2_approx(transform.exact(largest, largest, reference));
    p.max_prob[row] = nan ? NAN : empty ? 0.f : e_largest * inverse;
    // The sum of (p - eps/K)^2 over the others, expanded, and the target's own term.
    const float share = in.smoothing / count, other_mass = others.exp * inverse;
    const float others_norm = others.squares * inverse * inverse - 2.f * share * other_mass +
                              static_cast<float>(others.classes) * share * share;
    const float target_part = target_masked ? 0.f : in.smoothing - share - other_mass;
    p.grad_norm_sq[row] = nan ? NAN : empty ? 0.f : dev::fma(target_part, target_part, dev::max(others_norm, 0.f));
    const unsigned target = static_cast<unsigned>(in.target);
    const bool target_first = x_y > others.largest || (x_y == others.largest && target < others.at);
    const unsigned predicted = target_first ? target : others.at;
    p.predicted[row] = nan || empty ? 0u : predicted;
  }
  return state;
}

// What a row that takes no part leaves: zeros if ignored, NaN if one of its inputs is bad.
template <bool STATS> DEVICE void finish_unused_row(const Params& p, uint64_t row, float value) {
  if (threadIdx.x != 0) return;
  p.loss[row] = value;
  if (p.state) static_cast<RowState*>(p.state)[row] = {value, value, value, 0u};
  if constexpr (STATS) {
    p.nll[row] = p.lse[row] = p.entropy[row] = p.max_prob[row] = p.grad_norm_sq[row] = value;
    p.predicted[row] = 0u;
  }
}

// Whether a group is one of this thread's, who has every `threads`-th, a power of 2.
DEVICE bool is_own(int group, int threads) { return (group & (threads - 1)) == static_cast<int>(threadIdx.x); }

// For for_each_group; no generic lambda, which CUDA 12's run-time compiler takes for a host function.
template <class T, bool STATS, bool SOFTCAP> struct AddGroups {
  ThreadSums& sums;
  int own_target;
  const Transform<SOFTCAP>& transform;

  template <int U> DEVICE void operator()(uint4 (&v)[U], int group, int stride, bool) const {
    add_groups<T, STATS>(sums, v, group, stride, own_target, transform);
  }
};

// Sums over the classes at `x`, merged over the block for its first warp. The target may be outside.
template <class T, bool STATS, bool SOFTCAP, bool STREAMING>
DEVICE Partial sum_row(const T* x, int vocab, int target, const Transform<SOFTCAP>& transform) {
  SHARED_ARRAY(Partial, scratch, kMaxWarps);
  ThreadSums sums = empty_sums();
  const RowReader<T> reader(x, vocab, 0);
  const int groups = (vocab + kGroup<T> - 1) / kGroup<T>;
  const int own_target = target >= 0 && target < vocab && is_own(target / kGroup<T>, static_cast<int>(blockDim.x)) ? target : -1;
  const AddGroups<T, STATS, SOFTCAP> add = {sums, own_target, transform};
  for_each_group<T, 4, !SOFTCAP, STREAMING, false>(reader, groups, add);
  return merge_block<STATS>(sums, scratch, transform);
}

// Elements by which a row of gradients starts past a 16-byte boundary. Gradients are grouped by it: their 16-byte
// stores must be aligned, and no sum depends on them.
template <class T> DEVICE int store_lead(const T* grad) {
  return static_cast<int>((reinterpret_cast<uintptr_t>(grad) & 15u) / sizeof(T));
}

template <class T> DEVICE T* gradient_at(const Params& p, uint64_t row, const Stretch& stretch) {
  return static_cast<T*>(p.grad) + row_offset<uint64_t>(p.grad_rows, row - p.first_row) +
         (stretch.begin - static_cast<int>(p.first_column));
}

// Fills a stretch's gradient: `value` for classes, 0 for padding.
template <class T> DEVICE void fill_gradient(const Params& p, uint64_t row, float value, const Stretch& stretch) {
  const int classes = stretch.classes, width = stretch.width;
  T* grad = gradient_at<T>(p, row, stretch);
  float g[kGroup<T>];
  UNROLL for (int k = 0; k < kGroup<T>; k++) g[k] = value;
  const uint4 whole = narrow<T>(g);
  const int lead = store_lead(grad);
  for (int start = static_cast<int>(threadIdx.x) * kGroup<T> - lead; start < width;
       start += static_cast<int>(blockDim.x) * kGroup<T>) {
    const bool all_classes = start + kGroup<T> <= classes, all_padding = start >= classes && start + kGroup<T> <= width;
    if (start >= 0 && (all_classes || all_padding)) {
      PATH("whole");
      dev::store16_streaming(grad + start, all_classes ? whole : uint4{0u, 0u, 0u, 0u});
      continue;
    }
    PATH("edge");
    for (int i = start < 0 ? 0 : start; i < start + kGroup<T> && i < width; i++) {
      grad[i] = narrow_one<T>(i < classes ? value : 0.f);
    }
  }
}

// How a row's gradient is formed: special where classes of it may be masked or it is far.
enum class RowWay : unsigned { kUsual, kSpecial, kZero };

// What a row's gradient takes beside its logits: dx = (2^d * factor - offset) * slope, and the target's own.
struct alignas(16) GradientFactors {
  float largest;
  float reference;
  float log2_sum;
  float factor;
  float offset;
  float outer;  // with a softcap: the logit scale
  float scale;
  float smoothing_but_share;
  float lse_slope;
  float masked_value;  // 0, but NaN in a row that is NaN
  float affine[3];     // without a softcap, d = (x*[0] + [1])*[2], of near and far rows alike
  RowWay way;
};

// The nearest value whose sum with another such is finite.
DEVICE float in_range(float x) { return x < -1.7e38f ? -1.7e38f : x > 1.7e38f ? 1.7e38f : x; }

// `scale` is everything that multiplies dz but the row's weight.
template <bool SOFTCAP>
DEVICE GradientFactors gradient_factors(const Params& p, const RowInputs& in, const RowState& state, float scale,
                                        const Transform<SOFTCAP>& transform) {
  GradientFactors f;
  f.largest = state.largest;
  f.reference = transform.reference(state.largest);
  f.log2_sum = state.log2_sum;
  f.scale = scale * in.weight * (SOFTCAP ? 1.f : p.logit_scale);
  f.outer = SOFTCAP ? p.logit_scale : 1.f;
  f.lse_slope = p.z_loss == 0.f ? 0.f : 2.f * p.z_loss * transform.lse(f.largest, f.reference, state.log2_sum);
  const float share = in.smoothing / static_cast<float>(state.classes);
  f.factor = in_range(f.scale * (1.f + f.lse_slope) * state.inverse_sum);
  f.offset = in_range(f.scale * share);
  f.smoothing_but_share = in.smoothing - share;
  f.masked_value = state.largest == state.largest ? 0.f : NAN;
  const bool near = f.reference < INFINITY;
  f.affine[0] = near ? transform.scale : 0.5f;
  f.affine[1] = near ? -f.reference : -0.5f * f.largest;
  f.affine[2] = near ? 1.f : fminf(p.logit_scale * (2.f * kLog2E), 3.4e38f);
  const bool special = state.classes != p.vocab || (!SOFTCAP && !(f.reference < INFINITY));
  f.way = in.weight == 0.f || state.classes == 0u ? RowWay::kZero : special ? RowWay::kSpecial : RowWay::kUsual;
  return f;
}

// Gradient of some logits, wrong for the target's. SPECIAL is the row's way.
template <bool SOFTCAP, bool SPECIAL, int N>
DEVICE void gradient_of(const float (&x)[N], float (&g)[N], const GradientFactors& f, const Transform<SOFTCAP>& transform) {
  if constexpr (!SOFTCAP && !SPECIAL && N % 2 == 0) {
    UNROLL for (int k = 0; k < N; k += 2) {
      const dev::Pair d = transform.near_pair({x[k], x[k + 1]}, f.reference);
      const dev::Pair e = {dev::exp2_approx(d.low), dev::exp2_approx(d.high)};
      const dev::Pair both = dev::fma(e, {f.factor, f.factor}, {-f.offset, -f.offset});
      g[k] = both.low, g[k + 1] = both.high;
    }
  } else {
    UNROLL for (int k = 0; k < N; k++) {
      float slope, d;
      if (SPECIAL && !SOFTCAP) d = dev::fma(x[k], f.affine[0], f.affine[1]) * f.affine[2];
      else d = transform.near(x[k], f.largest, f.reference, slope);
      g[k] = dev::fma(dev::exp2_approx(d), f.factor, -f.offset);
      if constexpr (SOFTCAP) g[k] *= slope * f.outer;
      if (SPECIAL && x[k] == -INFINITY) g[k] = f.masked_value;
    }
  }
}

template <class T, bool SOFTCAP, bool SPECIAL>
DEVICE uint4 gradient_of_group(uint4 v, const GradientFactors& f, const Transform<SOFTCAP>& transform) {
  float x[kGroup<T>], g[kGroup<T>];
  widen<T>(v, x);
  gradient_of<SOFTCAP, SPECIAL>(x, g, f, transform);
  return narrow<T>(g);
}

template <class T, bool SOFTCAP, bool SPECIAL>
DEVICE T gradient_of_one(T x, const GradientFactors& f, const Transform<SOFTCAP>& transform) {
  const float wide[1] = {widen_one(x)};
  float g[1];
  gradient_of<SOFTCAP, SPECIAL>(wide, g, f, transform);
  return narrow_one<T>(g[0]);
}

// Puts the gradient of the target, whose logit is `x_y`, right: by the thread that wrote its group.
template <class T, bool SOFTCAP>
DEVICE void write_target(T* grad, float x_y, const GradientFactors& f, const Transform<SOFTCAP>& transform) {
  if (x_y == -INFINITY) return;
  PATH("target");
  float slope;
  const float log2_p = transform.exact(x_y, f.largest, f.reference, slope) - f.log2_sum;
  const float p_minus_1 = dev::expm1(kLn2 * log2_p);
  float g_y = f.scale * (p_minus_1 + f.smoothing_but_share + f.lse_slope * dev::exp2_approx(log2_p));
  if constexpr (SOFTCAP) g_y *= slope * f.outer;
  *grad = narrow_one<T>(g_y);
}

// For for_each_group.
template <class T, bool SOFTCAP, bool SPECIAL> struct WriteGroups {
  T* grad;
  const RowReader<T>& reader;
  const Stretch& stretch;
  const GradientFactors& f;
  const Transform<SOFTCAP>& transform;

  template <int U> DEVICE void operator()(uint4 (&v)[U], int group, int stride, bool inside) const {
    UNROLL for (int u = 0; u < U; u++) v[u] = gradient_of_group<T, SOFTCAP, SPECIAL>(v[u], f, transform);
    if (inside) {
      PATH("whole");
      UNROLL for (int u = 0; u < U; u++) dev::store16_streaming(grad + reader.start(group + u * stride), v[u]);
      return;
    }
    UNROLL for (int u = 0; u < U; u++) {
      const int start = reader.start(group + u * stride);
      float g[kGroup<T>];
      widen<T>(v[u], g);
      UNROLL for (int k = 0; k < kGroup<T>; k++) {
        const int i = start + k;
        if (i >= 0 && i < stretch.width) grad[i] = narrow_one<T>(i < stretch.classes ? g[k] : 0.f);
      }
    }
  }
};

template <class T, bool SOFTCAP, bool SPECIAL, bool ON_CHIP>
DEVICE void write_groups(T* grad, const T* x, const Stretch& stretch, int target, const GradientFactors& f,
                         const Transform<SOFTCAP>& transform) {
  const int lead = store_lead(grad);
  const RowReader<T> reader(x, stretch.classes, lead);
  const int groups = (stretch.width + lead + kGroup<T> - 1) / kGroup<T>;
  const bool has_target = target >= 0 && target < stretch.classes &&
                          is_own(groups - 1 - (target + lead) / kGroup<T>, static_cast<int>(blockDim.x));
  const float x_y = has_target ? widen_one(x[target]) : -INFINITY;  // before this thread overwrites it
  const WriteGroups<T, SOFTCAP, SPECIAL> write = {grad, reader, stretch, f, transform};
  // Descending: what the sums read last is still in the cache.
  // On chip, only gradients that do not lie as the logits do come here, so that every group straddles words.
  for_each_group<T, ON_CHIP ? 1 : 4, !SOFTCAP, !ON_CHIP, true, !ON_CHIP>(reader, groups, write);
  write_target(grad + target, x_y, f, transform);
}

// Writes the gradient of a stretch with the classes at `x`, of which the row's target may be one.
// `x` may be the gradient's own memory: a thread reads the elements it writes and no others.
template <class T, bool SOFTCAP, bool ON_CHIP>
DEVICE void write_gradient(const Params& p, uint64_t row, const T* x, const Stretch& stretch, int row_target,
                           const GradientFactors& f, const Transform<SOFTCAP>& transform) {
  if (f.way == RowWay::kZero) {
    fill_gradient<T>(p, row, 0.f, stretch);
    return;
  }
  T* grad = gradient_at<T>(p, row, stretch);
  const int target = row_target - stretch.begin;
  if (f.way == RowWay::kSpecial) write_groups<T, SOFTCAP, true, ON_CHIP>(grad, x, stretch, target, f, transform);
  else write_groups<T, SOFTCAP, false, ON_CHIP>(grad, x, stretch, target, f, transform);
}

// What gradients are multiplied by, but for the row's weight.
DEVICE float gradient_scale(const Params& p, uint64_t row) {
  float scale = p.result_scale;
  if (p.upstream) scale *= p.upstream[p.upstream_per_row ? row : 0];
  if (p.divisor && *p.divisor != 0.f) scale /= *p.divisor;
  return scale;
}
