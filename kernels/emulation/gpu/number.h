// Numbers of every type that tensors have, read and written one at a time.
#pragma once
#include "gpu.h"
#include <math.h>
#include <string.h>

namespace number {

// The floats are numbered as cuBLAS does.
enum Type { kF32 = 0, kF64 = 1, kF16 = 2, kBf16 = 14, kU8, kU32, kI64 };

inline size_t size(int type) {
  switch (type) {
    case kU8: return 1;
    case kF16: case kBf16: return 2;
    case kF32: case kU32: return 4;
    case kF64: case kI64: return 8;
    default: gpu::fail("numbers of the type %d", type);
  }
}

template <class T> T at(const void* memory, size_t i) {
  T value;
  memcpy(&value, static_cast<const unsigned char*>(memory) + i * sizeof(T), sizeof(T));
  return value;
}

// Long double holds each of them.
inline long double read(const void* memory, size_t i, int type) {
  switch (type) {
    case kF32: return at<float>(memory, i);
    case kF64: return at<double>(memory, i);
    case kF16: return static_cast<float>(at<_Float16>(memory, i));
    case kBf16: return __builtin_bit_cast(float, uint32_t{at<uint16_t>(memory, i)} << 16);
    case kU8: return at<uint8_t>(memory, i);
    case kU32: return at<uint32_t>(memory, i);
    case kI64: return at<int64_t>(memory, i);
    default: gpu::fail("numbers of the type %d", type);
  }
}

template <class T> void put(void* memory, size_t i, T value) {
  memcpy(static_cast<unsigned char*>(memory) + i * sizeof(T), &value, sizeof(T));
}

inline void write(void* memory, size_t i, int type, long double value) {
  switch (type) {
    case kF32: return put(memory, i, static_cast<float>(value));
    case kF64: return put(memory, i, static_cast<double>(value));
    case kF16: return put(memory, i, static_cast<_Float16>(static_cast<float>(value)));
    case kBf16: {
      const uint32_t bits = __builtin_bit_cast(uint32_t, static_cast<float>(value));
      const uint32_t rounded = value != value ? 0x7fff0000u : bits + 0x7fff + (bits >> 16 & 1);
      return put(memory, i, static_cast<uint16_t>(rounded >> 16));
    }
    case kU8: return put(memory, i, static_cast<uint8_t>(value));
    case kU32: return put(memory, i, static_cast<uint32_t>(value));
    case kI64: return put(memory, i, static_cast<int64_t>(value));
    default: gpu::fail("numbers of the type %d", type);
  }
}

}  // namespace number
