#!/usr/bin/env python3
"""Compiles the kernels with the compilers of CUDA 12, of which there are wheels but none with nvcc:

    check-cuda12.py [--arch ARCH …] [DIR [VERSION …]]     # default: the oldest and the newest that build.rs takes

By nvrtc to PTX and by ptxas to machine code with line information, as nvcc would. Fails if either does, or if a kernel
spills registers or uses local memory, but a few bytes with a softcap. Wheels go to DIR (default ~/.cache/cuda12), 0.2 GB a
version. Needs no GPU.
"""
import argparse
import concurrent.futures
import ctypes
import os
import pathlib
import re
import subprocess
import sys
import tempfile

VERSIONS = ["12.1", "12.9"]
# Bytes a thread: these kernels are limited by arithmetic, and CUDA 13 spills none.
SOFTCAP_SPILLS = 64
ARCHS = ["80", "90"]
KERNELS = pathlib.Path(__file__).resolve().parent.parent / "kernels"
# What nvcc takes from the host's headers, and nvrtc has not.
STDINT = b"""
typedef unsigned long long uint64_t;
typedef long long int64_t;
typedef unsigned uint32_t;
typedef unsigned long long uintptr_t;
#define INFINITY __int_as_float(0x7f800000)
#define NAN __int_as_float(0x7fffffff)
"""


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dir", type=pathlib.Path, nargs="?", default=pathlib.Path.home() / ".cache/cuda12")
    parser.add_argument("versions", nargs="*", default=VERSIONS, metavar="version")
    parser.add_argument("--arch", action="append")
    parser.add_argument("--alone", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    jobs = [(version, arch) for version in args.versions for arch in args.arch or ARCHS]
    if args.alone:
        [(version, arch)] = jobs
        sys.exit(compile_kernels(args.dir / version, arch))
    for version in args.versions:
        install(args.dir / version, version)

    def alone(job):  # two versions of a library in one process would mix
        command = [sys.executable, __file__, "--alone", "--arch", job[1], args.dir, job[0]]
        return subprocess.run(command, capture_output=True, text=True)

    failed = False
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        for (version, arch), done in zip(jobs, pool.map(alone, jobs)):
            failed |= done.returncode != 0
            print(f"{'FAIL' if done.returncode else 'ok  '} CUDA {version} sm_{arch}: {done.stdout}{done.stderr}".strip())
    sys.exit(failed)


def install(folder, version):
    if folder.exists():
        return
    partial = folder.with_name(folder.name + ".partial")
    wheels = [f"nvidia-cuda-{name}-cu12=={version}.*" for name in ("nvrtc", "nvcc")]
    pip = [sys.executable, "-m", "pip", "install", "-qq", "--disable-pip-version-check", "--no-deps"]
    subprocess.run([*pip, "--upgrade", "--target", partial, *wheels], check=True)
    partial.rename(folder)


def compile_kernels(folder, arch):
    """Why it fails, or None; prints what it saw."""
    nvrtc = ctypes.CDLL(str(folder / "nvidia/cuda_nvrtc/lib/libnvrtc.so.12"))
    program = ctypes.c_void_p()

    def text(size, get):
        length = ctypes.c_size_t()
        size(program, ctypes.byref(length))
        buffer = ctypes.create_string_buffer(length.value)
        get(program, buffer)
        return buffer.value

    def strings(*values):
        return (ctypes.c_char_p * len(values))(*values)

    source = (KERNELS / "cross_entropy.cu").read_bytes()
    options = strings(f"--gpu-architecture=compute_{arch}".encode(), b"--std=c++17", b"--generate-line-info",
                      b"--include-path=" + os.fsencode(KERNELS))
    if nvrtc.nvrtcCreateProgram(ctypes.byref(program), source, b"cross_entropy.cu", 1, strings(STDINT),
                                strings(b"stdint.h")):
        return "nvrtc does not start"
    if nvrtc.nvrtcCompileProgram(program, len(options), options):
        return "nvrtc: " + text(nvrtc.nvrtcGetProgramLogSize, nvrtc.nvrtcGetProgramLog).decode()
    with tempfile.TemporaryDirectory() as work:
        ptx = pathlib.Path(work) / "kernels.ptx"
        ptx.write_bytes(text(nvrtc.nvrtcGetPTXSize, nvrtc.nvrtcGetPTX))
        done = subprocess.run([folder / "nvidia/cuda_nvcc/bin/ptxas", f"-arch=sm_{arch}", "-O3", "-lineinfo", "-v",
                               "-o", ptx.with_suffix(".cubin"), ptx], capture_output=True, text=True)
    if done.returncode < 0:
        return f"ptxas dies of signal {-done.returncode}"
    if done.returncode:
        return "ptxas: " + done.stderr
    # Each has to be 0 for every kernel.
    used = re.findall(r"(\d+) bytes (?:stack frame|spill stores|spill loads|lmem)", done.stderr)
    kernels = done.stderr.count("Compiling entry function")
    if kernels == 0 or len(used) < 3 * kernels:
        return "the assembler says nothing of spills:\n" + done.stderr
    of_kernel = re.findall(r"properties for (\w+)\n\s+(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+)", done.stderr)
    spilling = [name for name, *bytes_ in of_kernel if max(map(int, bytes_)) > (SOFTCAP_SPILLS if name.endswith("_softcap") else 0)]
    if len(of_kernel) < kernels or spilling:
        return f"{', '.join(spilling)} spill or use local memory:\n" + done.stderr
    print(f"{kernels} kernels, no spills, but for a softcap's")


if __name__ == "__main__":
    main()
