#!/usr/bin/env python3
"""Draws docs/budget.svg, or the file of its argument, from the table that the example `budget` prints:

    cargo run --release --example budget | scripts/budget-figure.py

Needs matplotlib.
"""
import re
import sys
from pathlib import Path

LINEAR = "#0072b2"
WHOLE = "#d55e00"


def main():
    text = sys.stdin.read()
    title = re.search(r"^N .*$", text, re.MULTILINE)
    # Name, MiB at the peak, seconds.
    rows = re.findall(r"^ *(\d+|whole) +(\d+) +([\d.]+)$", text, re.MULTILINE)
    whole = [tuple(map(float, row[1:])) for row in rows if row[0] == "whole"]
    points = [tuple(map(float, row)) for row in rows if row[0] != "whole"]
    if not (title and whole and points):
        sys.exit("budget-figure: there is no table of the example `budget` on stdin")
    try:
        import matplotlib
    except ImportError:
        sys.exit("budget-figure: needs matplotlib: python3 -m pip install matplotlib")
    matplotlib.use("svg")
    # The same bytes each time; text as text.
    matplotlib.rcParams.update({"svg.hashsalt": "candle-cross-entropy", "svg.fonttype": "none"})
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 2, figsize=(10, 4.2), layout="constrained")
    figure.suptitle(f"forward and backward, {title[0]}")
    budgets = [point[0] for point in points]
    for at, (panel, name) in enumerate(zip(panels, ["peak memory, MiB", "seconds"])):
        panel.plot(budgets, [point[at + 1] for point in points], marker="o", color=LINEAR, label="forward_linear")
        panel.axhline(whole[0][at], color=WHOLE, label="whole logits, gradient in place")
        panel.set_ylim(bottom=0)
        panel.set_xlabel("memory_budget, MiB of logits kept")
        panel.set_ylabel(name)
        panel.grid(alpha=0.3)
        panel.legend()
    path = Path(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).parent.parent / "docs/budget.svg")
    figure.savefig(path, metadata={"Date": None})


if __name__ == "__main__":
    main()
