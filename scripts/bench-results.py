#!/usr/bin/env python3
"""Turns what `cargo bench --bench cpu` left in a target directory into a list of records, on standard output:

    bench-results.py [TARGET_DIR] > benches/results/cpu.json

A record: {"bench", "impl", "n", "v", "dtype", "median_ms", "gb_per_s", "commit", "cpu", "threads", "date"}; gb_per_s
counts useful bytes, as the benchmark does.
"""
import datetime
import json
import os
import pathlib
import re
import subprocess
import sys

target = pathlib.Path(sys.argv[1] if len(sys.argv) > 1 else "target")
commit = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=True).stdout.strip()
model = re.search(r"model name\s*: (.*)", pathlib.Path("/proc/cpuinfo").read_text())
records = []
for path in target.glob("criterion/*/*/new/benchmark.json"):
    about = json.loads(path.read_text())
    group = re.fullmatch(r"(\d+)x(\d+) (\w+)", about["group_id"])
    if not group:
        continue
    estimates = json.loads((path.parent / "estimates.json").read_text())
    seconds = estimates["median"]["point_estimate"] * 1e-9
    records.append({
        "bench": "cpu",
        "impl": about["value_str"],
        "n": int(group[1]),
        "v": int(group[2]),
        "dtype": group[3],
        "median_ms": round(seconds * 1e3, 3),
        "gb_per_s": round(about["throughput"]["Bytes"] / seconds * 1e-9, 2),
        "commit": commit,
        "cpu": model[1] if model else "unknown",
        "threads": os.cpu_count(),
        "date": datetime.date.fromtimestamp(path.stat().st_mtime).isoformat(),
    })
records.sort(key=lambda r: (-r["n"], r["v"], r["dtype"], r["impl"]))
print("[\n" + ",\n".join(json.dumps(r, ensure_ascii=False) for r in records) + "\n]")
