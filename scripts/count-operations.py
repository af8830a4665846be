#!/usr/bin/env python3
"""Counts the machine instructions that whole kernels issue, and the share of a GPU's issue slots they take while memory
runs at the speed of a copy:

    count-operations.py [--arch 90 …] [KERNEL …]    # a table; needs nvcc, ptxas and nvdisasm (cuda-toolchain.sh), no GPU
    count-operations.py --check                     # compares with operation-bounds.tsv: exit 1 where more, and for rules
    count-operations.py --update                    # writes today's counts there
    count-operations.py --distributions             # of the kernels for any target distribution, option by option
    count-operations.py --self-test                 # needs nothing

A warp's usual path is the longest one through the machine code that avoids what is rare (RARE below, by the source line
that an instruction comes from) and what other warps do (LEADER, SECOND, EDGES). Instructions outside loops are counted
once; a loop over 16-byte groups once a group; a loop over a slice's chunks once a chunk. Predicated instructions take a
slot whether they do anything or not. Which blocks a row has is in geometry.tsv, which a test compares with select.rs.
"""
import argparse
import math
import re
import subprocess
import sys
import tempfile
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent
KERNELS = HERE.parent / "kernels"
BOUNDS = HERE / "operation-bounds.tsv"
GEOMETRY = HERE / "geometry.tsv"
ARCHS = ["90", "100", "103", "120"]  # for the rules; bounds are on BOUNDED
BOUNDED = ["90", "100", "120"]
# Of the on-chip kernels (kernels/on_chip.cuh): warps of a block; groups that a thread takes at once; groups of a chunk that
# it has, and of the first where there is a gradient.
WARPS, AT_ONCE, CHUNK, EARLY = 8, 2, 8, 2

# Whose code it runs, multiprocessors, GHz, a copy's TB/s.
GPUS = {
    "H100": ("90", 132, 1.755, 3.0),
    "H200": ("90", 132, 1.98, 4.3),
    "B200": ("100", 148, 1.965, 7.0),
    "RTX 5090": ("120", 170, 2.407, 1.8),
}

# (function, pattern of a line in it). A block of instructions most of which come from such lines, inlined or not.
RARE = [
    ("check_inputs", r"kIgnored|kBad|first_error"),
    ("report_bad_row", r"."),
    ("row_on_chip", r"in\.kind|filled\[0\]"),
    ("finish_unused_row", r"."),
    ("fill_gradient", r"."),
    ("row_offset", r"offset \+= row %|row /=|size ="),
    ("without_target|write_target", r"."),
    ("add_groups", r"without_target|if \(has_target|if \(largest > sums.limit|if \(group|^\s+largest = |relate<STATS>|a\.largest = |sums\.limit =|opaque|x\[k\] != -INFINITY|exact\(|in_units\(|if \(e > 0|a\.classes\+\+"),
    ("relate", r"exact\("),
    ("write_slice", r"write_gradient<|if \(special\)"),
    ("write_gradient", r"if \(f\.way|fill_gradient"),
    ("operator", r"if \(i >= 0|widen<T>\(v\[u\], g\)"),
    ("for_each_group_aligned", r"\(reader, here|one\[0\]|continue;"),
    ("load_edge", r"."),
]
EDGES = [("gradient_of_one", r"."), ("write_words", r"at_edge|edge|last")]
LEADER = [("init_mbarriers|start_copies|find_column|send", r"."), ("merge_block", r"merge_warps"), ("row_loss|row_gradient", r"find_column|finish_row|gradient_factors|factors\[0\] ="), ("row_on_chip", r"find_column|dev::send|mbarrier_wait_cluster|senders|merge_warps|finish_row|gradient_factors|gradient_scale|known.rank == 0|kept\[0\] = |merge_lanes<STATS, kMaxB")]
WRITER = [("finish_row", r"(?s)if \(!writes\) return state;.*")]
SECOND = [("copy_edges", r".")]
CLUSTER = [("send", r"."), ("init_mbarriers", r"senders"), ("row_on_chip", r"if \(!one_block\)|mbarrier_wait_cluster|kMaxBlocksPerRow")]
ALIGNED = [("row_on_chip", r"GRAD, true>\(on_chip"), ("for_each_group", r"<T, true,")]
MISALIGNED = [("row_on_chip", r"GRAD, false>\(on_chip"), ("for_each_group", r"<T, false,")]


class Sources:
    """Lines of the kernels, and the function that each is in."""

    def __init__(self, texts):
        self.lines = {name: text.splitlines() for name, text in texts.items()}
        self.function, self.after, self.known = {}, {}, {}
        for name, lines in self.lines.items():
            current, written = None, False
            for number, line in enumerate(lines, 1):
                if match := re.match(r"\s*(?:template .*> )?(?:ROW_KERNEL|DEVICE)\b.*?(\w+)\(", line):
                    current, written = match[1], False
                self.function[name, number] = current
                self.after[name, number] = written
                written |= "if (!writes) return state;" in line

    def matches(self, frames, rules):
        key = frames, tuple(rules)
        if key not in self.known:
            self.known[key] = self._matches(*key)
        return self.known[key]

    def _matches(self, frames, rules):
        for frame in frames:
            if frame not in self.function:
                continue
            function, line = self.function[frame] or "", self.lines[frame[0]][frame[1] - 1]
            for name, pattern in rules:
                if re.fullmatch(name, function) and (
                    self.after[frame] if pattern.startswith("(?s)") else re.search(pattern, line)
                ):
                    return True
        return False


class Code:
    """Basic blocks of a kernel: [(address, text, frames)], and edges."""

    def __init__(self, instructions, labels):
        self.instructions = instructions
        branch = {}
        for i, (_, text, _) in enumerate(instructions):
            if (match := re.search(r"`\((\.L_x_\d+)\)", text)) and re.search(r"\bBRA\b", text):
                branch[i] = labels[match[1]]
        ends = {i for i, (_, text, _) in enumerate(instructions) if re.search(r"\b(BRA|EXIT|RET|CALL)\b", text)}
        starts = sorted({0, *branch.values(), *(i + 1 for i in ends if i + 1 < len(instructions))})
        self.spans = list(zip(starts, starts[1:] + [len(instructions)]))
        number = {start: block for block, start in enumerate(starts)}
        self.successors, self.exits = [], []
        for block, (_, end) in enumerate(self.spans):
            text, to = instructions[end - 1][1], []
            always = not text.startswith("@") and not re.search(r"BRA(\.\w+)* !?U?P", text)
            # BRA.DIV goes to what a diverged warp does in place of a shuffle.
            if end - 1 in branch and ".DIV" not in text:
                to.append(number[branch[end - 1]])
            leaves = re.search(r"\b(EXIT|RET)\b", text)
            if end < len(instructions) and (not (always and (leaves or end - 1 in branch)) or ".DIV" in text):
                to.append(block + 1)
            self.successors.append(to)
            self.exits.append(bool(leaves))
        self._loops()

    def block(self, number):
        start, end = self.spans[number]
        return self.instructions[start:end]

    def _loops(self):
        """Natural loops: head -> blocks; and a graph without cycles, in which a loop's end leads to what follows it."""
        order, state = [], {}
        stack = [(0, iter(self.successors[0]))]
        state[0] = 1
        back = []
        while stack:
            block, rest = stack[-1]
            for to in rest:
                if state.get(to) == 1:
                    back.append((block, to))
                elif to not in state:
                    state[to] = 1
                    stack.append((to, iter(self.successors[to])))
                    break
            else:
                state[block] = 2
                order.append(block)
                stack.pop()
        predecessors = defaultdict(list)
        for block in order:
            for to in self.successors[block]:
                predecessors[to].append(block)
        self.loops = defaultdict(set)
        for end, head in back:
            body, todo = self.loops[head], [end]
            body.add(head)
            while todo:
                block = todo.pop()
                if block not in body:
                    body.add(block)
                    todo += predecessors[block]
        self.forward = {block: list(self.successors[block]) for block in order}
        for end, head in back:
            body = self.loops[head]
            self.forward[end] = [to for to in self.forward[end] if to != head]
            self.forward[end] += [to for block in body for to in self.successors[block] if to not in body]
        self.innermost = {}
        for head, body in sorted(self.loops.items(), key=lambda item: -len(item[1])):
            for block in body:
                self.innermost[block] = head
        # Children before parents; edges that the construction above closed into a cycle are dropped.
        self.order, state = [], {0: 1}
        stack = [(0, iter(self.forward[0]))]
        while stack:
            block, rest = stack[-1]
            for to in rest:
                if state.get(to) == 1:
                    self.forward[block] = [other for other in self.forward[block] if other != to]
                elif to not in state:
                    state[to] = 1
                    stack.append((to, iter(self.forward[to])))
                    break
            else:
                state[block] = 2
                self.order.append(block)
                stack.pop()

    def path(self, sources, avoid, loads=(), unusual=None):
        """Blocks of the longest path from the start to the end that passes as few avoided blocks as possible, among them
        those with such `loads`, and with such an unusual number of exponentials."""
        best = {}
        for block in self.order:
            content = self.block(block)
            rare = sum(sources.matches(frames, avoid) for _, _, frames in content) * 2 > len(content)
            opcodes = [text for _, text, _ in content]
            # What follows the loads of one loop may be said to be of another's lines.
            loading = any(re.match(r"LD[SG]\b", opcode(text)) for text in opcodes)
            rare |= loading and sum(sources.matches(frames, loads) for _, _, frames in content) * 2 > len(content)
            rare |= any("CALL" in text for text in opcodes)
            rare |= unusual is not None and unusual(sum("MUFU.EX2" in text for text in opcodes))
            spins = block in self.loops.get(block, ()) and any("PHASECHK" in text for text in opcodes)
            # No way round the work: a compiler may put a branch down to another call of the same function.
            works = not rare and any("MUFU" in text for text in opcodes)
            weight = (-1 if rare or spins else 10 if works else 0, len(content))
            ends = [((-1000, 0), [])] if not self.exits[block] else [((0, 0), [])]
            follow = max(ends + [best[to] for to in self.forward[block] if to in best], key=lambda known: known[0])
            best[block] = (tuple(map(sum, zip(weight, follow[0]))), [block] + follow[1])
        return best[0][1]

    def count(self, sources, avoid, loads=(), unusual=None):
        """Instructions of a warp: once, and by kind of loop [(kind, 16-byte groups a round, instructions)]."""
        once, loops = 0, defaultdict(list)
        for block in self.path(sources, avoid, loads, unusual):
            head = self.innermost.get(block)
            if head is None:
                once += len(self.block(block))
            else:
                loops[head] += [opcode(text) for _, text, _ in self.block(block)]
        found = []
        for head, opcodes in loops.items():
            seen = Counter(opcodes)
            exponentials = seen["MUFU.EX2"]
            memory = any(re.match(r"(LDS|LDG)\b", name) for name in seen)
            if exponentials and memory:
                found.append(("gradient" if any(name.startswith("STG") for name in seen) else "sums", exponentials, len(opcodes)))
            elif any(name.startswith(("SYNCS", "UBLKCP")) for name in seen):
                found.append(("chunk", 0, len(opcodes)))
            else:
                once += len(opcodes)
        return once, found


def opcode(text):
    return re.sub(r"^@!?U?P\w+\s+", "", text).split()[0]


def parse(listing):
    """{kernel: Code} of nvdisasm -c -gi."""
    kernels, name, frames, fresh = {}, None, [], True
    for line in listing.splitlines():
        if match := re.match(r"\.text\.(\S+):", line):
            name = match[1]
            kernels[name] = ([], {})
            frames, fresh = [], True
        elif name is None:
            continue
        elif match := re.match(r'\s*//## File "([^"]*)", line (\d+)', line):
            if fresh:
                frames, fresh = [], False
            frames.append((match[1].rsplit("/", 1)[-1], int(match[2])))
        elif match := re.match(r"(\.L_x_\d+):", line):
            kernels[name][1][match[1]] = len(kernels[name][0])
        elif match := re.match(r"\s+/\*([0-9a-f]{4,6})\*/\s+(.*?)\s*(\(\*.*\*\))?;", line):
            fresh = True
            kernels[name][0].append((int(match[1], 16), match[2].strip(), tuple(frames)))
    return {name: Code(*kernel) for name, kernel in kernels.items()}


def element_size(kernel):
    return 4 if "_f32" in kernel else 2


def counts(kernel, code, sources):
    """What bounds are on: {what: instructions}."""
    result = {}
    on_chip = "onchip" in kernel
    each = 16 // element_size(kernel) * (3 if "softcap" in kernel else 1)
    batches = "softcap" not in kernel
    for phase, other in (("aligned", MISALIGNED), ("misaligned", ALIGNED)):
        warps = {"warp": RARE + LEADER + WRITER + SECOND + EDGES}
        warps |= {"leader": RARE + SECOND + WRITER + EDGES, "writer": RARE + SECOND + EDGES}
        if on_chip:
            # The last warp's edges are counted with the second's.
            warps |= {"second": RARE + LEADER + WRITER}
        if on_chip and batches:
            warps["one by one"] = warps["warp"]
        for cluster in (False, True) if on_chip else (False,):
            for warp, avoided in warps.items():
                # By lines the two cannot be told apart: compilers take the lines of one inlined function for another's.
                unusual = None
                if warp == "one by one":
                    unusual = lambda exponentials: exponentials > 1.25 * each
                elif batches and not on_chip:
                    unusual = lambda exponentials: 0.75 * each <= exponentials <= 1.25 * each
                once, loops = code.count(sources, avoided + ([] if cluster else CLUSTER), other, unusual)
                if warp != "one by one":
                    name = f"{warp} in a cluster" if cluster else warp
                    result[name] = max(result.get(name, 0), once)
                for kind, exponentials, instructions in loops:
                    if kind == "chunk":
                        what = "chunk of the leader" if warp in ("leader", "writer") else "chunk"
                        # The leader passes both loops; the wait's is everyone's.
                        result.setdefault((what, warp, cluster, phase), 0)
                        result[what, warp, cluster, phase] += instructions
                    else:
                        groups = max(1, exponentials // each)
                        what = kind if kind == "gradient" and on_chip else f"{kind}, {phase}"
                        if batches and groups == 1:
                            what += ", one by one"
                        result[what] = max(result.get(what, 0), math.ceil(instructions / groups * 10) / 10)
    for key in [key for key in result if isinstance(key, tuple)]:
        result[key[0]] = max(result.get(key[0], 0), result.pop(key))
    return result


def rounds(groups):
    """Batches, and rounds of one group, of all warps of a block for consecutive groups, of which each thread takes every
    256th, several at once where it has as many. A warp issues what any of its lanes does."""
    threads = 32 * WARPS
    batches = single = 0
    for warp in range(WARPS):
        each = [max(0, math.ceil((groups - 32 * warp - lane) / threads)) for lane in (0, 31)]
        batches += each[0] // AT_ONCE
        # Where the last round is partial, lanes have one more or one fewer.
        single += max(each[0] % AT_ONCE, each[1] % AT_ONCE)
    return batches, single


def row_instructions(count, blocks, groups_per_block, groups, misaligned, gradient):
    """Warp instructions of a row on chip."""
    total, sums = 0.0, "sums, misaligned" if misaligned else "sums, aligned"
    suffix = " in a cluster" if blocks > 1 else ""

    def work(what, groups):
        batches, single = rounds(groups)
        each = count.get(what, 0)
        return AT_ONCE * batches * each + single * count.get(what + ", one by one", each)

    for rank in range(blocks):
        here = max(0, min(groups_per_block, groups - rank * groups_per_block))
        first = 32 * WARPS * (EARLY if gradient else CHUNK)
        chunks = (here > 0) + math.ceil(max(0, here - first) / (32 * WARPS * CHUNK))
        total += count[("writer" if rank == 0 else "leader") + suffix] + count["second" + suffix]
        total += (WARPS - 2) * count["warp" + suffix]
        total += chunks * (count.get("chunk of the leader", 0) + (WARPS - 1) * count.get("chunk", 0))
        total += work(sums, here) + work("gradient", here)
    return total


def shares(all_counts, geometry):
    """{(GPU, kernel): [(V, share)]} of the issue slots while memory runs at a copy's speed."""
    found = defaultdict(list)
    for gpu, kernel, vocab, blocks, groups_per_block in geometry:
        arch, multiprocessors, clock, bandwidth = GPUS[gpu]
        count = all_counts.get((arch, kernel))
        if count is None:
            continue
        size, passes = element_size(kernel), 2 if "fused" in kernel else 1
        groups = math.ceil(vocab * size / 16)
        slots = 4 * multiprocessors * clock * 1e9 * vocab * size * passes / (bandwidth * 1e12)
        # Of rows one behind another, one in `period` is aligned.
        period = 16 // math.gcd(16, vocab * size)
        rows = [row_instructions(count, blocks, groups_per_block, groups, i > 0, "fused" in kernel) for i in range(period)]
        found[gpu, kernel].append((vocab, sum(rows) / period / slots))
    return found


def faults(arch, kernel, code, sources):
    """Breaches of rules that hold for every kernel."""
    texts = [text for _, text, _ in code.instructions]
    if any(re.search(r"\b(LDL|STL)\b", text) for text in texts):
        yield "local memory"
    if any(re.search(r"MEMBAR\.(SC|\w+\.GPU)", text) for text in texts):
        yield "a fence of the whole GPU"
    # Every path begins with this block.
    first = [opcode(text) for _, text, _ in code.block(0)]
    before = first[: first.index("ACQBULK")] if "ACQBULK" in first else texts
    if any(re.match(r"(LDG?|STG?|LDGSTS|ATOMG?|REDG?|UBLKCP)\b", name) for name in map(opcode, before)):
        yield "global memory before earlier kernels have ended"
    if "onchip" not in kernel:
        return
    rare = RARE + EDGES
    paths = [code.path(sources, rare + WRITER + LEADER + SECOND, other) for other in (ALIGNED, MISALIGNED)]
    for path in paths:
        for head in {code.innermost.get(block) for block in path} - {None}:
            names = [opcode(text) for block in path if code.innermost.get(block) == head for _, text, _ in code.block(block)]
            narrow = [name for name in names if re.match(r"(LDG|STG|STS)\b|LDS\.U", name) and not name.endswith("128")]
            if "MUFU.EX2" in names and narrow:
                yield f"{narrow[0]} in a loop over groups"
    # Nothing that waits for a division or for its divisor before the copies are on their way.
    leader = [instruction for block in code.path(sources, rare + SECOND, MISALIGNED) for instruction in code.block(block)]
    copy = next((i for i, (_, text, _) in enumerate(leader) if "UBLKCP" in text), 0)
    uses = [text for _, text, frames in leader[:copy] if sources.matches(frames, (("gradient_scale", "."),))]
    if any(re.match(r"MUFU|FCHK|BRA|FSETP", opcode(text)) for text in uses):
        yield "the gradient's scale is waited for before the first copy starts"


def disassemble(arch, source=KERNELS / "cross_entropy.cu"):
    """By way of PTX: `nvcc -cubin` does not always give the same code, and what ptxas makes of a file is always the same."""
    with tempfile.TemporaryDirectory() as folder:
        ptx, cubin = f"{folder}/kernels.ptx", f"{folder}/kernels.cubin"
        flags = [f"-arch=sm_{arch}", "-O3", "-lineinfo"]
        subprocess.run(["nvcc", "-ptx", *flags, "-std=c++17", "-o", ptx, source], check=True)
        subprocess.run(["ptxas", *flags, "-o", cubin, ptx], check=True)
        return subprocess.run(["nvdisasm", "-c", "-gi", cubin], check=True, capture_output=True, text=True).stdout


def kernel_sources(folder=KERNELS):
    return Sources({path.name: path.read_text() for path in folder.iterdir() if path.suffix in (".cu", ".cuh")})


# What may stand beside the logits of a row with any target distribution (kernels/distribution_sums.cuh): where the kernels ask
# for it, what they ask, and the answers no and yes.
BESIDE = {
    "class weights": ("distribution_sums.cuh", "weights = p.class_weights ? p.class_weights + stretch.begin : nullptr;",
                      "weights = nullptr;", "weights = p.class_weights + stretch.begin; __builtin_assume(weights != nullptr);"),
    "prior": ("distribution_sums.cuh", "prior = p.prior ? p.prior + stretch.begin : nullptr;",
              "prior = nullptr;", "prior = p.prior + stretch.begin; __builtin_assume(prior != nullptr);"),
    "probabilities": ("distribution_sums.cuh", "    if (p.entries == 0) {\n      const", "    if (false) {\n      const",
                      "    if (__builtin_assume(p.probabilities != nullptr); true) {\n      const"),
    "norm": ("distribution.cuh", "const bool norm = p.grad_norm_sq;", "constexpr bool norm = false;", "constexpr bool norm = true;"),
    "type": ("distribution_sums.cuh", "type = static_cast<FloatType>(p.probability_type);", "type = kBF16;", "type = kF32;"),
}
RARE_BESIDE = RARE + [
    ("read_group", r"phase != 0|load_inside<P, false|beyond\)"),
    ("load_straddling", r"."),
    ("add_four", r"add<true|relate\(|before = |if \(largest|sums\.largest = |a\.at = |replaced = x"),
    ("operator", r"const int i = start|if \(i >= 0"),
    ("write_distribution", r"write_classes<T, SOFTCAP, true"),
]


def beside_counts(arch, present):
    """Instructions of a warp a 16-byte group of bf16 logits, {sums, gradient}, aligned, nothing masked, in code compiled for
    what is `present` alone, without the branches that choose."""
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        for path in KERNELS.iterdir():
            if path.suffix == ".cuh":
                (folder / path.name).write_text(path.read_text())
        for name, (file, question, no, yes) in BESIDE.items():
            text = (folder / file).read_text()
            assert text.count(question) == 1, question
            (folder / file).write_text(text.replace(question, yes if name in present else no))
        kernels = {"sums": "distribution_loss<bf16, false, false>", "gradient": "distribution_gradient<bf16, false>"}
        bodies = [f"KERNEL void __launch_bounds__(256, 2) {name}(Params p) {{ {body}(p); }}" for name, body in kernels.items()]
        source = folder / "alone.cu"
        source.write_text("\n".join(['#include "distribution.cuh"', *bodies]))
        listing, sources = disassemble(arch, source), kernel_sources(folder)
    found = {}
    for name, code in parse(listing).items():
        path = set(code.path(sources, RARE_BESIDE))
        for head, body in code.loops.items():
            frames = code.block(head)[0][2]
            own = any(sources.function.get(frame) == "for_each_group_rolled" for frame in frames)
            inner = [other for at, other in code.loops.items() if at != head and other < body]
            # The loop over the two halves of a group is passed twice.
            here = [(2 if any(block in other for other in inner) else 1, code.block(block)) for block in body & path]
            exponentials = sum(times * sum("MUFU.EX2" in text for _, text, _ in block) for times, block in here)
            if own and exponentials >= 8:
                found[name] = sum(times * len(block) for times, block in here)
    return found


def print_beside():
    _, multiprocessors, clock, bandwidth = GPUS["H200"]
    per_byte = 32 * 4 * multiprocessors * clock / bandwidth / 1000  # lane instructions
    print(f"{'bf16, sm_90':<34}{'sums':>8}{'gradient':>10}{'bytes':>8}{'% of slots':>12}{'loss alone':>12}")
    for name, present in [
        ("nothing", []), ("class weights", ["class weights"]), ("prior", ["prior"]), ("both", ["class weights", "prior"]),
        ("probabilities f32", ["probabilities", "type"]), ("probabilities bf16", ["probabilities"]),
    ]:
        count = beside_counts("90", present)
        read = 2 + ("probabilities" in present) * (4 if "type" in present else 2)
        share = [100 * instructions / 8 / (per_byte * moved) for instructions, moved in
                 [(count["sums"] + count["gradient"], read + 2), (count["sums"], read)]]
        print(f"{name:<34}{count['sums']:>8}{count['gradient']:>10}{read + 2:>8}{share[0]:>12.0f}{share[1]:>12.0f}")


def read_table(path):
    return [line.split("\t") for line in path.read_text().splitlines() if line and not line.startswith("#")]


def geometry():
    return [(gpu, kernel, int(v), int(b), int(g)) for gpu, kernel, v, b, g in read_table(GEOMETRY)]


def print_shares(all_counts):
    table = shares(all_counts, geometry())
    if not table:
        return
    vocabularies = [vocab for vocab, _ in next(iter(table.values()))]
    print(f"\n{'% of the issue slots':<40}" + "".join(f"{vocab:>8}" for vocab in vocabularies))
    for (gpu, kernel), row in table.items():
        print(f"{gpu + ', ' + kernel:<40}" + "".join(f"{100 * share:>8.0f}" for _, share in row))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", action="append")
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--update", action="store_true")
    parser.add_argument("--distributions", action="store_true")
    parser.add_argument("--self-test", action="store_true")
    parser.add_argument("kernels", nargs="*")
    arguments = parser.parse_args()
    if arguments.self_test:
        return self_test()
    if arguments.distributions:
        return print_beside()
    archs = arguments.arch or (ARCHS if arguments.check or arguments.update else ["90"])
    sources, measured, complaints = kernel_sources(), {}, []
    with ThreadPoolExecutor(2) as pool:
        for arch, listing in zip(archs, pool.map(disassemble, archs)):
            for kernel, code in sorted(parse(listing).items()):
                if arguments.kernels and kernel not in arguments.kernels:
                    continue
                complaints += [f"sm_{arch} {kernel}: {fault}" for fault in set(faults(arch, kernel, code, sources))]
                if (arch in BOUNDED or not arguments.check) and not re.search("_f16|distribution|reduce|classes|merge", kernel):
                    measured[arch, kernel] = counts(kernel, code, sources)
    if arguments.update:
        measured = {(arch, kernel): count for (arch, kernel), count in measured.items() if arch in BOUNDED}
        rows = ["\t".join([*key, *(f"{what}: {n:g}" for what, n in sorted(count.items()))]) for key, count in measured.items()]
        BOUNDS.write_text("# Written by count-operations.py --update: the most instructions --check lets a warp issue.\n" + "\n".join(rows) + "\n")
    elif arguments.check:
        bounds = {
            (arch, kernel, what): float(n)
            for arch, kernel, *cells in read_table(BOUNDS)
            for what, n in (cell.split(": ") for cell in cells)
        }
        for (arch, kernel), count in measured.items():
            for what, n in count.items():
                bound = bounds.get((arch, kernel, what), 0)
                if n > bound:
                    complaints.append(f"sm_{arch} {kernel}: {what}: {n:g} instructions, {bound:g} allowed")
                elif n < bound:
                    print(f"sm_{arch} {kernel}: {what}: {n:g} instructions, fewer than {bound:g}: --update lowers the bound")
        missing = {key[:2] for key in bounds} - set(measured)
        complaints += [f"sm_{arch} {kernel} is gone" for arch, kernel in missing if arch in archs and not arguments.kernels]
    else:
        for (arch, kernel), count in measured.items():
            print(f"sm_{arch} {kernel}: " + ", ".join(f"{what} {n:g}" for what, n in sorted(count.items())))
    print_shares(measured)
    if complaints:
        print("\n".join(complaints))
        return 1
    return 0


def self_test():
    """A made-up kernel: a rare block, a loop over groups, an exit."""
    source = "DEVICE int without_target(int x) {\n  rare;\n}\nDEVICE void body() {\n  without_target(x);\n  usual;\n}\n"
    sources = Sources({"made-up.cuh": source})

    def code(*in_loop):
        rare, usual = [("made-up.cuh", 2), ("made-up.cuh", 5)], [("made-up.cuh", 6)]
        lines = ["MOV R1, R2", "LDS.128 R4, [R1]", "@P0 BRA `(.L_x_1)", *["FADD R1, R1, R1"] * 50]
        listing = [".text.made_up:"]
        for i, text in enumerate([*lines, "MUFU.EX2 R1, R1", *in_loop, "@P1 BRA `(.L_x_0)", "STG.E R1, R2", "EXIT"]):
            listing += [".L_x_0:"] if i == 1 else [".L_x_1:"] if i == len(lines) else []
            frames = rare if i in range(3, len(lines)) else usual
            listing += [f'//## File "/{name}", line {line}' for name, line in frames]
            listing.append(f"        /*{16 * i:04x}*/    {text} ;")
        return parse("\n".join(listing))["made_up"]

    assert code().count(sources, RARE) == (3, [("sums", 1, 4)]), code().count(sources, RARE)
    assert code("FADD R1, R1, R2").count(sources, RARE) == (3, [("sums", 1, 5)])
    assert code().count(sources, [])[1] == [("sums", 1, 54)]
    assert "local memory" in set(faults("90", "made_up", code("LDL R1, [R1]"), sources))
    assert "global memory before earlier kernels have ended" in set(faults("90", "made_up", code(), sources))
    assert "LDS.U16 in a loop over groups" in set(faults("90", "onchip", code("LDS.U16 R1, [R1]"), sources))
    # The budgets of the documents: lane instructions a bf16 logit.
    _, multiprocessors, clock, bandwidth = GPUS["H200"]
    budget = 32 * 4 * multiprocessors * clock * 4 / bandwidth / 1000
    assert f"{budget:.1f} {budget / 2:.1f}" == "31.1 15.6", budget
    print("count-operations.py: the self-test passed")
    return 0


if __name__ == "__main__":
    sys.exit(main())
