// A buffer in emulated global memory, with guard bytes on both sides.
//
// The guards change with the seed of the schedule: a read beyond the end that matters makes the results differ from
// seed to seed, a write is found when they are checked. Under AddressSanitizer the block ends with the data, and the
// red zones find both at once; before the data only whole words of 8 bytes can be forbidden, guards do the rest.
#pragma once
#include <optional>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <string>
#include <vector>
#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#endif

class GuardedBuffer {
 public:
  // The data starts `offset` bytes after a 16-byte boundary.
  GuardedBuffer(const std::vector<unsigned char>& data, size_t offset, uint64_t seed)
      : front_(kBoundary + offset % kBoundary), bytes_(data.size()), guard_(guard_byte(seed)) {
    void* memory = nullptr;
    if (posix_memalign(&memory, kBoundary, front_ + bytes_ + kBack) != 0) abort();
    memory_ = static_cast<unsigned char*>(memory);
    memset(memory_, guard_, front_ + bytes_ + kBack);
    if (bytes_ != 0) memcpy(begin(), data.data(), bytes_);
    forbid(true);
  }
  GuardedBuffer(const GuardedBuffer&) = delete;
  GuardedBuffer& operator=(const GuardedBuffer&) = delete;
  ~GuardedBuffer() {
    forbid(false);
    free(memory_);
  }

  unsigned char* begin() { return memory_ + front_; }
  const unsigned char* begin() const { return memory_ + front_; }
  size_t bytes() const { return bytes_; }
  std::vector<unsigned char> contents() const { return {begin(), begin() + bytes_}; }

  // Offset from the first byte of the data of a guard byte that was overwritten.
  std::optional<ptrdiff_t> broken_guard() {
    forbid(false);
    std::optional<ptrdiff_t> broken;
    for (size_t i = 0; i < front_ + bytes_ + kBack; i++) {
      bool is_data = i >= front_ && i < front_ + bytes_;
      if (!is_data && memory_[i] != guard_) broken = static_cast<ptrdiff_t>(i) - static_cast<ptrdiff_t>(front_);
    }
    forbid(true);
    return broken;
  }

 private:
  static constexpr size_t kBoundary = 16;
#ifdef __SANITIZE_ADDRESS__
  static constexpr size_t kBack = 0;
  void forbid(bool on) const {
    auto change = on ? __asan_poison_memory_region : __asan_unpoison_memory_region;
    change(memory_, front_ / 8 * 8);
  }
#else
  static constexpr size_t kBack = 64;
  void forbid(bool) const {}
#endif
  // All ones are NaN for every type; so seed 0 finds what a NaN shows.
  static unsigned char guard_byte(uint64_t seed) { return static_cast<unsigned char>(0xff - seed * 0x4d); }

  size_t front_, bytes_;
  unsigned char guard_;
  unsigned char* memory_;
};
