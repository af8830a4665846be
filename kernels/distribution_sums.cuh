// Sums over a row with any target distribution, and their merge. The twin of partial.cuh, which has one class a row.
//
// What may stand beside a logit, weights and a prior of the classes and a probability for each, is a null pointer where it
// does not: a branch that all threads of a launch take alike, for each group of logits. docs/performance.md says why, and what
// is compiled apart.
#pragma once
#include "row.cuh"

// A sum of many numbers and what its steps lost: equal numbers round alike at each of a thread's hundreds of steps, and C - c*q
// of a class that has nearly all of C must keep its digits.
struct Sum {
  float value;
  float lost;

  DEVICE void add(float x) {
    const float sum = value + x, part = sum - value;
    lost += (value - (sum - part)) + (x - part);
    value = sum;
  }
  DEVICE void add(const Sum& other) {
    add(other.value);
    lost += other.lost;
  }
  DEVICE void scale(float factor) { value *= factor, lost *= factor; }
  DEVICE float total() const { return value + lost; }
};

// Over the classes that are not masked, but for `target` and `weighted`, relative to `largest`: u of the prior, 1 if it is
// even, c of the class weights, t of the target.
struct alignas(16) AllClasses {
  float largest;
  float reference;
  // Over all but one class that has the largest logit, so that a probability near 1 keeps its digits, whatever the target.
  Sum exp;         // sum of 2^d
  Sum weighted;    // sum of d * 2^d
  float squares;   // sum of 2^2d
  unsigned classes;
  unsigned at;     // as in Partial
  unsigned faults;
  Sum shares;      // sum of c*u
  Sum prior;       // sum of u
  Sum target;      // sum of t, of masked classes too
  Sum weighted_target;     // sum of c*t, likewise
  float shares_linear;     // sums of the same with d, in `kUnit`s
  float target_linear;
  float weighted_linear;
  // For the norm of the gradient.
  float prior_exp;         // sum of u * 2^d
  float prior_squares;
  float target_exp;        // sum of t * 2^d
  float target_squares;
  float target_prior;      // sum of t * u
  float top_probability;   // t of the class `at`, which is a column by then: for the norm
  unsigned digest;         // as in Running
};
static_assert(sizeof(AllClasses) == 112, "src/kernels/abi.rs has as many bytes");

enum Fault : unsigned { kOutOfReach = 1, kBadProbability = 2 };  // a masked class has a probability; one is none

DEVICE AllClasses no_classes() {
  AllClasses a = {};
  a.largest = -INFINITY;
  return a;
}

// 2^kNothing is 0, and so is its product with that.
constexpr float kNothing = -1024.f;

// d in `kUnit`s of a class that is not masked, no less than what a sum of nothing can be multiplied by.
template <bool SOFTCAP> DEVICE float finite_units(float x, float largest, float d, const Transform<SOFTCAP>& transform) {
  return dev::max(transform.in_units(x, largest, d), -3.4e38f);
}

template <bool SOFTCAP>
DEVICE void relate(AllClasses& a, float largest, float reference, const Transform<SOFTCAP>& transform) {
  if (a.largest != -INFINITY) {
    float by;
    if constexpr (SOFTCAP) by = transform.near(a.largest, largest, reference);
    else if (a.reference < INFINITY && reference < INFINITY) by = a.reference - reference;
    else {
      PATH("far");
      by = transform.exact(a.largest, largest, INFINITY);
    }
    const float units = finite_units(a.largest, largest, by, transform), factor = dev::exp2_approx(by);
    a.shares_linear = dev::fma(a.shares.total(), units, a.shares_linear);
    a.target_linear = dev::fma(a.target.total(), units, a.target_linear);
    a.weighted_linear = dev::fma(a.weighted_target.total(), units, a.weighted_linear);
    if (factor == 0.f) a.weighted = {0.f, 0.f};
    else a.weighted = {dev::fma(by, a.exp.value, a.weighted.value), dev::fma(by, a.exp.lost, a.weighted.lost)};
    a.weighted.scale(factor);
    a.squares *= factor * factor;
    a.exp.scale(factor);
    a.prior_exp *= factor;
    a.target_exp *= factor;
  }
  a.largest = largest;
  a.reference = reference;
}

// Adds a class with logit `x` that was left out, -inf for none, to what leaves out another.
template <bool SOFTCAP> DEVICE void add_left_out(AllClasses& a, float x, const Transform<SOFTCAP>& transform) {
  if (x == -INFINITY) return;
  const float d = transform.exact(x, a.largest, a.reference), e = dev::exp2_approx(d);
  a.exp.add(e);
  if (e > 0.f) a.weighted.add(d * e);
  a.squares = dev::fma(e, e, a.squares);
}

// Calls add(x, y) for every sum x of `a` and y of `b`.
template <class Add> DEVICE void for_each_sum(AllClasses& a, const AllClasses& b, const Add& add) {
  add(a.exp, b.exp), add(a.weighted, b.weighted), add(a.squares, b.squares);
  add(a.classes, b.classes);
  add(a.shares, b.shares), add(a.prior, b.prior), add(a.target, b.target), add(a.weighted_target, b.weighted_target);
  add(a.shares_linear, b.shares_linear), add(a.target_linear, b.target_linear), add(a.weighted_linear, b.weighted_linear);
  add(a.prior_exp, b.prior_exp), add(a.prior_squares, b.prior_squares);
  add(a.target_exp, b.target_exp), add(a.target_squares, b.target_squares), add(a.target_prior, b.target_prior);
}

struct Add {
  DEVICE void operator()(float& x, float y) const { x += y; }
  DEVICE void operator()(unsigned& x, unsigned y) const { x += y; }
  DEVICE void operator()(Sum& x, const Sum& y) const { x.add(y); }
};

// Adds another lane's, which adds this one's.
struct AddOfLane {
  int mask;

  DEVICE void operator()(float& x, float y) const { x += dev::shuffle_xor(y, mask); }
  DEVICE void operator()(unsigned& x, unsigned y) const { x += dev::shuffle_xor(y, mask); }
  DEVICE void operator()(Sum& x, const Sum& y) const {
    const Sum other = {dev::shuffle_xor(y.value, mask), dev::shuffle_xor(y.lost, mask)};
    x.add(other);
  }
};

// Of two stretches of a row, each of which leaves its largest out.
template <bool SOFTCAP>
DEVICE AllClasses merge(const AllClasses& a, const AllClasses& b, const Transform<SOFTCAP>& transform) {
  const bool first = a.largest > b.largest || (a.largest == b.largest && a.at <= b.at);
  AllClasses all = first ? a : b, other = first ? b : a;
  const float left_out = other.largest;
  relate(other, all.largest, all.reference, transform);
  add_left_out(other, left_out, transform);
  all.faults |= other.faults;
  for_each_sum(all, other, Add{});
  return all;
}

// A thread's sums so far. A class that its target names may be in another thread's groups: `partial.largest` is the larger of
// that one's logit and of `largest`, which is the one left out.
struct AllClassesOfThread {
  AllClasses partial;
  float largest;
};

// As merge_lanes for Partial.
template <int LANES, bool SOFTCAP>
DEVICE AllClassesOfThread merge_lanes(AllClassesOfThread sums, const Transform<SOFTCAP>& transform) {
  AllClasses& a = sums.partial;
  const float largest = largest_of_warp(a.largest), own_largest = largest_of_warp(sums.largest);
  const unsigned at = dev::reduce_min(sums.largest == own_largest ? a.at : ~0u);
  relate(a, largest, transform.reference(largest), transform);
  if (sums.largest != own_largest || a.at != at) add_left_out(a, sums.largest, transform);
  a.at = at;
  UNROLL for (int lane = LANES / 2; lane > 0; lane >>= 1) {
    a.faults |= dev::shuffle_xor(a.faults, lane);
    for_each_sum(a, a, AddOfLane{lane});
  }
  return {a, own_largest};
}

// Merges all threads' results through `scratch`; the first warp gets the result.
template <bool SOFTCAP>
DEVICE AllClasses merge_block(const AllClassesOfThread& sums, AllClassesOfThread* scratch, const Transform<SOFTCAP>& transform) {
  AllClassesOfThread all = merge_lanes<32>(sums, transform);
  if (blockDim.x == 32) return all.partial;
  if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = all;
  dev::sync_block();
  if (threadIdx.x >= 32) return all.partial;
  const unsigned lane = threadIdx.x % kMaxWarps, warps = blockDim.x / 32;
  all = lane < warps ? scratch[lane] : AllClassesOfThread{no_classes(), -INFINITY};
  return merge_lanes<kMaxWarps>(all, transform).partial;
}

// The elements of `group` of a reader, `beyond` for those beyond the row.
template <class P> DEVICE uint4 read_group(const RowReader<P>& reader, int group, float beyond) {
  uint4 v[1];
  if (reader.phase == 0 && reader.template inside<true>(group)) {
    PATH("inside");
    load_inside<P, true, false>(reader, group, 0, v);
  } else if (reader.phase != 0 && reader.template inside<false>(group)) {
    PATH("straddling");
    load_inside<P, false, false>(reader, group, 0, v);
  } else {
    PATH("edge");
    v[0] = load_edge(reader, group, beyond);
  }
  return v[0];
}

// Groups that a thread loads ahead: what the registers leave, fewer for a softcap.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
template <bool SOFTCAP> constexpr int kGroupsAhead = SOFTCAP ? 1 : 2;
#else
template <bool SOFTCAP> constexpr int kGroupsAhead = SOFTCAP ? 2 : 4;
#endif

// Calls use(v, group) for this thread's groups, in ascending or descending order, of which some are loaded ahead. Of `use` there
// is one copy, where for_each_group has eight: it is so long that the loop costs nothing, and compilers would take minutes.
template <class T, bool DESCENDING, bool SOFTCAP, class Use>
DEVICE void for_each_group_rolled(const RowReader<T>& reader, int groups, const Use& use) {
  constexpr int kAhead = kGroupsAhead<SOFTCAP>;
  const int threads = static_cast<int>(blockDim.x);
  uint4 ahead[kAhead] = {};
  ROLLED for (int next = static_cast<int>(threadIdx.x); next - kAhead * threads < groups; next += threads) {
    const uint4 v = ahead[0];
    UNROLL for (int i = 1; i < kAhead; i++) ahead[i - 1] = ahead[i];
    if (next < groups) ahead[kAhead - 1] = read_group(reader, DESCENDING ? groups - 1 - next : next, -INFINITY);
    const int now = next - kAhead * threads;
    if (now >= 0) use(v, DESCENDING ? groups - 1 - now : now);
  }
}

// Sums take four classes at once, of which a group has one or two fours: more would not fit in the registers.
constexpr int kFour = 4;
template <class T> constexpr int kFours = kGroup<T> / kFour;

// Four numbers of type P, of a reader with the same lead as the logits'.
template <class P> DEVICE void read_four(const RowReader<P>& reader, int four, float (&v)[kFour]) {
  float x[kGroup<P>];
  widen<P>(read_group(reader, four / kFours<P>, 0.f), x);
  UNROLL for (int k = 0; k < kFour; k++) v[k] = kFours<P> == 1 || four % 2 == 0 ? x[k] : x[kGroup<P> - kFour + k];
}

// What stands beside a stretch of a row, in fours from `lead` elements before its first on.
struct Beside {
  const float* weights;
  const float* prior;
  const char* target;  // null where it names classes
  FloatType type;
  float prior_scale;
  int count;
  int lead;

  DEVICE Beside(const Params& p, uint64_t row, const Stretch& stretch, int lead_) : count(stretch.classes), lead(lead_) {
    weights = p.class_weights ? p.class_weights + stretch.begin : nullptr;
    prior = p.prior ? p.prior + stretch.begin : nullptr;
    prior_scale = p.prior ? p.class_check->prior_scale : 1.f;
    type = static_cast<FloatType>(p.probability_type);
    target = nullptr;
    if (p.entries == 0) {
      const uint64_t first = row_offset<uint64_t>(p.probability_rows, row) + (static_cast<unsigned>(stretch.begin) - p.first_class);
      target = static_cast<const char*>(p.probabilities) + first * (type == kF32 ? 4 : 2);
    }
  }

  DEVICE bool any() const { return weights || prior || target; }

  template <class P> DEVICE void read(const void* values, int four, float (&v)[kFour]) const {
    read_four(RowReader<P>(static_cast<const P*>(values), count, lead), four, v);
  }
  DEVICE void read_weights(int four, float (&c)[kFour]) const { read<float>(weights, four, c); }
  DEVICE void read_prior(int four, float (&u)[kFour]) const {
    read<float>(prior, four, u);
    UNROLL for (int k = 0; k < kFour; k++) u[k] *= prior_scale;
  }
  DEVICE void read_target(int four, float (&t)[kFour]) const {
    if (type == kF32) read<float>(target, four, t);
    else if (type == kF16) read<f16>(target, four, t);
    else read<bf16>(target, four, t);
  }

  // The same of one class of the stretch.
  DEVICE float weight(int k) const { return weights ? weights[k] : 1.f; }
  DEVICE float prior_of(int k) const { return prior ? prior[k] * prior_scale : 1.f; }
  DEVICE float target_of(int k) const {
    if (type == kF32) return reinterpret_cast<const float*>(target)[k];
    if (type == kF16) return widen_one(reinterpret_cast<const f16*>(target)[k]);
    return widen_one(reinterpret_cast<const bf16*>(target)[k]);
  }
};

// For for_each_group_rolled: adds logits, -inf for masked classes and elements beyond the row.
template <class T, bool SOFTCAP> struct AddClasses {
  static constexpr int N = kFour;

  AllClassesOfThread& sums;
  const Beside& beside;
  bool norm;  // whether sums for the gradient's norm are wanted
  const Transform<SOFTCAP>& transform;

  DEVICE void operator()(const uint4& v, int group) const {
    if constexpr (kFours<T> == 1) {
      float x[N];
      widen<T>(v, x);
      add_four(x, group, group);
    } else {
      unsigned low = v.x, high = v.y;
      ROLLED for (int half = 0; half < 2; half++) {
        float x[N];
        dev::unpack<T>(low, x[0], x[1]), dev::unpack<T>(high, x[2], x[3]);
        add_four(x, 2 * group + half, group);
        low = v.z, high = v.w;
      }
    }
  }

  DEVICE void add_four(const float (&x)[N], int four, int group) const {
    AllClasses& a = sums.partial;
    const float largest = dev::max(dev::max(x[0], x[1]), dev::max(x[2], x[3]));
    // Where a larger one is left out from now on, the one before takes its place in the sums of exponentials.
    int replaced = N;
    float before = kNothing;
    if (largest > sums.largest) {
      if (largest > a.largest) relate(a, largest, transform.reference(largest), transform);
      if (sums.largest != -INFINITY) before = dev::max(transform.exact(sums.largest, a.largest, a.reference), kNothing);
      sums.largest = largest;
      a.at = static_cast<unsigned>(group);
      UNROLL for (int k = N - 1; k >= 0; k--) replaced = x[k] == largest ? k : replaced;
    }
    // Where nothing stands beside the logits, as with a teacher's few classes, a third fewer instructions.
    if (beside.any() ? add<false, true>(x, four, replaced, before) : add<false, false>(x, four, replaced, before)) return;
    PATH("masked or far");
    add<true, true>(x, four, replaced, before);
  }

  // SPECIAL: some may be masked or far. Without, adds nothing and says so where some are. BESIDE: something may stand beside.
  template <bool SPECIAL, bool BESIDE> DEVICE bool add(const float (&x)[N], int four, int replaced, float before) const {
    AllClasses& a = sums.partial;
    float d[N], exp = 0.f, weighted = 0.f, squares = 0.f, linear = 0.f;
    unsigned classes = 0;
    UNROLL for (int k = 0; k < N; k++) {
      const bool counts = !SPECIAL || x[k] != -INFINITY;
      d[k] = !SPECIAL ? transform.near(x[k], a.largest, a.reference)
                      : counts ? transform.exact(x[k], a.largest, a.reference) : 0.f;
      linear += d[k];
      classes += counts ? 1u : 0u;
      const float rest = k == replaced ? before : d[k];
      const float e = counts ? dev::exp2_approx(rest) : 0.f;
      exp += e;
      if (!SPECIAL || e > 0.f) weighted = dev::fma(rest, e, weighted);
      squares = dev::fma(e, e, squares);
    }
    if (!SPECIAL && linear == -INFINITY) return false;
    const bool has_weights = BESIDE && beside.weights, has_prior = BESIDE && beside.prior, has_target = BESIDE && beside.target;
    float own_exp[N];  // with the largest, without the one that takes its place
    if (norm && (has_prior || has_target)) {
      UNROLL for (int k = 0; k < N; k++) own_exp[k] = !SPECIAL || x[k] != -INFINITY ? dev::exp2_approx(d[k]) : 0.f;
    }
    // From here on d is in `kUnit`s.
    const bool has_values = has_weights || has_prior;
    linear = SPECIAL ? 0.f : linear * kUnit;
    if (SPECIAL || has_values || has_target) {
      UNROLL for (int k = 0; k < N; k++) {
        d[k] = !SPECIAL ? d[k] * kUnit : x[k] != -INFINITY ? finite_units(x[k], a.largest, d[k], transform) : 0.f;
        if (SPECIAL) linear += d[k];
      }
    }
    float shares = static_cast<float>(classes), c[N], u[N];
    if (has_values) {
      shares = linear = 0.f;
      if (has_weights) beside.read_weights(four, c);
      if (has_prior) beside.read_prior(four, u);
      float prior = 0.f, prior_exp = 0.f, prior_squares = 0.f;
      UNROLL for (int k = 0; k < N; k++) {
        const bool counts = !SPECIAL || x[k] != -INFINITY;
        if (has_prior) {
          u[k] = counts ? u[k] : 0.f;
          prior += u[k];
          if (norm) {
            prior_exp = dev::fma(u[k], own_exp[k], prior_exp);
            prior_squares = dev::fma(u[k], u[k], prior_squares);
          }
        }
        const float share = !has_weights ? u[k] : !counts ? 0.f : has_prior ? c[k] * u[k] : c[k];
        shares += share;
        linear = dev::fma(share, d[k], linear);
      }
      if (has_prior) {
        a.prior.add(prior);
        a.prior_exp += prior_exp;
        a.prior_squares += prior_squares;
      }
    }
    if (has_target) {
      float t[N];
      beside.read_target(four, t);
      Sum mass = {0.f, 0.f}, weighted_mass = {0.f, 0.f};
      float target_linear = 0.f, weighted_linear = 0.f, least = 0.f;
      float target_exp = 0.f, target_squares = 0.f, target_prior = 0.f;
      UNROLL for (int k = 0; k < N; k++) {
        const bool counts = !SPECIAL || x[k] != -INFINITY;
        least = t[k] < least ? t[k] : least;
        mass.add(t[k]);
        target_linear = dev::fma(t[k], d[k], target_linear);
        if (has_weights) {
          const float ct = c[k] * t[k];
          weighted_mass.add(ct);
          weighted_linear = dev::fma(ct, d[k], weighted_linear);
        }
        if (SPECIAL && !counts && t[k] > 0.f) a.faults |= kOutOfReach;
        if (norm && counts) {
          target_exp = dev::fma(t[k], own_exp[k], target_exp);
          target_squares = dev::fma(t[k], t[k], target_squares);
          target_prior = has_prior ? dev::fma(t[k], u[k], target_prior) : target_prior + t[k];
        }
      }
      if (!(least >= 0.f && mass.value < INFINITY)) a.faults |= kBadProbability;
      a.target.add(mass);
      a.target_linear += target_linear;
      if (has_weights) {
        a.weighted_target.add(weighted_mass);
        a.weighted_linear += weighted_linear;
      }
      a.target_exp += target_exp;
      a.target_squares += target_squares;
      a.target_prior += target_prior;
    }
    a.exp.add(exp);
    a.weighted.add(weighted);
    a.squares += squares;
    a.classes += classes;
    if (has_values) a.shares.add(shares);
    else a.shares.value += shares;
    a.shares_linear += linear;
    return true;
  }
};
