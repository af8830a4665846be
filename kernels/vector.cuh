// Groups of 16 bytes of a row, read and written at any alignment.
//
// Which thread adds up which logits must not depend on a row's address, or a row's bits would change with its place
// in memory. So groups are counted from the row's first element, not from a 16-byte boundary, and a group that
// straddles two 16-byte words is put together from both; the second comes from the cache.
#pragma once
#include "device.cuh"

template <class T> constexpr int kLogGroup = sizeof(T) == 4 ? 2 : 3;
template <class T> constexpr int kGroup = 1 << kLogGroup<T>;

// The elements of a 16-byte word as f32.
template <class T> DEVICE void widen(uint4 v, float (&x)[kGroup<T>]) {
  if constexpr (sizeof(T) == 4) {
    x[0] = dev::float_from_bits(v.x), x[1] = dev::float_from_bits(v.y);
    x[2] = dev::float_from_bits(v.z), x[3] = dev::float_from_bits(v.w);
  } else {
    dev::unpack<T>(v.x, x[0], x[1]), dev::unpack<T>(v.y, x[2], x[3]);
    dev::unpack<T>(v.z, x[4], x[5]), dev::unpack<T>(v.w, x[6], x[7]);
  }
}

// The inverse, rounding each value once.
template <class T> DEVICE uint4 narrow(const float (&x)[kGroup<T>]) {
  uint4 v;
  if constexpr (sizeof(T) == 4) {
    v.x = dev::bits_from_float(x[0]), v.y = dev::bits_from_float(x[1]);
    v.z = dev::bits_from_float(x[2]), v.w = dev::bits_from_float(x[3]);
  } else {
    v.x = dev::pack<T>(x[0], x[1]), v.y = dev::pack<T>(x[2], x[3]);
    v.z = dev::pack<T>(x[4], x[5]), v.w = dev::pack<T>(x[6], x[7]);
  }
  return v;
}

template <class T> DEVICE float widen_one(T x) {
  if constexpr (sizeof(T) == 4) {
    return x;
  } else {
    float low, high;
    dev::unpack<T>(x.bits, low, high);
    return low;
  }
}

template <class T> DEVICE T narrow_one(float x) {
  if constexpr (sizeof(T) == 4) {
    return x;
  } else {
    T y;
    y.bits = static_cast<unsigned short>(dev::pack<T>(x, 0.f));
    return y;
  }
}

// 16 bytes of five consecutive 32-bit words, from `bits` (0, or 16 of 16-bit elements) on.
template <class T> DEVICE uint4 shifted(unsigned a, unsigned b, unsigned c, unsigned d, unsigned e, unsigned bits) {
  if constexpr (sizeof(T) == 4) return {a, b, c, d};
  return {dev::funnel_right(a, b, bits), dev::funnel_right(b, c, bits), dev::funnel_right(c, d, bits),
          dev::funnel_right(d, e, bits)};
}

// U groups that each start `phase` bytes (1 to 15, a multiple of the element's size) into the first of the two 16-byte
// words load(u, 0) and load(u, 1). One branch for all U: to select words would cost eleven instructions a group.
template <class T, int U, class Load> DEVICE void load_straddling(uint4 (&v)[U], unsigned phase, Load load) {
  const unsigned bits = (phase & 2u) * 8u;
  switch (phase / 4) {
    case 0:
      UNROLL for (int u = 0; u < U; u++) {
        const uint4 low = load(u, 0), high = load(u, 1);
        v[u] = shifted<T>(low.x, low.y, low.z, low.w, high.x, bits);
      }
      break;
    case 1:
      UNROLL for (int u = 0; u < U; u++) {
        const uint4 low = load(u, 0), high = load(u, 1);
        v[u] = shifted<T>(low.y, low.z, low.w, high.x, high.y, bits);
      }
      break;
    case 2:
      UNROLL for (int u = 0; u < U; u++) {
        const uint4 low = load(u, 0), high = load(u, 1);
        v[u] = shifted<T>(low.z, low.w, high.x, high.y, high.z, bits);
      }
      break;
    default:
      UNROLL for (int u = 0; u < U; u++) {
        const uint4 low = load(u, 0), high = load(u, 1);
        v[u] = shifted<T>(low.w, high.x, high.y, high.z, high.w, bits);
      }
  }
}

// The first `count` elements of a row, in groups that start at element `lead` before the first: group g holds
// elements g*kGroup - lead and on. Every group starts `phase` bytes past a 16-byte boundary.
template <class T> struct RowReader {
  const T* row;
  int count;
  int lead;
  unsigned phase;

  DEVICE RowReader(const T* row_, int count_, int lead_) : row(row_), count(count_), lead(lead_) {
    phase = (static_cast<unsigned>(reinterpret_cast<uintptr_t>(row)) - lead * static_cast<unsigned>(sizeof(T))) & 15u;
  }

  DEVICE int start(int group) const { return group * kGroup<T> - lead; }

  // Whether the one or two 16-byte words of a group hold nothing outside the row.
  template <bool ALIGNED> DEVICE bool inside(int group) const {
    const int first = start(group);
    if constexpr (ALIGNED) return first >= 0 && first + kGroup<T> <= count;
    const int before = static_cast<int>(phase / sizeof(T));
    return first >= before && first - before + 2 * kGroup<T> <= count;
  }
};

// A group at the row's edge, element by element, with `beyond` for those beyond it.
template <class T> DEVICE uint4 load_edge(const RowReader<T>& reader, int group, float beyond = -INFINITY) {
  float x[kGroup<T>];
  UNROLL for (int k = 0; k < kGroup<T>; k++) {
    const int i = reader.start(group) + k;
    x[k] = i >= 0 && i < reader.count ? widen_one(reader.row[i]) : beyond;
  }
  return narrow<T>(x);
}

// Loads U groups, `stride` after one another, none of whose words reach beyond the row.
template <class T, bool ALIGNED, bool STREAMING, int U>
DEVICE void load_inside(const RowReader<T>& reader, int group, int stride, uint4 (&v)[U]) {
  const char* at = reinterpret_cast<const char*>(reader.row) + static_cast<long long>(reader.start(group)) * int(sizeof(T));
  if constexpr (ALIGNED) {
    UNROLL for (int u = 0; u < U; u++) {
      const char* word = at + static_cast<long long>(u * stride) * 16;
      v[u] = STREAMING ? dev::load16_streaming(word) : dev::load16(word);
    }
  } else {
    at -= reader.phase;
    load_straddling<T>(v, reader.phase, [&](int u, int second) {
      const char* word = at + static_cast<long long>(u * stride) * 16 + second * 16;
      return STREAMING && second == 0 ? dev::load16_streaming(word) : dev::load16(word);
    });
  }
}

// Calls use(v, group, stride, inside) for this thread's groups, in ascending or descending order, AHEAD at once where
// there are as many and BATCHES, else one by one; AHEAD are loaded at once in any case. `inside`: they lie wholly in the
// row. Neither the order nor what comes at once depends on the alignment, so no sum does.
template <class T, bool ALIGNED, int AHEAD, bool BATCHES, bool STREAMING, bool DESCENDING, class Use>
DEVICE void for_each_group_aligned(const RowReader<T>& reader, int groups, Use use) {
  const int threads = static_cast<int>(blockDim.x), stride = DESCENDING ? -threads : threads;
  for (int first = static_cast<int>(threadIdx.x); first < groups; first += AHEAD * threads) {
    const int group = DESCENDING ? groups - 1 - first : first, last = group + (AHEAD - 1) * stride;
    const bool all = first + (AHEAD - 1) * threads < groups;
    const bool inside = all && reader.template inside<ALIGNED>(group) && reader.template inside<ALIGNED>(last);
    uint4 v[AHEAD];
    if (inside) {
      PATH("inside");
      load_inside<T, ALIGNED, STREAMING>(reader, group, stride, v);
    } else {
      UNROLL for (int u = 0; u < AHEAD; u++) {
        const int here = group + u * stride;
        if (first + u * threads >= groups) continue;
        if (reader.template inside<ALIGNED>(here)) {
          uint4 one[1];
          load_inside<T, ALIGNED, STREAMING>(reader, here, stride, one);
          v[u] = one[0];
        } else {
          PATH("edge");
          v[u] = load_edge(reader, here);
        }
      }
    }
    if constexpr (BATCHES) {
      if (all) {
        use(v, group, stride, inside);
        continue;
      }
    }
    UNROLL for (int u = 0; u < AHEAD; u++) {
      const int here = group + u * stride;
      uint4 one[1] = {v[u]};
      if (first + u * threads < groups) use(one, here, stride, reader.template inside<ALIGNED>(here));
    }
  }
}

template <class T, int AHEAD, bool BATCHES, bool STREAMING, bool DESCENDING, bool MAY_ALIGN = true, class Use>
DEVICE void for_each_group(const RowReader<T>& reader, int groups, Use use) {
  if constexpr (MAY_ALIGN) {
    if (reader.phase == 0) {
      for_each_group_aligned<T, true, AHEAD, BATCHES, STREAMING, DESCENDING>(reader, groups, use);
      return;
    }
  }
  for_each_group_aligned<T, false, AHEAD, BATCHES, STREAMING, DESCENDING>(reader, groups, use);
}
