#!/usr/bin/env python3
"""Writes what benches/results says of GPUs into the README and into figures:

    gpu-report.py [--results DIR] [--readme FILE] [--figures DIR]

Reads every DIR/*.json whose records name a GPU (compare.sh makes them). Replaces what lies between the README's lines
`<!-- gpu-table:begin -->` and `<!-- gpu-table:end -->`, which is of entry points that take logits, and between
`<!-- gpu-linear-table:begin -->` and `<!-- gpu-linear-table:end -->`, of those that take hidden states. Draws
docs/bandwidth-GPU.svg: useful GB/s of loss and gradient against the vocabulary. The figures need matplotlib, the tables
do not.
"""
import argparse
import json
import os
import pathlib
import sys

# Rows of the large table: bench and implementation in the results, and what the README calls them.
LARGE = [
    ("copy", "device", "a device copy"),
    ("loss_and_grad_inplace", "ours", "**`loss_and_grad_inplace`**"),
    ("loss_and_grad_inplace_without_stats", "ours", "**`loss_and_grad_inplace_without_stats`**"),
    ("loss_and_grad_inplace", "Liger", "Liger, in place"),
    ("loss_and_grad_inplace", "Liger, kernel alone", "Liger, its kernel alone"),
    ("loss_and_grad_inplace", "QuACK", "QuACK, in place, no smoothing"),
    ("loss_and_grad", "ours", "**`loss_and_grad`**"),
    ("loss_and_grad", "QuACK", "QuACK, no smoothing"),
    ("loss_and_grad", "torch.compile", "torch.compile"),
    ("loss_and_grad", "torch.compile, row smoothing", "torch.compile, a smoothing value a row"),
    ("loss_and_grad", "PyTorch", "PyTorch"),
    ("loss_and_grad", "PyTorch, row smoothing", "PyTorch, a smoothing value a row"),
    ("forward + backward()", "ours", "**`forward` and candle's `backward()`**"),
    ("forward + backward()", "candle-nn", "candle-nn and candle's `backward()`, no smoothing"),
    ("forward", "ours", "**`forward`**"),
    ("forward_with_stats", "ours", "**`forward_with_stats`**"),
    ("forward", "Liger", "Liger, forward"),
    ("forward", "QuACK", "QuACK, forward, no smoothing"),
    ("forward", "torch.compile", "torch.compile, forward"),
    ("forward", "torch.compile, row smoothing", "torch.compile, forward, a smoothing value a row"),
    ("forward", "PyTorch", "PyTorch, forward"),
    ("forward", "PyTorch, row smoothing", "PyTorch, forward, a smoothing value a row"),
]
# candle's zeros and sums of the gradients that an operation returns.
ADDED = "candle's own accumulation"
# Rows of the table of hidden states: implementation with gradients, the same for the loss alone, and the README's name.
LINEAR = [
    ("bare products, 3", "bare products, 1", "the bare products, three and one"),
    ("bare products, 4", None, "four of them: logits twice"),
    ("ours, budget 0", "ours", "**`forward_linear`**, budget 0"),
    ("ours, budget for 25 %", None, "**`forward_linear`**, budget for a quarter of the logits"),
    ("ours, budget for 50 %", None, "**`forward_linear`**, for half"),
    ("ours, budget for 75 %", None, "**`forward_linear`**, for three quarters"),
    ("ours, budget for all", None, "**`forward_linear`**, for all"),
    (ADDED, None, "of which candle's zeros and sums of gradients"),
    ("ours, whole logits", None, "whole logits by candle, **`forward`**"),
    ("Liger", "Liger", "Liger, sums of gradients in bf16"),
    ("Liger, f32 sums", "Liger, f32 sums", "Liger, sums in f32"),
    ("Cut Cross-Entropy", "Cut Cross-Entropy", "Cut Cross-Entropy, small gradients left out"),
    ("Cut Cross-Entropy, all gradients", "Cut Cross-Entropy, all gradients", "Cut Cross-Entropy, all gradients"),
    ("QuACK", "QuACK", "QuACK, in chunks of 4096 rows"),
    ("torch.compile", "torch.compile", "torch.compile"),
    ("PyTorch", "PyTorch", "PyTorch"),
]
BOTH, ALONE, IGNORED = "linear forward + backward()", "linear forward", ", 75 % ignored"
# Lines of the figure, each with the best form that the implementation has.
LINES = [
    ("copy", "device", "device copy", {"color": "0.5", "linestyle": "--"}),
    ("loss_and_grad_inplace", "ours", "this crate, a smoothing value a row", {"color": "C3", "linewidth": 2.5}),
    ("loss_and_grad_inplace", "QuACK", "QuACK, no smoothing", {"color": "C0"}),
    ("loss_and_grad_inplace", "Liger, kernel alone", "Liger, its kernel alone", {"color": "C2", "linestyle": ":"}),
    ("loss_and_grad_inplace", "Liger", "Liger", {"color": "C2"}),
    ("loss_and_grad", "torch.compile", "torch.compile, not in place", {"color": "C1"}),
    ("loss_and_grad", "PyTorch", "PyTorch, not in place", {"color": "C4"}),
    ("forward + backward()", "candle-nn", "candle-nn, not in place", {"color": "C5"}),
]


def main():
    root = pathlib.Path(__file__).resolve().parent.parent
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=pathlib.Path, default=root / "benches/results")
    parser.add_argument("--readme", type=pathlib.Path, default=root / "README.md")
    parser.add_argument("--figures", type=pathlib.Path, default=root / "docs")
    args = parser.parse_args()

    gpus = {}
    for path in sorted(args.results.glob("*.json")):
        records = json.loads(path.read_text())
        if isinstance(records, list) and records and "gpu" in records[0]:
            gpus[path.stem] = records
    # Those that take hidden states have their length.
    logits = {slug: [r for r in records if "d" not in r] for slug, records in gpus.items()}
    logits = {slug: records for slug, records in logits.items() if timed(records)}
    linear = [[r for r in records if "d" in r] for records in gpus.values()]
    figures = {slug: args.figures / f"bandwidth-{slug}.svg" for slug in logits}
    link = lambda slug: os.path.relpath(figures[slug], args.readme.parent)

    text = args.readme.read_text()
    text = replace(text, "gpu-table", [section(records, link(slug)) for slug, records in logits.items()])
    text = replace(text, "gpu-linear-table", [linear_section(records) for records in linear if timed(records)])
    args.readme.write_text(text)
    print(f"gpu-report: {args.readme}: {', '.join(gpus) or 'no GPU measured'}")
    for slug, records in logits.items():
        draw(records, figures[slug])
        print(f"gpu-report: {figures[slug]}")


def replace(text, name, sections):
    """The text with sections between a pair of marks."""
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        sys.exit(f"gpu-report: the README needs the lines {begin} and {end}, once each")
    before, rest = text.split(begin)
    return before + begin + "\n" + "\n".join([*sections, end]) + rest.split(end)[1]


def timed(records):
    """Records that have a median, by bench, implementation, rows and vocabulary."""
    return {(r["bench"], r["impl"], r["n"], r["v"]): r for r in records if r.get("median_ms") is not None}


def provenance(records):
    about = {key: "/".join(dict.fromkeys(str(r[key]) for r in records)) for key in ("gpu", "driver", "date", "commit")}
    software = dict.fromkeys(r["software"] for r in records if "software" in r)
    return ", ".join([about["gpu"], f"driver {about['driver']}", about["date"], f"commit {about['commit']}", *software])


def section(records, figure):
    by = timed(records)
    rows = max(n for _, _, n, _ in by)
    lines = [
        provenance(records)
        + f". {rows} rows of bf16, medians in milliseconds, in brackets the useful bandwidth in % of a device copy's: "
        "one read of the logits counts for a loss, a read and a write for a loss with gradient. This crate has a "
        "smoothing value a row, the others one for all where nothing else is said.",
        "",
    ]
    vocabularies = sorted({v for _, _, n, v in by if n == rows})

    def large(bench, impl, v):
        r = by.get((bench, impl, rows, v))
        return f"{r['median_ms']:.3g} ({100 * r['fraction_of_copy']:.0f})" if r else "–"

    lines += table([str(v) for v in vocabularies],
                   [(name, [large(bench, impl, v) for v in vocabularies]) for bench, impl, name in LARGE])
    lines += ["", f"![Useful bandwidth of loss and gradient against the vocabulary]({figure})"]

    shapes = sorted({(n, v) for _, _, n, v in by if n < rows}, key=lambda shape: (shape[1], shape[0]))
    if shapes:
        def small(bench, impl, shape):
            r = by.get((f"{bench}, host", impl, *shape))
            return f"{1e3 * r['median_ms']:.3g}" if r else "–"

        few = [(name, [small(bench, impl, shape) for shape in shapes]) for bench, impl, name in LARGE]
        lines += ["", "Few rows, where launching is most of the cost: microseconds a call by the host's clock, of "
                  "calls back to back.", ""]
        lines += table([f"{n}×{v}" for n, v in shapes], few)

    return "\n".join(lines + not_timed(records))


def linear_section(records):
    by = timed(records)
    depth = records[0]["d"]
    shapes = sorted({(n, v) for _, _, n, v in by}, key=lambda shape: shape[1])
    lines = [
        provenance(records)
        + f". bf16, hidden states of {depth}, N×V; medians in milliseconds, in brackets the speed in % of the bare "
        "products': three with gradients, one for the loss alone. Then the MiB that a call with gradients takes at "
        "most beyond its inputs and their gradients; this crate's have candle's zeros and sum for the weight's gradient in "
        "them. This crate has a smoothing value a row, the others none.",
        "",
    ]

    def cell(bench, impl, shape, bare):
        r, b = by.get((bench, impl, *shape)), by.get((bench, bare, *shape))
        if not r:
            return "–"
        compared = b and impl != ADDED
        return f"{r['median_ms']:.3g}" + (f" ({100 * b['median_ms'] / r['median_ms']:.0f})" if compared else "")

    def memory(impl, shape):
        r = by.get((BOTH, impl, *shape), {})
        if "peak_bytes" not in r or impl.startswith("bare") or impl == ADDED:
            return "–"
        return f"{(r['peak_bytes'] - r['gradient_bytes']) / 2**20:.0f}"

    def row(both, alone, shape, ignored=""):
        return [cell(BOTH + ignored, both, shape, "bare products, 3"),
                cell(ALONE + ignored, alone, shape, "bare products, 1")]

    columns = [f"{n}×{v}: {what}" for n, v in shapes for what in ("gradients", "loss alone", "MiB")]
    rows = [(name, [c for shape in shapes for c in (*row(both, alone, shape), memory(both, shape))])
            for both, alone, name in LINEAR]
    rows += [(f"75 % of the rows ignored: {name}",
              [c for shape in shapes for c in (*row(both, alone, shape, IGNORED), "–")])
             for both, alone, name in LINEAR]
    lines += table(columns, rows)

    said = []
    for shape in shapes:
        added = by.get((BOTH, ADDED, *shape))
        for impl, products, kept in [("ours, budget 0", 4, "none"), ("ours, budget for all", 3, "all")]:
            ours, bare = (by.get((BOTH, i, *shape)) for i in (impl, f"bare products, {products}"))
            if ours and bare and added:
                share = 100 * bare["median_ms"] / (ours["median_ms"] - added["median_ms"])
                said.append(f"{share:.0f} % of the speed of its {products} products with {kept} of the logits kept, "
                            f"V {shape[1]}")
    if said:
        lines += ["", "Without candle's zeros and sums: " + "; ".join(said) + "."]
    return "\n".join(lines + not_timed(records))


def not_timed(records):
    skipped = {}
    for r in records:
        if "skipped" in r:
            skipped.setdefault((r["impl"], r["skipped"]), []).append(f"{r['n']}×{r['v']}")
    # A bar would end a table's cell, and these are other programs' words.
    said = [f"{impl} at {', '.join(dict.fromkeys(where))}: {why}" for (impl, why), where in skipped.items()]
    return ["", "Not timed: " + "; ".join(said) + "."] if said else []


def table(columns, rows):
    """Markdown, without rows that have no number."""
    lines = ["| | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    return lines + [f"| {name} | " + " | ".join(cells) + " |" for name, cells in rows if set(cells) != {"–"}]


def draw(records, path):
    try:
        import matplotlib
    except ImportError:
        sys.exit(f"gpu-report: {path} needs matplotlib: python3 -m pip install matplotlib. The README is written.")
    matplotlib.use("svg")
    # The same bytes each time; text as text.
    matplotlib.rcParams.update({"svg.hashsalt": "candle-cross-entropy", "svg.fonttype": "none"})
    from matplotlib import pyplot

    by = timed(records)
    rows = max(n for _, _, n, _ in by)
    vocabularies = sorted({v for _, _, n, v in by if n == rows})
    figure, axes = pyplot.subplots(figsize=(9, 5), layout="constrained")
    for bench, impl, label, style in LINES:
        points = [(v, by[bench, impl, rows, v]["gb_per_s"]) for v in vocabularies if (bench, impl, rows, v) in by]
        if points:
            axes.plot(*zip(*points), marker="o", markersize=4, label=label, **style)
    axes.set_xticks(vocabularies, [str(v) for v in vocabularies], rotation=30, ha="right")
    axes.set_ylim(bottom=0)
    axes.set_xlabel("vocabulary")
    axes.set_ylabel("useful GB/s (one read and one write of the logits)")
    axes.set_title(f"Loss and gradient, {rows} rows of bf16, {records[0]['gpu']}")
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right center", frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


if __name__ == "__main__":
    main()
