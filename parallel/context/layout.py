"""Which rank holds which part of the packed stream, and how documents lie across the cuts.

Everything here is computed on the host from numbers that every rank has, so that all ranks agree without a message.
A *span* is a run of the stream on one rank; a *segment* is the part of one document inside one span. Only two segments
of a span can have a neighbour elsewhere: its *head*, which continues a document begun in an earlier span, and its
*tail*, whose document goes on in a later one (both are the same segment where one document covers the span).
"""

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field, replace
from itertools import pairwise
from math import lcm
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from ltrain.data.packing import NO_LABEL, MicroBatch
from ltrain.model.sequence import Counted
from ltrain.parallel.context.balance import CAUSAL, Balance, Cost, Spans, balance
from ltrain.parallel.context.cache import Cache

KINDS = ("zigzag", "contiguous", "balanced")


class Segment(NamedTuple):
    """The part of one document that lies in one span."""

    document: int
    begin: int  # where the document starts in the stream
    start: int  # first token in the stream
    stop: int
    local: int  # where it lies among its rank's tokens
    incoming: bool  # continues from an earlier span
    outgoing: bool  # goes on in a later span

    @property
    def length(self) -> int:
        return self.stop - self.start

    @property
    def rows(self) -> tuple[int, int]:
        """Its rows among its rank's tokens."""
        return self.local, self.local + self.length


class Span(NamedTuple):
    """A run of the stream on one rank."""

    number: int  # in the order of the stream
    rank: int
    start: int
    stop: int
    local: int  # where it starts among its rank's tokens
    head: Segment | None  # the segment that continues from an earlier span
    tail: Segment | None  # the segment that goes on in a later span

    @property
    def inside(self) -> bool:
        """One document comes in at the start and leaves at the end."""
        return self.head is not None and self.head is self.tail


@dataclass(frozen=True)
class ContextLayout:
    """How a stream of `tokens` tokens is cut over `size` context ranks, as `rank` sees it.

    contiguous: rank r holds the r-th of `size` equal spans. zigzag: it holds spans r and 2 size - 1 - r of 2 size equal
    ones, which gives every rank the same causal attention work on one long document (Brandon et al. 2023, Zhu 2024);
    the last rank's two spans touch and are one. balanced: the spans follow the documents of each stream, for equal work by
    `cost` (see `ltrain.parallel.context.balance`); `of` gives the layout of one stream.

    A stream that does not divide into equal spans is filled up by a masked tail, which `filled` finds and `fill` adds: a document of its own, so that
    nothing else attends to it, without labels, and left out of every mean and statistic (`counted`).

    Raises ValueError where `tokens` does not divide into equal spans or the kind is unknown.
    """

    tokens: int
    rank: int = 0
    size: int = 1
    kind: str = "zigzag"
    cost: Cost = CAUSAL
    chosen: tuple[Spans, ...] | None = None  # of each rank, where they follow the documents
    tail: int = 0  # of `tokens`, the last ones, which fill the stream up

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"parallel.context_layout={self.kind!r} is not a layout: write {', '.join(KINDS[:-1])} or {KINDS[-1]}")
        if not 0 <= self.rank < self.size:
            raise ValueError(f"context rank {self.rank} is outside parallel.context={self.size}: give a rank from 0 to {self.size - 1}")
        if self.tokens % self.parts:
            raise ValueError(
                f"a stream of {self.tokens} tokens does not cut into {self.parts} equal spans for parallel.context={self.size} "
                f"({self.kind}): give a multiple of {self.parts}, or use ContextLayout.filled"
            )

    @classmethod
    def filled(cls, tokens: int, rank: int = 0, size: int = 1, kind: str = "zigzag", cost: Cost = CAUSAL, multiple: int = 1) -> "ContextLayout":
        """For streams of `tokens` tokens, with the shortest tail that gives each rank as many, a multiple of `multiple`."""
        empty = cls(0, rank, size, kind, cost)
        tail = -tokens % (size * lcm(empty.parts // size, multiple))
        return replace(empty, tokens=tokens + tail, tail=tail)

    @property
    def parts(self) -> int:
        """Equal parts that the stream is cut into."""
        return 2 * self.size if self.kind == "zigzag" and self.size > 1 else self.size

    @property
    def local_tokens(self) -> int:
        return self.tokens // self.size

    def spans(self, rank: int | None = None) -> list[tuple[int, int]]:
        """[start, stop) of each run of the stream that `rank` (default: this one) holds, in order."""
        rank = self.rank if rank is None else rank
        if self.chosen is not None:
            return list(self.chosen[rank])
        assert self.kind != "balanced" or self.size == 1, "ask `of` for the layout of one stream"
        n = self.tokens // self.parts
        if self.parts == self.size:
            return [(rank * n, rank * n + n)]
        mirror = self.parts - 1 - rank
        if mirror == rank + 1:
            return [(rank * n, mirror * n + n)]
        return [(rank * n, rank * n + n), (mirror * n, mirror * n + n)]

    def take(self, x: Tensor) -> Tensor:
        """x [tokens, ...] -> this rank's tokens [tokens / size, ...]."""
        if x.shape[0] != self.tokens:
            raise ValueError(f"the stream has {x.shape[0]} tokens but its layout is for {self.tokens}: give the whole micro-batch")
        parts = [x[start:stop] for start, stop in self.spans()]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def fill(self, batch: MicroBatch) -> MicroBatch:
        """batch of tokens - tail tokens -> of `tokens`: the tail is a document of zeros without labels."""
        if not self.tail:
            return batch
        if batch.cu_seqlens[-1] + self.tail != self.tokens:
            raise ValueError(f"the stream has {batch.cu_seqlens[-1]} tokens but its layout fills up {self.tokens - self.tail}: give it data.tokens")
        return replace(
            batch,
            tokens=F.pad(batch.tokens, (0, self.tail)),
            labels=F.pad(batch.labels, (0, self.tail), value=NO_LABEL),
            positions=torch.cat((batch.positions, torch.arange(self.tail))),
            cu_seqlens=F.pad(batch.cu_seqlens, (0, 1), value=self.tokens),
        )

    def counted(self, tensor_rank: int = 0, tensor_size: int = 1) -> Counted | None:
        """What is not the tail, in the layout of one stream, whose spans each rank holds in order: of its tokens the tail's are the last."""
        if not self.tail:
            return None
        end, share = self.tokens - self.tail, self.local_tokens // tensor_size
        here = sum(max(min(stop, end) - start, 0) for start, stop in self.spans())
        return Counted(end, here, min(max(here - tensor_rank * share, 0), share))

    def of(self, cu_seqlens: Tensor) -> "ContextLayout":
        """The layout of one stream, cu_seqlens [documents + 1] int32 on the host: this one, where it does not follow the documents."""
        if self.kind != "balanced" or self.size == 1 or self.chosen is not None:
            return self
        return replace(self, chosen=self._balance(cu_seqlens).spans)

    def _balance(self, cu_seqlens: Tensor) -> Balance:
        return balance(tuple(cast(list[int], cu_seqlens.tolist())), self.size, self.cost)

    def work(self, cu_seqlens: Tensor) -> list[float]:
        """The expected work of each rank, in units of `cost`."""
        if self.kind == "balanced" and self.size > 1:
            return list(self._balance(cu_seqlens).work)
        plan = self.plan(cu_seqlens)
        work = [0.0] * self.size
        for begin, end in pairwise(plan.cuts):
            first = bisect_right(plan.spans, begin, key=lambda span: span.stop)
            for span in plan.spans[first : bisect_left(plan.spans, end, key=lambda span: span.start)]:
                work[span.rank] += self.cost.between(max(span.start, begin) - begin, min(span.stop, end) - begin)
        return work

    def imbalance(self, cu_seqlens: Tensor) -> float:
        """The expected work of the busiest rank over the mean, less one."""
        work = self.work(cu_seqlens)
        mean = sum(work) / self.size
        return max(work) / mean - 1 if self.size > 1 and mean else 0.0

    def plan(self, cu_seqlens: Tensor) -> "Plan":
        """How the documents of one micro-batch lie over the ranks. cu_seqlens [documents + 1] int32, on the host."""
        if cu_seqlens.device.type != "cpu":
            raise ValueError(f"cu_seqlens is on {cu_seqlens.device}: keep it on the CPU, where plans are made without waiting for the device")
        cuts = cast(list[int], cu_seqlens.tolist())
        if len(cuts) < 1 or cuts[0] != 0 or cuts[-1] != self.tokens or any(a > b for a, b in zip(cuts, cuts[1:], strict=False)):
            raise ValueError(f"cu_seqlens must rise from 0 to {self.tokens}, the tokens of the stream: give the boundaries of the whole micro-batch")
        return Plan(self.of(cu_seqlens), cuts)

    def local_segments(self, cu_seqlens: Tensor) -> tuple[Tensor, list[Segment]]:
        """This rank's tokens cut at documents and spans: boundaries [segments + 1] int32 on the host, and the segments."""
        plan = self.plan(cu_seqlens)
        return plan.cu_seqlens, plan.segments


@dataclass
class Plan:
    """The documents of one micro-batch over the ranks of a layout."""

    layout: ContextLayout
    cuts: list[int]  # document boundaries in the stream
    spans: list[Span] = field(init=False)  # of all ranks, in the order of the stream
    segments: list[Segment] = field(init=False)  # of this rank, in the order of its tokens
    cu_seqlens: Tensor = field(init=False)  # [segments + 1] int32: boundaries among this rank's tokens
    _derived: Cache[Any] = field(init=False, default_factory=Cache)

    def __post_init__(self) -> None:
        self.spans, self.segments = [], []
        where = sorted((span, rank) for rank in range(self.layout.size) for span in self.layout.spans(rank))
        local = [0] * self.layout.size
        mine: list[Segment] = []
        for number, ((start, stop), rank) in enumerate(where):
            if stop > start:
                first, last = self._segment(start, start, stop, local[rank]), self._segment(stop - 1, start, stop, local[rank])
                last = first if first == last else last
                head, tail = first if first.incoming else None, last if last.outgoing else None
                self.spans.append(Span(number, rank, start, stop, local[rank], head, tail))
                if rank == self.layout.rank:
                    mine += self._segments(first, last, start, stop, local[rank])
            local[rank] += stop - start
        self.segments = mine
        self.cu_seqlens = torch.tensor([0, *(s.local + s.length for s in mine)], dtype=torch.int32)

    def _document(self, token: int) -> int:
        return bisect_right(self.cuts, token) - 1

    def _segment(self, token: int, start: int, stop: int, local: int) -> Segment:
        """The segment of span [start, stop) that holds `token`."""
        document = self._document(token)
        begin, end = self.cuts[document], self.cuts[document + 1]
        first, last = max(begin, start), min(end, stop)
        return Segment(document, begin, first, last, local + first - start, begin < start, end > stop)

    def _segments(self, first: Segment, last: Segment, start: int, stop: int, local: int) -> list[Segment]:
        if first is last:
            return [first]
        low, high = bisect_left(self.cuts, first.stop), bisect_left(self.cuts, last.start)
        starts = sorted(set(self.cuts[low : high + 1]) - {last.start})  # a set: documents may be empty
        return [first, *(self._segment(c, start, stop, local) for c in starts), last]

    def of(self, rank: int) -> list[Span]:
        """The spans of one rank, in the order of its tokens."""
        spans: list[Span] = self.derive(("spans", rank), lambda: [span for span in self.spans if span.rank == rank])
        return spans

    def index(self, segment: Segment) -> int:
        """The number of one of this rank's segments among them."""
        return bisect_left(self.segments, segment.local, key=lambda s: s.local)

    def derive(self, key: Hashable, build: Callable[[], Any]) -> Any:
        """build(), once for this plan: what an access pattern works out from it, shared by all layers."""
        return self._derived.get(key, build)
