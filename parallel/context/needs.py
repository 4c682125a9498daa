"""What must travel, by what a mixer says it needs and by where documents are cut: worked out apart from the plans that make it travel."""

import numpy as np

from ltrain.kernels.attention import Mask
from ltrain.model.mixers.base import ExchangeNeed
from ltrain.parallel.context.layout import ContextLayout
from ltrain.parallel.context.scan import LONGEST


def sent_bytes(need: ExchangeNeed, layout: ContextLayout, documents: list[int], itemsize: int, inside: int = 1) -> int:
    """What all ranks together send in a forward: each row, or map of a span, once to each rank that needs it.

    layout: of this stream. documents: their lengths. itemsize: bytes of a number as the mixer has it; states have at least float32.
    inside: so many neighbours are a node, and only what crosses between nodes counts.
    """
    cuts = np.cumsum([0, *documents])
    spans = sorted((start, stop, rank) for rank in range(layout.size) for start, stop in layout.spans(rank) if start < stop)
    begins = [int(cuts[np.searchsorted(cuts, start, side="right") - 1]) for start, _, _ in spans]  # of the document at each span's first token
    if need.kind == "scan":
        nodes = [(start, stop, rank // inside) for start, stop, rank in spans]
        return _numbers_of_maps(need, cuts, spans, nodes, begins) * max(itemsize, 4)
    rows = np.ones(layout.tokens, dtype=np.int64)  # that are there with each token
    if need.units is not int:
        for begin, end in zip(cuts, cuts[1:], strict=False):
            rows[begin:end] = np.diff([need.units(n) for n in range(int(end - begin) + 1)])
    total = 0
    for rank in range(layout.size):
        own = [(start, stop, begin) for (start, stop, owner), begin in zip(spans, begins, strict=True) if owner == rank]
        wanted = np.zeros((len(own) if need.kind == "halo" else 1, layout.tokens), dtype=bool)  # of a halo each span gets its own copy
        for n, (start, stop, begin) in enumerate(own):
            for first, last in _seen(need, start, begin) if need.mask.causal else _seen_both_ways(need.mask, start, stop, cuts):
                wanted[n if need.kind == "halo" else 0, first:last] = True
        for start, stop, owner in spans:
            if owner // inside == rank // inside:
                wanted[:, start:stop] = False
        total += int((wanted * rows).sum())
    return need.width * total * itemsize


def _seen(need: ExchangeNeed, start: int, begin: int) -> list[tuple[int, int]]:
    """Of a document's rows before `start`, those that what comes from there on sees."""
    if need.kind == "halo":
        return [(max(begin, start - need.reach), start)]
    mask = need.mask
    if mask.chunk:
        return [(start - (start - begin) % mask.chunk, start)]
    if not mask.window:
        return [(begin, start)]
    return [(begin, min(begin + mask.anchors, start)), (max(begin, start - mask.window + 1), start)]


def _seen_both_ways(mask: Mask, start: int, stop: int, cuts: "np.ndarray") -> list[tuple[int, int]]:
    """Of the documents of a span's first and last token the rows that its tokens see under a mask that is not causal."""
    found = []
    for token in (start, stop - 1):
        document = int(np.searchsorted(cuts, token, side="right"))
        begin, end = int(cuts[document - 1]), int(cuts[document])
        first, last = max(start, begin), min(stop, end)
        if mask.chunk:
            found.append((first - (first - begin) % mask.chunk, min(end, last + (begin - last) % mask.chunk)))
        elif not mask.window or first - begin < mask.globals:
            found.append((begin, end))
        else:
            found += [(begin, min(begin + mask.globals, end)), (max(begin, first - mask.window + 1), min(end, last + mask.window - 1))]
    return found


def _numbers_of_maps(
    need: ExchangeNeed, cuts: "np.ndarray", spans: list[tuple[int, int, int]], nodes: list[tuple[int, int, int]], begins: list[int]
) -> int:
    """Where a document crosses more than LONGEST spans, maps are composed: in round i with those of the span 2^i before. nodes: as spans, by node."""
    earlier = [sum(stop > begin for _, stop, _ in spans[:n]) for n, begin in enumerate(begins)]  # spans of that document
    # whose document came in and goes on
    inside = [e > 0 and not np.any((cuts > start) & (cuts <= stop)) for e, (start, stop, _) in zip(earlier, spans, strict=True)]
    if max(earlier) <= LONGEST:
        sent = {(n - back, spans[n][2]) for n, e in enumerate(earlier) for back in range(1, e + 1) if nodes[n - back][2] != nodes[n][2]}
        return sum(need.width + need.map * inside[n] for n, _ in sent)
    numbers = sum(need.width for n, e in enumerate(earlier) if e and nodes[n - 1][2] != nodes[n][2])
    left = [e * i for e, i in zip(earlier, inside, strict=True)]  # spans that a span's map has still to meet
    reach = 1
    while reach <= max(left):
        met = [n for n, e in enumerate(left) if e >= reach and nodes[n - reach][2] != nodes[n][2]]
        numbers += sum(need.width + need.map * (left[n - reach] >= reach) for n in met)
        reach *= 2
    return numbers
