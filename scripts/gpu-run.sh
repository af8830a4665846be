#!/usr/bin/env bash
# Runs the GPU check on a machine with a GPU, then compute-sanitizer's four tools on its reduced grid:
#
#   gpu-run.sh EXECUTABLE FOLDER      # EXECUTABLE from gpu-check.sh; everything goes to FOLDER
#
# The checks run as the crate chooses kernels, and reduced with the general kernels everywhere and, from sm_90 on, with
# the on-chip kernels everywhere, in each size of cluster that the GPU allows. compare.sh has the timings.
#
# FOLDER gets machine.txt, check*.txt, check.json and sanitizer-TOOL.txt. Fails if a check or a tool does, after running
# all of them; says so where there is no compute-sanitizer. Run at once beside an H200 with 16 cores, the
# reduced checks took seconds each and three of the tools 2 minutes; racecheck had done 50 of the 66 checks in 3. Nothing is
# to be timed beside these tools, not even while they are stopped: their kernels keep the GPU.
set -euo pipefail
program=$(realpath "$1")
out=$2
here=$(dirname "$(realpath "$0")")
mkdir -p "$out"
query() { nvidia-smi --query-gpu="$1" --format=csv,noheader | sed -n 1p; }
nvidia-smi >"$out/machine.txt" 2>&1 || { echo "gpu-run: nvidia-smi finds no GPU" >&2; exit 1; }
# The driver must be of the executable's CUDA: of an older one, what fails says little. Not where the loader finds the
# libraries of NVIDIA's forward compatibility in its place.
libraries=$(ldd "$program" 2>/dev/null || true)
driver=$(query driver_version)
cuda=$(sed -nE 's/.*libcublas\.so\.([0-9]+).*/\1/p' <<<"$libraries" | head -n 1)
case $cuda in
  12) needed=525 ;;
  13) needed=580 ;;
  *) needed=0 ;;
esac
if ((${driver%%.*} < needed)) && [[ $libraries != */compat/libcuda.so* ]]; then
  echo "gpu-run: this machine's driver is $driver; an executable of CUDA $cuda needs $needed or newer" >&2
  exit 1
fi

failed=()
kernels=(general)
capability=$(query compute_cap)
if ((${capability%%.*} >= 9)); then
  kernels+=(on-chip on-chip:2 on-chip:7 on-chip:8 on-chip:16)
fi
# Whether the program came to its end and all that failed did because the GPU allows no such clusters, in the words of
# src/kernels/select.rs.
not_allowed() {
  awk '/^FAIL/ { failed++; refused += /CANDLE_CROSS_ENTROPY_KERNEL: a row of .* does not fit on this GPU/ }
    / checks passed$/ { ended = 1 }
    END { exit !(ended && failed && refused == failed) }' "$1"
}
for kernel in "${kernels[@]}"; do
  log=$out/check-$kernel.txt
  if CANDLE_CROSS_ENTROPY_KERNEL=$kernel "$here/cuda-run.sh" "$program" --reduced 2>&1 | tee "$log"; then continue; fi
  # Of no particular size, the on-chip kernels run on every such GPU.
  if [[ $kernel == on-chip:* ]] && not_allowed "$log"; then
    echo "gpu-run: skipped $kernel: not allowed on this GPU" | tee -a "$log"
  else
    failed+=("checks with $kernel")
  fi
done
"$here/cuda-run.sh" "$program" --no-timing --out "$out/check.json" 2>&1 | tee "$out/check.txt" || failed+=(checks)

sanitizer=$(command -v compute-sanitizer ||
  find -L /usr/local /opt -name compute-sanitizer -type f -perm -u+x -print -quit 2>/dev/null || true)
if [[ -z $sanitizer ]]; then
  echo "gpu-run: no compute-sanitizer on this machine, its four tools did not run" | tee "$out/sanitizer.txt"
  failed+=("compute-sanitizer (missing)")
else
  for tool in memcheck synccheck initcheck racecheck; do
    options=(--reduced)
    if [[ $tool == memcheck ]]; then options+=(--no-linear-graphs); fi
    if "$here/cuda-run.sh" "$sanitizer" --tool "$tool" --error-exitcode 9 "$program" "${options[@]}" \
      >"$out/sanitizer-$tool.txt" 2>&1; then
      echo "PASS compute-sanitizer $tool: $(grep -h 'ERROR SUMMARY\|RACECHECK SUMMARY' "$out/sanitizer-$tool.txt" | tail -n 1)"
    else
      echo "FAIL compute-sanitizer $tool: see $out/sanitizer-$tool.txt"
      failed+=("$tool")
    fi
  done
fi
if ((${#failed[@]})); then
  echo "gpu-run: failed: ${failed[*]}" >&2
  exit 1
fi
echo "gpu-run: everything passed; see $out"
