#!/usr/bin/env python3
"""Turns what `cargo bench --bench cpu` (or linear) left in a target directory into a list of records, on standard output:

    bench-results.py cpu [TARGET_DIR] > benches/results/cpu.json

A record: {"bench", "impl", "n", "v", "dtype", "median_ms", "gb_per_s", "commit", "cpu", "threads", "date"}, for linear
with "d" and "gflop_per_s"; both count useful work, as the benchmarks do.
"""
import datetime
import json
import os
import pathlib
import re
import subprocess
import sys

GROUPS = {"cpu": r"(?P<n>\d+)x(?P<v>\d+) (?P<dtype>\w+)", "linear": r"linear (?P<n>\d+)x(?P<d>\d+)x(?P<v>\d+) (?P<dtype>\w+)"}
if len(sys.argv) < 2 or sys.argv[1] not in GROUPS:
    sys.exit(__doc__)
bench = sys.argv[1]
target = pathlib.Path(sys.argv[2] if len(sys.argv) > 2 else "target")
commit = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=True).stdout.strip()
model = re.search(r"model name\s*: (.*)", pathlib.Path("/proc/cpuinfo").read_text())
records = []
for path in target.glob("criterion/*/*/new/benchmark.json"):
    about = json.loads(path.read_text())
    group = re.fullmatch(GROUPS[bench], about["group_id"])
    if not group:
        continue
    estimates = json.loads((path.parent / "estimates.json").read_text())
    seconds = estimates["median"]["point_estimate"] * 1e-9
    work = about["throughput"]
    unit = "gb_per_s" if "Bytes" in work else "gflop_per_s"
    records.append({
        "bench": bench,
        "impl": about["value_str"],
        **{name: int(value) for name, value in group.groupdict().items() if name != "dtype"},
        "dtype": group["dtype"],
        "median_ms": round(seconds * 1e3, 3),
        unit: round(next(iter(work.values())) / seconds * 1e-9, 2),
        "commit": commit,
        "cpu": model[1] if model else "unknown",
        "threads": os.cpu_count(),
        "date": datetime.date.fromtimestamp(path.stat().st_mtime).isoformat(),
    })
records.sort(key=lambda r: (-r["n"], r["v"], r["dtype"], r["impl"]))
print("[\n" + ",\n".join(json.dumps(r, ensure_ascii=False) for r in records) + "\n]")
