// A case as tests/emulation writes it: little-endian 64-bit words, and byte strings after a word with their length.
#pragma once
#include "emulator.h"
#include <bit>
#include <fstream>
#include <iterator>
#include <stdexcept>
#include <stdint.h>
#include <string.h>
#include <string>
#include <vector>

static_assert(std::endian::native == std::endian::little);

struct CaseBuffer {
  std::string name;
  size_t offset;  // of the first byte from a 16-byte boundary
  bool output;    // otherwise no kernel may change it
  std::vector<unsigned char> contents;
};

struct CaseLaunch {
  std::string symbol;
  emu::LaunchShape shape;
  uint64_t pointers;  // leading words of params that are 0 or (buffer + 1) << 40 | offset
  std::vector<unsigned char> params;
};

struct Case {
  std::vector<uint64_t> seeds;
  std::vector<CaseBuffer> buffers;
  std::vector<CaseLaunch> launches;
};

class CaseReader {
 public:
  explicit CaseReader(const std::string& path) {
    std::ifstream file(path, std::ios::binary);
    bytes_.assign(std::istreambuf_iterator<char>(file), {});
  }

  Case read() {
    Case result;
    result.seeds.resize(word());
    for (uint64_t& seed : result.seeds) seed = word();
    result.buffers.resize(word());
    for (CaseBuffer& buffer : result.buffers) {
      buffer.name = text();
      buffer.offset = word();
      buffer.output = word() != 0;
      buffer.contents = block();
    }
    result.launches.resize(word());
    for (CaseLaunch& launch : result.launches) {
      launch.symbol = text();
      launch.shape.grid = static_cast<unsigned>(word());
      launch.shape.block = static_cast<unsigned>(word());
      launch.shape.cluster = static_cast<unsigned>(word());
      launch.shape.dynamic_shared_bytes = word();
      launch.pointers = word();
      launch.params = block();
    }
    if (at_ != bytes_.size()) throw std::runtime_error("the case file goes on after its end");
    return result;
  }

 private:
  const unsigned char* take(size_t count) {
    if (count > bytes_.size() - at_) throw std::runtime_error("the case file is too short");
    at_ += count;
    return bytes_.data() + at_ - count;
  }
  uint64_t word() {
    uint64_t value;
    memcpy(&value, take(sizeof value), sizeof value);
    return value;
  }
  std::vector<unsigned char> block() {
    size_t count = word();
    const unsigned char* begin = take(count);
    return {begin, begin + count};
  }
  std::string text() {
    std::vector<unsigned char> bytes = block();
    return {bytes.begin(), bytes.end()};
  }

  std::vector<unsigned char> bytes_;
  size_t at_ = 0;
};
