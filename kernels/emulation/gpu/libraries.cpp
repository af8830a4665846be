// libcublas, libcurand and libcudart, as much of them as candle and this crate use.
#include "gpu.h"
#include "number.h"
#include <random>

namespace {

using number::kF16, number::kF32, number::kF64, number::read, number::size, number::write;

// Columns of `rows` elements, `lead` apart, or their transpose.
struct Matrix {
  const void* memory;
  int type;  // number::Type; cuBLAS numbers them so
  bool transposed;
  int lead;

  size_t at(int row, int column) const {
    return transposed ? static_cast<size_t>(row) * lead + column : static_cast<size_t>(column) * lead + row;
  }
  void check(int rows, int columns) const {
    if (rows == 0 || columns == 0) return;
    if (lead < (transposed ? columns : rows)) gpu::fail("a product's matrix has a leading dimension of %d", lead);
    gpu::check_memory(memory, (at(rows - 1, columns - 1) + 1) * size(type), "a product");
  }
};

void multiply(int m, int n, int k, double alpha, Matrix a, Matrix b, double beta, void* c, int type, int lead) {
  a.check(m, k);
  b.check(k, n);
  Matrix{c, type, false, lead}.check(m, n);
  for (int j = 0; j < n; j++) {
    for (int i = 0; i < m; i++) {
      long double sum = 0;
      for (int l = 0; l < k; l++) sum += read(a.memory, a.at(i, l), a.type) * read(b.memory, b.at(l, j), b.type);
      const size_t at = static_cast<size_t>(j) * lead + i;
      write(c, at, type, alpha * sum + (beta == 0 ? 0 : beta * read(c, at, type)));
    }
  }
}

double scalar(const void* value, int compute) {
  constexpr int kCompute16 = 64, kCompute16Pedantic = 65, kCompute64 = 70;
  if (compute == kCompute16 || compute == kCompute16Pedantic) return read(value, 0, kF16);
  return read(value, 0, compute == kCompute64 ? kF64 : kF32);
}

const void* offset(const void* memory, long long elements, int type) {
  return static_cast<const unsigned char*>(memory) + elements * static_cast<long long>(size(type));
}

std::mt19937_64 random_numbers(1);

}  // namespace

extern "C" {

int cublasCreate_v2(void** handle) {
  static int one;
  *handle = &one;
  return 0;
}
int cublasDestroy_v2(void*) { return 0; }
int cublasSetMathMode(void*, int) { return 0; }
int cublasSetStream_v2(void*, void*) { return 0; }
int cublasGemmStridedBatchedEx(void*, int trans_a, int trans_b, int m, int n, int k, const void* alpha, const void* a, int type_a,
                               int lead_a, long long stride_a, const void* b, int type_b, int lead_b, long long stride_b,
                               const void* beta, void* c, int type_c, int lead_c, long long stride_c, int count, int compute, int) {
  const double factor = scalar(alpha, compute), kept = scalar(beta, compute);
  gpu::submit([=] {
    for (int i = 0; i < count; i++) {
      multiply(m, n, k, factor, {offset(a, i * stride_a, type_a), type_a, trans_a != 0, lead_a},
               {offset(b, i * stride_b, type_b), type_b, trans_b != 0, lead_b}, kept,
               const_cast<void*>(offset(c, i * stride_c, type_c)), type_c, lead_c);
    }
  });
  return 0;
}
int cublasGemmEx(void* handle, int trans_a, int trans_b, int m, int n, int k, const void* alpha, const void* a, int type_a, int lead_a,
                 const void* b, int type_b, int lead_b, const void* beta, void* c, int type_c, int lead_c, int compute, int algorithm) {
  return cublasGemmStridedBatchedEx(handle, trans_a, trans_b, m, n, k, alpha, a, type_a, lead_a, 0, b, type_b, lead_b, 0, beta, c,
                                    type_c, lead_c, 0, 1, compute, algorithm);
}
int cublasDgemmStridedBatched(void* handle, int trans_a, int trans_b, int m, int n, int k, const double* alpha, const double* a,
                              int lead_a, long long stride_a, const double* b, int lead_b, long long stride_b, const double* beta,
                              double* c, int lead_c, long long stride_c, int count) {
  return cublasGemmStridedBatchedEx(handle, trans_a, trans_b, m, n, k, alpha, a, kF64, lead_a, stride_a, b, kF64, lead_b, stride_b,
                                    beta, c, kF64, lead_c, stride_c, count, 70, 0);
}

int curandCreateGenerator(void** generator, int) {
  static int one;
  *generator = &one;
  return 0;
}
int curandDestroyGenerator(void*) { return 0; }
int curandSetStream(void*, void*) { return 0; }
int curandSetPseudoRandomGeneratorSeed(void*, unsigned long long seed) {
  const auto held = gpu::hold();
  random_numbers.seed(seed);
  return 0;
}
int curandGenerateNormalDouble(void*, double* out, size_t count, double mean, double deviation) {
  const auto held = gpu::hold();
  gpu::check_memory(out, count * sizeof *out, "random numbers");
  std::normal_distribution<double> normal(mean, deviation);
  for (size_t i = 0; i < count; i++) out[i] = normal(random_numbers);
  return 0;
}
int curandGenerateNormal(void*, float* out, size_t count, float mean, float deviation) {
  const auto held = gpu::hold();
  gpu::check_memory(out, count * sizeof *out, "random numbers");
  std::normal_distribution<float> normal(mean, deviation);
  for (size_t i = 0; i < count; i++) out[i] = normal(random_numbers);
  return 0;
}
int curandGenerateUniformDouble(void*, double* out, size_t count) {
  const auto held = gpu::hold();
  gpu::check_memory(out, count * sizeof *out, "random numbers");
  std::uniform_real_distribution<double> uniform;
  for (size_t i = 0; i < count; i++) out[i] = uniform(random_numbers);
  return 0;
}
int curandGenerateUniform(void*, float* out, size_t count) {
  const auto held = gpu::hold();
  gpu::check_memory(out, count * sizeof *out, "random numbers");
  std::uniform_real_distribution<float> uniform;
  for (size_t i = 0; i < count; i++) out[i] = uniform(random_numbers);
  return 0;
}

// Kernels of candle that are linked in, not loaded, register themselves before main; none of them is started.
void** __cudaRegisterFatBinary(void*) {
  static void* one;
  return &one;
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
void __cudaRegisterFunction(void**, const char*, char*, const char*, int, void*, void*, void*, void*, int*) {}
void __cudaRegisterVar(void**, char*, char*, const char*, int, size_t, int, int) {}
int __cudaPushCallConfiguration() { gpu::fail("a kernel of the CUDA runtime is started"); }
int __cudaPopCallConfiguration() { gpu::fail("a kernel of the CUDA runtime is started"); }
int __cudaLaunchKernel_ptsz() { gpu::fail("a kernel of the CUDA runtime is started"); }
int __cudaGetKernel() { gpu::fail("a kernel of the CUDA runtime is started"); }
int cudaFuncSetAttribute() { gpu::fail("the CUDA runtime is used"); }
int cudaGetDevice() { gpu::fail("the CUDA runtime is used"); }

}  // extern "C"
