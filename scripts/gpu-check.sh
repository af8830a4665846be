#!/usr/bin/env bash
# Builds the GPU check, one stripped executable, on a machine with or without a GPU, and prints where it is:
#
#   gpu-check.sh                  # then: gpu-run.sh EXECUTABLE FOLDER, on the machine with the GPU
#
# Kernels are compiled for CANDLE_CROSS_ENTROPY_CUDA_ARCHS, by default the data-centre GPUs 80 and 90. Gets nvcc by
# cuda-toolchain.sh where there is none.
set -euo pipefail
cd "$(dirname "$0")/.."
cargo fetch --locked >&2 # cuda-toolchain.sh reads cudarc's source
exports=$(scripts/cuda-toolchain.sh)
eval "$exports"
export CANDLE_CROSS_ENTROPY_CUDA_ARCHS=${CANDLE_CROSS_ENTROPY_CUDA_ARCHS:-80;90}
GPU_CHECK_COMMIT=$(git describe --always --dirty --exclude '*')
export GPU_CHECK_COMMIT
cargo build --release --locked --package gpu-check --features cuda >&2
# Stripped here: a profile that strips would compile every dependency again.
built=${CARGO_TARGET_DIR:-target}/release/gpu-check
strip -o "$built-stripped" "$built"
echo "$built-stripped"
