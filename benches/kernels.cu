// Times the on-chip kernels of bf16 logits alone, beside the driver's copy of as many bytes: for who changes them. A variant
// compiles in seconds, and a program holds nothing else, so that many travel to a machine with a GPU at once:
//
//   nvcc -std=c++17 -O3 -arch=sm_90a -Ikernels benches/kernels.cu -cudart static -o kernels     # no GPU needed
//   ./kernels VOCABULARY BLOCKS …                # pairs: rows of so many classes, in clusters of so many blocks
//
// 8192 rows of random logits with a deviation of 2, a smoothing value a row, none ignored; medians of 10. Prints JSON, one
// timing a line, with the mean loss, which does not depend on the variant, and the sum of a row's gradients, about 0.
#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <vector>

#include "on_chip.cuh"

#define TIMED KERNEL void __launch_bounds__(256, 4)  // as cross_entropy.cu
TIMED forward(Params p) { row_on_chip<bf16, false, false, false>(p); }
TIMED forward_with_stats(Params p) { row_on_chip<bf16, true, false, false>(p); }
TIMED loss_and_grad_without_stats(Params p) { row_on_chip<bf16, false, false, true>(p); }
TIMED loss_and_grad(Params p) { row_on_chip<bf16, true, false, true>(p); }

struct Timed {
  const char* name;
  const void* kernel;
  bool stats, gradient;
};
const Timed kTimed[] = {{"forward", (const void*)forward, false, false},
                        {"forward_with_stats", (const void*)forward_with_stats, true, false},
                        {"loss_and_grad_without_stats", (const void*)loss_and_grad_without_stats, false, true},
                        {"loss_and_grad", (const void*)loss_and_grad, true, true}};

#define CHECK(call)                                                                      \
  do {                                                                                   \
    const cudaError_t error = (call);                                                    \
    if (error != cudaSuccess) {                                                          \
      fprintf(stderr, "kernels: %s: %s\n", #call, cudaGetErrorString(error));            \
      exit(1);                                                                           \
    }                                                                                    \
  } while (0)

constexpr size_t kRows = 8192;

// Normal numbers, by a hash of their place.
__global__ void fill(bf16* x, size_t count) {
  for (size_t i = blockIdx.x * size_t(blockDim.x) + threadIdx.x; i < count; i += size_t(gridDim.x) * blockDim.x) {
    uint64_t h = (i + 1) * 0x9e3779b97f4a7c15u;
    h = (h ^ h >> 31) * 0xbf58476d1ce4e5b9u;
    h = (h ^ h >> 27) * 0x94d049bb133111ebu;
    const float u = ((h & 0xffffff) + 1) * 0x1p-24f, v = (h >> 24 & 0xffffff) * 0x1p-24f;
    x[i] = narrow_one<bf16>(2.f * sqrtf(-2.f * logf(u)) * cospif(2.f * v));
  }
}

float median_ms(cudaStream_t stream, const std::function<void()>& work) {
  cudaEvent_t start, end;
  CHECK(cudaEventCreate(&start));
  CHECK(cudaEventCreate(&end));
  std::vector<float> samples;
  for (int i = -3; i < 10; i++) {  // three to warm up
    CHECK(cudaEventRecord(start, stream));
    work();
    CHECK(cudaEventRecord(end, stream));
    CHECK(cudaEventSynchronize(end));
    float ms;
    CHECK(cudaEventElapsedTime(&ms, start, end));
    if (i >= 0) samples.push_back(ms);
  }
  std::sort(samples.begin(), samples.end());
  return samples[samples.size() / 2];
}

template <class T> T* on_device(size_t count) {
  T* p;
  CHECK(cudaMalloc(&p, count * sizeof(T)));
  return p;
}

int main(int argc, char** argv) {
  if (argc < 3 || argc % 2 == 0) {
    fprintf(stderr, "usage: kernels VOCABULARY BLOCKS …\n");
    return 2;
  }
  size_t widest = 0;
  for (int i = 1; i < argc; i += 2) widest = std::max(widest, size_t(atol(argv[i])));
  bf16 *x = on_device<bf16>(kRows * widest), *grad = on_device<bf16>(kRows * widest);
  fill<<<2048, 256>>>(x, kRows * widest);
  CHECK(cudaGetLastError());
  auto *targets = on_device<unsigned>(kRows), *predicted = on_device<unsigned>(kRows);
  auto *smoothing = on_device<float>(kRows), *loss = on_device<float>(kRows), *stats = on_device<float>(5 * kRows);
  float* divisor = on_device<float>(1);
  const float rows = kRows;
  CHECK(cudaMemcpy(divisor, &rows, 4, cudaMemcpyHostToDevice));
  std::vector<float> values(kRows);
  for (size_t i = 0; i < kRows; i++) values[i] = 0.2f * (i * 2654435761u >> 8 & 0xffff) / 65536;
  CHECK(cudaMemcpy(smoothing, values.data(), kRows * 4, cudaMemcpyHostToDevice));
  cudaStream_t stream;
  CHECK(cudaStreamCreate(&stream));
  cudaDeviceProp gpu;
  CHECK(cudaGetDeviceProperties(&gpu, 0));

  for (int arg = 1; arg < argc; arg += 2) {
    const unsigned vocab = atoi(argv[arg]), blocks = atoi(argv[arg + 1]);
    std::vector<unsigned> classes(kRows);
    for (size_t i = 0; i < kRows; i++) classes[i] = i * 31 % vocab;
    CHECK(cudaMemcpy(targets, classes.data(), kRows * 4, cudaMemcpyHostToDevice));
    const size_t bytes = kRows * vocab * sizeof(bf16);
    const auto copy = [&] { CHECK(cudaMemcpyAsync(grad, x, bytes, cudaMemcpyDeviceToDevice, stream)); };
    const float copy_ms = median_ms(stream, copy);
    const double copy_gb_per_s = 2e-6 * bytes / copy_ms;
    for (const Timed& timed : kTimed) {
      Params p;
      memset(&p, 0, sizeof p);
      p.logits = x, p.targets = targets, p.smoothing = smoothing, p.divisor = divisor, p.loss = loss;
      p.grad = timed.gradient ? grad : nullptr;
      if (timed.stats) {
        float** const of_rows[] = {&p.nll, &p.lse, &p.entropy, &p.max_prob, &p.grad_norm_sq};
        for (int i = 0; i < 5; i++) *of_rows[i] = stats + i * kRows;
        p.predicted = predicted;
      }
      p.logits_rows.dims = p.smoothing_rows.dims = p.weight_rows.dims = 1;
      p.logits_rows.strides[0] = vocab, p.smoothing_rows.strides[0] = p.weight_rows.strides[0] = 1;
      p.grad_rows = p.logits_rows;
      p.rows = kRows, p.ignore_index = -100, p.vocab = p.end_class = p.width = vocab;
      p.logit_scale = p.result_scale = 1.f;
      // As src/kernels/select.rs.
      const unsigned groups = (vocab * sizeof(bf16) + 15) / 16;
      p.blocks_per_row = blocks, p.groups_per_block = ((groups + blocks - 1) / blocks + 7) / 8 * 8;
      const int shared = sizeof(OnChip) + (p.groups_per_block + 1) * 16;
      CHECK(cudaFuncSetAttribute(timed.kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared));
      CHECK(cudaFuncSetAttribute(timed.kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1));
      cudaLaunchAttribute cluster = {};
      cluster.id = cudaLaunchAttributeClusterDimension;
      cluster.val.clusterDim.x = blocks, cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
      cudaLaunchConfig_t config = {};
      config.gridDim = dim3(kRows * blocks), config.blockDim = dim3(256);
      config.dynamicSmemBytes = shared, config.stream = stream;
      config.attrs = &cluster, config.numAttrs = blocks > 1;
      void* arguments[] = {&p};
      const float ms = median_ms(stream, [&] { CHECK(cudaLaunchKernelExC(&config, timed.kernel, arguments)); });
      CHECK(cudaMemcpy(values.data(), loss, kRows * 4, cudaMemcpyDeviceToHost));
      double mean = 0, sum = 0;
      for (float value : values) mean += value / kRows;
      if (timed.gradient) {
        std::vector<bf16> row(vocab);
        CHECK(cudaMemcpy(row.data(), grad + 5 * size_t(vocab), vocab * sizeof(bf16), cudaMemcpyDeviceToHost));
        for (bf16 g : row) {
          const unsigned bits = unsigned(g.bits) << 16;
          float value;
          memcpy(&value, &bits, 4);
          sum += value;
        }
      }
      int fit = 0;
      CHECK(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&fit, timed.kernel, 256, shared));
      const double gb_per_s = (timed.gradient ? 2e-6 : 1e-6) * bytes / ms;
      printf("{\"gpu\": \"%s\", \"kernel\": \"%s\", \"v\": %u, \"blocks\": %u, \"blocks_a_multiprocessor\": %d, \"ms\": %.4f, "
             "\"gb_per_s\": %.0f, \"copy_gb_per_s\": %.0f, \"fraction_of_copy\": %.3f, \"loss\": %.6f, \"gradients\": %.1e}\n",
             gpu.name, timed.name, vocab, blocks, fit, ms, gb_per_s, copy_gb_per_s, gb_per_s / copy_gb_per_s, mean, sum);
      fflush(stdout);
    }
  }
}
