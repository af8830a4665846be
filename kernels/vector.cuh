// Groups of 16 bytes of a row, read and written at any alignment.
//
// Which thread adds up which logits must not depend on a row's address, or a row's bits would change with its place
// in memory. So groups are counted from the row's first element, not from a 16-byte boundary, and a group that
// straddles two 16-byte words is put together from both; the second comes from the cache.
#pragma once
#include "device.cuh"

template <class T> constexpr int kGroup = 16 / sizeof(T);

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

// The 16 bytes that start `phase` bytes (0 to 15, a multiple of the element's size) into `low`, `high`.
template <class T> DEVICE uint4 straddle(uint4 low, uint4 high, unsigned phase) {
  const bool by2 = phase & 8, by1 = phase & 4;
  const unsigned a0 = by2 ? low.z : low.x, a1 = by2 ? low.w : low.y, a2 = by2 ? high.x : low.z;
  const unsigned a3 = by2 ? high.y : low.w, a4 = by2 ? high.z : high.x, a5 = by2 ? high.w : high.y;
  const unsigned b0 = by1 ? a1 : a0, b1 = by1 ? a2 : a1, b2 = by1 ? a3 : a2, b3 = by1 ? a4 : a3, b4 = by1 ? a5 : a4;
  uint4 v;
  if constexpr (sizeof(T) == 4) {
    v.x = b0, v.y = b1, v.z = b2, v.w = b3;
  } else {
    const unsigned bits = (phase & 2) * 8;
    v.x = dev::funnel_right(b0, b1, bits), v.y = dev::funnel_right(b1, b2, bits);
    v.z = dev::funnel_right(b2, b3, bits), v.w = dev::funnel_right(b3, b4, bits);
  }
  return v;
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

// The 16-byte words of a group, loaded ahead of their use.
template <class T, bool ALIGNED> struct GroupWords {
  uint4 low, high;

  template <bool STREAMING> DEVICE void load(const RowReader<T>& reader, int group) {
    const char* at = reinterpret_cast<const char*>(reader.row) + static_cast<long long>(reader.start(group)) * int(sizeof(T));
    if constexpr (!ALIGNED) at -= reader.phase;
    low = STREAMING ? dev::load16_streaming(at) : dev::load16(at);
    if constexpr (!ALIGNED) high = dev::load16(at + 16);
  }

  DEVICE void widen_to(float (&x)[kGroup<T>], unsigned phase) const {
    if constexpr (ALIGNED) widen<T>(low, x);
    else widen<T>(straddle<T>(low, high, phase), x);
  }
};

// A group at the row's edge, element by element; `outside` stands for those beyond it.
template <class T> DEVICE void load_edge(const RowReader<T>& reader, int group, float outside, float (&x)[kGroup<T>]) {
  UNROLL for (int k = 0; k < kGroup<T>; k++) {
    const int i = reader.start(group) + k;
    x[k] = i >= 0 && i < reader.count ? widen_one(reader.row[i]) : outside;
  }
}

// Calls use(group, x, at_edge) for every group of this thread, in ascending or descending order, with AHEAD loads in
// flight. The order, and so every sum taken in it, does not depend on the alignment.
template <class T, bool ALIGNED, int AHEAD, bool STREAMING, bool DESCENDING, class Use>
DEVICE void for_each_group_aligned(const RowReader<T>& reader, int groups, Use use) {
  const int threads = static_cast<int>(blockDim.x);
  for (int first = static_cast<int>(threadIdx.x); first < groups; first += AHEAD * threads) {
    GroupWords<T, ALIGNED> words[AHEAD];
    UNROLL for (int u = 0; u < AHEAD; u++) {
      const int at = first + u * threads, group = DESCENDING ? groups - 1 - at : at;
      if (at < groups && reader.template inside<ALIGNED>(group)) words[u].template load<STREAMING>(reader, group);
    }
    UNROLL for (int u = 0; u < AHEAD; u++) {
      const int at = first + u * threads, group = DESCENDING ? groups - 1 - at : at;
      if (at < groups) {
        float x[kGroup<T>];
        const bool inside = reader.template inside<ALIGNED>(group);
        if (inside) {
          PATH("inside");
          words[u].widen_to(x, reader.phase);
        } else {
          PATH("edge");
          load_edge<T>(reader, group, -INFINITY, x);
        }
        use(group, x, !inside);
      }
    }
  }
}

template <class T, int AHEAD, bool STREAMING, bool DESCENDING, bool MAY_ALIGN = true, class Use>
DEVICE void for_each_group(const RowReader<T>& reader, int groups, Use use) {
  if constexpr (MAY_ALIGN) {
    if (reader.phase == 0) {
      for_each_group_aligned<T, true, AHEAD, STREAMING, DESCENDING>(reader, groups, use);
      return;
    }
  }
  for_each_group_aligned<T, false, AHEAD, STREAMING, DESCENDING>(reader, groups, use);
}
