"""The last few inputs of a document's earlier part, for what looks a fixed distance back.

A convolution of width W needs W - 1 tokens from before each span that continues a document: W - 1 rows for each such
cut, from one earlier span or, where spans are shorter than that, from several. The backward returns their gradient.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ltrain.model.sequence import Tape
from ltrain.parallel.context.layout import Plan
from ltrain.parallel.context.messages import Messages


class Piece(NamedTuple):
    """Rows of one rank that belong before a segment of another."""

    segment: int  # of the reader
    slot: int  # where they lie in the segment's window of `reach` tokens
    start: int  # rows of the owner
    stop: int

    @property
    def window(self) -> slice:
        return slice(self.slot, self.slot + self.stop - self.start)


class Halo(NamedTuple):
    reach: int
    segments: int
    local: list[Piece]
    read: dict[int, list[Piece]]  # owner -> what it sends here
    sent: dict[int, list[Piece]]  # reader -> what this rank sends it

    @property
    def needed(self) -> bool:
        return bool(self.local or self.read or self.sent)


def _pieces(plan: Plan, reader: int, owner: int, reach: int) -> list[Piece]:
    pieces = []
    for span in plan.of(reader):
        head = span.head
        if head is None:
            continue
        low = max(head.begin, head.start - reach)
        segment = plan.index(head) if reader == plan.layout.rank else -1
        for other in plan.of(owner):
            start, stop = max(low, other.start), min(head.start, other.stop)
            if start < stop:
                local = other.local + start - other.start
                pieces.append(Piece(segment, reach - (head.start - start), local, local + stop - start))
    return pieces


def halo(plan: Plan, reach: int) -> Halo:
    """Who sends whom which rows so that every segment has the `reach` tokens of its document before it."""
    rank, others = plan.layout.rank, [r for r in range(plan.layout.size) if r != plan.layout.rank]
    read = {r: pieces for r in others if (pieces := _pieces(plan, rank, r, reach))}
    sent = {r: pieces for r in others if (pieces := _pieces(plan, r, rank, reach))}
    return Halo(reach, len(plan.segments), _pieces(plan, rank, rank, reach), read, sent)


def _rows(pieces: list[Piece]) -> int:
    return sum(p.stop - p.start for p in pieces)


def _unpack(flat: Tensor, pieces: list[Piece], width: int) -> list[Tensor]:
    """One flat message -> each piece's rows [n, width]."""
    return list(flat.view(-1, width).split([p.stop - p.start for p in pieces]))


class HaloExchange(torch.autograd.Function):
    """x [T, C] -> x, and the `reach` inputs before each local segment [segments, reach, C] (zeros before a document).

    x passes through so that a rank that only sends still has a backward in which its gradient comes home.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, plan: Halo, messages: Messages, tape: Tape) -> tuple[Tensor, Tensor]:
        width = x.shape[1]

        def exchange() -> dict[int, Tensor]:
            sends = {r: torch.cat([x[p.start : p.stop] for p in pieces]).flatten() for r, pieces in plan.sent.items()}
            receives = {r: _rows(pieces) * width for r, pieces in plan.read.items()}
            return messages.post("halo", sends, receives, dtype=x.dtype, device=x.device).wait()

        arrived: dict[int, Tensor] = tape.keep(exchange)
        state = x.new_zeros(plan.segments, plan.reach, width)
        for piece in plan.local:
            state[piece.segment, piece.window] = x[piece.start : piece.stop]
        for r, pieces in plan.read.items():
            for piece, rows in zip(pieces, _unpack(arrived[r], pieces, width), strict=True):
                state[piece.segment, piece.window] = rows
        ctx.halo = plan, messages
        return x.view_as(x), state

    @staticmethod
    def backward(ctx: Any, dx: Tensor, dstate: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        plan, messages = ctx.halo
        width = dx.shape[1]
        sends = {r: torch.cat([dstate[p.segment, p.window] for p in pieces]).flatten() for r, pieces in plan.read.items()}
        receives = {r: _rows(pieces) * width for r, pieces in plan.sent.items()}
        arrived = messages.post("halo", sends, receives, dtype=dstate.dtype, device=dstate.device).wait()
        dx = dx.clone()
        for piece in plan.local:
            dx[piece.start : piece.stop] += dstate[piece.segment, piece.window]
        for r, pieces in plan.sent.items():
            for piece, rows in zip(pieces, _unpack(arrived[r], pieces, width), strict=True):
                dx[piece.start : piece.stop] += rows
        return dx, None, None, None
