"""Attention that divides its heads over some of the context ranks, which then hold all of each other's tokens.

DeepSpeed Ulysses (Jacobs et al. 2023): before attention every member of a group gives each other one that one's heads of its
tokens, and gets the outputs of its tokens back behind it. Where a group has not all context ranks, those with the same heads in
all groups are a ring (Fang and Zhao 2024, USP): the cut of the stream over groups is that over ranks with the members' spans joined.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ltrain.kernels.attention import Score
from ltrain.parallel.context.balance import joined
from ltrain.parallel.context.layout import ContextLayout
from ltrain.parallel.context.messages import Messages, Silence
from ltrain.schema import divides_heads


class Swap(torch.autograd.Function):
    """x [members, ...], of which each member gets its part -> [members, ...], what each member had for this one. Its own transpose."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, messages: Messages, rank: int) -> Tensor:
        ctx.messages, ctx.rank = messages, rank
        others = [member for member in range(len(x)) if member != rank]
        # Each posts to all others: the same batch, whatever its documents are.
        arrived = messages.post(
            "ulysses", {m: x[m].flatten() for m in others}, dict.fromkeys(others, x[0].numel()), dtype=x.dtype, device=x.device
        ).wait()
        return torch.stack([x[m] if m == rank else arrived[m].view(x[m].shape) for m in range(len(x))])

    @staticmethod
    def backward(ctx: Any, dx: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        return Swap.apply(dx, ctx.messages, ctx.rank), None, None  # type: ignore[no-untyped-call]


@dataclass(frozen=True)
class Ulysses:
    """Who divides heads with this rank, and who has the same heads of other tokens.

    members: neighbours among the context ranks; swap: messages between them; ring: messages between those with this rank's place in each group.
    """

    members: int
    rank: int  # among the members
    swap: Messages
    ring: Messages

    @classmethod
    def over(cls, members: dist.ProcessGroup, ring: dist.ProcessGroup, count: Counter[str]) -> "Ulysses":
        """Collective over both groups; what is sent is added to `count`."""
        return cls(members.size(), members.rank(), Messages(members, members.size(), count, "member"), Messages(ring, ring.size(), count, "group"))

    def silent(self) -> "Ulysses":
        return Ulysses(self.members, self.rank, Silence(), Silence())

    def heads(self, x: Tensor) -> Tensor:
        """x [H, ...] of all heads -> those of this rank."""
        return x.chunk(self.members)[self.rank]

    def score(self, score: Score) -> Score:
        slopes, bias = (None if x is None else self.heads(x) for x in (score.slopes, score.bias))
        return score._replace(slopes=slopes, bias=bias)

    def _places(self, layout: ContextLayout) -> list[tuple[int, int]]:
        """(start in the stream, tokens) of each span of the members, one member after another."""
        first = layout.rank - self.rank
        return [(start, stop - start) for member in range(self.members) for start, stop in layout.spans(first + member)]

    def joined(self, x: Tensor, layout: ContextLayout) -> Tensor:
        """x [members, T, ...], the rows of one member after another -> [members T, ...] in the order of the stream."""
        places = self._places(layout)
        spans = x.flatten(0, 1).split([n for _, n in places])
        return torch.cat([spans[i] for i in sorted(range(len(places)), key=lambda i: places[i])])

    def parted(self, x: Tensor, layout: ContextLayout) -> Tensor:
        """The other way: x [members T, ...] -> [members, T, ...]"""
        places = self._places(layout)
        order = sorted(range(len(places)), key=lambda i: places[i])
        spans = dict(zip(order, x.split([places[i][1] for i in order]), strict=True))
        return torch.cat([spans[i] for i in range(len(places))]).unflatten(0, (self.members, -1))

    def positions(self, positions: Tensor, layout: ContextLayout) -> Tensor:
        """positions [T] -> [members T] of all members' tokens."""
        whole: Tensor = Swap.apply(positions.expand(self.members, -1), self.swap, self.rank)  # type: ignore[no-untyped-call]
        return self.joined(whole, layout)

    def attention(self, q: Tensor, k: Tensor, v: Tensor, layout: ContextLayout, attend: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Tensor:
        """q [T, H, D], k [T, Hk, D], v [T, Hk, Dv] -> [T, H, Dv], where `attend` works on [members T, heads / members, ...]."""
        assert divides_heads(q.shape[1], k.shape[1], self.members), "the config says so"
        shared = max(k.shape[1] // self.members, 1)
        if k.shape[1] < self.members:  # several members have one K/V head
            k, v = (x.repeat_interleave(self.members // k.shape[1], dim=1) for x in (k, v))
        parts = [x.unflatten(1, (self.members, -1)) for x in (q, k, v)]  # [T, members, heads, D]
        message = torch.cat([x.flatten(2) for x in parts], dim=-1).transpose(0, 1)  # [members, T, numbers]
        here: Tensor = self.joined(Swap.apply(message, self.swap, self.rank), layout)  # type: ignore[no-untyped-call]
        widths = [x.shape[2:].numel() for x in parts]
        q, k, v = (
            x.unflatten(1, (heads, -1)) for x, heads in zip(here.split(widths, dim=-1), (q.shape[1] // self.members, shared, shared), strict=True)
        )
        out = attend(q, k, v)
        back: Tensor = Swap.apply(self.parted(out, layout), self.swap, self.rank)  # type: ignore[no-untyped-call]
        return back.transpose(0, 1).flatten(1, 2)  # [T, members, heads, Dv] -> [T, H, Dv]


def layout_over_groups(layout: ContextLayout, members: int) -> ContextLayout:
    """How a layout of one stream cuts it over groups of `members` neighbours."""
    groups = layout.size // members
    spans = [tuple(joined([span for member in range(members) for span in layout.spans(group * members + member)])) for group in range(groups)]
    return ContextLayout(layout.tokens, layout.rank // members, groups, layout.kind, layout.cost, tuple(spans))


def places(ranks: list[int], members: int) -> tuple[list[list[int]], list[list[int]]]:
    """Of ranks in their order the groups of `members` neighbours, and those at the same place of each group."""
    groups = [ranks[first : first + members] for first in range(0, len(ranks), members)]
    return groups, [list(line) for line in zip(*groups, strict=True)]
