#!/usr/bin/env bash
# Times this crate beside PyTorch, Liger, QuACK and Cut Cross-Entropy in one run on one GPU:
#
#   compare.sh [--logits|--linear] EXECUTABLE FOLDER [WHEEL …]    # EXECUTABLE from gpu-check.sh; needs PyTorch
#
# From logits, and from hidden states (`forward_linear`): 8 and 7 minutes at most; each alone with its option, where a
# command may not take that long. WHEELs (of liger-kernel, quack-kernels, cut-cross-entropy and what they need) are
# installed for this run only, offline. A peer that is not there is in the result as skipped, with the reason. FOLDER
# gets GPU.json (such as h200.json), which belongs in benches/results, and what it was merged from: ours-WORK.json,
# peers-WORK.json (of another run in FOLDER, too), and their output. A run that is cut off leaves these with what was
# timed until then; `compare.py merge` joins them. Fails if a check of ours does, after timing everything.
set -euo pipefail
works=(logits linear)
if [[ ${1:-} == --logits || ${1:-} == --linear ]]; then
  works=("${1#--}")
  shift
fi
if (($# < 2)); then
  echo "usage: compare.sh [--logits|--linear] EXECUTABLE FOLDER [WHEEL …]" >&2
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

merge() {
  local files=()
  for file in "$out"/{ours,peers}-{logits,linear}.json; do
    if [[ -e $file ]]; then files+=("$file"); fi
  done
  if ((${#files[@]})); then "$python" "$here/compare.py" merge "$out/$gpu.json" "${files[@]}"; fi
}
for work in "${works[@]}"; do
  # Results of an earlier run would be merged where this one has none.
  rm -f "$out/ours-$work.json" "$out/peers-$work.json"
  # Each stops on its own before the time that this run may take is over.
  timeout --kill-after=10 180 "$here/cuda-run.sh" "$program" --timing-only --timed "$work" \
    --out "$out/ours-$work.json" 2>&1 | tee "$out/ours-$work.txt" || failed+=("ours from $work")
  commit=$(sed -n 's/.*"commit": "\([^"]*\)".*/\1/p' "$out/ours-$work.json" 2>/dev/null | head -n 1 || true)
  merge
  timeout --kill-after=10 290 "$python" -u "$here/compare.py" time --work "$work" --commit "${commit:-unknown}" \
    --seconds 240 --out "$out/peers-$work.json" >"$out/peers-$work.txt" 2>&1 ||
    { failed+=("peers from $work") && tail -n 5 "$out/peers-$work.txt"; }
  merge
done
"$python" "$here/compare.py" table "$out/$gpu.json"
if ((${#failed[@]})); then
  echo "compare: failed: ${failed[*]}; see $out/ours-*.txt and $out/peers-*.txt" >&2
  exit 1
fi
