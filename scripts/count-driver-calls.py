#!/usr/bin/env python3
"""Counts the calls of the CUDA driver that a step makes, on the emulated GPU:

    scripts/count-driver-calls.py [--check] LIBRARIES GPU_CHECK

LIBRARIES is the folder of scripts/emulated-gpu.sh, GPU_CHECK the program. With --check exits 1 where a step makes more
than it is known to.
"""
import os
import pathlib
import subprocess
import sys
import tempfile

KINDS = {
    "allocations": ["cuMemAlloc_v2"],
    "events made": ["cuEventCreate"],
    "launches": ["cuLaunchKernel", "cuLaunchKernelEx"],
    "copies and fills": ["cuMemcpyHtoDAsync_v2", "cuMemcpyDtoHAsync_v2", "cuMemcpyDtoDAsync_v2", "cuMemsetD8Async"],
    "waits": ["cuStreamSynchronize", "cuCtxSynchronize", "cuEventSynchronize"],
}
# At most, a kind each.
BOUNDS = {
    "loss-and-grad": [4, 8, 3, 0, 0],
    "forward": [2, 4, 2, 0, 0],
    "forward-backward": [6, 12, 5, 1, 0],
}


def calls(libraries, program, step, count):
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "calls"
        script = pathlib.Path(__file__).parent / "emulated-gpu.sh"
        subprocess.run(
            [script, libraries, program, "--step", step, "--steps", str(count)],
            env={**os.environ, "EMULATED_GPU_CALLS": str(path)}, check=True, stdout=subprocess.DEVNULL)
        return {name: int(number) for name, number in map(str.split, path.read_text().splitlines())}


arguments = [argument for argument in sys.argv[1:] if argument != "--check"]
if len(arguments) != 2:
    sys.exit(__doc__)
good = True
print(f"{'a step':<18}" + "".join(f"{kind:>18}" for kind in KINDS))
for step, bounds in BOUNDS.items():
    # Between a few steps and more: the first ones load kernels.
    few, many = (calls(*arguments, step, count) for count in (2, 12))
    found = [sum(many.get(name, 0) - few.get(name, 0) for name in names) / 10 for names in KINDS.values()]
    print(f"{step:<18}" + "".join(f"{count:>18g}" for count in found))
    good = good and all(count <= bound for count, bound in zip(found, bounds))
if "--check" in sys.argv and not good:
    sys.exit("count-driver-calls: more than before")
