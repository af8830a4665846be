#!/usr/bin/env bash
# Times this crate beside PyTorch, Liger and QuACK in one run on one GPU:
#
#   compare.sh EXECUTABLE FOLDER [WHEEL …]    # EXECUTABLE from gpu-check.sh; needs PyTorch, and 8 minutes at most
#
# WHEELs (of liger-kernel, quack-kernels and what they need) are installed for this run only, offline. A peer that is
# not there is in the result as skipped, with the reason. FOLDER gets GPU.json (such as h200.json), which belongs in
# benches/results, and what it was merged from: ours.json, peers.json, and their output. A run that is cut off leaves
# ours.json and peers.json with what was timed until then; `compare.py merge` joins them. Fails if a check of ours does,
# after timing everything.
set -euo pipefail
if (($# < 2)); then
  echo "usage: compare.sh EXECUTABLE FOLDER [WHEEL …]" >&2
  exit 2
fi
program=$(realpath "$1")
out=$(mkdir -p "$2" && realpath "$2")
wheels=("${@:3}")
here=$(dirname "$(realpath "$0")")
python=${PYTHON:-python3}
failed=()

name=$(nvidia-smi --query-gpu=name --format=csv,noheader 2>/dev/null | head -n 1 || true)
if [[ -z $name ]]; then
  echo "compare: nvidia-smi finds no GPU" >&2
  exit 1
fi
# "NVIDIA H200" is h200, "NVIDIA H100 80GB HBM3" h100, "NVIDIA GeForce RTX 4090" geforce-rtx-4090.
gpu=$(tr '[:upper:] ' '[:lower:]-' <<<"$name" | sed -E 's/^nvidia-//; s/^([a-z-]*[0-9]+[a-z0-9]*).*/\1/')
echo "compare: $name, to $out/$gpu.json"

temporary=$(mktemp -d)
trap 'rm -rf "$temporary"' EXIT
if ((${#wheels[@]})); then
  if "$python" -m pip install --quiet --no-index --no-deps --no-compile --target "$temporary/site" "${wheels[@]}"; then
    export PYTHONPATH=$temporary/site${PYTHONPATH:+:$PYTHONPATH}
  else
    failed+=("installing wheels")
  fi
fi

# Results of an earlier run would be merged where this one has none.
rm -f "$out/ours.json" "$out/peers.json"
# Each stops on its own before the time that this run may take is over.
timeout --kill-after=10 180 "$here/cuda-run.sh" "$program" --timing-only --out "$out/ours.json" 2>&1 |
  tee "$out/ours.txt" || failed+=("ours")
commit=$(sed -n 's/.*"commit": "\([^"]*\)".*/\1/p' "$out/ours.json" 2>/dev/null | head -n 1 || true)
"$python" "$here/compare.py" merge "$out/$gpu.json" "$out/ours.json"
timeout --kill-after=10 290 "$python" -u "$here/compare.py" time --commit "${commit:-unknown}" --seconds 240 \
  --out "$out/peers.json" >"$out/peers.txt" 2>&1 || { failed+=("peers") && tail -n 5 "$out/peers.txt"; }

"$python" "$here/compare.py" merge "$out/$gpu.json" "$out/ours.json" "$out/peers.json"
"$python" "$here/compare.py" table "$out/$gpu.json"
if ((${#failed[@]})); then
  echo "compare: failed: ${failed[*]}; see $out/ours.txt and $out/peers.txt" >&2
  exit 1
fi
