#!/usr/bin/env bash
# Runs the GPU check on a machine with a GPU, then compute-sanitizer's four tools on its reduced grid:
#
#   gpu-run.sh EXECUTABLE FOLDER      # EXECUTABLE from gpu-check.sh; everything goes to FOLDER
#
# The checks run as the crate chooses kernels, and reduced with the general kernels everywhere and, on sm_90, with the
# on-chip kernels everywhere. compare.sh has the timings.
#
# FOLDER gets machine.txt, check*.txt, check.json and sanitizer-TOOL.txt. Fails if a check or a tool does, after running
# all of them; says so where there is no compute-sanitizer.
set -euo pipefail
program=$(realpath "$1")
out=$2
here=$(dirname "$(realpath "$0")")
mkdir -p "$out"
nvidia-smi >"$out/machine.txt" 2>&1 || { echo "gpu-run: nvidia-smi finds no GPU" >&2; exit 1; }
failed=()
kernels=(general)
if [[ $(nvidia-smi --query-gpu=compute_cap --format=csv,noheader | head -n 1) == 9.* ]]; then
  kernels+=(on-chip on-chip:2 on-chip:16)
fi
for kernel in "${kernels[@]}"; do
  CANDLE_CROSS_ENTROPY_KERNEL=$kernel "$here/cuda-run.sh" "$program" --reduced 2>&1 | tee "$out/check-$kernel.txt" ||
    failed+=("checks with $kernel")
done
"$here/cuda-run.sh" "$program" --no-timing --out "$out/check.json" 2>&1 | tee "$out/check.txt" || failed+=(checks)

sanitizer=$(command -v compute-sanitizer ||
  find -L /usr/local /opt -name compute-sanitizer -type f -perm -u+x -print -quit 2>/dev/null || true)
if [[ -z $sanitizer ]]; then
  echo "gpu-run: no compute-sanitizer on this machine, its four tools did not run" | tee "$out/sanitizer.txt"
  failed+=("compute-sanitizer (missing)")
else
  for tool in memcheck racecheck initcheck synccheck; do
    if "$here/cuda-run.sh" "$sanitizer" --tool "$tool" --error-exitcode 9 "$program" --reduced \
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
