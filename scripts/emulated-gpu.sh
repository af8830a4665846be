#!/usr/bin/env bash
# Runs a program that was built with the feature `cuda` on a machine without a GPU: the driver, cuBLAS, cuRAND and NCCL
# are those of kernels/emulation/gpu, and kernels run by the emulation. Needs g++ and CUDA's headers (cuda-toolchain.sh).
#
#   scripts/emulated-gpu.sh DIR PROGRAM [ARGUMENT …]     # DIR keeps the libraries
#
# EMULATED_GPU_SM (90) and EMULATED_GPU_MULTIPROCESSORS (132) say what GPU it is, EMULATED_GPU_COUNT (1) how many there are,
# EMULATED_GPU_PTX (the same as SM) what PTX the code was made from, EMULATED_GPU_SEED (1) in which order threads run;
# EMULATED_GPU_CALLS names a file for the number of calls of the driver's functions.
set -euo pipefail
emulation=$(cd "$(dirname "$0")/../kernels/emulation" && pwd)
dir=$1
shift
mkdir -p "$dir"
flags=(-std=c++20 -DEMULATE_CUDA -fPIC -fno-strict-aliasing -ffp-contract=off -fno-gnu-unique -Wall -Wextra -Wno-unknown-pragmas
  -I"$CUDA_HOME/include")
stamp=$(cat "$emulation"/*.h "$emulation"/*.cpp "$emulation"/gpu/* "$emulation"/../*.cu* "$0" | sha256sum)
if [[ $(cat "$dir/stamp" 2>/dev/null) != "$stamp" ]]; then
  rm -f "$dir/stamp"
  for source in kernels runtime gpu/driver gpu/libraries gpu/nccl gpu/candle; do
    g++ "${flags[@]}" -O2 -c "$emulation/$source.cpp" -o "$dir/$(basename "$source").o" &
  done
  wait
  g++ -shared -o "$dir/libcuda.so.1" -Wl,-soname,libcuda.so.1 "$dir"/{kernels,runtime,driver,libraries,nccl,candle}.o
  # One library holds it all; these are the names by which programs ask for its parts.
  for name in cublas.so.13 curand.so.10 cudart.so.13 nccl.so.2; do
    echo "lib$name { };" >"$dir/$name.map"
    echo | g++ -x c -shared -o "$dir/lib$name" -Wl,-soname,"lib$name" -Wl,--version-script="$dir/$name.map" -
  done
  echo "$stamp" >"$dir/stamp"
fi
LD_LIBRARY_PATH="$dir${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}" exec "$@"
