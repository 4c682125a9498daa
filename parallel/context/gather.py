"""What a rank's documents have before its tokens, for queries that may choose any of it.

Where it is not known which keys a query takes before these have been seen (an indexer's, blocks chosen by their means),
all that it could take comes: of each document that a rank holds a part of, the rows up to that part's end, and no others.
They lie document after document, so that a choice is a row among them. What travels is a row for each token, or for
each block of them, which belongs to the rank of its last token.
"""

from collections.abc import Callable
from typing import NamedTuple

from ltrain.kernels.segments import Part
from ltrain.parallel.context.layout import Plan, Segment
from ltrain.parallel.context.rows import Piece, Rows

Units = Callable[[int], int]


class Gather(NamedTuple):
    rows: Rows
    parts: list[Part]  # this rank's segments among the gathered rows, where each is a token


def _last(plan: Plan, rank: int) -> dict[int, Segment]:
    """Of each document with an earlier part elsewhere in the stream, its last segment on this rank."""
    return {span.head.document: span.head for span in plan.of(rank) if span.head is not None}


def _pieces(plan: Plan, reader: int, owner: int, units: Units, slots: dict[int, int], rows: dict[int, int]) -> list[Piece]:
    """slots: document -> where its rows begin with the reader; rows: where a segment's do with the owner; either is known to its rank alone."""
    last, pieces = _last(plan, reader), []
    for tail in (span.tail for span in plan.of(owner)):
        if tail is not None and tail.document in last and tail.stop <= last[tail.document].start:
            low, high = units(tail.start - tail.begin), units(tail.stop - tail.begin)
            start = rows.get(tail.local, 0)
            if low < high:
                pieces.append(Piece(slots.get(tail.document, 0) + low, start, start + high - low))
    return pieces


def gather(plan: Plan, units: Units = int) -> Gather:
    """Who sends whom which rows. Every rank makes the same choice for a pair of ranks.

    units: how many rows the first so many tokens of a document have; int: one each.
    """
    rank, others = plan.layout.rank, [r for r in range(plan.layout.size) if r != plan.layout.rank]
    ends = {s.document: units(s.stop - s.begin) for s in plan.segments}  # up to the end of this rank's last part of it
    slots, count = {}, 0
    for document, length in ends.items():
        slots[document], count = count, count + length
    rows: dict[int, int] = {}
    local: list[Piece] = []
    at = 0
    for s in plan.segments:
        low, high = units(s.start - s.begin), units(s.stop - s.begin)
        rows[s.local] = at
        piece = Piece(slots[s.document] + low, at, at + high - low)
        if local and local[-1].window.stop == piece.slot:  # one copy for all the whole documents in a row
            piece = Piece(local[-1].slot, local.pop().start, piece.stop)
        local.append(piece)
        at += high - low
    parts = [Part(*s.rows, slots[s.document], slots[s.document] + s.start - s.begin) for s in plan.segments]
    read = {r: pieces for r in others if (pieces := _pieces(plan, rank, r, units, slots, {}))}
    sent = {r: pieces for r in others if (pieces := _pieces(plan, r, rank, units, {}, rows))}
    return Gather(Rows("gather", count, local, read, sent), parts)
