#!/usr/bin/env python3
"""Counts the instructions of the kernels' inner loops, which is most of what decides whether memory is the limit:

    nvcc -cubin -arch=sm_90 -O3 -std=c++17 -o kernels.cubin kernels/cross_entropy.cu
    cuobjdump --dump-sass kernels.cubin | scripts/count-operations.py [KERNEL …]

Prints, for each loop that computes exponentials, the instructions of its usual way round: the one that skips what is
rare (the target's group, a new maximum, masked classes), which compilers put behind forward branches. A loop works on
16 bytes of logits a thread, 8 of f16 or bf16 and 4 of f32. MUFU are special-function instructions; a loop with two
LDS.128 puts together words that a misaligned row straddles; one with STG writes the gradient.
"""
import re
import sys
from collections import Counter


def functions(lines):
    name, found = None, {}
    for line in lines:
        if match := re.search(r"Function : (\S+)", line):
            name = match[1]
            found[name] = []
        elif name and (match := re.match(r"\s+/\*([0-9a-f]{4,5})\*/\s+(.*?);", line)):
            found[name].append((int(match[1], 16), match[2].strip()))
    return found


def branch_target(text):
    match = re.search(r"\bBRA\b.*?0x([0-9a-f]+)", text)
    return int(match[1], 16) if match else None


def walk(code, at, head, back):
    """Opcodes from the loop's head back to it, or None."""
    index, opcodes, seen = at[head], Counter(), set()
    while index < len(code):
        address, text = code[index]
        if address in seen:
            return opcodes if address == head else None
        seen.add(address)
        conditional = text.startswith("@")
        opcodes[re.sub(r"^@!?U?P\w+\s+", "", text).split()[0].split(".")[0]] += 1
        target = branch_target(text)
        if target is not None and (not conditional or target == head or address < target <= back):
            index = at[target]
        elif "EXIT" in text and not conditional:
            return None
        else:
            index += 1
    return None


def loops(code):
    at = {address: index for index, (address, _) in enumerate(code)}
    ends = {(branch_target(text), address) for address, text in code if (branch_target(text) or address) < address}
    for head, back in sorted(ends):
        opcodes = walk(code, at, head, back)
        # Merging partial results computes exponentials as well, without touching memory.
        if opcodes and opcodes["MUFU"] and opcodes["LDS"] + opcodes["LDG"]:
            yield opcodes


print(f"{'kernel':<40}{'instructions':>13}{'MUFU':>6}{'LDS':>5}{'LDG':>5}{'STG':>5}")
for kernel, code in functions(sys.stdin).items():
    if len(sys.argv) > 1 and kernel not in sys.argv[1:]:
        continue
    for opcodes in loops(code):
        memory = "".join(f"{opcodes[opcode]:>5}" for opcode in ("LDS", "LDG", "STG"))
        print(f"{kernel:<40}{opcodes.total():>13}{opcodes['MUFU']:>6}{memory}")
