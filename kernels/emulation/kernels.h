// The kernels under test, by symbol.
#pragma once
#include "../params.cuh"

struct KernelEntry {
  const char* symbol;
  void (*run)(Params);
};

// Ends with a null symbol. Constant data, as instrumented code must not need anything of the C++ library.
extern const KernelEntry kKernels[];
