"""`ltrain bench context-parallel`: what it costs to cut documents over ranks, for each kind of mixing along the stream.

Every operator runs forward and backward on one rank and on all of them, on the same stream; then again with messages that arrive at
once and say nothing, which leaves the time of computing. The bytes that were sent are counted, and beside them stands what the documents
and the operator's reach say must travel.
"""

import json
import math
import random
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ltrain.kernels.attention import FULL, Mask
from ltrain.kernels.recurrence import Elementwise, GeneralisedDelta, Linear, Selective
from ltrain.kernels.sparse_attention import select
from ltrain.kernels.sparse_attention.block_means import block_attention
from ltrain.kernels.sparse_attention.latent import latent_attention
from ltrain.model.mixers.base import ExchangeNeed
from ltrain.model.sequence import Latent, LocalExchange, Sequence
from ltrain.parallel.context.balance import CAUSAL, FLAT, Cost
from ltrain.parallel.context.exchange import ContextExchange
from ltrain.parallel.context.layout import ContextLayout
from ltrain.parallel.context.needs import sent_bytes
from ltrain.parallel.context.peers import PEERS, Place, Shape, rounded
from ltrain.parallel.context.ulysses import layout_over_groups
from ltrain.parallel.mesh import Mesh
from ltrain.plan.hardware import device_name, synchronise
from ltrain.schema import ConfigError, divides_heads

Inputs = dict[str, Tensor]
DOCUMENTS = ("one", "long", "short")
WARM_UP = 2  # rounds that are not timed: the first compiles, the second tells how many calls a round is to have
ROUND = 0.1  # seconds that a round of calls is to take on a GPU,
CALLS = 8  # and so many calls at most


class Sizes(NamedTuple):
    heads: int = 16
    kv_heads: int = 4
    head_dim: int = 128
    window: int = 4096
    latent: int = 512
    rope: int = 64
    states: int = 16
    selected: int = 2048  # keys that an indexer gives each query; four blocks of MoBA


class Heads(NamedTuple):
    """Of softmax attention: what `parallel.ulysses` divides."""

    heads: int
    kv_heads: int
    key_dim: int
    value_dim: int


@dataclass(frozen=True)
class Operator:
    """shapes: of the inputs of each token; whole: of those that all tokens have in common. Both are drawn from a normal distribution.

    heads: of softmax attention, else None. elsewhere: numbers of a token that other context parallelism moves, keys and values, or of a recurrence
    what goes in and out, from tokens to heads and back; None: there is none to be named.
    """

    shapes: Mapping[str, tuple[int, ...]]
    run: Callable[[Inputs, Sequence], Tensor]
    need: ExchangeNeed  # in a forward
    whole: Mapping[str, tuple[int, ...]]
    heads: Heads | None = None
    elsewhere: int | None = None

    def bytes_elsewhere(self, tokens: int, ranks: int, itemsize: int) -> int | None:
        """What all ranks together send in a forward of Transformer Engine's and ring-flash-attention's rings, in which all keys and values go to all
        ranks whatever documents and masks are, latents as what they become; or in Megatron-LM's all-to-all over heads."""
        if self.elsewhere is None:
            return None
        moved = tokens * self.elsewhere * (ranks - 1) * itemsize
        return moved if self.heads else moved // ranks


def operators(s: Sizes) -> dict[str, Operator]:
    """By name, in the sizes asked for."""
    qkv = {"q": (s.heads, s.head_dim), "k": (s.kv_heads, s.head_dim), "v": (s.kv_heads, s.head_dim)}
    grouped = 2 * s.kv_heads * s.head_dim

    channels = s.heads * s.head_dim

    def in_and_out(shapes: Mapping[str, tuple[int, ...]]) -> int:
        return sum(math.prod(shape) for shape in shapes.values()) + channels

    def attention(mask: Mask) -> Operator:
        def run(x: Inputs, seq: Sequence) -> Tensor:
            return seq.exchange.attention(x["q"], x["k"], x["v"], seq, scale=s.head_dim**-0.5, mask=mask)

        return Operator(qkv, run, ExchangeNeed("ring", grouped, mask), {}, Heads(s.heads, s.kv_heads, s.head_dim, s.head_dim), grouped)

    def expand(rows: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        latent, key = rows.split((s.latent, s.rope), dim=-1)
        k, v = (latent @ weight.T).unflatten(-1, (s.heads, -1)).chunk(2, dim=-1)
        return torch.cat((k, key.unsqueeze(1).expand(-1, s.heads, -1)), dim=-1), v

    def mla(x: Inputs, seq: Sequence) -> Tensor:
        k, v = expand(x["rows"], x["weight"])
        latent = Latent(s.latent + s.rope, lambda: x["rows"], x["weight"], expand)
        return seq.exchange.attention(x["q"], k, v, seq, scale=(s.head_dim + s.rope) ** -0.5, latent=latent)

    def linear(decay: str, delta: bool) -> Operator:
        decays = {"head": (s.heads,), "channel": (s.heads, s.head_dim)}.get(decay, ())
        shapes = (
            dict.fromkeys(("q", "k", "v"), (s.heads, s.head_dim)) | ({"decay": decays} if decays else {}) | ({"beta": (s.heads,)} if delta else {})
        )
        state = s.heads * s.head_dim**2
        size = state if delta else int(np.prod(decays)) if decays else 0

        def run(x: Inputs, seq: Sequence) -> Tensor:
            log_decay = F.logsigmoid(x["decay"].float()) / 16 if decays else None
            constant = None
            if decay == "constant":
                constant = -(2 ** (-8 * torch.arange(1, s.heads + 1, device=x["q"].device, dtype=torch.float32) / s.heads))
                log_decay = constant.expand(len(x["q"]), -1)
            k = F.normalize(x["k"], dim=-1)
            beta = x["beta"].float().sigmoid() if delta else None
            return seq.exchange.recurrence(Linear(x["q"], k, x["v"], log_decay, beta, s.head_dim**-0.5, constant), seq)

        return Operator(shapes, run, ExchangeNeed("scan", state, map=size), {}, elsewhere=in_and_out(shapes))

    def generalised(x: Inputs, seq: Sequence) -> Tensor:
        c = F.normalize(x["c"].float(), dim=-1)
        return seq.exchange.recurrence(
            GeneralisedDelta(x["r"], -0.6 * x["w"].float().sigmoid(), x["k"], x["v"], c * x["b"].float().sigmoid(), c), seq
        )

    def dsa(x: Inputs, seq: Sequence) -> Tensor:
        latent, key = seq.exchange.gather(torch.cat((x["rows"], x["ik"]), dim=-1), seq).split((s.latent + s.rope, s.head_dim), dim=-1)
        indices = select(x["iq"], key.contiguous(), x["iw"], seq.exchange.parts(seq), min(s.selected, int(seq.cu_seqlens.diff().max())))
        return latent_attention(x["q"], latent.contiguous(), indices, width=s.latent, scale=(s.head_dim + s.rope) ** -0.5)[0]

    def moba(x: Inputs, seq: Sequence) -> Tensor:
        k, v = seq.exchange.gather(torch.cat((x["k"], x["v"]), dim=-1).flatten(1), seq).unflatten(-1, (s.heads, -1)).chunk(2, dim=-1)
        block = max(s.selected // 4, 1)
        return block_attention(x["q"], k.contiguous(), v.contiguous(), seq.exchange.parts(seq), scale=s.head_dim**-0.5, block=block, top=8)

    def layer(inner: Operator) -> Operator:
        """With its projections: a product to each of its inputs, and one from what comes out."""
        whole = {name: (math.prod(shape), channels) for name, shape in inner.shapes.items()} | {"out": (channels, channels)}

        def run(x: Inputs, seq: Sequence) -> Tensor:
            weights = {name: x[name] * channels**-0.5 for name in whole}
            mixed = inner.run({name: (x["x"] @ weights[name].T).unflatten(-1, shape) for name, shape in inner.shapes.items()}, seq)
            return mixed.flatten(1) @ weights["out"].T

        return replace(inner, shapes={"x": (channels,)}, run=run, whole=whole)

    def selective(x: Inputs, seq: Sequence) -> Tensor:
        return seq.exchange.recurrence(Selective(x["x"], F.softplus(x["step"].float()), x["rate"].float().exp(), x["B"], x["C"]), seq)

    def elementwise(x: Inputs, seq: Sequence) -> Tensor:
        return seq.exchange.recurrence(Elementwise(x["a"].float().sigmoid(), x["b"].float()), seq)

    return {
        "attention": attention(FULL),
        "window": attention(Mask(window=s.window)),
        "mla": Operator(
            {"q": (s.heads, s.head_dim + s.rope), "rows": (s.latent + s.rope,)},
            mla,
            ExchangeNeed("ring", min(s.latent + s.rope, s.heads * (2 * s.head_dim + s.rope))),
            {"weight": (2 * channels, s.latent)},
            Heads(s.heads, s.heads, s.head_dim + s.rope, s.head_dim),
            s.heads * (2 * s.head_dim + s.rope),
        ),
        "dsa": Operator(
            {"q": (s.heads, s.latent + s.rope), "rows": (s.latent + s.rope,), "iq": (s.heads, s.head_dim), "ik": (s.head_dim,), "iw": (s.heads,)},
            dsa,
            ExchangeNeed("gather", s.latent + s.rope + s.head_dim),
            {},
        ),
        "moba": Operator(dict.fromkeys(("q", "k", "v"), (s.heads, s.head_dim)), moba, ExchangeNeed("gather", 2 * channels), {}),
        "linear_attention": linear("none", False),
        "lightning": linear("constant", False),
        "mamba2": linear("head", False),
        "gla": linear("channel", False),
        "delta_net": linear("none", True),
        "gated_delta_net": linear("head", True),
        "kda": linear("channel", True),
        **{f"{name}_layer": layer(linear(decay, True)) for name, decay in (("delta_net", "none"), ("gated_delta_net", "head"), ("kda", "channel"))},
        "rwkv7": Operator(
            dict.fromkeys(("r", "w", "k", "v", "b", "c"), (s.heads, s.head_dim)),
            generalised,
            ExchangeNeed("scan", s.heads * s.head_dim**2, map=s.heads * s.head_dim**2),
            {},
            elsewhere=7 * channels,
        ),
        "mamba": Operator(
            {"x": (channels,), "step": (channels,), "B": (s.states,), "C": (s.states,)},
            selective,
            ExchangeNeed("scan", channels * s.states, map=channels * s.states),
            {"rate": (channels, s.states)},
            elsewhere=3 * channels + 2 * s.states,
        ),
        "rg_lru": Operator(
            {"a": (channels,), "b": (channels,)}, elementwise, ExchangeNeed("scan", channels, map=channels), {}, elsewhere=3 * channels
        ),
        "short_conv": Operator(
            {"x": (channels,)},
            lambda x, seq: seq.exchange.short_conv(x["x"], x["weight"], seq),
            ExchangeNeed("halo", channels, reach=3),
            {"weight": (channels, 4)},
        ),
    }


def lengths(documents: str, tokens: int) -> list[int]:
    """One document; ten, the longest of at most 0.46 of the tokens; or many of 256 to 8192 tokens. The same for everybody."""
    if documents == "one":
        return [tokens]
    rng = random.Random(0)
    found: list[int] = []
    if documents == "long":
        cuts = sorted(rng.sample(range(1, tokens), 9))
        while max(b - a for a, b in zip([0, *cuts], [*cuts, tokens], strict=True)) > 0.46 * tokens:
            cuts = sorted(rng.sample(range(1, tokens), 9))
        return [b - a for a, b in zip([0, *cuts], [*cuts, tokens], strict=True)]
    while sum(found) < tokens:
        found.append(min(tokens - sum(found), round(256 * 32 ** rng.random())))
    return found


def cost_of(need: ExchangeNeed, longest: int) -> Cost:
    """What documents cost an operator, by which `balanced` cuts them: attention the keys that it sees, of which a sparse one goes over all for its
    choice; what goes along the stream the tokens."""
    if need.kind in ("scan", "halo"):
        return FLAT
    window = need.mask.window
    return Cost.of(lambda n: min(n, window) * (min(n, window) + 1) / 2 + max(n - window, 0) * window, longest) if window else CAUSAL


def expected_of_attention(
    heads: Heads, need: ExchangeNeed, layout: ContextLayout, documents: list[int], itemsize: int, ulysses: int
) -> tuple[int, int]:
    """What all ranks together must send in a forward and in a backward of softmax attention; layout: of this stream.

    Members of a group swap all but their own share of q, k, v and the output, K/V heads repeated where there are fewer than members, and
    the gradients back. Between groups the ring carries keys and values of the joined spans, or latents. Its backward carries them again, and
    their gradients.
    """
    kv_width = heads.kv_heads * (heads.key_dim + heads.value_dim)
    if ulysses == 1:
        ring = sent_bytes(need, layout, documents, itemsize)
        return ring, 2 * ring
    kv_width = max(heads.kv_heads, ulysses) * (heads.key_dim + heads.value_dim)
    swap = layout.tokens * (ulysses - 1) * (heads.heads * (heads.key_dim + heads.value_dim) + kv_width) // ulysses * itemsize
    # each of the members' rings carries its share of the width
    ring = sent_bytes(replace(need, width=kv_width), layout_over_groups(layout, ulysses), documents, itemsize)
    return swap + ring, swap + 2 * ring


def inputs(
    of_tokens: Mapping[str, tuple[int, ...]], whole: Mapping[str, tuple[int, ...]], tokens: int, dtype: torch.dtype, device: torch.device
) -> Inputs:
    """Shapes of each token's numbers, and of those that all tokens have in common -> the same draw on every rank."""
    generator = torch.Generator(device).manual_seed(0)
    shapes = {name: (tokens, *shape) for name, shape in of_tokens.items()} | dict(whole)
    return {name: torch.randn(shape, generator=generator, dtype=dtype, device=device) / 8 for name, shape in shapes.items()}


def both(run: Callable[[Inputs, Sequence], Tensor], leaves: Inputs, seq: Sequence, weights: tuple[Tensor, ...] = ()) -> None:
    """A forward and a backward to the leaves and weights."""
    out = run(leaves, seq)
    torch.autograd.grad(out, [*leaves.values(), *weights], torch.ones_like(out), allow_unused=True)


def as_leaves(x: Inputs) -> Inputs:
    return {name: tensor.detach().requires_grad_() for name, tensor in x.items()}


def timed(run: Callable[[], None], steps: int, mesh: Mesh) -> float:
    """Seconds that a call takes on the slowest rank; the median of `steps` rounds.

    On a GPU the calls of a round follow each other, as layers do in a step: there the host is ahead of the device, and how long it takes to
    launch the first kernel of each is no part of its time.
    """
    times = []
    calls = 1
    for n in range(WARM_UP + steps):
        synchronise(mesh.device)
        mesh.barrier()
        began = time.perf_counter()
        for _ in range(calls):
            run()
        synchronise(mesh.device)
        taken = max(mesh.all_gather_object(time.perf_counter() - began)) / calls
        if n >= WARM_UP:
            times.append(taken)
        elif mesh.device.type == "cuda":
            calls = min(max(round(ROUND / taken), 1), CALLS)
    return statistics.median(times)


def timed_alone(
    run: Callable[[Inputs, Sequence], Tensor], leaves: Inputs, whole: Sequence, steps: int, mesh: Mesh, weights: tuple[Tensor, ...] = ()
) -> float:
    """Seconds of a forward and a backward of the whole stream on one rank."""
    return timed(lambda: both(run, leaves, Sequence(whole.cu_seqlens, whole.positions, LocalExchange()), weights), steps, mesh)


def measure_peers(name: str, documents: list[int], dtype: torch.dtype, steps: int, sizes: Sizes, mesh: Mesh) -> list[dict[str, Any]]:
    """What is installed of other context parallelism for an operator, on as many tokens. All of it is for GPUs.

    One that does not take these inputs says so in `error`, on all ranks alike.
    """
    if mesh.device.type != "cuda" or mesh.exchange.size() == 1:
        return []
    found: list[dict[str, Any]] = []
    given = rounded(documents, mesh.exchange.size())
    shape = Shape(sizes.heads, sizes.kv_heads, sizes.head_dim, sizes.rope, sizes.window)
    for peer in PEERS:
        if name not in peer.operators or peer.version is None:
            continue
        row: dict[str, Any] = {"implementation": peer.name, "version": peer.version, "tokens": sum(given)}
        try:
            for key, group in (("seconds_on_one_rank", None), ("seconds", mesh.exchange)):
                row[key] = timed(peer.build(given, shape, Place(group, mesh.device, dtype)), steps, mesh)
            row["efficiency"] = row["seconds_on_one_rank"] / row["seconds"] / mesh.exchange.size()
        except Exception as error:  # whatever another package has to say of these inputs is a result
            row["error"] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        found.append(row)
    return found


def measure(
    name: str, operator: Operator, exchange: ContextExchange, documents: list[int], dtype: torch.dtype, steps: int, mesh: Mesh
) -> dict[str, Any]:
    """One operator on one stream; every rank calls, and all have the same result."""
    device = mesh.device
    whole = Sequence.of(documents, device)
    layout = exchange.layout.of(whole.cu_seqlens)
    x = inputs(operator.shapes, operator.whole, layout.tokens, dtype, device)
    alone = timed_alone(operator.run, as_leaves(x), whole, steps, mesh)
    mine = {key: layout.take(tensor) if key in operator.shapes else tensor for key, tensor in x.items()}
    del x
    shares = as_leaves(mine)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    together = timed(lambda: both(operator.run, shares, exchange.sequence(whole.cu_seqlens, whole.positions)), steps, mesh)
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
    quiet = exchange.silent()
    computing = timed(lambda: both(operator.run, shares, quiet.sequence(whole.cu_seqlens, whole.positions)), steps, mesh)
    exchange.bytes.clear()
    out = operator.run(shares, exchange.sequence(whole.cu_seqlens, whole.positions))
    forward = sum(exchange.bytes.values())
    torch.autograd.grad(out, list(shares.values()), torch.ones_like(out), allow_unused=True)
    sent = mesh.all_gather_object((forward, sum(exchange.bytes.values()) - forward, peak))
    need, itemsize = operator.need, dtype.itemsize
    if operator.heads is None:
        expected: tuple[int, int | None] = sent_bytes(need, layout, documents, itemsize), None
    else:
        expected = expected_of_attention(operator.heads, need, layout, documents, itemsize, exchange.members)
    return {
        "operator": name,
        "tokens": layout.tokens,
        "documents": len(documents),
        "ranks": layout.size,
        "ulysses": exchange.members if operator.heads else 1,
        "layout": layout.kind,
        "expected_imbalance": layout.imbalance(whole.cu_seqlens),
        "seconds_on_one_rank": alone,
        "seconds": together,
        "seconds_of_computing": computing,
        "seconds_exposed": max(together - computing, 0.0),
        "efficiency": alone / together / layout.size,
        "forward_bytes": sum(rank[0] for rank in sent),
        "forward_bytes_expected": expected[0],
        "forward_bytes_elsewhere": operator.bytes_elsewhere(layout.tokens, layout.size, itemsize),
        "backward_bytes": sum(rank[1] for rank in sent),
        "backward_bytes_expected": expected[1],  # of softmax attention
        "peak_bytes_of_a_rank": max(rank[2] for rank in sent) or None,
    }


def table(results: list[dict[str, Any]]) -> str:
    head = f"{'operator':17} {'tokens':>8} {'docs':>5} {'1 rank ms':>10} {'ms':>9} {'efficiency':>10} {'computing':>10} {'exposed':>8}"
    lines = [f"{head} {'sent MB':>9} {'expected':>9} {'elsewhere':>9}"]
    for r in results:
        ms = [r[key] * 1e3 for key in ("seconds_on_one_rank", "seconds", "seconds_of_computing", "seconds_exposed")]
        sent, expected, others = (
            None if r[k] is None else r[k] / 1e6 for k in ("forward_bytes", "forward_bytes_expected", "forward_bytes_elsewhere")
        )
        line = f"{r['operator']:17} {r['tokens']:8} {r['documents']:5} {ms[0]:10.2f} {ms[1]:9.2f} {r['efficiency']:10.1%} {ms[2]:10.2f} {ms[3]:8.2f}"
        lines.append(f"{line} {sent:9.3f} {expected:9.3f} {'' if others is None else f'{others:9.3f}'}")
        for peer in r["peers"]:
            if "error" in peer:
                lines.append(f"  {peer['implementation']} {peer['version']}: {peer['error'][:150]}")
                continue
            called = f"  {peer['implementation']} {peer['version']}"
            alone, together = peer["seconds_on_one_rank"] * 1e3, peer["seconds"] * 1e3
            lines.append(f"{called:32} {alone:10.2f} {together:9.2f} {peer['efficiency']:10.1%}")
    return "\n".join(lines)


def draw(results: list[dict[str, Any]], path: Path) -> None:
    """Efficiency over the tokens of a stream, a line for each operator and kind of stream."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for name, documents in dict.fromkeys((r["operator"], r["stream"]) for r in results):
        points = sorted((r["tokens"], r["efficiency"]) for r in results if (r["operator"], r["stream"]) == (name, documents))
        axes.plot(
            *zip(*points, strict=True),
            marker="o",
            linewidth=1.2,
            linestyle={"one": "-", "long": "--"}.get(documents, ":"),
            label=f"{name}, {documents}",
        )
    axes.set_xscale("log", base=2)
    axes.set_xlabel("tokens of the stream")
    axes.set_ylabel(f"time on one rank / {results[0]['ranks']} / time on {results[0]['ranks']}")
    axes.axhline(1.0, color="grey", linewidth=0.8)
    axes.legend(fontsize=7)
    figure.savefig(path)


def bench(
    names: list[str],
    streams: list[str],
    tokens: list[int],
    kind: str,
    dtype: torch.dtype,
    steps: int,
    sizes: Sizes,
    mesh: Mesh,
    out: Path | None = None,
) -> list[dict[str, Any]]:
    """Every operator on every stream over the context ranks of the mesh, which are all ranks. out: folder for bench-context-parallel.json, which is
    written again with each row, so that a run that is cut short keeps what it has measured, and .png.

    Raises ConfigError for an operator, stream or length that does not fit.
    """
    known = operators(sizes)
    for given, among, what in ((names, known, "--operators"), (streams, DOCUMENTS, "--documents")):
        if wrong := [name for name in given if name not in among]:
            raise ConfigError(f"{what} {wrong[0]} is not known: write some of {','.join(among)}")
    rank, size = mesh.context.rank(), mesh.context.size()
    members = 1 if mesh.ulysses is None else mesh.ulysses[0].size()
    for name in names:
        heads = known[name].heads
        if heads is not None and not divides_heads(heads.heads, heads.kv_heads, members):
            raise ConfigError(
                f"--ulysses {members} does not divide the {heads.heads} heads and {heads.kv_heads} K/V heads of {name}: write a divisor of the heads "
                "that divides the K/V heads too or is a multiple of them"
            )
    try:
        layouts = {n: ContextLayout(n, rank, size, kind) for n in tokens}
    except ValueError as error:
        raise ConfigError(f"--tokens {','.join(map(str, tokens))}: {error}") from error
    group = mesh.exchange if size > 1 else None
    exchange = ContextExchange(layouts[tokens[0]], group, group, ulysses=mesh.ulysses)
    results = []
    for n in tokens:
        for stream in streams:
            for name in names:
                found = measure(name, known[name], exchange.resized(n, cost_of(known[name].need, n)), lengths(stream, n), dtype, steps, mesh)
                beside = measure_peers(name, lengths(stream, n), dtype, steps, sizes, mesh)
                results.append({"stream": stream, **found, "peers": beside})
                if rank == 0:
                    print("\n".join(table(results[-1:]).splitlines()[len(results) > 1 :]), flush=True)
                    if out is not None:
                        write(results, sizes, dtype, mesh.device, out)
    if rank == 0 and out is not None:
        draw(results, out / "bench-context-parallel.png")
        print(f"written to {out / 'bench-context-parallel.json'} and .png")
    return results


def write(results: list[dict[str, Any]], sizes: Sizes, dtype: torch.dtype, device: torch.device, out: Path) -> None:
    """bench-context-parallel.json in the folder."""
    out.mkdir(parents=True, exist_ok=True)
    about = {"device": device_name(device), "torch": torch.__version__, "dtype": str(dtype).removeprefix("torch."), "sizes": sizes._asdict()}
    (out / "bench-context-parallel.json").write_text(json.dumps({**about, "results": results}, indent=2) + "\n")
