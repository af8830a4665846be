// self_test NAME: one small kernel, right or with the named fault, so that tests/emulation can require each fault to
// be reported.
#include "cuda_host.h"
#include <stdexcept>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <string>
#include <vector>

namespace {

std::string fault;
// Evaluated by every thread, so a fault is the same for all unless the condition says otherwise.
bool has(const char* name) { return fault == name; }

constexpr unsigned kBlock = 64;
constexpr unsigned kCluster = 4;
constexpr unsigned kClusters = 2;
constexpr unsigned kSlice = 256;  // floats a block

struct Arguments {
  const float* input;
  float* output;
};

DEVICE float sum_of_warp(float x) {
  for (int mask = 16; mask > 0; mask /= 2) x += dev::shuffle_xor(x, mask);
  return dev::shuffle(x, 0);
}

DEVICE float sum_of_block(float x) {
  SHARED_ARRAY(float, partial, kBlock / 32);
  if (has("missing_lane") && threadIdx.x == 5) return x;
  x = sum_of_warp(x);
  if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32 + (has("shared_overrun") ? 1 : 0)] = x;
  if (has("divergent_barrier") && threadIdx.x >= 32) return x;
  if (!has("no_barrier")) dev::sync_block();
  return partial[0] + partial[1];
}

// Twice the sum of each block's numbers plus 1, through the same scratch memory both times.
void block_kernel(const Arguments& a) {
  if (!has("no_wait_for_kernels")) dev::begin_kernel();
  if (has("early_return") && threadIdx.x >= 32) return;
  const float* slice = a.input + blockIdx.x * kSlice;
  float x = 0;
  for (unsigned i = threadIdx.x; i < kSlice / 4; i += blockDim.x) {
    uint4 v = dev::load16(slice + 4 * i + (has("misaligned") ? 1 : 0));
    x += dev::float_from_bits(v.x) + dev::float_from_bits(v.y) + dev::float_from_bits(v.z) + dev::float_from_bits(v.w);
  }
  float once = sum_of_block(x);
  if (!has("no_barrier_before_reuse")) dev::sync_block();
  float twice = once + sum_of_block(x + 1.0f / kBlock);
  unsigned row = has("rows_collide") ? 0 : blockIdx.x;
  if (threadIdx.x == 0) a.output[row] = twice;
}

struct alignas(16) Message {
  float sum;
};
struct alignas(128) Shared {
  uint64_t mbarrier, received;
  Message sums[kCluster];
};
constexpr size_t kDynamicBytes = sizeof(Shared) + kSlice * sizeof(float);

// The same for the numbers of each cluster, copied on chip and sent from each block to all.
void cluster_kernel(const Arguments& a) {
  if (!has("copy_before_wait")) dev::begin_kernel();
  DYNAMIC_SHARED(memory);
  Shared* shared = reinterpret_cast<Shared*>(memory);
  float* slice = reinterpret_cast<float*>(memory + sizeof(Shared));
  if (threadIdx.x == 0) {
    if (!has("no_mbarrier")) dev::mbarrier_init(&shared->mbarrier, 1);
    dev::mbarrier_init(&shared->received, 1);
    if (!has("no_fence")) dev::mbarrier_fence_init();
    const unsigned senders = has("too_few_senders") ? kCluster - 1 : has("too_many_senders") ? kCluster + 1 : kCluster;
    dev::mbarrier_arrive_expect(&shared->received, senders * sizeof(Message));
  }
  if (!has("no_cluster_arrival")) dev::cluster_arrive_relaxed();
  if (!has("no_barrier_after_init")) dev::sync_block();
  if (threadIdx.x == 0) {
    unsigned bytes = kSlice * sizeof(float);
    dev::mbarrier_arrive_expect(&shared->mbarrier, has("wrong_byte_count") ? bytes + 16 : bytes);
    float* to = slice + (has("copy_too_far") ? 4 : 0);
    dev::bulk_copy(to, a.input + blockIdx.x * kSlice, bytes, &shared->mbarrier);
  }
  if (has("copy_before_wait")) dev::begin_kernel();
  if (!has("no_wait")) dev::mbarrier_wait(&shared->mbarrier, 0);
  float x = 0;
  for (unsigned i = threadIdx.x; i < kSlice; i += blockDim.x) x += slice[i];
  x = sum_of_block(x);
  if (!has("no_cluster_barrier")) dev::cluster_wait();
  const unsigned own = blockIdx.x % kCluster, to = has("wrong_rank") ? threadIdx.x + 1 : threadIdx.x;
  if (threadIdx.x < kCluster) dev::send(&shared->sums[own], {x}, to, &shared->received);
  if (has("block_ends_early")) return;
  if (!has("no_wait_for_messages")) dev::mbarrier_wait_cluster(&shared->received, 0);
  float sum = 0;
  for (unsigned rank = 0; rank < kCluster; rank++) sum += shared->sums[rank].sum;
  if (threadIdx.x == 0) a.output[blockIdx.x] = 2 * sum + 1;
}

struct Data {
  float* input;
  float* output;
  unsigned blocks = kCluster * kClusters;
  Data() {
    unsigned floats = blocks * kSlice;
    input = static_cast<float*>(aligned_alloc(16, floats * sizeof(float)));
    output = static_cast<float*>(aligned_alloc(16, blocks * sizeof(float)));
    for (unsigned i = 0; i < floats; i++) input[i] = static_cast<float>(i % 7) - static_cast<float>(i / kSlice);
    for (unsigned i = 0; i < blocks; i++) output[i] = -1;
    emu::watch_global(input, floats * sizeof(float), "input");
    emu::watch_global(output, blocks * sizeof(float), "output");
  }
  ~Data() {
    emu::unwatch_all();
    free(input);
    free(output);
  }
  float sum(unsigned first_block, unsigned count) const {
    float sum = 0;
    for (unsigned i = first_block * kSlice; i < (first_block + count) * kSlice; i++) sum += input[i];
    return sum;
  }
};

void check(const Data& data, unsigned blocks_a_sum, const char* kernel) {
  for (unsigned i = 0; i < data.blocks; i++) {
    float expected = 2 * data.sum(i / blocks_a_sum * blocks_a_sum, blocks_a_sum) + 1;
    if (data.output[i] != expected) throw std::runtime_error(std::string("wrong result of the ") + kernel + " kernel");
  }
}

void run(uint64_t seed) {
  {
    Data data;
    Arguments arguments{data.input, data.output};
    auto body = [](void* a) { block_kernel(*static_cast<const Arguments*>(a)); };
    emu::launch({data.blocks, kBlock}, seed, body, &arguments);
    check(data, 1, "block");
  }
  Data data;
  Arguments arguments{data.input, data.output};
  auto body = [](void* a) { cluster_kernel(*static_cast<const Arguments*>(a)); };
  emu::launch({data.blocks, kBlock, kCluster, kDynamicBytes}, seed, body, &arguments);
  check(data, kCluster, "cluster");
}

template <class T> float neighbour_below(unsigned bits) {
  float value, unused;
  dev::unpack<T>(bits - 1, value, unused);
  return value;
}

// Every f16 and bf16 survives the way to f32 and back, and what lies half way goes to the even neighbour.
template <class T> void check_conversions(unsigned infinity) {
  for (unsigned bits = 0; bits < infinity; bits++) {
    float value, above, unused;
    dev::unpack<T>(bits, value, unused);
    dev::unpack<T>(bits + 1, above, unused);
    unsigned even = bits + bits % 2;
    // Beyond the largest finite number the half-way point is where the next one would be.
    float middle = bits + 1 == infinity ? value + (value - neighbour_below<T>(bits)) / 2 : value + (above - value) / 2;
    bool good = dev::pack<T>(value, -value) == (bits | (bits | 0x8000u) << 16);
    good = good && dev::pack<T>(middle, nextafterf(middle, 0)) == (even | bits << 16);
    good = good && dev::pack<T>(nextafterf(middle, INFINITY), 0) == bits + 1;
    if (!good) throw std::runtime_error("wrong conversion of " + std::to_string(bits));
  }
  if ((dev::pack<T>(NAN, 0) & 0x7fffu) <= infinity) throw std::runtime_error("NaN is lost");
}

}  // namespace

int main(int count, char** arguments) {
  if (count == 2) fault = arguments[1];
  try {
    check_conversions<f16>(0x7c00);
    check_conversions<bf16>(0x7f80);
    for (uint64_t seed = 0; seed < 6; seed++) run(seed);
  } catch (const std::exception& error) {
    fprintf(stderr, "%s\n", error.what());
    return 1;
  }
  return 0;
}
