"""The packed stream a layer works on, and what it may ask of other ranks.

A micro-batch is one stream of documents. `Sequence` describes this rank's tokens of it; its `exchange` is the identity on
one rank, and ring attention, halos and state scans under context parallelism (`ltrain.parallel.context`), so that a mixer
is the same code on one rank and on a thousand.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from ltrain.kernels import attention, linear_recurrence, short_conv


class Exchange(Protocol):
    """The access patterns of the mixers along the stream. T is the number of this rank's tokens."""

    def attention(self, q: Tensor, k: Tensor, v: Tensor, seq: "Sequence", *, scale: float) -> Tensor:
        """Causal softmax attention inside documents: q [T, H, D], k [T, Hk, D], v [T, Hk, Dv] -> [T, H, Dv]."""
        ...

    def short_conv(self, x: Tensor, weight: Tensor, seq: "Sequence") -> Tensor:
        """Causal depthwise convolution inside documents, then SiLU: x [T, C], weight [C, W] -> [T, C]."""
        ...

    def linear_recurrence(
        self, q: Tensor, k: Tensor, v: Tensor, decay: Tensor | None, beta: Tensor | None, seq: "Sequence", *, scale: float
    ) -> Tensor:
        """q, k [T, Hk, K], v [T, H, V], decay [T, H] (log) or None, beta [T, H] or None (additive) -> [T, H, V]."""
        ...

    def sum(self, x: Tensor) -> Tensor:
        """Sum over every rank that holds tokens of this micro-batch (tensor and context ranks). No gradient."""
        ...


class LocalExchange:
    """One rank holds the whole stream: nothing is exchanged."""

    def attention(self, q: Tensor, k: Tensor, v: Tensor, seq: "Sequence", *, scale: float) -> Tensor:
        return attention.attention(q, k, v, seq.cu_seqlens, scale=scale)

    def short_conv(self, x: Tensor, weight: Tensor, seq: "Sequence") -> Tensor:
        return short_conv.short_conv(x, weight, seq.cu_seqlens)[0]

    def linear_recurrence(
        self, q: Tensor, k: Tensor, v: Tensor, decay: Tensor | None, beta: Tensor | None, seq: "Sequence", *, scale: float
    ) -> Tensor:
        return linear_recurrence.linear_recurrence(q, k, v, decay, beta, seq.cu_seqlens, scale=scale).output

    def sum(self, x: Tensor) -> Tensor:
        return x


class Tape:
    """What a recomputed block must not compute twice: routing decisions and the results of exchanges.

    The first forward records in order; the recomputation replays in the same order.
    """

    def __init__(self) -> None:
        self._saved: list[Any] = []
        self._next = 0  # what the replay gives next
        self._mode: str | None = None

    @contextmanager
    def _as(self, mode: str) -> Iterator[None]:
        self._mode = mode
        self._next = 0  # a graph that is kept may be replayed more than once
        try:
            yield
        finally:
            self._mode = None

    def contexts(self) -> tuple[Any, Any]:
        """For `torch.utils.checkpoint(context_fn=...)`: the first forward records, the recomputation replays."""
        return self._as("record"), self._as("replay")

    def keep(self, compute: Any) -> Any:
        """compute() now, or what it gave in the first forward."""
        if self._mode == "replay":
            self._next += 1
            return self._saved[self._next - 1]
        value = compute()
        if self._mode == "record":
            self._saved.append(value)
        return value


@dataclass
class Sequence:
    """This rank's part of one packed micro-batch, and what travels beside the hidden states."""

    cu_seqlens: Tensor  # [documents + 1] int32, on the host: document boundaries in the whole stream
    positions: Tensor  # [T] int64: each local token's position in its document (a cut document's rest continues)
    exchange: Exchange = field(default_factory=LocalExchange)
    tape: Tape = field(default_factory=Tape)
    aux_weight: float = 1.0  # what an auxiliary loss is multiplied with: 1 / micro-batches of the step
    metrics: dict[str, Tensor] = field(default_factory=dict)  # detached scalars, by name
    shared: dict[str, Tensor] = field(default_factory=dict)  # tensors that later layers read (shared K/V, top-k...)

    @classmethod
    def of(cls, lengths: list[int], device: torch.device | str = "cpu", exchange: Exchange | None = None) -> "Sequence":
        """A one-rank sequence of whole documents with these lengths."""
        cu = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
        positions = torch.cat([torch.arange(n) for n in lengths]) if lengths else torch.zeros(0, dtype=torch.int64)
        return cls(cu, positions.to(device), exchange or LocalExchange())

    @classmethod
    def step(cls, positions: Tensor) -> "Sequence":
        """A one-rank sequence with one token per document, for decoding: positions [documents]."""
        return cls(torch.arange(len(positions) + 1, dtype=torch.int32), positions)

    def with_tape(self) -> "Sequence":
        """The same sequence with a tape of its own: one recomputed block's. Metrics and shared tensors stay common."""
        return replace(self, tape=Tape())
