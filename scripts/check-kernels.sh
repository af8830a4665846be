#!/usr/bin/env bash
# Compiles the kernels for each architecture and fails if any spills registers or touches local memory:
#
#   check-kernels.sh [ARCH …]     # default: 75 80 90 120
#
# Prints registers and shared memory of each kernel. Needs nvcc (see cuda-toolchain.sh), no GPU.
set -euo pipefail
cd "$(dirname "$0")/.."
if (($# == 0)); then set -- 75 80 90 120; fi
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
for arch in "$@"; do
  if ! nvcc -cubin -arch="sm_$arch" -O3 -std=c++17 -lineinfo -Xptxas -v -o "$work/$arch.cubin" \
    kernels/cross_entropy.cu >"$work/$arch.log" 2>&1; then
    cat "$work/$arch.log" >&2
    exit 1
  fi
  # A kernel is four lines: its name, "Function properties", stack and spills, then "Used … registers".
  awk -v arch="sm_$arch" '
    function number(unit) { return match($0, "[0-9]+ " unit) ? substr($0, RSTART) + 0 : 0 }
    /Compiling entry function/ { split($0, part, "\047"); kernel = part[2] }
    /bytes stack frame/ { bad = number("bytes stack frame") + number("bytes spill stores") + number("bytes spill loads") }
    /Used [0-9]+ registers/ {
      bad += number("bytes lmem")
      print kernel, arch, number("registers"), number("bytes smem"), bad
    }' "$work/$arch.log" >>"$work/table"
done
# What src/kernels/select.rs counts for the kernels whose other shared memory it chooses.
constant() { sed -n "s/^const $1: usize = \([0-9]*\);/\1/p" src/kernels/select.rs; }
awk -v ours="$(constant STATIC_SHARED)" -v distribution="$(constant DISTRIBUTION_STATIC_SHARED)" '
  $1 ~ /fused|onchip/ && $4 > ($1 ~ /distribution/ ? distribution : ours) { print $1 ": " $4 " bytes of shared memory, more than select.rs counts"; more++ }
  { registers[$1, $2] = $3 "/" $4 ($5 ? "!" : ""); failed += $5 > 0 }
  !($1 in kernel) { kernel[$1]; names[++n] = $1 }
  !($2 in arch) { arch[$2]; archs[++m] = $2 }
  END {
    printf "%-34s", "registers/bytes of shared memory"
    for (j = 1; j <= m; j++) printf "%12s", archs[j]
    print ""
    for (i = 1; i <= n; i++) {
      printf "%-34s", names[i]
      for (j = 1; j <= m; j++) printf "%12s", registers[names[i], archs[j]]
      print ""
    }
    if (n == 0) { print "no kernels found"; exit 1 }
    if (more) exit 1
    if (failed) { printf "%d kernels, marked with !, spill or use local memory\n", failed; exit 1 }
    printf "%d kernels, no spills, no local memory\n", n
  }' "$work/table"
