"""Streams of documents that meet the cuts in every awkward way, and each exchange run on one rank and on several."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ltrain.kernels.attention import FULL, PLAIN, Mask, Score
from ltrain.kernels.recurrence import Elementwise, GeneralisedDelta, Linear, Selective
from ltrain.kernels.segments import accumulator, documents
from ltrain.model.sequence import Latent, LocalExchange, Sequence
from ltrain.parallel.context.exchange import ContextExchange
from ltrain.parallel.context.layout import ContextLayout
from ltrain.parallel.context.ulysses import places

SHARED = ("weight", "sinks", "bias", "rate")  # inputs that are not of tokens
LAYOUTS = [(size, kind) for size in (2, 3, 4) for kind in ("contiguous", "zigzag", "balanced")]


def streams(size: int) -> dict[str, list[int]]:
    """Document lengths by name. All totals divide into 2 `size` spans."""
    tokens = 12 * size
    edges = [tokens // size] * size

    def moved(by: int) -> list[int]:
        return [edges[0] + by, *edges[1:-1], edges[-1] - by]

    tiny: list[int] = []
    while (left := tokens - sum(tiny)) > 0:
        tiny.append(min(left, 1 + len(tiny) * 2 % 5))
    return {
        "one document": [tokens],
        "on the edges": edges,
        "one past the edges": moved(1),
        "one before the edges": moved(-1),
        "over several ranks": [5, tokens - 9, 4],
        "two long": [tokens // 2 + 1, tokens // 2 - 1],
        "tiny": tiny,
        "with empty documents": [0, 7, 0, 0, tokens - 7, 0],
        "spans shorter than the convolution": [4 * size],
        "short spans, cut early": [1, 4 * size - 3, 2],
        "over several chunks": [7, 90 * size - 3, 10 * size - 4],
    }


@dataclass(frozen=True)
class Case:
    """One call of one exchange: its inputs are drawn from the seed, the same everywhere."""

    op: str  # attention | latent | gather | gather thirds | short_conv | before | linear_recurrence | generalised | elementwise | selective
    lengths: tuple[int, ...]
    dtype: torch.dtype = torch.float64
    decay: str = "head"  # none | constant | head | channel
    update: str = "delta"  # add | delta
    strength: float = 1e-3  # mean of -log decay
    recompute: bool = False
    changed: int | None = None  # a document whose inputs are drawn anew
    mask: Mask = FULL
    scored: bool = False  # attention with a soft cap, slopes, biases by distance, and sinks
    start: int = 0  # position of the first document's first token: an earlier stream has begun it

    @property
    def tokens(self) -> int:
        return sum(self.lengths)

    @property
    def cu_seqlens(self) -> Tensor:
        return Sequence.of(list(self.lengths)).cu_seqlens

    @property
    def positions(self) -> Tensor:
        positions = Sequence.of(list(self.lengths)).positions
        positions[: next(filter(None, self.lengths))] += self.start
        return positions

    def inputs(self) -> dict[str, Tensor]:
        """By name, over the whole stream [T, ...]; those in SHARED belong to every token; `dout` is the gradient of the output."""
        inputs = self._draw(0)
        if self.changed is not None:
            start, stop = self.cu_seqlens[self.changed : self.changed + 2].tolist()
            for name, x in self._draw(1).items():
                if name not in (*SHARED, "dout"):
                    inputs[name][start:stop] = x[start:stop]
        return {name: x.to(self.dtype) for name, x in inputs.items()}

    def _draw(self, seed: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(self.tokens, *shape, generator=generator, dtype=torch.float64)

        if self.op == "attention":
            found = {"q": normal(4, 8), "k": normal(2, 8), "v": normal(2, 6), "dout": normal(4, 6)}
            if self.scored:
                found |= {name: torch.randn(*shape, generator=generator, dtype=torch.float64) for name, shape in (("sinks", (4,)), ("bias", (4, 12)))}
            return found
        if self.op == "latent":
            weight = torch.randn(48, 5, generator=generator, dtype=torch.float64)
            return {"q": normal(4, 8), "rows": normal(7), "weight": weight, "dout": normal(4, 6)}
        if self.op in ("gather", "gather thirds"):
            return {"x": normal(5), "dout": normal(5)}
        if self.op == "before":
            return {"x": normal(5), "dout": normal(5)}
        if self.op == "elementwise":
            return {"a": (-self.strength * normal(3, 2).exp()).exp(), "b": normal(3, 2), "dout": normal(3, 2)}
        if self.op == "selective":
            rate = self.strength * torch.arange(1, 5) + 0.1 * torch.rand(6, 4, generator=generator, dtype=torch.float64)
            return {"x": normal(6), "step": normal(6).exp() / 4, "rate": rate, "B": normal(4), "C": normal(4), "dout": normal(6)}
        if self.op == "generalised":
            c = normal(3, 8)
            c = c / c.norm(dim=-1, keepdim=True)
            w = -0.6 * min(self.strength, 1.0) * normal(3, 8).sigmoid()
            return {"r": normal(3, 8), "w": w, "k": normal(3, 8), "v": normal(3, 6), "b": c * normal(3, 8).sigmoid(), "c": c, "dout": normal(3, 6)}
        if self.op == "short_conv":
            weight = torch.randn(5, 4, generator=generator, dtype=torch.float64)
            return {"x": normal(5), "weight": weight, "dout": normal(5)}
        q, k = normal(2, 8), normal(2, 8)
        inputs = {"q": q, "k": k / k.norm(dim=-1, keepdim=True), "v": normal(4, 6), "dout": normal(4, 6)}
        if self.decay == "constant":
            inputs["rate"] = -self.strength * torch.arange(1, 5, dtype=torch.float64)
        elif self.decay != "none":
            inputs["decay"] = -self.strength * normal(*((4, 8) if self.decay == "channel" else (4,))).exp()
        if self.update == "delta":
            inputs["beta"] = normal(4).sigmoid()
        return inputs


def thirds(count: int) -> int:
    return count // 3


def so_far(seq: Sequence, rows: Tensor, units: Callable[[int], int]) -> Tensor:
    """For each of this rank's tokens the sum of its document's gathered rows up to it, [T, C]."""
    found, begins, at = [], {}, 0
    parts = seq.exchange.parts(seq)
    for begin, end in documents(parts).items():
        begins[begin], at = at, at + units(end - begin)
    for part in parts:
        sums = torch.cat((rows.new_zeros(1, rows.shape[1]), rows[begins[part.begin] :].cumsum(0)))
        found += [sums[units(part.first - part.begin + n + 1)] for n in range(part.stop - part.start)]
    return torch.stack(found)


def expand(rows: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Latents of 5 numbers and keys of 2 that all heads share -> k [n, 4, 8] and v [n, 4, 6]"""
    k, v = (rows[:, :5] @ weight.T).split(24, dim=-1)
    return torch.cat((k.unflatten(-1, (4, 6)), rows[:, None, 5:].expand(-1, 4, -1)), dim=-1), v.unflatten(-1, (4, 6))


def compute(case: Case, inputs: dict[str, Tensor], seq: Sequence, between: Callable[[], None] = lambda: None) -> dict[str, Tensor]:
    """Output and the gradient of every input. `between` is called after the forward."""
    leaves = {name: x.clone().requires_grad_() for name, x in inputs.items() if name != "dout"}

    def forward() -> Tensor:
        if case.op == "attention":
            bias, slopes = leaves.get("bias"), torch.arange(1, 5).to(leaves["q"]) / 40
            score = Score(3.0, slopes, bias, 40, not case.mask.causal) if case.scored else PLAIN
            q, k, v = leaves["q"], leaves["k"], leaves["v"]
            return seq.exchange.attention(q, k, v, seq, scale=0.3, mask=case.mask, score=score, sinks=leaves.get("sinks"))
        if case.op == "short_conv":
            return seq.exchange.short_conv(leaves["x"], leaves["weight"], seq)
        if case.op == "latent":
            rows, weight = leaves["rows"], leaves["weight"]
            carried = Latent(7, lambda: rows, weight, expand)
            return seq.exchange.attention(leaves["q"], *expand(rows, weight), seq, scale=0.3, mask=case.mask, latent=carried)
        if case.op == "gather":
            return so_far(seq, seq.exchange.gather(leaves["x"], seq), int)
        if case.op == "gather thirds":
            ends = torch.cat([torch.arange(p.first - p.begin, p.first - p.begin + p.stop - p.start) % 3 == 2 for p in seq.exchange.parts(seq)])
            return so_far(seq, seq.exchange.gather(leaves["x"][ends], seq, thirds), thirds)
        if case.op == "before":
            return seq.exchange.before(leaves["x"], seq)
        if case.op == "linear_recurrence":
            rate = leaves.get("rate")
            decay, constant = (leaves.get("decay"), None) if rate is None else (rate.expand(len(leaves["q"]), -1), rate.detach())
            return seq.exchange.recurrence(Linear(leaves["q"], leaves["k"], leaves["v"], decay, leaves.get("beta"), 0.3, constant), seq)
        kinds = {"elementwise": Elementwise, "selective": Selective, "generalised": GeneralisedDelta}
        return seq.exchange.recurrence(kinds[case.op](**leaves), seq)

    out = checkpoint(forward, use_reentrant=False, preserve_rng_state=False, context_fn=seq.tape.contexts) if case.recompute else forward()
    between()
    grads = torch.autograd.grad(out, list(leaves.values()), inputs["dout"])
    return {"out": out.detach(), **dict(zip(leaves, grads, strict=True))}


@cache
def whole(case: Case, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """On one rank, in the case's type or another one from the same inputs."""
    inputs = {name: x.to(dtype or case.dtype) for name, x in case.inputs().items()}
    return compute(case, inputs, Sequence(case.cu_seqlens, case.positions, LocalExchange()))


Groups = tuple[dist.ProcessGroup, dist.ProcessGroup]


def divided(lines: list[list[int]], members: int) -> Groups | None:
    """This rank's groups of `places` among those of its line; collective over all lines, which have every rank."""
    if members == 1:
        return None
    found = [places(line, members) for line in lines]
    enumerated = ([group for kinds in found for group in kinds[kind]] for kind in (0, 1))
    inside, across = (dist.new_subgroups_by_enumeration(groups)[0] for groups in enumerated)
    return inside, across


def on_rank(kind: str, cases: list[Case], ulysses: int = 1, inner_ring: int = 1, fp8: bool = False) -> list[tuple[dict[str, Tensor], dict[str, int]]]:
    """On this rank of a pool: for each case its rows of output and gradients, and bytes sent (forward, and in all), by kind."""
    results = []
    group = dist.group.WORLD  # nothing else speaks over it, and a pool that failed is replaced
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    ranks = list(range(dist.get_world_size()))
    groups, nodes = divided([ranks], ulysses), divided(places(ranks, ulysses)[1], inner_ring)
    exchanges: dict[int, ContextExchange] = {}
    for case in cases:
        layout = ContextLayout(case.tokens, dist.get_rank(), dist.get_world_size(), kind)
        if case.tokens not in exchanges:
            exchanges[case.tokens] = ContextExchange(layout, group, group, ulysses=groups, nodes=nodes, fp8=fp8)
        exchange = exchanges[case.tokens]
        exchange.bytes.clear()
        take, sent = exchange.layout.of(case.cu_seqlens).take, {}
        inputs = {name: (x if name in SHARED else take(x)).to(device) for name, x in case.inputs().items()}
        seq = exchange.sequence(case.cu_seqlens, case.positions.to(device))
        values = compute(case, inputs, seq, lambda: sent.update({f"{k} forward": n for k, n in exchange.bytes.items()}))  # noqa: B023 - called at once
        results.append(({name: x.cpu() for name, x in values.items()}, {**sent, **exchange.bytes}))
    return results


def over_ranks(
    pool: Any, size: int, kind: str, cases: list[Case], ulysses: int = 1, inner_ring: int = 1, fp8: bool = False
) -> list[tuple[dict[str, Tensor], list[dict[str, int]]]]:
    """Each case over `size` ranks: output and gradients put back in the order of the stream, and bytes sent by rank."""
    ranks = pool(size).run(on_rank, kind, cases, ulysses, inner_ring, fp8)
    results = []
    for i, case in enumerate(cases):
        layout = ContextLayout(case.tokens, 0, size, kind).of(case.cu_seqlens)
        order = torch.cat([torch.arange(a, b) for rank in range(size) for a, b in layout.spans(rank)])
        values = {}
        for name in ranks[0][i][0]:
            parts = [rank[i][0][name] for rank in ranks]
            # the engine adds up gradients of parameters in float32
            values[name] = sum(p.to(accumulator(p.dtype)) for p in parts).to(parts[0].dtype) if name in SHARED else torch.cat(parts)[order.argsort()]
        results.append((values, [rank[i][1] for rank in ranks]))
    return results


def error(got: dict[str, Tensor], want: dict[str, Tensor]) -> tuple[float, str]:
    """The largest error of a tensor, and whose it is: of the relative RMS, which sees what is off everywhere, and the largest difference over the
    largest value, which sees one number among many."""
    assert got.keys() == want.keys()
    worst = (0.0, "")
    for name, x in want.items():
        assert got[name].shape == x.shape and got[name].dtype == x.dtype and bool(got[name].isfinite().all()), name
        off, exact = (got[name].double() - x.double()).abs(), x.double().abs()
        for norm in (torch.linalg.vector_norm, torch.amax):
            worst = max(worst, (float(norm(off)) / max(float(norm(exact)), 1e-30), name))
    return worst
