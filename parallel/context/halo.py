"""The last few inputs of a document's earlier part, for what looks a fixed distance back.

A convolution of width W needs W - 1 tokens from before each span that continues a document: W - 1 rows for each such
cut, from one earlier span or, where spans are shorter than that, from several.
"""

from ltrain.parallel.context.layout import Plan
from ltrain.parallel.context.rows import Piece, Rows


def _pieces(plan: Plan, reader: int, owner: int, reach: int) -> list[Piece]:
    pieces = []
    for span in plan.of(reader):
        head = span.head
        if head is None:
            continue
        low = max(head.begin, head.start - reach)
        window = plan.index(head) * reach if reader == plan.layout.rank else 0  # where the rows go is the reader's affair
        for other in plan.of(owner):
            start, stop = max(low, other.start), min(head.start, other.stop)
            if start < stop:
                local = other.local + start - other.start
                pieces.append(Piece(window + reach - (head.start - start), local, local + stop - start))
    return pieces


def halo(plan: Plan, reach: int) -> Rows:
    """Who sends whom which rows so that every segment has the `reach` tokens of its document before it: [segments x reach] rows."""
    rank, others = plan.layout.rank, [r for r in range(plan.layout.size) if r != plan.layout.rank]
    read = {r: pieces for r in others if (pieces := _pieces(plan, rank, r, reach))}
    sent = {r: pieces for r in others if (pieces := _pieces(plan, r, rank, reach))}
    return Rows("halo", len(plan.segments) * reach, _pieces(plan, rank, rank, reach), read, sent)
