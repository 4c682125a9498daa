"""Rows of some tokens handed to the ranks that ask for them, and their gradients back."""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ltrain.kernels.segments import accumulator
from ltrain.model.sequence import Tape
from ltrain.parallel.context import wire
from ltrain.parallel.context.messages import Messages, Transit


class Piece(NamedTuple):
    """Rows of one rank that another one, or itself, wants."""

    slot: int  # where they lie with the reader
    start: int  # rows of the owner
    stop: int

    @property
    def window(self) -> slice:
        return slice(self.slot, self.slot + self.stop - self.start)


class Rows(NamedTuple):
    """Which rows go where."""

    kind: str  # in Messages.bytes
    total: int  # rows that this rank ends up with
    local: list[Piece]
    read: dict[int, list[Piece]]  # owner -> what it sends here
    sent: dict[int, list[Piece]]  # reader -> what this rank sends it

    @property
    def needed(self) -> bool:
        return bool(self.local or self.read or self.sent)


def _count(pieces: list[Piece]) -> int:
    return sum(p.stop - p.start for p in pieces)


def _unpack(flat: Tensor, pieces: list[Piece], width: int) -> list[Tensor]:
    """One flat message -> each piece's rows [n, width]."""
    return list(flat.view(-1, width).split([p.stop - p.start for p in pieces]))


class RowExchange(torch.autograd.Function):
    """x [T, C] -> x, and the rows that this rank wants [total, C], zeros where nobody has one.

    x passes through so that a rank that only sends still has a backward in which its gradient comes home. fp8: see `wire`.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, plan: Rows, messages: Messages, tape: Tape, fp8: bool = False) -> tuple[Tensor, Tensor]:
        width = x.shape[1]

        def posted() -> Transit:
            sent = {r: torch.cat([x[p.start : p.stop] for p in pieces]) for r, pieces in plan.sent.items()}
            sends = {r: (wire.pack(rows) if fp8 else rows).flatten() for r, rows in sent.items()}
            receives = {r: _count(pieces) * (wire.width(width) if fp8 else width) for r, pieces in plan.read.items()}
            return messages.post(plan.kind, sends, receives, dtype=torch.uint8 if fp8 else x.dtype, device=x.device)

        transit = None if tape.replays else posted()
        wanted = x.new_zeros(plan.total, width)
        for piece in plan.local:  # while the others' are under way
            wanted[piece.window] = x[piece.start : piece.stop]

        def received() -> dict[int, Tensor]:
            assert transit is not None  # a replay has what was kept
            arrived = transit.wait()
            return {r: wire.unpack(flat.view(-1, wire.width(width)), width, x.dtype) for r, flat in arrived.items()} if fp8 else arrived

        arrived: dict[int, Tensor] = tape.keep(received)
        for r, pieces in plan.read.items():
            for piece, rows in zip(pieces, _unpack(arrived[r], pieces, width), strict=True):
                wanted[piece.window] = rows
        ctx.rows = plan, messages
        return x.view_as(x), wanted

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dx: Tensor, dwanted: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        plan, messages = ctx.rows
        width = dx.shape[1]
        sends = {r: torch.cat([dwanted[p.window] for p in pieces]).flatten() for r, pieces in plan.read.items()}
        receives = {r: _count(pieces) * width for r, pieces in plan.sent.items()}
        transit = messages.post(plan.kind, sends, receives, dtype=dwanted.dtype, device=dwanted.device)
        total = dx.to(accumulator(dx.dtype), copy=True)
        for piece in plan.local:
            total[piece.start : piece.stop] += dwanted[piece.window]
        arrived = transit.wait()
        for r, pieces in plan.sent.items():
            for piece, rows in zip(pieces, _unpack(arrived[r], pieces, width), strict=True):
                total[piece.start : piece.stop] += rows
        return total.to(dx.dtype), None, None, None, None
