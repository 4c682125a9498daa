"""The packed stream a layer works on, and what it may ask of other ranks.

A micro-batch is one stream of documents. `Sequence` describes this rank's tokens of it; its `exchange` is the identity on
one rank, and ring attention, halos and state scans under context parallelism (`ltrain.parallel.context`), so that a mixer
is the same code on one rank and on a thousand.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from ltrain.kernels import attention, short_conv
from ltrain.kernels.attention import FULL, PLAIN, Mask, Score
from ltrain.kernels.recurrence import Recurrence
from ltrain.kernels.segments import Part, parts
from ltrain.kernels.sparse_attention.decoding import best_numbers, candidates


class Latent(NamedTuple):
    """What keys and values are made of, where that is smaller and may travel in their place."""

    width: int  # C
    rows: Callable[[], Tensor]  # -> [T, C]
    weight: Tensor
    expand: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]  # rows [n, C] and the weight -> k [n, Hk, D] and v [n, Hk, Dv]


class Exchange(Protocol):
    """The access patterns of the mixers along the stream. T is the number of this rank's tokens."""

    def attention(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        seq: "Sequence",
        *,
        scale: float,
        mask: Mask = FULL,
        score: Score = PLAIN,
        sinks: Tensor | None = None,
        latent: Latent | None = None,
    ) -> Tensor:
        """Softmax attention inside documents under a mask: q [T, H, D], k [T, Hk, D], v [T, Hk, Dv], sinks [H] -> [T, H, Dv]."""
        ...

    def short_conv(self, x: Tensor, weight: Tensor, seq: "Sequence", activation: str | None = "silu") -> Tensor:
        """Causal depthwise convolution inside documents, then SiLU or nothing: x [T, C], weight [C, W] -> [T, C]."""
        ...

    def before(self, x: Tensor, seq: "Sequence") -> Tensor:
        """x [T, C] -> the row before each in its document, zeros before the first."""
        ...

    def halo(self, x: Tensor, seq: "Sequence", reach: int) -> tuple[Tensor, Tensor | None]:
        """x [T, C] -> x, and the `reach` rows before each of `parts` [N, reach, C], zeros before a document; None: all documents begin here."""
        ...

    @property
    def whole(self) -> bool:
        """Whether this context rank holds the whole stream."""
        ...

    def parts(self, seq: "Sequence") -> list[Part]:
        """Each run of one document among this rank's tokens, and where its keys are in what `gather` gives."""
        ...

    def gather(self, x: Tensor, seq: "Sequence", units: Callable[[int], int] = ...) -> Tensor:
        """For what chooses among all earlier keys: x [T, C] -> of each document here its rows up to this rank's last part of it, one document after
        another. units: where a row is not a token, the rows that the first so many tokens of a document have; they are with the last token's."""
        ...

    def recurrence(self, inputs: Recurrence, seq: "Sequence") -> Tensor:
        """The outputs of a recurrence inside documents [T, ...]."""
        ...

    def sum(self, x: Tensor) -> Tensor:
        """Sum over every rank that holds tokens of this micro-batch (tensor and context ranks). No gradient."""
        ...

    # For prefill and decoding of N documents, without gradients. Every context rank decodes the same tokens, from recurrent
    # states that all of them have and from its own part of the keys and values.

    def runs(self, seq: "Sequence") -> list[tuple[int, int, int]]:
        """(document, its first token's place there, tokens) for each run of one document among this context rank's tokens, in their order."""
        ...

    def last(self, x: Tensor, seq: "Sequence", count: int) -> Tensor:
        """x [T, C] -> the last `count` rows of each document [N, count, C], zeros before its beginning; on every context rank."""
        ...

    def last_hidden(self, x: Tensor, seq: "Sequence") -> Tensor:
        """What lies between blocks, [T / tensor ranks, hidden] -> its row of each document's last token [N / tensor ranks, hidden]."""
        ...

    def final_recurrence(self, inputs: Recurrence, seq: "Sequence") -> tuple[Tensor, Tensor]:
        """As `recurrence`, and the state after each document [N, ...] (float32 or wider) on every context rank."""
        ...

    def decode_attention(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        behind: Tensor,
        *,
        scale: float,
        score: Score = PLAIN,
        sinks: Tensor | None = None,
        seen: Tensor | None = None,
    ) -> Tensor:
        """One query per document, q [N, H, D], over the keys k [N, L, Hk, D], v [N, L, Hk, Dv] of all context ranks, which are behind [N, L]
        it by so much (negative: it does not see them), and sinks [H] -> [N, H, Dv]. seen [N, H, L] or [N, Hk, L]: which of these keys a head sees,
        or the heads of a K/V head; None: all."""
        ...

    def merged(self, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
        """Attention of one query per document over the keys of this context rank, out [N, H, Dv] and lse [N, H] -> over those of all."""
        ...

    def best(self, scores: Tensor, numbers: Tensor, count: int) -> Tensor:
        """Of the keys or blocks that context ranks have, scores [..., n] in float32 or wider (-inf: none) and numbers [..., n], the numbers of the
        `count` of highest score [..., count], -1 where there are fewer; of a number that several ranks have the highest score counts."""
        ...

    def keeps(self, step: int) -> bool:
        """Whether this context rank keeps key and value of the step-th decoded token; exactly one does."""
        ...

    def takes(self, blocks: Tensor) -> Tensor:
        """Whether blocks with these numbers are this context rank's, where decoding has made them; each is exactly one's."""
        ...


class LocalExchange:
    """One rank holds the whole stream: nothing is exchanged."""

    def attention(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        seq: "Sequence",
        *,
        scale: float,
        mask: Mask = FULL,
        score: Score = PLAIN,
        sinks: Tensor | None = None,
        latent: Latent | None = None,
    ) -> Tensor:
        starts = seq.starts() if mask.placed else None
        return attention.attention(q, k, v, seq.cu_seqlens, scale=scale, mask=mask, starts=starts, score=score, sinks=sinks)

    def short_conv(self, x: Tensor, weight: Tensor, seq: "Sequence", activation: str | None = "silu") -> Tensor:
        return short_conv.short_conv(x, weight, seq.cu_seqlens, return_final_state=False, activation=activation)[0]

    def before(self, x: Tensor, seq: "Sequence") -> Tensor:
        return shifted(x, seq.cu_seqlens)

    def halo(self, x: Tensor, seq: "Sequence", reach: int) -> tuple[Tensor, Tensor | None]:
        return x, None

    @property
    def whole(self) -> bool:
        return True

    def parts(self, seq: "Sequence") -> list[Part]:
        return parts(seq.cu_seqlens, len(seq.positions))

    def gather(self, x: Tensor, seq: "Sequence", units: Callable[[int], int] = int) -> Tensor:
        return x

    def recurrence(self, inputs: Recurrence, seq: "Sequence") -> Tensor:
        return inputs.run(seq.cu_seqlens)[0]

    def sum(self, x: Tensor) -> Tensor:
        return x

    def runs(self, seq: "Sequence") -> list[tuple[int, int, int]]:
        return [(document, 0, tokens) for document, tokens in enumerate(seq.cu_seqlens.diff().tolist())]

    def last(self, x: Tensor, seq: "Sequence", count: int) -> Tensor:
        rows = seq.cu_seqlens[1:, None].long() + torch.arange(-count, 0)  # [N, count]
        outside = (rows < seq.cu_seqlens[:-1, None]).to(x.device, non_blocking=True)
        return x[rows.clamp(min=0).to(x.device, non_blocking=True)].masked_fill(outside.unsqueeze(-1), 0)

    def last_hidden(self, x: Tensor, seq: "Sequence") -> Tensor:
        return x[(seq.cu_seqlens[1:] - 1).to(x.device, torch.int64, non_blocking=True)]

    def final_recurrence(self, inputs: Recurrence, seq: "Sequence") -> tuple[Tensor, Tensor]:
        output, final = inputs.run(seq.cu_seqlens, final=True)
        assert final is not None
        return output, final

    def decode_attention(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        behind: Tensor,
        *,
        scale: float,
        score: Score = PLAIN,
        sinks: Tensor | None = None,
        seen: Tensor | None = None,
    ) -> Tensor:
        out, lse = attention.decode_attention(q, k, v, behind, scale=scale, score=score, seen=seen)
        return (out if sinks is None else attention.with_sinks(out, lse, sinks)[0]).to(q.dtype)

    def merged(self, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
        return out, lse

    def best(self, scores: Tensor, numbers: Tensor, count: int) -> Tensor:
        return best_numbers(*candidates(scores, numbers, count), count)

    def keeps(self, step: int) -> bool:
        return True

    def takes(self, blocks: Tensor) -> Tensor:
        return torch.ones_like(blocks, dtype=torch.bool)


@dataclass(frozen=True)
class Memory:
    """What an encoder gave for the documents of a stream, packed as they are: every rank has all of it.

    Over several ranks the gradient of `states` is on each what its own heads and tokens give: its sum over tensor and context ranks is the whole.
    """

    states: Tensor  # [M, width]
    cu_seqlens: Tensor  # [documents + 1] int32, on the host: the rows of each document of the whole stream; a document may have none

    @classmethod
    def of(cls, states: Tensor, lengths: list[int]) -> "Memory":
        """states [M, width], so many rows for each document."""
        return cls(states, torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32))


class Counted(NamedTuple):
    """Where a tail fills the stream up (`ltrain.parallel.context.layout`): the tokens before it, which alone count in losses and statistics."""

    stream: int  # of the whole stream
    here: int  # of this context rank's tokens, the first ones
    rows: int  # of this tensor rank's share of these, the first ones


class Tape:
    """What a recomputed block must not compute twice: routing decisions and the results of exchanges.

    The first forward records in order; the recomputation replays in the same order.
    """

    def __init__(self) -> None:
        self._saved: list[Any] = []
        self._next = 0  # what the replay gives next
        self._mode: str | None = None

    def contexts(self) -> tuple["_Mode", "_Mode"]:
        """For `torch.utils.checkpoint(context_fn=...)`: the first forward records, the recomputation replays."""
        return _Mode(self, "record"), _Mode(self, "replay")

    @property
    def replays(self) -> bool:
        """Whether what is kept has been computed before."""
        return self._mode == "replay"

    def keep(self, compute: Any) -> Any:
        """compute() now, or what it gave in the first forward."""
        if self._mode == "replay":
            self._next += 1
            return self._saved[self._next - 1]
        value = compute()
        if self._mode == "record":
            self._saved.append(value)
        return value


class _Mode(NamedTuple):
    """While it lasts a tape records or replays; more than once, for a graph that is kept may be replayed again."""

    tape: Tape
    mode: str

    def __enter__(self) -> None:
        self.tape._mode, self.tape._next = self.mode, 0

    def __exit__(self, *_: object) -> None:
        self.tape._mode = None


@dataclass
class Sequence:
    """This rank's part of one packed micro-batch, and what travels beside the hidden states."""

    cu_seqlens: Tensor  # [documents + 1] int32, on the host: document boundaries in the whole stream
    positions: Tensor  # [T] int64: each local token's position in its document (a cut document's rest continues)
    exchange: Exchange = field(default_factory=LocalExchange)
    tape: Tape = field(default_factory=Tape)
    aux_weight: float = 1.0  # what an auxiliary loss is multiplied with: 1 / micro-batches of the step
    metrics: dict[str, Tensor] = field(default_factory=dict)  # detached scalars, by name
    shared: dict[str, Any] = field(default_factory=dict)  # tensors that later layers read (shared K/V, top-k...)
    memory: Memory | None = None  # what cross-attention reads, in a forward or a prefill; None: no document has any
    counted: Counted | None = None  # None: all tokens do
    room: int = 0  # tokens that decoding will add to each document: prefill makes caches that much longer

    @property
    def tokens(self) -> int:
        """What a mean over the whole stream divides by."""
        return max(int(self.cu_seqlens[-1]) if self.counted is None else self.counted.stream, 1)

    def counted_parts(self) -> list[Part]:
        """As `Exchange.parts`, without the tail's."""
        return [part for part in self.exchange.parts(self) if self.counted is None or part.start < self.counted.here]

    def note(self, name: str, value: Tensor) -> None:
        """Add a layer's scalar to what the log shows under this name."""
        value = value.detach()
        self.metrics[name] = self.metrics[name] + value if name in self.metrics else value

    @classmethod
    def of(cls, lengths: list[int], device: torch.device | str = "cpu", exchange: Exchange | None = None) -> "Sequence":
        """A one-rank sequence of whole documents with these lengths."""
        cu = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
        positions = torch.cat([torch.arange(n) for n in lengths]) if lengths else torch.zeros(0, dtype=torch.int64)
        return cls(cu, positions.to(device), exchange or LocalExchange())

    @classmethod
    def step(cls, positions: Tensor, exchange: Exchange | None = None) -> "Sequence":
        """One token per document, for decoding: positions [documents], the same on every context rank."""
        return cls(torch.arange(len(positions) + 1, dtype=torch.int32), positions, exchange or LocalExchange())

    def starts(self) -> list[int]:
        """The position of each document's first token in this stream: not 0 for the rest of a document that an earlier stream cut. For a
        stream that this rank holds whole."""
        if "starts" not in self.shared:
            first = self.cu_seqlens[:-1].long().clamp(max=max(len(self.positions) - 1, 0)).to(self.positions.device)
            self.shared["starts"] = self.positions[first].tolist() if len(self.positions) else [0] * len(first)
        starts: list[int] = self.shared["starts"]
        return starts

    def with_tape(self) -> "Sequence":
        """The same sequence with a tape of its own: one recomputed block's. Metrics and shared tensors stay common."""
        return replace(self, tape=Tape())


def shifted(x: Tensor, cu_seqlens: Tensor, before: Tensor | None = None) -> Tensor:
    """x [T, C] -> the row before each in its segment, those of `before` [N, C] (None: zeros) before the first."""
    first, end = cu_seqlens[:-1].long(), cu_seqlens[1:]
    filled = (first < end).nonzero().squeeze(1)
    rows, filled = first[filled].to(x.device, non_blocking=True), filled.to(x.device, non_blocking=True)
    moved = torch.cat((torch.zeros_like(x[:1]), x[:-1]))
    return moved.index_fill(0, rows, 0.0) if before is None else moved.index_copy(0, rows, before[filled])
