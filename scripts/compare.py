#!/usr/bin/env python3
"""Times other libraries' cross-entropy on a GPU, as `gpu-check --timing-only` times this crate's:

    compare.py time [--work logits|linear|all] [--out FILE] [--seconds S] [--samples N] [--commit NAME]
                    [--device cuda|cpu] [--reduced]
    compare.py merge OUT FILE...      # one list from this script's files and gpu-check's
    compare.py table FILE             # the list, to read

Needs PyTorch. Compared, from logits: a device copy; PyTorch, eager and compiled, with one smoothing value and with one
a row composed of its operations; Liger's kernel; QuACK's. From hidden states and the output projection, without
smoothing: the same, and Cut Cross-Entropy. Whatever cannot be imported or fails is in the list with the reason under
"skipped".

A result is checked against fp64 before it is timed: the loss over all rows, the gradient in some. A sample lies between
two events on the device. Ahead of each the logits are restored, if the call overwrites them, and a buffer of at least
four L2 caches is written and read, so that nothing of the logits is cached, and nothing dirty is left to write back.
Where launches are what a call costs, back-to-back calls are timed by the host's clock as well ("…, host").

A record: {"bench", "impl", "n", "v", "dtype", "median_ms", "p10_ms", "p90_ms", "samples", "gb_per_s",
"fraction_of_copy", "smoothing", "loss_error", "grad_error", "software", "commit", "gpu", "driver", "date"}. gb_per_s
counts useful bytes: the logits once for a loss, twice for a loss with gradient. peak_bytes is what a call takes beyond
its inputs. From hidden states there are "d", "gradient_bytes" (of both inputs, part of the peak) and, instead of
bandwidth, "tflop_per_s" of one matrix product for a loss and of three with gradients. The file is written anew after
each record, so that a run which is cut off keeps what it has.

`--device cpu --reduced` rehearses the script where there is no GPU: tiny shapes, the host's clock. Its numbers mean
nothing.
"""
import argparse
import datetime
import importlib.metadata
import json
import os
import pathlib
import subprocess
import sys
import time

ROWS = 8192
VOCABULARIES = [32000, 50257, 128256, 151936, 202048, 262144]
SMALL = [(n, v) for v in (1000, 128256) for n in (1, 8, 64)]
REHEARSAL = [(64, 1000), (64, 1031), (3, 257)]
LINEAR = [(ROWS, 4096, v) for v in (32000, 128256)]
LINEAR_REHEARSAL = [(64, 32, 1000), (64, 48, 1031)]
SMOOTHING = 0.1
CALLS = 200  # between two looks at the clock, for "…, host"
# Errors that no correct implementation has. A bf16 log-probability near 11 is off by up to 1/32, and PyTorch's eager
# backward starts from that; smoothing that is missing or of the wrong size changes most gradients by more than 0.4.
LOSS_TOLERANCE, GRAD_TOLERANCE = 1e-2, 0.15


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("time", help="times the peers")
    run.add_argument("--work", choices=["logits", "linear", "all"], default="all", help="from logits, or hidden states")
    run.add_argument("--out", type=pathlib.Path, help="the list, as JSON")
    run.add_argument("--seconds", type=float, default=270, help="starts nothing new after so long (default 270)")
    run.add_argument("--samples", type=int, default=25, help="samples of each (default 25)")
    run.add_argument("--commit", default="unknown", help="commit that the records name")
    run.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    run.add_argument("--reduced", action="store_true", help="tiny shapes")
    join = commands.add_parser("merge", help="one list from several files")
    join.add_argument("out", type=pathlib.Path)
    join.add_argument("files", type=pathlib.Path, nargs="+")
    show = commands.add_parser("table", help="prints a list")
    show.add_argument("file", type=pathlib.Path)
    args = parser.parse_args()
    if args.command == "time":
        compare(args)
    elif args.command == "merge":
        write(args.out, [record for path in args.files for record in read(path)])
    else:
        print_table(read(args.file))


# Files


def read(path):
    """Records of this script's list, or of what gpu-check wrote; none where there is no such file."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:  # a run was cut off before or while writing
        print(f"compare: nothing from {path}: {error}", file=sys.stderr)
        return []
    return content["timings"] if isinstance(content, dict) else content


def write(path, records):
    # By way of another file: a run may be cut off in the middle of writing.
    partial = path.with_name(path.name + ".partial")
    partial.write_text("[\n" + ",\n".join(json.dumps(tidy(r), ensure_ascii=False) for r in records) + "\n]\n")
    os.replace(partial, path)


def tidy(record):
    """Figures that a timing can bear, and keys without a value left out."""
    return {k: float(f"{v:.5g}") if isinstance(v, float) else v for k, v in record.items() if v is not None}


# Timing


def compare(args):
    global torch
    import torch

    torch.manual_seed(0)
    run = Run(args)
    shapes = REHEARSAL if args.reduced else [(ROWS, v) for v in VOCABULARIES] + SMALL
    linear = LINEAR_REHEARSAL if args.reduced else LINEAR
    # Compiling takes longest, so all that needs none comes first.
    plan = {
        "logits": [(Inputs, shapes, [copy, eager, liger, quack]), (Inputs, shapes, [compiled])],
        "linear": [(LinearInputs, linear, [linear_eager, linear_liger, linear_cut, linear_quack, linear_compiled])],
    }
    for make, shapes, peers in [part for work in plan if args.work in (work, "all") for part in plan[work]]:
        for shape in shapes:
            try:
                inputs = make(*shape, args.device)
            except RuntimeError as error:  # out of memory
                print(f"skipped {shape}: {error}", flush=True)
                continue
            for peer in peers:
                peer(run, inputs)
            del inputs
            run.release()
    print_table(run.records)


class Inputs:
    """Random bf16 logits, and what goes with them."""

    def __init__(self, n, v, device):
        self.n, self.v, self.device = n, v, device
        self.sizes = {"n": n, "v": v}
        self.small = n < ROWS
        self.pristine = torch.empty(n, v, dtype=torch.bfloat16, device=device)
        for part in self.pristine.split(1024):
            part.copy_(2 * torch.randn(part.shape, device=device))
        self.targets = torch.arange(n, device=device) * 31 % v
        self.smoothing = 0.2 * torch.rand(n, device=device)
        # A leaf: peers differentiate with respect to it, and some write the gradient over it.
        self.logits = self.pristine.clone().requires_grad_()
        self.facts = None

    def restore(self):
        with torch.no_grad():
            self.logits.copy_(self.pristine)

    def row_facts(self):
        """lse, mean and target's logit of each row in fp64, and the rows whose gradient is looked at."""
        if self.facts is None:
            parts = []
            for x, y in zip(self.pristine.split(256), self.targets.split(256)):
                x = x.double()
                parts.append(torch.stack([x.logsumexp(1), x.mean(1), x.gather(1, y[:, None])[:, 0]]))
            some = torch.linspace(0, self.n - 1, min(self.n, 8), device=self.device).round().long()
            self.facts = *torch.cat(parts, 1), some
        return self.facts

    def reference(self, smoothing, reduction):
        """Loss, and gradient in some rows."""
        lse, mean, x_y, some = self.row_facts()
        eps = {"none": torch.zeros_like(lse), "one value": torch.full_like(lse, SMOOTHING),
               "a value a row": self.smoothing.double()}[smoothing]
        rows = (1 - eps) * (lse - x_y) + eps * (lse - mean)
        grad = (self.pristine[some].double() - lse[some, None]).exp() - (eps[some, None] / self.v)
        grad[torch.arange(len(some), device=self.device), self.targets[some]] -= 1 - eps[some]
        if reduction == "mean":
            return rows.mean(), grad / self.n
        return rows.sum(), grad

    def errors(self, result, smoothing, reduction):
        loss, grad = result if isinstance(result, tuple) else (result, None)
        expected, expected_grad = self.reference(smoothing, reduction)
        errors = {"loss_error": ((loss.detach().double().sum() - expected) / expected).abs().item()}
        if grad is not None:
            some = self.row_facts()[-1]
            at_target = torch.zeros_like(expected_grad, dtype=torch.bool)
            at_target[torch.arange(len(some), device=some.device), self.targets[some]] = True
            got = grad.detach()[some].double()
            # The median, as it sees smoothing, which the few large gradients hide; and the targets' own.
            each = ((got - expected_grad) / expected_grad).abs()
            norm = ((got.norm() - expected_grad.norm()) / expected_grad.norm()).abs()
            parts = torch.stack([each[~at_target].median(), each[at_target].max(), norm])
            errors["grad_error"] = parts.max().item()  # NaN if any is, unlike Python's own
        return errors

    def speed(self, run, bench, has_grad, ms):
        """Of a kind with a copy's."""
        gb_per_s = (2 if has_grad else 1) * 2 * self.n * self.v / ms / 1e6
        if bench == "copy":
            run.copy_gb_per_s[self.n, self.v] = gb_per_s
        copied = run.copy_gb_per_s.get((self.n, self.v))
        return {"gb_per_s": gb_per_s, "fraction_of_copy": gb_per_s / copied if copied else None}


class LinearInputs:
    """Random bf16 hidden states and projection, whose logits have a deviation of 2, too."""

    small = False

    def __init__(self, n, d, v, device):
        self.n, self.d, self.v, self.device = n, d, v, device
        self.sizes = {"n": n, "d": d, "v": v}
        random = lambda rows, deviation: (deviation * torch.randn(rows, d, device=device)).bfloat16()
        self.hidden = random(n, 1).requires_grad_()
        self.weight = random(v, 2 / d**0.5).requires_grad_()
        self.targets = torch.arange(n, device=device) * 31 % v
        self.facts = None

    def restore(self):
        pass  # no peer writes its inputs

    def reference(self):
        """Loss, and the gradients of some hidden states and of some classes' weights, in fp64."""
        if self.facts is None:
            hidden, weight, y = self.hidden.detach().double(), self.weight.detach().double(), self.targets
            parts = []
            for h, t in zip(hidden.split(256), y.split(256)):
                z = h @ weight.T
                parts.append(torch.stack([z.logsumexp(1), z.gather(1, t[:, None])[:, 0]]))
            lse, z_y = torch.cat(parts, 1)
            rows = torch.linspace(0, self.n - 1, 8, device=self.device).round().long()
            classes = torch.cat([y[rows], torch.arange(8, device=self.device)])
            grad = (hidden[rows] @ weight.T - lse[rows, None]).exp() / self.n
            grad[torch.arange(8, device=self.device), y[rows]] -= 1 / self.n
            of_classes = ((hidden @ weight[classes].T - lse[:, None]).exp() - (y[:, None] == classes).double()) / self.n
            self.facts = (lse - z_y).mean(), (rows, grad @ weight), (classes, of_classes.T @ hidden)
        return self.facts

    def errors(self, result, smoothing, reduction):
        loss, *grads = result if isinstance(result, tuple) else (result,)
        expected, *parts = self.reference()
        errors = {"loss_error": ((loss.detach().double() - expected) / expected).abs().item()}
        if grads:
            norms = [(g[at].double() - e).norm() / e.norm() for g, (at, e) in zip(grads, parts)]
            errors["grad_error"] = torch.stack(norms).max().item()
        return errors

    def speed(self, run, bench, has_grad, ms):
        products = 3 if has_grad else 1  # logits, and the gradients of both factors
        return {"tflop_per_s": products * 2 * self.n * self.d * self.v / ms / 1e9,
                "gradient_bytes": 2 * (self.n + self.v) * self.d if has_grad else 0}


class Run:
    """Times work, and keeps the records."""

    def __init__(self, args):
        self.args, self.cuda = args, args.device == "cuda"
        self.deadline = time.monotonic() + args.seconds
        self.records = []
        self.copy_gb_per_s = {}
        self.samples, self.calls = (3, 5) if args.reduced else (args.samples, CALLS)
        self.about = {
            "commit": args.commit,
            "gpu": torch.cuda.get_device_name() if self.cuda else "none: a rehearsal on the CPU",
            "driver": driver(),
            "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        }
        l2 = getattr(torch.cuda.get_device_properties(0), "L2_cache_size", 0) if self.cuda else 1 << 16
        flush = 4 * max(l2, 64 << 20 if self.cuda else 0)
        self.flush = torch.zeros(flush // 4096, 1024, dtype=torch.float32, device=args.device)

    def evict(self):
        # Written several times over, which also keeps the device busy while the host prepares a sample's launches.
        for _ in range(8):
            self.flush.zero_()
        self.flush.sum(1)

    def synchronize(self):
        if self.cuda:
            torch.cuda.synchronize()

    def release(self):
        if self.cuda:
            torch.cuda.empty_cache()

    def peak(self, work):
        """Bytes that a call takes at most beyond what is there before it."""
        if not self.cuda:
            return None
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before

    def device_samples(self, before, work):
        samples = []
        for i in range(-3, self.samples):  # three to warm up
            before()
            self.evict()
            if self.cuda:
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                start.record()
                work()
                end.record()
                end.synchronize()
                ms = start.elapsed_time(end)
            else:
                began = time.perf_counter()
                work()
                ms = 1e3 * (time.perf_counter() - began)
            if i >= 0:
                samples.append(ms)
        return samples

    def host_samples(self, work):
        samples = []
        for _ in range(8):
            self.synchronize()
            began = time.perf_counter()
            for _ in range(self.calls):
                work()
            self.synchronize()
            samples.append(1e3 * (time.perf_counter() - began) / self.calls)
        return samples[1:]  # the first was a warm-up

    def record(self, bench, impl, inputs, **values):
        record = {"bench": bench, "impl": impl, **inputs.sizes, "dtype": "bf16", **values, **self.about}
        self.records.append(record)
        if self.args.out:
            write(self.args.out, self.records)

    def keep(self, bench, impl, inputs, has_grad, samples, **values):
        samples = sorted(samples)
        percentile = lambda percent: samples[(len(samples) - 1) * percent // 100]
        speed = inputs.speed(self, bench, has_grad, percentile(50))
        self.record(bench, impl, inputs, median_ms=percentile(50), p10_ms=percentile(10), p90_ms=percentile(90),
                    samples=len(samples), **speed, **values)
        print(f"{bench:<32}{impl:<32}{inputs.n:>6}{inputs.v:>8} {percentile(50):>9.4f} ms", flush=True)

    def skip(self, bench, impl, inputs, why):
        # Tools' messages can be pages long; the type says what happened, the first line mostly why.
        if isinstance(why, BaseException):
            first = (str(why).strip().splitlines() or [""])[0]
            why = f"{type(why).__name__}: {first[:200]}"
        print(f"{bench:<32}{impl:<32}{inputs.n:>6}{inputs.v:>8} skipped: {why}", flush=True)
        self.record(bench, impl, inputs, skipped=why)

    def work(self, bench, impl, inputs, prepare, *, package="torch", smoothing="one value", reduction="mean",
             overwrites=False, note=None):
        """Checks and times one implementation.

        prepare() imports and compiles what it needs, and returns the call to time: one that returns the loss, or the
        loss and the gradient. A loss of every row is summed."""
        if time.monotonic() > self.deadline:
            return self.skip(bench, impl, inputs, "no time left (--seconds)")
        before = inputs.restore if overwrites else lambda: None
        try:
            call = prepare()
            inputs.restore()
            errors = inputs.errors(call(), smoothing, reduction)
            has_grad = "grad_error" in errors
            if not errors["loss_error"] <= LOSS_TOLERANCE or has_grad and not errors["grad_error"] <= GRAD_TOLERANCE:
                raise ArithmeticError("wrong results: " + ", ".join(f"{k} {v:.3g}" for k, v in errors.items()))
            about = {"smoothing": smoothing, **errors, "software": version(package), "note": note,
                     "peak_bytes": self.peak(call)}
            self.keep(bench, impl, inputs, has_grad, self.device_samples(before, call), **about)
            if inputs.small:
                self.keep(f"{bench}, host", impl, inputs, has_grad, self.host_samples(call), **about)
        except Exception as error:  # whatever a peer raises; the others go on
            self.skip(bench, impl, inputs, error)
        finally:
            inputs.restore()


def driver():
    try:
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        return subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return "none"


def version(package):
    try:
        return f"{package} {importlib.metadata.version(package)}"
    except importlib.metadata.PackageNotFoundError:
        return package


# Peers


def copy(run, inputs):
    # The gradient's memory stands for any other of the logits' size.
    run.keep("copy", "torch copy_", inputs, True, run.device_samples(lambda: None, inputs.restore))
    if inputs.small:
        run.keep("copy, host", "torch copy_", inputs, True, run.host_samples(inputs.restore))


def losses(inputs):
    """PyTorch's own, and what a trainer writes to have a smoothing value a row."""
    targets, smoothing = inputs.targets, inputs.smoothing

    def one_value(x):
        return torch.nn.functional.cross_entropy(x, targets, label_smoothing=SMOOTHING)

    def a_value_a_row(x):
        log_p = torch.log_softmax(x, 1, dtype=torch.float32)
        nll = -log_p.gather(1, targets[:, None])[:, 0]
        return ((1 - smoothing) * nll - smoothing * log_p.mean(1)).mean()

    return {"one value": one_value, "a value a row": a_value_a_row}


def with_grad(loss, x):
    value = loss(x)
    return value, *torch.autograd.grad(value, x)


def eager(run, inputs):
    for smoothing, loss in losses(inputs).items():
        impl = "PyTorch" if smoothing == "one value" else "PyTorch, row smoothing"
        run.work("forward", impl, inputs, lambda: lambda: loss(inputs.pristine), smoothing=smoothing)
        run.work("loss_and_grad", impl, inputs, lambda: lambda: with_grad(loss, inputs.logits), smoothing=smoothing)


def compiled(run, inputs):
    for smoothing, loss in losses(inputs).items():
        impl = "torch.compile" if smoothing == "one value" else "torch.compile, row smoothing"

        def prepare():
            # Each shape is compiled for itself; past a few of one function, PyTorch would go on uncompiled.
            torch.compiler.reset()
            return torch.compile(loss, dynamic=False)

        def forward():
            call = prepare()
            return lambda: call(inputs.pristine)

        def both():
            call = prepare()
            return lambda: with_grad(call, inputs.logits)

        run.work("loss_and_grad", impl, inputs, both, smoothing=smoothing)
        run.work("forward", impl, inputs, forward, smoothing=smoothing)


def liger(run, inputs):
    impl, package = "Liger", "liger-kernel"

    def loss(x):
        from liger_kernel.ops.cross_entropy import LigerCrossEntropyFunction

        return LigerCrossEntropyFunction.apply(x, inputs.targets, None, -100, 0.0, SMOOTHING, "mean")[0]

    def kernel_alone():
        # The launch that the function makes, noted once and then repeated.
        from liger_kernel.ops import cross_entropy as module

        kernel, launches = module.liger_cross_entropy_kernel, []

        class Noted:
            def __getitem__(self, grid):
                return lambda *args, **named: launches.append((grid, args, named))

        module.liger_cross_entropy_kernel = Noted()
        try:
            loss(inputs.logits)
        finally:
            module.liger_cross_entropy_kernel = kernel
        [(grid, args, named)] = launches

        def launch():
            kernel[grid](*args, **named)
            return named["loss_ptr"], inputs.logits

        return launch

    run.work("loss_and_grad_inplace", impl, inputs, lambda: lambda: with_grad(loss, inputs.logits), package=package,
             overwrites=True, note="waits for the device in each call")
    run.work("loss_and_grad_inplace", "Liger, kernel alone", inputs, kernel_alone, package=package, overwrites=True)
    run.work("forward", impl, inputs, lambda: lambda: loss(inputs.pristine), package=package,
             note="waits for the device in each call")


def quack(run, inputs):
    def prepare(**how):
        def ready():
            from quack.cross_entropy import cross_entropy_fwd

            return lambda: cross_entropy_fwd(inputs.logits.detach(), inputs.targets, **how)

        return ready

    about = {"package": "quack-kernels", "smoothing": "none", "reduction": "sum"}
    run.work("loss_and_grad_inplace", "QuACK", inputs, prepare(return_dx=True, inplace_backward=True), overwrites=True,
             **about)
    run.work("loss_and_grad", "QuACK", inputs, prepare(return_dx=True), **about)
    run.work("forward", "QuACK", inputs, prepare(), **about)


def linear_both(run, impl, inputs, prepare, **about):
    """Times prepare()'s loss of hidden states and projection alone, and with the gradients of both."""

    def forward():
        loss = prepare()
        return lambda: loss(inputs.hidden.detach(), inputs.weight.detach())

    def both():
        loss = prepare()
        return lambda: with_grad(lambda x: loss(*x), (inputs.hidden, inputs.weight))

    run.work("linear forward + backward()", impl, inputs, both, smoothing="none", **about)
    run.work("linear forward", impl, inputs, forward, smoothing="none", **about)


def whole_logits(hidden, weight, targets):
    return torch.nn.functional.cross_entropy(hidden @ weight.T, targets)


def linear_eager(run, inputs):
    linear_both(run, "PyTorch", inputs, lambda: lambda h, w: whole_logits(h, w, inputs.targets))


def linear_compiled(run, inputs):
    def prepare():
        torch.compiler.reset()
        loss = torch.compile(whole_logits, dynamic=False)
        return lambda h, w: loss(h, w, inputs.targets)

    linear_both(run, "torch.compile", inputs, prepare)


def linear_liger(run, inputs):
    def prepare(accum_dtype):
        def ready():
            from liger_kernel.transformers.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyLoss

            loss = LigerFusedLinearCrossEntropyLoss(accum_dtype=accum_dtype)
            return lambda h, w: loss(w, h, inputs.targets)

        return ready

    linear_both(run, "Liger", inputs, prepare(None), package="liger-kernel")
    linear_both(run, "Liger, f32 sums", inputs, prepare(torch.float32), package="liger-kernel")


def linear_cut(run, inputs):
    def prepare(**how):
        def ready():
            from cut_cross_entropy import linear_cross_entropy

            return lambda h, w: linear_cross_entropy(h, w, inputs.targets, **how)

        return ready

    about = {"package": "cut-cross-entropy"}
    linear_both(run, "Cut Cross-Entropy", inputs, prepare(), note="leaves out blocks of small gradients, of which "
                "random logits have few", **about)
    linear_both(run, "Cut Cross-Entropy, all gradients", inputs, prepare(filter_eps=None), **about)


def linear_quack(run, inputs):
    def prepare():
        from quack.linear_cross_entropy import chunked_linear_cross_entropy

        return lambda h, w: chunked_linear_cross_entropy(h, w, inputs.targets, tuned=False)

    linear_both(run, "QuACK", inputs, prepare, package="quack-kernels", note="not tuned for the shape")


# Reading


def print_table(records):
    """Large shapes in milliseconds with the fraction of a copy's bandwidth, small ones in microseconds."""
    timed = [r for r in records if r.get("median_ms") is not None and "d" not in r]
    linear = [r for r in records if r.get("median_ms") is not None and "d" in r]
    large = [r for r in timed if r["n"] >= ROWS]
    small = [r for r in timed if r["n"] < ROWS]
    pivot(f"{ROWS} rows, bf16: ms, and useful bandwidth in % of a copy's", large, lambda r: str(r["v"]),
          lambda r: f"{r['median_ms']:.3f} {100 * (r.get('fraction_of_copy') or 0):3.0f}%")
    pivot("few rows, bf16: µs", small, lambda r: f"{r['n']}x{r['v']}", lambda r: f"{1e3 * r['median_ms']:.1f}")
    pivot("from hidden states, bf16: ms, and MiB beyond inputs and gradients", linear,
          lambda r: f"{r['n']}x{r['d']}x{r['v']}", lambda r: f"{r['median_ms']:.2f} {beyond(r):6.0f}")
    skipped = {}
    for r in records:
        if "skipped" in r:
            skipped.setdefault((r["impl"], r["skipped"]), []).append(f"{r['bench']} {r['n']}x{r['v']}")
    for (impl, why), where in skipped.items():
        print(f"skipped {impl}: {why} ({where[0]}{f' and {len(where) - 1} more' if len(where) > 1 else ''})")


def beyond(record):
    """MiB that a call from hidden states takes beyond inputs and gradients."""
    return ((record.get("peak_bytes") or float("nan")) - record.get("gradient_bytes", 0)) / 2**20


def pivot(title, records, column, cell):
    if not records:
        return
    columns = list(dict.fromkeys(column(r) for r in records))
    rows = {}
    for r in records:
        rows.setdefault((r["bench"], r["impl"]), {})[column(r)] = cell(r)
    print(f"\n{title}\n{'':<72}" + "".join(f"{c:>18}" for c in columns))
    for bench, impl in sorted(rows, key=lambda key: key[0]):
        print(f"{bench:<42}{impl:<30}" + "".join(f"{rows[bench, impl].get(c, '-'):>18}" for c in columns))


if __name__ == "__main__":
    main()
