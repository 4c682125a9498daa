"""`ltrain bench context-parallel --simulate`: what a hybrid would gain from more ranks than there are.

Each kind of layer runs on this device as single ranks of the larger layout would run it, with the plans, kernels and order of messages of
those ranks; the messages themselves are written down and set on a network of stated speed (`ltrain.parallel.context.trace`).
"""

import json
import statistics
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ltrain.config import Config, load
from ltrain.model.block import Block
from ltrain.model.layers import LocalLayers, seed_parameters
from ltrain.model.sequence import Sequence
from ltrain.parallel.context.exchange import ContextExchange
from ltrain.parallel.context.layout import ContextLayout
from ltrain.parallel.context.trace import FREE, Network, Recorder, Trace, moment, replay
from ltrain.parallel.mesh import Mesh
from ltrain.pattern import resolve_layers
from ltrain.plan.context_parallel import WARM_UP, Inputs, Sizes, as_leaves, both, inputs, lengths, operators, timed, timed_alone
from ltrain.plan.hardware import device_name, synchronise
from ltrain.schema import ConfigError, divides_heads

TRACED = 8  # ranks, up to which all are traced
HYBRID = ["kda", "kda", "kda", "attention"]


@dataclass(frozen=True)
class Layer:
    """One kind of layer of the hybrid. shapes: of the inputs of each token; whole: of those that all tokens have in common."""

    name: str
    count: int
    shapes: Mapping[str, tuple[int, ...]]
    whole: Mapping[str, tuple[int, ...]]
    run: Callable[[Inputs, Sequence], Tensor]
    quadratic: bool  # a token costs more, the more there are before it
    heads: list[tuple[int, int]]  # of each softmax attention its heads and K/V heads, which `parallel.ulysses` divides
    weights: tuple[Tensor, ...] = ()


@dataclass(frozen=True)
class Cut:
    """How streams are cut over ranks that need not be there."""

    kind: str = "zigzag"
    ulysses: int = 1
    inner_ring: int = 1

    def layout(self, tokens: int, size: int, rank: int = 0) -> ContextLayout:
        """Raises ConfigError where ranks, tokens and groups do not divide."""
        if size % (self.ulysses * self.inner_ring):
            raise ConfigError(f"--ranks {size} do not divide into groups of {self.ulysses * self.inner_ring}: write a multiple")
        try:
            return ContextLayout(tokens, rank, size, self.kind)
        except ValueError as error:
            raise ConfigError(f"--ranks {size} and --tokens {tokens}: {error}") from error


def layers_of_operators(names: list[str], sizes: Sizes) -> list[Layer]:
    """Operators by name, one for each layer of the hybrid: what mixes along the stream and nothing else."""
    known = operators(sizes)
    if wrong := [name for name in names if name not in known]:
        raise ConfigError(f"--operators {wrong[0]} is not known: write some of {','.join(known)}")
    found = []
    for name, count in Counter(names).items():
        o = known[name]
        found.append(Layer(name, count, o.shapes, o.whole, o.run, o.need.everything, [] if o.heads is None else [(o.heads.heads, o.heads.kv_heads)]))
    return found


def layers_of_config(config: Config, dtype: torch.dtype, device: torch.device) -> list[Layer]:
    """The blocks of a config, norms, projections and feed-forward included, equal ones counted.

    Raises ConfigError for blocks that cannot be timed by themselves, and for mixers that do not go over context ranks.
    """
    model = config.model
    specs = resolve_layers(model)
    if model.streams.count > 1 or any(spec.block.shared for spec in specs):
        raise ConfigError("blocks with several residual streams, or that use shared ones, are not simulated: write --operators in place of --config")
    for spec in specs:
        if why := spec.options.refuses().get("context"):
            raise ConfigError(f"model.layers.{spec.kind} does not go over context ranks: {why}")
        if spec.options.takes()[0]:
            raise ConfigError(f"model.layers.{spec.kind} needs what an earlier layer leaves and is not simulated by itself: write --operators")
    different = [spec for i, spec in enumerate(specs) if spec not in specs[:i]]
    names = Counter(spec.kind for spec in different)
    found = []
    for spec in different:
        block = Block(model.hidden, spec, LocalLayers.of(model, device, dtype).at(0), config.train.recompute)
        seed_parameters(block, config.seed)

        def run(x: Inputs, seq: Sequence, block: Block = block) -> Tensor:
            y: Tensor = block(x["x"], seq)
            return y

        few, many = (0.0 if block.mixer is None else block.mixer.flops(1024, context) for context in (1 << 16, 1 << 20))
        name = spec.kind if names[spec.kind] == 1 else f"{spec.kind} {specs.index(spec)}"
        heads = [] if block.mixer is None else list(spec.options.softmax_heads().values())
        weights = tuple(parameter for parameter in block.parameters() if parameter.requires_grad)
        found.append(Layer(name, specs.count(spec), {"x": (model.hidden,)}, {}, run, many > 1.01 * few, heads, weights))
    return found


def traced_ranks(layout: ContextLayout, cu_seqlens: Tensor) -> list[int]:
    """All of a few ranks; of more the first, middle and last one, the one with most attention to do and the one that looks back farthest."""
    if layout.size <= TRACED:
        return list(range(layout.size))
    work, spans = layout.work(cu_seqlens), layout.plan(cu_seqlens).spans
    farthest = max(spans, key=lambda span: 0 if span.head is None else span.head.start - span.head.begin)
    return sorted({0, layout.size // 2, layout.size - 1, work.index(max(work)), farthest.rank})


def record(
    layer: Layer,
    layout: ContextLayout,
    cut: Cut,
    documents: list[int],
    dtype: torch.dtype,
    device: torch.device,
    steps: int,
    now: Callable[[], Any] | None = None,
) -> Trace:
    """A forward and a backward of one rank's share; of each stretch of computing the median of `steps` runs. now: another clock."""
    recorder = Recorder(layout.rank, now or partial(moment, device))
    exchange = ContextExchange.recorded(layout, recorder, cut.ulysses, cut.inner_ring)
    whole = Sequence.of(documents, device)
    leaves = as_leaves(inputs(layer.shapes, layer.whole, layout.local_tokens, dtype, device))
    traces = []
    for n in range(WARM_UP + steps):
        seq = exchange.sequence(whole.cu_seqlens, whole.positions)
        synchronise(device)
        recorder.begin()
        both(layer.run, leaves, seq, layer.weights)
        recorder.end()
        synchronise(device)
        if n >= WARM_UP:
            traces.append(recorder.trace())
    first = traces[0]
    events = [
        event._replace(computed=statistics.median(run[i].computed for run in [t.events for t in traces])) for i, event in enumerate(first.events)
    ]
    return first._replace(events=events)


def _alone(layer: Layer, documents: list[int], dtype: torch.dtype, steps: int, mesh: Mesh) -> float:
    whole = Sequence.of(documents, mesh.device)
    leaves = as_leaves(inputs(layer.shapes, layer.whole, sum(documents), dtype, mesh.device))
    return timed_alone(layer.run, leaves, whole, steps, mesh, layer.weights)


def extrapolated(layer: Layer, seconds: dict[int, float], documents: list[int]) -> float:
    """seconds: of two lengths, each of one document -> of these documents: a tokens + b tokens^2 of each, with b only where the cost grows so."""
    (short, few), (long, many) = sorted(seconds.items())
    b = max((many / long - few / short) / (long - short), 0.0) if layer.quadratic else 0.0
    return sum((many / long - b * long) * n + b * n**2 for n in documents)


def one_rank(layer: Layer, documents: list[int], most: int, dtype: torch.dtype, steps: int, mesh: Mesh) -> float:
    """Seconds of all the documents on one rank; from shorter streams where they have more than `most` tokens."""
    if sum(documents) <= most:
        return _alone(layer, documents, dtype, steps, mesh)
    return extrapolated(layer, {n: _alone(layer, [n], dtype, steps, mesh) for n in (most // 4, most)}, documents)


def traces_of(layer: Layer, layout: ContextLayout, cut: Cut, documents: list[int], dtype: torch.dtype, steps: int, mesh: Mesh) -> list[Trace]:
    """The ranks that are here trace those of the layout in turn."""
    cu_seqlens = Sequence.of(documents).cu_seqlens
    ranks = traced_ranks(layout, cu_seqlens)[mesh.rank :: mesh.size]
    mine = [record(layer, replace(layout, rank=rank).of(cu_seqlens), cut, documents, dtype, mesh.device, steps) for rank in ranks]
    return sorted((trace for traces in mesh.all_gather_object(mine) for trace in traces), key=lambda trace: trace.rank)


def expected(traces: list[Trace], network: Network) -> dict[str, Any]:
    """Of one layer, forward and backward."""
    seconds, computing = max(replay(traces, network)), max(replay(traces, FREE))
    busiest = max(traces, key=lambda trace: sum(trace.bytes.values()))
    return {
        "seconds": seconds,
        "seconds_of_computing": computing,  # of the slowest rank, and of those that wait for it
        "seconds_exposed": seconds - computing,
        "bytes_sent_by_a_rank": sum(busiest.bytes.values()),
        "bytes_by_kind": busiest.bytes,
        "traced_ranks": [trace.rank for trace in traces],
    }


def together(layer: Layer, layout: ContextLayout, documents: list[int], dtype: torch.dtype, steps: int, mesh: Mesh) -> float:
    """Seconds on the ranks that are here, measured."""
    group = mesh.exchange if mesh.size > 1 else None
    exchange = ContextExchange(layout, group, ulysses=mesh.ulysses, nodes=mesh.nodes)
    whole = Sequence.of(documents, mesh.device)
    leaves = as_leaves(inputs(layer.shapes, layer.whole, layout.local_tokens, dtype, mesh.device))
    return timed(lambda: both(layer.run, leaves, exchange.sequence(whole.cu_seqlens, whole.positions), layer.weights), steps, mesh)


def total(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """All layers of the hybrid, one after the other."""
    first = rows[0]
    keys = ("seconds_on_one_rank", "seconds", "seconds_of_computing", "seconds_exposed", "bytes_sent_by_a_rank", "seconds_measured")
    sums = {key: sum(row["layers"] * row[key] for row in rows) for key in keys if key in first}
    named = {"stream": first["stream"], "tokens": first["tokens"], "ranks": first["ranks"], "layer": "all layers"}
    return with_efficiency({**named, "layers": sum(row["layers"] for row in rows), **sums})


def with_efficiency(row: dict[str, Any]) -> dict[str, Any]:
    found = {**row, "efficiency": row["seconds_on_one_rank"] / row["seconds"] / row["ranks"]}
    if "seconds_measured" in row:
        found["efficiency_measured"] = row["seconds_on_one_rank"] / row["seconds_measured"] / row["ranks"]
        found["predicted_over_measured"] = row["seconds"] / row["seconds_measured"]
    return found


def check(layers: list[Layer], cut: Cut, sizes: list[int], tokens: list[int], most: int, here: int = 1) -> None:
    """Raises ConfigError for what does not divide, and for a longest stream that leaves a rank of those that are here nothing."""
    for size in sizes:
        for n in tokens:
            cut.layout(n, size)
    if most < max(8, 2 * here):
        raise ConfigError(f"--longest {most} is too short to be timed: write at least {max(8, 2 * here)} tokens")
    for layer in layers:
        for heads, kv_heads in layer.heads:
            if not divides_heads(heads, kv_heads, cut.ulysses):
                raise ConfigError(f"--ulysses {cut.ulysses} does not divide the {heads} heads and {kv_heads} K/V heads of {layer.name}")


def simulate(
    layers: list[Layer],
    streams: list[str],
    tokens: list[int],
    sizes: list[int],
    cut: Cut,
    network: Network,
    most: int,
    dtype: torch.dtype,
    steps: int,
    mesh: Mesh,
) -> list[dict[str, Any]]:
    """A row for each layer, stream and number of ranks, and one for all layers together; every rank calls and has the same result.

    most: tokens of the longest stream that one rank is timed on. Where several ranks are here, they are also measured on a stream of at
    most so many tokens, beside what the traces say of them, if they divide into the groups of the cut.
    """
    check(layers, cut, sizes, tokens, most, mesh.size)
    results: list[dict[str, Any]] = []

    def add(stream: str, n: int, size: int, rows: list[dict[str, Any]]) -> None:
        for row in [*rows, *([total(rows)] if len(rows) > 1 or rows[0]["layers"] > 1 else [])]:
            results.append(row)
            if mesh.rank == 0:
                print(table(results[-1:], head=len(results) == 1), flush=True)

    for stream in streams:
        for n in tokens:
            documents = lengths(stream, n)
            alone = {layer.name: one_rank(layer, documents, most, dtype, steps, mesh) for layer in layers}
            if mesh.size > 1 and mesh.size % (cut.ulysses * cut.inner_ring) == 0:
                short = min(n, most // (2 * mesh.size) * 2 * mesh.size)
                few, layout = lengths(stream, short), cut.layout(short, mesh.size, mesh.rank)
                rows = []
                for layer in layers:
                    one = alone[layer.name] if short == n else one_rank(layer, few, most, dtype, steps, mesh)
                    traces = traces_of(layer, layout, cut, few, dtype, steps, mesh)
                    row = {"stream": stream, "tokens": short, "ranks": mesh.size, "layer": layer.name, "layers": layer.count}
                    measured = together(layer, layout, few, dtype, steps, mesh)
                    rows.append(with_efficiency({**row, "seconds_on_one_rank": one, **expected(traces, network), "seconds_measured": measured}))
                add(stream, short, mesh.size, rows)
            for size in sizes:
                layout, rows = cut.layout(n, size), []
                for layer in layers:
                    traces = traces_of(layer, layout, cut, documents, dtype, steps, mesh)
                    row = {"stream": stream, "tokens": n, "ranks": size, "layer": layer.name, "layers": layer.count}
                    rows.append(with_efficiency({**row, "seconds_on_one_rank": alone[layer.name], **expected(traces, network)}))
                add(stream, n, size, rows)
    return results


def assumptions(network: Network, cut: Cut, most: int, blocks: bool, device: torch.device) -> list[str]:
    """What the numbers rest on, in words."""
    inside, across = network.inside / 1e9, network.across / 1e9
    included = (
        "whole blocks of the config with all experts on each device, without exchange of experts, embedding, loss, optimiser and data parallelism"
        if blocks
        else "what mixes along the stream; projections and feed-forwards, which need no exchange, would raise the efficiency"
    )
    return [
        f"Computing: each layer's share ran forward and backward on {device_name(device)} as that rank runs it, while messages arrived at once.",
        f"Of more than {TRACED} ranks few were traced: the first, middle and last, the one with most attention and the one that looks back farthest.",
        f"Network: {inside:g} GB/s each way for a device inside nodes of {network.per_node}, {across:g} GB/s across them, "
        f"{network.latency * 1e6:g} microseconds for each batch of messages. Neighbouring context ranks are on one node. Nobody else uses the links.",
        "Overlap: as the exchanges do it, from where a batch is posted to where it is waited for. It begins when the traced ranks that have one like "
        "it have posted it, and lasts as long as the busiest of them needs. Batches of a group follow each other. Computing is no slower meanwhile.",
        "All ranks meet behind each layer: it takes as long as its slowest rank.",
        f"One rank: measured up to {most} tokens; longer streams as a tokens, for attention + b tokens^2, through {most // 4} and {most} tokens.",
        f"In it: {included}.",
        f"Layout: {cut.kind}, ulysses {cut.ulysses}, inner_ring {cut.inner_ring}; messages in the type of the activations.",
    ]


def table(rows: list[dict[str, Any]], head: bool = True) -> str:
    names = f"{'layer':18} {'layers':>6} {'stream':>6} {'tokens':>8} {'ranks':>5} {'1 rank ms':>11} {'ms':>10} {'computing':>10} {'exposed':>9}"
    lines = [f"{names} {'sent MB':>9} {'efficiency':>10} {'measured':>18}"] if head else []
    for r in rows:
        ms = [r[key] * 1e3 for key in ("seconds_on_one_rank", "seconds", "seconds_of_computing", "seconds_exposed")]
        line = (
            f"{r['layer']:18} {r['layers']:6} {r['stream']:>6} {r['tokens']:8} {r['ranks']:5} {ms[0]:11.2f} {ms[1]:10.2f} {ms[2]:10.2f} {ms[3]:9.2f}"
        )
        off = f"{r['seconds_measured'] * 1e3:10.2f} {r['predicted_over_measured'] - 1:+7.1%}" if "seconds_measured" in r else ""
        lines.append(f"{line} {r['bytes_sent_by_a_rank'] / 1e6:9.2f} {r['efficiency']:10.1%} {off:>18}")
    return "\n".join(lines)


def write(results: list[dict[str, Any]], said: list[str], about: dict[str, Any], out: Path) -> None:
    """simulate-context-parallel.json in the folder; the assumptions are printed too."""
    out.mkdir(parents=True, exist_ok=True)
    path = out / "simulate-context-parallel.json"
    path.write_text(json.dumps({**about, "assumptions": said, "results": results}, indent=2) + "\n")
    print("\n".join(["assumptions:", *(f"- {line}" for line in said), f"written to {path}"]))


def main(args: Any, sizes: Sizes, dtype: torch.dtype, mesh: Mesh) -> None:
    """args: of the command line."""
    cut = Cut(args.layout, args.ulysses, args.inner_ring)
    network = Network(args.inside * 1e9, args.across * 1e9, args.per_node, args.latency * 1e-6)
    if args.config is None:
        layers = layers_of_operators(args.operators or HYBRID, sizes)
    else:
        layers = layers_of_config(load(args.config, []), dtype, mesh.device)
    results = simulate(layers, args.documents, args.tokens or [1 << 20], args.ranks, cut, network, args.longest, dtype, args.steps, mesh)
    if mesh.rank == 0:
        hybrid = {layer.name: layer.count for layer in layers}
        about = {"device": device_name(mesh.device), "torch": torch.__version__, "dtype": str(dtype).removeprefix("torch."), "hybrid": hybrid}
        about |= {"sizes": sizes._asdict()} if args.config is None else {"config": args.config}
        said = assumptions(network, cut, args.longest, args.config is not None, mesh.device)
        write(results, said, {**about, "network": network._asdict()}, Path(args.out))
