"""`ltrain bench kernels`: our kernels beside every other one that is installed, on the same inputs in one run.

Beside each time stands the floor that it could have on this machine: the larger of the operator's matrix products at the rate of a large
product and of the bytes it cannot avoid at the rate of a copy, both measured at the start. And, since speed counts for the same function
only, how far the output and the gradients are from the reference in float64, on a short stream.
"""

import gc
import json
import math
import statistics
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ltrain.plan.hardware import device_name, measured_bandwidth, measured_flops, synchronise
from ltrain.plan.operators import Operator, Sizes, operators
from ltrain.plan.peers import PEERS, Inputs, Peer, installed_version
from ltrain.schema import ConfigError

WARM_UP = 2  # runs that are not timed: they compile and tune
SECONDS = 1.0  # after which no further run begins, when there are LEAST
LEAST = 3
COLD = 2**28  # bytes written before each run, so that no input is in a cache
CHECKED = 192  # tokens of the stream on which implementations are compared with the reference
PACKAGES = ("torch", "triton", "flash-linear-attention", "flash-qla", "mamba-ssm", "causal-conv1d", "liger-kernel")


class Machine(NamedTuple):
    """Rates of this machine, measured: flops in FLOP/s by the type of the factors, bandwidth in bytes/s, read and written together."""

    device: torch.device
    flops: float
    bandwidth: float

    @classmethod
    def measured(cls, device: torch.device, dtype: torch.dtype) -> "Machine":
        return cls(device, measured_flops(device, dtype), measured_bandwidth(device))

    def floor(self, flops: float, size: float) -> float:
        """Seconds that so many operations and bytes take at the least."""
        return max(flops / self.flops, size / self.bandwidth)


class Implementation(NamedTuple):
    name: str
    version: str
    run: Callable[[Inputs], Tensor]
    prepare: Callable[[Inputs], Inputs]
    same: bool = True


def implementations(name: str, operator: Operator, sizes: Sizes) -> list[Implementation]:
    """Ours, and the peers that are installed."""

    def called(peer: Peer) -> Callable[[Inputs], Tensor]:
        return lambda x: peer.run(x, sizes)

    ours = Implementation("ltrain", installed_version("ltrain") or "", lambda x: operator.run(x, "auto"), lambda x: x)
    found = [(peer, peer.version) for peer in PEERS.get(name, [])]
    return [ours, *(Implementation(peer.name, there, called(peer), peer.prepare, peer.same) for peer, there in found if there is not None)]


def leaves(x: Inputs, fixed: Iterable[str]) -> tuple[Inputs, list[str]]:
    """The inputs cut off from what made them, and the names of those that have a gradient now."""
    names = [name for name, tensor in x.items() if tensor.is_floating_point() and name not in fixed]
    return {name: tensor.detach().requires_grad_(name in names) for name, tensor in x.items()}, names


def elapsed(run: Callable[[], object], device: torch.device, steps: int) -> float:
    """Seconds, the median of at most `steps` runs: of the clock, or of a GPU between two events. There the runs are queued behind each other, as the
    layers of a model are: where a device waits for each run's first kernel, short ones would take as long as their launches (and still do where
    launching takes longer than all there is to compute)."""
    for _ in range(WARM_UP):
        synchronise(device)
        start = time.perf_counter()
        run()
    synchronise(device)
    if device.type != "cuda":
        times: list[float] = []
        began = time.perf_counter()
        while len(times) < steps and (len(times) < LEAST or time.perf_counter() - began < SECONDS):
            start = time.perf_counter()
            run()
            times.append(time.perf_counter() - start)
        return statistics.median(times)
    count = min(steps, max(LEAST, int(SECONDS / (time.perf_counter() - start))))
    cold = torch.empty(COLD, dtype=torch.uint8, device=device)
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(count)]
    for first, last in events:
        cold.zero_()
        first.record()
        run()
        last.record()
    synchronise(device)
    return statistics.median(first.elapsed_time(last) / 1e3 for first, last in events)


def timed(operator: Operator, one: Implementation, tokens: int, dtype: torch.dtype, machine: Machine, steps: int) -> dict[str, Any]:
    """Of one implementation on one stream: seconds, FLOP/s and shares of the floor, forwards and with the backward, and the memory beside the
    inputs at the worst moment of both."""
    device = machine.device
    given = operator.inputs(tokens, dtype, torch.Generator(device).manual_seed(0))
    size = sum(x.nbytes for x in given.values())
    with torch.no_grad():
        x, names = leaves(one.prepare(given), operator.fixed)
    del given
    plain = {name: tensor.detach() for name, tensor in x.items()}
    wanted = [x[name] for name in names]

    with torch.no_grad():
        out = one.run(plain)
        grad, out_size = torch.ones_like(out), out.nbytes
        del out
        forward = elapsed(lambda: one.run(plain), device, steps)

    def train() -> None:
        torch.autograd.grad(one.run(x), wanted, grad)

    both = elapsed(train, device, steps)
    peak = None
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        train()
        peak = torch.cuda.max_memory_allocated(device) - before
    once = operator.once(tokens)
    flops, both_flops = operator.flops(tokens) + once, operator.both * operator.flops(tokens) + once
    # inputs are read and gradients of them written once, and the inputs and the output's gradient read once more
    floors = machine.floor(flops, size + out_size), machine.floor(both_flops, 3 * size + 2 * out_size)
    return {
        "forward_seconds": forward,
        "forward_flops": flops / forward,
        "forward_floor_seconds": floors[0],
        "forward_of_floor": floors[0] / forward,
        "seconds": both,
        "flops": both_flops / both,
        "floor_seconds": floors[1],
        "of_floor": floors[1] / both,
        "peak_bytes": peak,
    }


def compared(operator: Operator, one: Implementation, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """error: the worst relative distance (in the 2-norm) of output and gradients from the reference in float64, on CHECKED tokens."""
    given, names = leaves(operator.inputs(CHECKED, dtype, torch.Generator(device).manual_seed(1)), operator.fixed)
    wide, _ = leaves({name: x.double() if x.is_floating_point() else x for name, x in given.items()}, operator.fixed)
    found: list[list[Tensor]] = []
    for x, run in ((wide, lambda x: operator.run(x, "reference")), (given, lambda x: one.run(one.prepare(x)))):
        out = run(x)
        grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64).to(out)
        found.append([out, *torch.autograd.grad(out, [x[name] for name in names], grad)])
    return {"error": max(float((got.detach().double() - true.detach()).norm() / true.detach().norm()) for true, got in zip(*found, strict=True))}


def reason(error: BaseException) -> str:
    """In one line, why an implementation did not run."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:120]


def _attempt(work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What a run finds, or why it did not: another's kernel may refuse or break in any way, and memory may run out."""
    try:
        return work()
    except Exception as failure:
        return {"reason": reason(failure)}


def _cleared(device: torch.device) -> bool:
    """Give back what the last run held. False: a kernel has broken the process's hold on the GPU, and nothing more will run."""
    if device.type == "cuda":  # a CPU's memory is not measured, and to look through all objects takes longer than a small run
        gc.collect()
        try:
            torch.cuda.synchronize(device)
            torch.cuda.empty_cache()
        except Exception:
            return False
    return True


def bench(
    names: list[str],
    tokens: list[int],
    dtype: torch.dtype,
    steps: int,
    sizes: Sizes,
    machine: Machine,
    log: Callable[[str], object] = print,
    keep: Callable[[list[dict[str, Any]]], object] = lambda results: None,
) -> list[dict[str, Any]]:
    """Every implementation of each operator of these names or families on streams of these lengths. keep: called with all results after each.

    Raises ConfigError for a name that does not exist.
    """
    known = operators(sizes)
    families = list(dict.fromkeys(operator.family for operator in known.values()))
    if wrong := [name for name in names if name not in known and name not in families]:
        raise ConfigError(f"{wrong[0]} is neither a family nor an operator: write some of {','.join(families)}, or of {','.join(known)}")
    # so that a window and a selection matter to the check
    short = sizes._replace(window=min(sizes.window, CHECKED // 3), selected=min(sizes.selected, CHECKED // 3))
    checked = operators(short)
    results: list[dict[str, Any]] = []
    log(HEAD)
    for name, operator in known.items():
        if names and name not in names and operator.family not in names:
            continue
        for one, same in zip(implementations(name, operator, sizes), implementations(name, checked[name], short), strict=True):
            about = {"operator": name, "family": operator.family, "implementation": one.name, "version": one.version}
            rows = []
            # the longest first: what tunes itself does so on its first stream
            for n in sorted(tokens, reverse=True):
                rows.append({**about, "tokens": n, **_attempt(partial(timed, operator, one, n, dtype, machine, steps))})
                working = _cleared(machine.device)
            far = _attempt(partial(compared, checked[name], same, dtype, machine.device)) if one.same else {"reason": "another function"}
            for row in reversed(rows):
                results.append({**far, **row})
                log(line(results[-1]))
            keep(results)
            if not (working and _cleared(machine.device)):
                log(f"the GPU does not answer any more after {one.name}: nothing further is measured")
                return results
    return results


HEAD = (
    f"{'operator':15} {'tokens':>7} {'implementation':26} {'fwd ms':>9} {'TFLOP/s':>8} {'floor':>6} {'f+b ms':>9} {'TFLOP/s':>8} {'floor':>6} "
    f"{'MiB':>8} {'error':>8}"
)


def line(r: dict[str, Any]) -> str:
    """Of the table: times, FLOP/s, shares of the floor, memory and error of one implementation on one stream, or why there are none."""
    start = f"{r['operator']:15} {r['tokens']:7} {(r['implementation'] + ' ' + r['version']).strip():26}"
    if "seconds" not in r:
        return f"{start} {r['reason']}"
    cells = [
        f"{r[f'{part}seconds'] * 1e3:9.3f} {r[f'{part}flops'] / 1e12:8.3f} {r[f'{part}of_floor']:6.1%}"  # of the forward, and of both
        for part in ("forward_", "")
    ]
    memory = "" if r["peak_bytes"] is None else f"{r['peak_bytes'] / 2**20:.0f}"
    return f"{start} {cells[0]} {cells[1]} {memory:>8} " + (f"{r['error']:8.1e}" if "error" in r else r["reason"])


def table(results: list[dict[str, Any]]) -> str:
    return "\n".join([HEAD, *map(line, results)])


def draw(results: list[dict[str, Any]], title: str, path: Path) -> None:
    """For each operator its milliseconds forwards and backwards over the tokens, a line for each implementation, and the floor."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    by_operator: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for r in results:
        if "seconds" in r:
            by_operator.setdefault(r["operator"], {}).setdefault(r["implementation"], []).append(r)
    columns = min(3, max(1, len(by_operator)))
    rows = max(1, math.ceil(len(by_operator) / columns))
    figure = Figure(figsize=(4.5 * columns, 3.4 * rows), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=9)
    panels = figure.subplots(rows, columns, squeeze=False).flatten()
    for axes, (operator, lines) in zip(panels, by_operator.items(), strict=False):
        for name, points in lines.items():
            axes.plot([r["tokens"] for r in points], [r["seconds"] * 1e3 for r in points], marker="o", markersize=3, linewidth=1.2, label=name)
        longest = max(lines.values(), key=len)
        axes.plot([r["tokens"] for r in longest], [r["floor_seconds"] * 1e3 for r in longest], color="grey", linestyle="--", label="floor")
        axes.set(xscale="log", yscale="log", title=operator, xlabel="tokens", ylabel="forward and backward, ms")
        axes.set_xscale("log", base=2)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7)
    for axes in panels[len(by_operator) :]:
        axes.set_axis_off()
    figure.savefig(path)


def main(names: list[str], tokens: list[int], dtype: torch.dtype, steps: int, sizes: Sizes, out: Path) -> list[dict[str, Any]]:
    """Measure, print, and write bench-kernels.json and .png into the folder."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    machine = Machine.measured(device, dtype)
    synchronise(device)
    kind = str(dtype).removeprefix("torch.")
    print(f"{device_name(device)}: {kind} products at {machine.flops / 1e12:.2f} TFLOP/s, copies at {machine.bandwidth / 1e9:.1f} GB/s", flush=True)
    packages = {package: installed_version(package) for package in PACKAGES}  # None: not there
    if missing := [package for package, there in packages.items() if there is None]:
        print(f"not installed: {', '.join(missing)}")
    out.mkdir(parents=True, exist_ok=True)
    about = {
        "device": device_name(device),
        "packages": packages,
        "dtype": kind,
        "sizes": sizes._asdict(),
        "measured_flops": machine.flops,
        "measured_bytes_per_second": machine.bandwidth,
        "checked_tokens": CHECKED,
    }

    def keep(results: list[dict[str, Any]]) -> None:  # so that a run that is cut short keeps what it has measured
        (out / "bench-kernels.json").write_text(json.dumps({**about, "results": results}, indent=2) + "\n")

    results = bench(names, tokens, dtype, steps, sizes, machine, lambda text: print(text, flush=True), keep)
    draw(results, f"{device_name(device)}, {kind}", out / "bench-kernels.png")
    print(f"written to {out / 'bench-kernels.json'} and .png")
    return results
