// A row with any target distribution: its inputs, its loss and statistics from the merged sums, its gradient. The twin of
// row.cuh, which has one class a row, smoothed evenly.
#pragma once
#include "distribution_sums.cuh"

struct DistributionInputs {
  RowKind kind;
  float smoothing;
  float weight;
  float entropy_weight;
};

// Of a row that names classes: which one entry `j` names, as it is in memory, and its probability.
DEVICE long long named_class(const Params& p, uint64_t row, unsigned j) { return read_target(p, row * p.entries + j); }
DEVICE float named_probability(const Params& p, uint64_t row, unsigned j) {
  return p.probabilities ? static_cast<const float*>(p.probabilities)[row * p.entries + j] : 1.f;
}

DEVICE DistributionInputs read_distribution_inputs(const Params& p, uint64_t row) {
  DistributionInputs in = {RowKind::kCounted, p.uniform_smoothing, 1.f, p.uniform_entropy_weight};
  if (p.smoothing) in.smoothing = p.smoothing[row_offset<unsigned>(p.smoothing_rows, row)];
  if (p.weights) in.weight = p.weights[row_offset<unsigned>(p.weight_rows, row)];
  if (p.entropy_weights) in.entropy_weight = p.entropy_weights[row_offset<unsigned>(p.entropy_rows, row)];
  const bool classes_good = !p.class_check || p.class_check->good == 1.f;
  // Every warp reads all entries, so that all threads know of them without a barrier.
  int found = p.entries == 0 ? 1 : 0;  // 2 for a bad entry
  for (unsigned j = threadIdx.x % 32; j < p.entries; j += 32) {
    const long long target = named_class(p, row, j);
    if (target == p.ignore_index) continue;
    const float t = named_probability(p, row, j);
    const bool good = target >= 0 && target < static_cast<long long>(p.vocab) && t >= 0.f && t < INFINITY;
    found = good && found < 2 ? 1 : 2;
  }
  found = dev::reduce_max(found);
  if (found == 0) {
    in.kind = RowKind::kIgnored;
    return in;
  }
  // Comparisons that NaN fails.
  const bool smoothing_good = in.smoothing >= 0.f && in.smoothing <= 1.f;
  const bool weight_good = in.weight >= 0.f && in.weight < INFINITY;
  const bool entropy_good = in.entropy_weight > -INFINITY && in.entropy_weight < INFINITY;
  if (found == 1 && smoothing_good && weight_good && entropy_good && classes_good) return in;
  in.kind = RowKind::kBad;
  if (classes_good) report_bad_row(p, row);
  return in;
}

// Adds the probabilities of the classes that the row's target names, those in the stretch at `x`: a thread has every so many.
template <class T, bool SOFTCAP>
DEVICE void add_named(const Params& p, uint64_t row, const T* x, const Stretch& stretch, AllClassesOfThread& sums,
                      const Beside& beside, bool norm, const Transform<SOFTCAP>& transform) {
  AllClasses& a = sums.partial;
  for (unsigned j = threadIdx.x; j < p.entries; j += blockDim.x) {
    const long long target = named_class(p, row, j);
    const long long k = target - stretch.begin;
    if (target == p.ignore_index || k < 0 || k >= stretch.classes) continue;
    const float t = named_probability(p, row, j);
    if (t == 0.f) continue;
    const float x_k = widen_one(x[k]), c = beside.weight(static_cast<int>(k));
    if (x_k > a.largest) {
      PATH("larger");
      relate(a, x_k, transform.reference(x_k), transform);
    }
    a.target.add(t);
    a.weighted_target.add(c * t);
    if (x_k == -INFINITY) {
      PATH("masked");
      a.faults |= kOutOfReach;
      continue;
    }
    const float d = transform.exact(x_k, a.largest, a.reference), units = finite_units(x_k, a.largest, d, transform);
    a.target_linear = dev::fma(t, units, a.target_linear);
    a.weighted_linear = dev::fma(c * t, units, a.weighted_linear);
    if (norm) {
      // A class that is named twice has the sum: its square is the sum of products with that.
      float all = 0.f;
      for (unsigned i = 0; i < p.entries; i++) {
        if (named_class(p, row, i) == target) all += named_probability(p, row, i);
      }
      a.target_exp = dev::fma(t, dev::exp2_approx(d), a.target_exp);
      a.target_squares = dev::fma(t, all, a.target_squares);
      a.target_prior = dev::fma(t, beside.prior_of(static_cast<int>(k)), a.target_prior);
    }
  }
}

// Sums over the classes at `x`, merged over the block for its first warp.
template <class T, bool SOFTCAP>
DEVICE AllClasses sum_distribution(const Params& p, uint64_t row, const T* x, const Stretch& stretch,
                                   const Transform<SOFTCAP>& transform) {
  SHARED_ARRAY(AllClassesOfThread, scratch, kMaxWarps);
  AllClassesOfThread sums = {no_classes(), -INFINITY};
  const bool norm = p.grad_norm_sq;
  const RowReader<T> reader(x, stretch.classes, 0);
  const Beside beside(p, row, stretch, 0);
  const AddClasses<T, SOFTCAP> add = {sums, beside, norm, transform};
  for_each_group_rolled<T, false, SOFTCAP>(reader, (stretch.classes + kGroup<T> - 1) / kGroup<T>, add);
  add_named(p, row, x, stretch, sums, beside, norm, transform);
  return merge_block(sums, scratch, transform);
}

// Probability of a class in the row's target, and where it names classes the sum of all that name it. By a whole warp.
DEVICE float target_probability(const Params& p, uint64_t row, int column) {
  if (p.entries == 0) {
    const int first = static_cast<int>(p.first_class), end = static_cast<int>(p.end_class);
    return Beside(p, row, {first, end - first, 0}, 0).target_of(column - first);
  }
  float t = 0.f;
  for (unsigned j = threadIdx.x % 32; j < p.entries; j += 32) {
    if (named_class(p, row, j) == column) t += named_probability(p, row, j);
  }
  UNROLL for (int lane = 16; lane > 0; lane >>= 1) t += dev::shuffle_xor(t, lane);
  return t;
}

// What a row's gradient takes of the forward.
struct alignas(16) DistributionState {
  float largest;
  float log2_sum;
  float inverse_sum;
  unsigned classes;
  Sum target_mass;  // sum of c*t
  Sum shares;       // sum of c*u
  float prior_mass;
  float mean;             // sum of p*d
  float largest_p_less_1; // p - 1 of a class with the largest logit
  int column;             // of the largest
  unsigned bad;
  unsigned unused[3];
};
static_assert(sizeof(DistributionState) == 64, "src/kernels/abi.rs has as many bytes");

// What a class's value of the prior is multiplied by; a prior of masked classes alone spreads nothing.
DEVICE float smoothed_part(float smoothing, float prior_mass) { return prior_mass == 0.f ? 0.f : smoothing / prior_mass; }

// Loss, statistics and normaliser of a row whose classes merge to `a`. Its `at` is a column. The first thread.
template <bool SOFTCAP>
DEVICE DistributionState finish_distribution(const Params& p, uint64_t row, const DistributionInputs& in, const AllClasses& a,
                                             const Transform<SOFTCAP>& transform) {
  const float largest = a.largest, reference = a.reference, rest = a.exp.total();
  const float d_top = transform.exact(largest, largest, reference), e_top = dev::exp2_approx(d_top);
  const float sum = rest + e_top, inverse = 1.f / sum, log_sum = dev::log1p(rest / e_top);  // -log p of the largest
  const float log2_sum = dev::fma(kLog2E, log_sum, d_top);
  const bool empty = a.classes == 0, bad = a.faults & kBadProbability;
  const bool nan = (!empty && sum != sum) || bad, out_of_reach = a.faults & kOutOfReach;
  const bool has_prior = p.prior, has_values = has_prior || p.class_weights;
  const float count = static_cast<float>(a.classes);
  const Sum shares = has_values ? a.shares : Sum{count, 0.f};
  const Sum prior = has_prior ? a.prior : Sum{count, 0.f};
  const Sum weighted = p.class_weights || p.entries != 0 ? a.weighted_target : a.target;
  const float weighted_linear = p.class_weights || p.entries != 0 ? a.weighted_linear : a.target_linear;
  // The mean of d over p, less that of the largest: of its own term nothing is left.
  const float mean_less_top = dev::fma(-d_top, rest, a.weighted.total()) * inverse;

  DistributionState state = {largest, log2_sum, inverse, a.classes, weighted, shares, prior.total(), mean_less_top + d_top,
                             -rest * inverse, static_cast<int>(a.at), bad ? 1u : 0u, {}};
  if (empty) state.largest = state.log2_sum = state.inverse_sum = state.mean = state.largest_p_less_1 = 0.f;
  if (nan) state.largest = NAN;
  if (bad) report_bad_row(p, row);

  // The sum of a_k*(lse - z_k) of sums of a_k and of a_k*d_k, in nats. The largest class's own term is its part of the log_sum.
  const auto surprisal = [&](float mass, float linear) {
    const float below = dev::fma(mass, d_top, -linear * (1.f / kUnit));
    return below < INFINITY ? dev::fma(mass, log_sum, kLn2 * below)
                            : dev::fma(linear, -kLn2 / kUnit, mass * (log_sum + kLn2 * d_top));
  };
  const float part = smoothed_part(in.smoothing, state.prior_mass);
  const float lse = transform.lse(largest, reference, log2_sum);
  const float entropy = dev::max(dev::fma(-kLn2, mean_less_top, log_sum), 0.f);
  float loss = 0.f;
  // What has no weight counts nothing, even if it is infinite.
  if (in.smoothing != 1.f) loss = (1.f - in.smoothing) * surprisal(weighted.total(), weighted_linear);
  if (part != 0.f) loss += surprisal(part * shares.total(), part * a.shares_linear);
  if (p.z_loss != 0.f) loss = dev::fma(p.z_loss * lse, lse, loss);
  if (in.entropy_weight != 0.f) loss = dev::fma(in.entropy_weight, entropy, loss);
  if (out_of_reach || empty) loss = INFINITY;
  if (nan) loss = NAN;
  p.loss[row] = in.weight == 0.f && !bad ? 0.f : in.weight * loss;
  if (p.state) static_cast<DistributionState*>(p.state)[row] = state;
  if (!p.nll) return state;
  p.nll[row] = nan ? NAN : out_of_reach || empty ? INFINITY : surprisal(a.target.total(), a.target_linear);
  p.lse[row] = nan ? NAN : empty ? -INFINITY : lse;
  p.entropy[row] = nan ? NAN : empty ? 0.f : entropy;
  p.max_prob[row] = nan ? NAN : empty ? 0.f : e_top * inverse;
  p.predicted[row] = nan || empty ? 0u : a.at;
  // The sum of (Q*p - q)^2, Q that of q without class weights, expanded over all classes but the largest, and its own.
  const float keep = 1.f - in.smoothing, top_probability = a.top_probability;
  const float u_top = has_prior && !empty ? p.prior[a.at] * p.class_check->prior_scale : 1.f;
  const float q_top = keep * top_probability + part * u_top;
  const float of_target = keep * (a.target.value - top_probability) + keep * a.target.lost;
  const float of_prior = part * (prior.value - u_top) + part * prior.lost;
  const float other_mass = of_target + of_prior, total = other_mass + q_top;
  const float prior_exp = has_prior ? a.prior_exp - u_top * e_top : rest, prior_squares = has_prior ? a.prior_squares : count;
  const float with_exp = dev::fma(keep, a.target_exp - top_probability * e_top, part * prior_exp);
  const float squares = keep * keep * (a.target_squares - top_probability * top_probability) +
                        2.f * keep * part * (a.target_prior - top_probability * u_top) +
                        part * part * (prior_squares - u_top * u_top);
  const float others = total * inverse * (total * inverse * a.squares - 2.f * with_exp) + squares;
  const float top = dev::fma(total, state.largest_p_less_1, other_mass);
  p.grad_norm_sq[row] = nan ? NAN : empty ? 0.f : dev::fma(top, top, dev::max(others, 0.f));
  return state;
}

// What a row that takes no part leaves: zeros if ignored, NaN if one of its inputs is bad.
DEVICE void finish_unused_distribution(const Params& p, uint64_t row, float value) {
  if (threadIdx.x != 0) return;
  p.loss[row] = value;
  if (!p.nll) return;
  p.nll[row] = p.lse[row] = p.entropy[row] = p.max_prob[row] = p.grad_norm_sq[row] = value;
  p.predicted[row] = 0u;
}

// dx_k = (2^d * (exponential - entropy*d) - share*c_k*u_k - target*c_k*t_k) * outer * slope. `outer` multiplies all of it: p
// and q may cancel, and neither's rounding may be more than its own.
struct alignas(16) DistributionFactors {
  float largest;
  float reference;
  float affine[3];  // as in GradientFactors
  float exponential;
  float entropy;
  float share;
  float target;
  float outer;
  float slope;  // multiplies the softcap's
  float masked_value;
  // For the largest class.
  float mass;
  float lse_slope;
  float mean;
  float largest_p_less_1;
  Sum target_mass;
  Sum shares;
  int column;
  float fill;  // of a row whose way is kZero
  RowWay way;
};

template <bool SOFTCAP>
DEVICE DistributionFactors distribution_factors(const Params& p, const DistributionInputs& in, const DistributionState& state,
                                                float scale, const Transform<SOFTCAP>& transform) {
  DistributionFactors f;
  f.largest = state.largest;
  f.reference = transform.reference(state.largest);
  const bool near = f.reference < INFINITY;
  f.affine[0] = near ? transform.scale : 0.5f;
  f.affine[1] = near ? -f.reference : -0.5f * f.largest;
  f.affine[2] = near ? 1.f : fminf(p.logit_scale * (2.f * kLog2E), 3.4e38f);
  f.share = smoothed_part(in.smoothing, state.prior_mass);
  f.target = 1.f - in.smoothing;
  f.mass = dev::fma(f.target, state.target_mass.total(), f.share * state.shares.total());
  f.lse_slope = p.z_loss == 0.f ? 0.f : 2.f * p.z_loss * transform.lse(f.largest, f.reference, state.log2_sum);
  const float beta = in.entropy_weight * kLn2;
  f.exponential = in_range((f.mass + f.lse_slope + (beta == 0.f ? 0.f : beta * state.mean)) * state.inverse_sum);
  f.entropy = in_range(beta * state.inverse_sum);
  f.mean = state.mean;
  f.outer = scale * in.weight * (SOFTCAP ? 1.f : p.logit_scale);
  f.slope = SOFTCAP ? p.logit_scale : 1.f;
  f.masked_value = state.largest == state.largest ? 0.f : NAN;
  f.largest_p_less_1 = state.largest_p_less_1;
  f.target_mass = state.target_mass;
  f.shares = state.shares;
  f.column = state.column;
  f.fill = state.bad != 0 ? NAN : 0.f;
  const bool special = state.classes != p.vocab || (!SOFTCAP && !near);
  const bool constant = state.bad != 0 || in.weight == 0.f || state.classes == 0u;
  f.way = constant ? RowWay::kZero : special ? RowWay::kSpecial : RowWay::kUsual;
  return f;
}

// Gradient of the logit `x` of a class whose probability, weight and share of the smoothing, c*u, are known. `is_largest`:
// p may be near 1.
template <bool SOFTCAP>
DEVICE float gradient_of_class(float x, bool is_largest, float t, float c, float share, const DistributionFactors& f,
                               const Transform<SOFTCAP>& transform) {
  float slope;
  const float d = SOFTCAP ? transform.near(x, f.largest, f.reference, slope)
                          : dev::fma(x, f.affine[0], f.affine[1]) * f.affine[2];
  const float e = dev::exp2_approx(d);
  float dz;
  if (is_largest) {
    const float ct = c * t;
    // Of the others' q: the sums less this class's, then what they had lost.
    const float others = f.target * ((f.target_mass.value - ct) + f.target_mass.lost) +
                         f.share * ((f.shares.value - share) + f.shares.lost);
    const float p_of_it = 1.f + f.largest_p_less_1, e_of_it = f.entropy == 0.f ? 0.f : f.entropy * e * (d - f.mean);
    dz = dev::fma(f.mass, f.largest_p_less_1, others) + f.lse_slope * p_of_it - e_of_it;
  } else {
    const float factor = f.entropy == 0.f ? f.exponential : dev::fma(-f.entropy, dev::max(d, kNothing), f.exponential);
    dz = dev::fma(e, factor, -dev::fma(f.target * c, t, f.share * share));
  }
  if constexpr (SOFTCAP) dz *= slope * f.slope;
  return dz * f.outer;
}

// For for_each_group_rolled; wrong for the largest class and for those that the target names.
template <class T, bool SOFTCAP, bool SPECIAL, bool BESIDE> struct WriteDistribution {
  static constexpr int N = kGroup<T>;

  T* grad;
  const RowReader<T>& reader;
  const Stretch& stretch;
  const Beside& beside;
  const DistributionFactors& f;
  const Transform<SOFTCAP>& transform;

  // What is subtracted of four classes, c*q.
  DEVICE void subtrahends(int four, float* q) const {
    UNROLL for (int k = 0; k < kFour; k++) q[k] = f.share;
    if constexpr (!BESIDE) return;
    float v[kFour];
    if (beside.prior) {
      beside.read_prior(four, v);
      UNROLL for (int k = 0; k < kFour; k++) q[k] *= v[k];
    }
    if (beside.target) {
      beside.read_target(four, v);
      UNROLL for (int k = 0; k < kFour; k++) q[k] = dev::fma(f.target, v[k], q[k]);
    }
    if (beside.weights) {
      beside.read_weights(four, v);
      UNROLL for (int k = 0; k < kFour; k++) q[k] *= v[k];
    }
  }

  DEVICE void operator()(const uint4& v, int group) const {
    float x[N], q[N], g[N];
    widen<T>(v, x);
    UNROLL for (int i = 0; i < kFours<T>; i++) subtrahends(group * kFours<T> + i, q + i * kFour);
    UNROLL for (int k = 0; k < N; k++) {
      float slope, d;
      if (SPECIAL && !SOFTCAP) d = dev::fma(x[k], f.affine[0], f.affine[1]) * f.affine[2];
      else d = transform.near(x[k], f.largest, f.reference, slope);
      const float factor = f.entropy == 0.f ? f.exponential : dev::fma(-f.entropy, dev::max(d, kNothing), f.exponential);
      g[k] = dev::fma(dev::exp2_approx(d), factor, -q[k]) * f.outer;
      if constexpr (SOFTCAP) g[k] *= slope * f.slope;
      if (SPECIAL && x[k] == -INFINITY) g[k] = f.masked_value;
    }
    const int start = reader.start(group);
    if (start >= 0 && start + N <= stretch.classes) {
      PATH("whole");
      dev::store16_streaming(grad + start, narrow<T>(g));
      return;
    }
    UNROLL for (int k = 0; k < N; k++) {
      const int i = start + k;
      if (i >= 0 && i < stretch.width) grad[i] = narrow_one<T>(i < stretch.classes ? g[k] : 0.f);
    }
  }
};

template <class T, bool SOFTCAP, bool SPECIAL, bool BESIDE>
DEVICE void write_classes(T* grad, const Params& p, uint64_t row, const T* x, const Stretch& stretch,
                          const DistributionFactors& f, const Transform<SOFTCAP>& transform) {
  const int lead = store_lead(grad);
  const RowReader<T> reader(x, stretch.classes, lead);
  const Beside beside(p, row, stretch, lead);
  const WriteDistribution<T, SOFTCAP, SPECIAL, BESIDE> write = {grad, reader, stretch, beside, f, transform};
  const int groups = (stretch.width + lead + kGroup<T> - 1) / kGroup<T>;
  for_each_group_rolled<T, true, SOFTCAP>(reader, groups, write);  // descending, as write_groups
}

// The gradient of entry `j`'s class, if that is in the stretch at `x`, is not the largest and no earlier entry names it.
template <class T, bool SOFTCAP>
DEVICE NamedGradient named_gradient(const Params& p, uint64_t row, unsigned j, const T* x, const Stretch& stretch,
                                    const Beside& beside, const DistributionFactors& f,
                                    const Transform<SOFTCAP>& transform) {
  constexpr NamedGradient none = {0.f, -1};
  const long long target = named_class(p, row, j);
  const int k = static_cast<int>(target) - stretch.begin;
  if (target == p.ignore_index || target == f.column || k < 0 || k >= stretch.classes) return none;
  const float x_k = widen_one(x[k]);
  if (x_k == -INFINITY) return none;
  float t = 0.f;
  for (unsigned i = 0; i < p.entries; i++) {
    if (named_class(p, row, i) != target) continue;
    if (i < j) return none;
    t += named_probability(p, row, i);
  }
  PATH("named");
  const float c = beside.weight(k);
  return {gradient_of_class(x_k, false, t, c, c * beside.prior_of(k), f, transform), k};
}

// Writes the gradient of a stretch with the classes at `x`, which may be the gradient's own memory. By a whole block.
template <class T, bool SOFTCAP>
DEVICE void write_distribution(const Params& p, uint64_t row, const T* x, const Stretch& stretch,
                               const DistributionFactors& f, const Transform<SOFTCAP>& transform) {
  if (f.way == RowWay::kZero) {
    fill_gradient<T>(p, row, f.fill, stretch);
    return;
  }
  T* grad = gradient_at<T>(p, row, stretch);
  const Beside beside(p, row, stretch, 0);
  NamedGradient* named = p.entries != 0 ? p.named + row * p.entries : nullptr;
  // First what takes a logit that the others' gradients may be written over.
  NamedGradient largest = {0.f, f.column - stretch.begin};
  if (largest.column >= 0 && largest.column < stretch.classes && threadIdx.x < 32) {
    const float t = target_probability(p, row, f.column), c = beside.weight(largest.column);
    largest.gradient = gradient_of_class(widen_one(x[largest.column]), true, t, c, c * beside.prior_of(largest.column), f, transform);
  }
  for (unsigned j = threadIdx.x; j < p.entries; j += blockDim.x) named[j] = named_gradient(p, row, j, x, stretch, beside, f, transform);
  dev::sync_block();  // these logits were read
  if (f.way == RowWay::kSpecial) write_classes<T, SOFTCAP, true, true>(grad, p, row, x, stretch, f, transform);
  else if (beside.any()) write_classes<T, SOFTCAP, false, true>(grad, p, row, x, stretch, f, transform);
  else write_classes<T, SOFTCAP, false, false>(grad, p, row, x, stretch, f, transform);
  dev::sync_block();  // the others' gradients are there
  if (threadIdx.x == 0 && largest.column >= 0 && largest.column < stretch.classes) grad[largest.column] = narrow_one<T>(largest.gradient);
  for (unsigned j = threadIdx.x; j < p.entries; j += blockDim.x) {
    if (named[j].column >= 0) grad[named[j].column] = narrow_one<T>(named[j].gradient);
  }
}

// As of RowInputs, with all entries of the target. By a whole warp.
DEVICE unsigned digest_of(const Params& p, uint64_t row, const DistributionInputs& in) {
  unsigned entries = 0;
  for (unsigned j = threadIdx.x % 32; j < p.entries; j += 32) {
    const long long target = named_class(p, row, j);
    if (target != p.ignore_index) {
      entries += digest_with(digest_with(j, static_cast<unsigned>(target)), named_probability(p, row, j));
    }
  }
  const unsigned of_row = digest_with(digest_with(dev::reduce_add(entries), in.smoothing), in.weight);
  return digest_with(digest_with(of_row, in.entropy_weight), p.class_check ? p.class_check->digest : 0u);
}

// Merges a slice of the vocabulary, which is not the last, into what is known of its row; the last only reads that. The
// first thread.
template <bool SOFTCAP>
DEVICE void continue_distribution(AllClasses& running, bool first, bool last, AllClasses& a, const Transform<SOFTCAP>& transform) {
  if (!first) a = merge(running, a, transform);
  if (!last) running = a;
}

template <class T, bool SOFTCAP, bool GRAD> DEVICE void distribution_loss(const Params& p) {
  dev::begin_kernel();
  const uint64_t row = p.first_row + blockIdx.x;
  const Stretch stored = stored_row(p);
  const DistributionInputs in = read_distribution_inputs(p, row);
  if (in.kind != RowKind::kCounted) {  // the whole block
    const float value = in.kind == RowKind::kIgnored ? 0.f : NAN;
    finish_unused_distribution(p, row, value);
    if constexpr (GRAD) fill_gradient<T>(p, row, value, stored);
    return;
  }
  const Transform<SOFTCAP> transform(p);
  const T* x = static_cast<const T*>(p.logits) + row_offset<uint64_t>(p.logits_rows, blockIdx.x);
  AllClasses a = sum_distribution(p, row, x, stored, transform);
  SHARED_ARRAY(DistributionFactors, factors, 1);
  if (threadIdx.x < 32) {
    find_column(a, x, stored);
    const bool first = stored.begin == static_cast<int>(p.first_class);
    const bool last = stored.begin + stored.classes == static_cast<int>(p.end_class);
    AllClasses* running = static_cast<AllClasses*>(p.running);
    if (!GRAD && running && threadIdx.x == 0) continue_distribution(running[row], first, last, a, transform);
    if (last) {
      const int column = static_cast<int>(dev::shuffle(a.at, 0));
      a.top_probability = p.grad_norm_sq ? target_probability(p, row, column) : 0.f;
      if (!GRAD && p.ranks != 0) a.digest = digest_of(p, row, in);
      if (threadIdx.x == 0) {
        if (!GRAD && p.ranks != 0) {
          running[row] = a;
        } else {
          const DistributionState state = finish_distribution(p, row, in, a, transform);
          if constexpr (GRAD) factors[0] = distribution_factors(p, in, state, gradient_scale(p, row), transform);
        }
      }
    }
  }
  if constexpr (GRAD) {
    dev::sync_block();  // the factors are there; and in place, nothing may be overwritten before it is read
    write_distribution<T>(p, row, x, stored, factors[0], transform);
  }
}

template <class T, bool SOFTCAP> DEVICE void distribution_gradient(const Params& p) {
  dev::begin_kernel();
  const uint64_t row = p.first_row + blockIdx.x;
  const Stretch stored = stored_row(p);
  const DistributionInputs in = read_distribution_inputs(p, row);
  if (in.kind != RowKind::kCounted) {
    fill_gradient<T>(p, row, in.kind == RowKind::kIgnored ? 0.f : NAN, stored);
    return;
  }
  const T* x = static_cast<const T*>(p.logits) + row_offset<uint64_t>(p.logits_rows, blockIdx.x);
  const Transform<SOFTCAP> transform(p);
  SHARED_ARRAY(DistributionFactors, factors, 1);
  if (threadIdx.x == 0) {
    const DistributionState& state = static_cast<const DistributionState*>(p.state)[row];
    factors[0] = distribution_factors(p, in, state, gradient_scale(p, row), transform);
  }
  dev::sync_block();  // the factors are there
  write_distribution<T>(p, row, x, stored, factors[0], transform);
}
