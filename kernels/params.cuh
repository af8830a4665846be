// What every kernel is given: the C++ twin of src/kernels/abi.rs, field for field. Shapes and meaning are described there.
#pragma once
#include <stdint.h>

constexpr int kMaxRowDims = 4;

// Element offset of row i of a view (..., V), or of a row's value: mixed-radix digits of i times strides, innermost first.
struct RowOffsets {
  uint64_t dims;
  uint64_t sizes[kMaxRowDims];
  uint64_t strides[kMaxRowDims];
};

// lse = z of the largest logit + log2_sum * ln 2, in two parts so that a large offset of the row costs no precision.
struct alignas(16) RowState {
  float largest;
  float log2_sum;
  float inverse_sum;
  uint32_t classes;
};

struct Running;  // partial.cuh

// A logit's gradient that is written once the others of its row are: by a class that the target names.
struct NamedGradient {
  float gradient;
  int column;  // negative: there is none
};

// What `ce_classes` found: 1, or NaN where a class's weight or its value of the prior is bad; what brings the largest value of
// the prior to 1, so that squares of others are in range; what tells these values from others.
struct ClassCheck {
  float good;
  float prior_scale;
  uint32_t digest;
};

enum FloatType : uint32_t { kF32 = 0, kF16 = 1, kBF16 = 2 };

struct Params {
  const void* logits;
  void* grad;
  const void* targets;
  const float* smoothing;
  const float* weights;
  const float* upstream;
  const float* divisor;
  float* loss;
  void* state;  // RowState, or DistributionState (distribution.cuh)
  float* nll;
  float* lse;
  float* entropy;
  float* max_prob;
  float* grad_norm_sq;
  uint32_t* predicted;
  float* reduced;
  float* total_weight;
  unsigned long long* first_error;
  void* running;  // Running, or AllClasses (distribution.cuh)
  const float* entropy_weights;
  const float* class_weights;
  const float* prior;
  ClassCheck* class_check;
  const void* probabilities;
  NamedGradient* named;
  const void* gathered;  // as `running`, of all ranks

  RowOffsets logits_rows;
  RowOffsets grad_rows;
  RowOffsets smoothing_rows;
  RowOffsets weight_rows;
  RowOffsets entropy_rows;
  RowOffsets probability_rows;
  uint64_t rows;
  int64_t ignore_index;
  uint32_t vocab;
  uint32_t width;
  uint32_t targets_are_i64;
  uint32_t upstream_per_row;
  uint32_t mean;
  float uniform_smoothing;
  float z_loss;
  float logit_scale;
  float softcap;
  float inner[2];
  float result_scale;
  uint32_t blocks_per_row;
  uint32_t groups_per_block;
  uint32_t first_row;
  uint32_t first_column;
  uint32_t entries;
  uint32_t probability_type;  // FloatType
  float uniform_entropy_weight;
  uint32_t first_class;
  uint32_t end_class;
  uint32_t ranks;
};
static_assert(sizeof(Params) == 26 * 8 + 6 * 72 + 16 + 88, "src/kernels/abi.rs has the same fields");
