#!/usr/bin/env bash
# Tests gpu-run.sh where there is no GPU, with stand-ins for nvidia-smi, ldd, gpu-check and compute-sanitizer.
set -euo pipefail
here=$(dirname "$(realpath "$0")")
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
# The words that tell a size of clusters that is not allowed from a failure.
REFUSAL=$(sed -n "s/.*\"{OVERRIDE}: \(.* does not fit on .*\)\",*$/CANDLE_CROSS_ENTROPY_KERNEL: \1/p" "$here/../src/kernels/select.rs")
[[ -n $REFUSAL ]] || { echo "test-gpu-run: src/kernels/select.rs refuses in other words"; exit 1; }
export REFUSAL

mkdir "$work/bin"
stand_in() {
  { echo '#!/usr/bin/env bash'; cat; } >"$work/bin/$1"
  chmod +x "$work/bin/$1"
}
# A second GPU, which is not used.
stand_in nvidia-smi <<'EOF'
case $* in
  *compute_cap*) printf '%s\n' "$CAPABILITY" 7.5 ;;
  *driver_version*) printf '%s\n' "$DRIVER" "$DRIVER" ;;
esac
EOF
stand_in ldd <<'EOF'
printf '\t%s\n' "libcublas.so.$CUDA => /lib/libcublas.so.$CUDA (0x1)" "libcuda.so.1 => $LIBCUDA/libcuda.so.1 (0x2)"
EOF
# LARGEST is the largest cluster that is allowed; the kernel BROKEN fails, CRASHED does so without a word.
stand_in gpu-check <<'EOF'
kernel=${CANDLE_CROSS_ENTROPY_KERNEL:-chosen} failures=0
fail() { echo "FAIL f32 plain: $1"; failures=$((failures + 1)); }
echo "PASS no rows: loss 0"
case $kernel in
  on-chip) ((LARGEST > 0)) || fail "$REFUSAL" ;;
  on-chip:*) ((LARGEST >= ${kernel#*:})) || fail "$REFUSAL" ;;
esac
[[ $kernel != "$BROKEN" ]] || fail "worst 7.000 of its tolerance (V 33)"
[[ $kernel != "$CRASHED" ]] || kill -SEGV $$
echo "$((9 - failures)) of 9 checks passed"
exit $((failures > 0))
EOF
stand_in compute-sanitizer <<<'echo "ERROR SUMMARY: 0 errors"'

# expect passed|failed NAME=VALUE… -- WORD…: gpu-run.sh ends so, and prints each of the words; !WORD is not printed.
expect() {
  local status=passed word end=$1 settings=()
  shift
  while [[ $1 != -- ]]; do
    settings+=("$1")
    shift
  done
  shift
  env PATH="$work/bin:$PATH" CUDA=13 DRIVER=580.65.06 LIBCUDA=/lib CAPABILITY=9.0 LARGEST=16 BROKEN='' CRASHED='' \
    "${settings[@]}" "$here/gpu-run.sh" "$work/bin/gpu-check" "$work/out" >"$work/log" 2>&1 || status=failed
  [[ $status == "$end" ]] || wrong "it $status" "${settings[@]}"
  for word in "$@"; do
    if [[ $word == !* ]]; then
      ! grep -qF -- "${word#!}" "$work/log" || wrong "\"${word#!}\" is printed" "${settings[@]}"
    else
      grep -qF -- "$word" "$work/log" || wrong "\"$word\" is not printed" "${settings[@]}"
    fi
  done
  rm -rf "$work/out"
}
wrong() {
  echo "test-gpu-run: $1 with ${*:2}:"
  cat "$work/log"
  exit 1
}

expect passed CAPABILITY=9.0 -- "everything passed" "!skipped"
# Every GPU that has clusters.
for capability in 9.0 10.0 12.1; do
  expect failed CAPABILITY=$capability BROKEN=on-chip:2 -- "failed: checks with on-chip:2"
done
expect passed CAPABILITY=8.9 LARGEST=0 -- "everything passed" "!skipped"
# Sizes that are not allowed.
expect passed CAPABILITY=12.0 LARGEST=8 -- "skipped on-chip:16" "!skipped on-chip:8" "everything passed"
expect failed LARGEST=8 BROKEN=on-chip:16 -- "failed: checks with on-chip:16" "!skipped"
expect failed LARGEST=8 CRASHED=on-chip:16 -- "failed: checks with on-chip:16" "!skipped"
expect failed LARGEST=0 -- "failed: checks with on-chip" "skipped on-chip:2"
# Drivers.
expect failed DRIVER=570.86.10 -- "driver is 570.86.10" "CUDA 13 needs 580" "!PASS"
expect passed DRIVER=570.86.10 LIBCUDA=/usr/local/cuda/compat -- "everything passed"
expect passed DRIVER=570.86.10 CUDA=12 -- "everything passed"
expect failed DRIVER=470.57.02 CUDA=12 -- "CUDA 12 needs 525" "!PASS"
echo "gpu-run.sh does as it says"
