"""Packed documents over ranks with equal tokens and, as nearly as may be, equal work.

Every rank must have the same number of tokens, which balances all that costs the same for each; what a token costs in attention grows with its
place in its document. Long documents are cut into 2 P pieces of which rank r gets the r-th and the r-th last (as in zigzag, each document for
itself); shorter ones stay whole, the costliest first to the rank that has least to do, and need no exchange. Which documents count as long is
tried, and that is taken with which the busiest rank's work and its share of the exchange come to least.
"""

from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import numpy as np

Spans = tuple[tuple[int, int], ...]  # [start, stop) in the stream, in order
# A row that a rank must have of another costs about as much as seeing so many keys: 8 KB there and back at 300 GB/s, three quarters of it behind
# computation, against 16 heads of 128 at 400 TFLOP/s.
KEYS = 100
CHOICES = 12  # of what counts as long
KEPT = 256  # streams whose layout is remembered


@dataclass(frozen=True)
class Cost:
    """What the first so many tokens of a document cost, in units of one's own: between the tabled lengths the cost of a token is interpolated."""

    lengths: tuple[int, ...]
    each: tuple[float, ...]  # of a token, on average over a document of that length

    @classmethod
    def of(cls, document: Callable[[int], float], longest: int) -> "Cost":
        """document: what one of so many tokens costs."""
        lengths = sorted({*np.geomspace(1, max(longest, 2), 64).round().astype(int).tolist()})
        return cls(tuple(lengths), tuple(document(n) / n for n in lengths))

    def until(self, tokens: int) -> float:
        # interpolated by hand: numpy turns the table into arrays for every single number, of which a stream may ask for a million
        after = bisect_left(self.lengths, tokens)
        if after in (0, len(self.lengths)):
            return tokens * self.each[min(after, len(self.each) - 1)]
        (x0, x1), (y0, y1) = self.lengths[after - 1 : after + 1], self.each[after - 1 : after + 1]
        return tokens * (y0 + (y1 - y0) * (tokens - x0) / (x1 - x0))

    @property
    def key(self) -> float:
        """What it costs a token to see one key more."""
        return 2 * (self.each[-1] - self.each[0]) / self.lengths[-1]

    def between(self, start: int, stop: int) -> float:
        return self.until(stop) - self.until(start)


FLAT = Cost((1, 1 << 30), (1.0, 1.0))  # every token costs the same
CAUSAL = Cost((1, 1 << 30), (1.0, (1 << 29) + 0.5))  # a token sees those before it: the mean of 1..n is (n + 1) / 2


@dataclass(frozen=True)
class Balance:
    spans: tuple[Spans, ...]  # of each rank
    work: tuple[float, ...]  # of each rank
    rows: int  # that ranks must have of others, where each token sees all before it

    @property
    def imbalance(self) -> float:
        """The busiest rank's work over the mean, less one."""
        mean = sum(self.work) / len(self.work)
        return max(self.work) / mean - 1 if mean else 0.0


Pieces = list[tuple[int, int, int]]  # document's begin, start, stop


def weigh(spans: list[Pieces], cost: Cost) -> tuple[tuple[float, ...], int]:
    """The work of each rank with these pieces, and the rows that they must have of others."""
    work, rows = [], 0
    for pieces in spans:
        work.append(sum(cost.between(start - begin, stop - begin) for begin, start, stop in pieces))
        last: dict[int, tuple[int, int]] = {}  # document -> the last piece's start, and tokens of it here
        before: dict[int, int] = {}  # document -> tokens of it here before the last piece
        for begin, start, stop in sorted(pieces):
            before[begin] = last[begin][1] if begin in last else 0
            last[begin] = start, before[begin] + stop - start
        rows += sum(start - begin - before[begin] for begin, (start, _) in last.items())
    return tuple(work), rows


def _assign(documents: list[tuple[int, int]], size: int, tokens: int, long: int, cost: Cost) -> list[Pieces]:
    """documents of at least `long` tokens in 2 size pieces, the others whole as far as equal tokens allow."""
    ranks: list[Pieces] = [[] for _ in range(size)]
    room, work = [tokens // size] * size, [0.0] * size

    def give(rank: int, begin: int, start: int, stop: int) -> None:
        ranks[rank].append((begin, start, stop))
        room[rank] -= stop - start
        work[rank] += cost.between(start - begin, stop - begin)

    rest: Pieces = []
    for begin, end in documents:
        piece = (end - begin) // (2 * size) if end - begin >= long else 0
        for n in range(2 * size if piece else 0):
            give(min(n, 2 * size - 1 - n), begin, begin + n * piece, begin + (n + 1) * piece)
        if begin + 2 * size * piece < end:
            rest.append((begin, begin + 2 * size * piece, end))
    left: Pieces = []
    for begin, start, stop in sorted(rest, key=lambda p: -cost.between(p[1] - p[0], p[2] - p[0])):
        fitting = [rank for rank in range(size) if room[rank] >= stop - start]
        if fitting:
            give(min(fitting, key=lambda rank: (work[rank], rank)), begin, start, stop)
        else:
            left.append((begin, start, stop))
    for begin, start, stop in left:  # what is whole nowhere
        while start < stop:
            rank = max(range(size), key=lambda rank: (room[rank], -rank))
            part = min(room[rank], stop - start)
            give(rank, begin, start, start + part)
            start += part
    return ranks


def joined(runs: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """The same numbers once each, in order: runs [start, stop) that touch or overlap as one."""
    once: list[tuple[int, int]] = []
    for start, stop in sorted(runs):
        if once and start <= once[-1][1]:
            once[-1] = once[-1][0], max(once[-1][1], stop)
        else:
            once.append((start, stop))
    return once


@lru_cache(maxsize=KEPT)
def balance(cuts: tuple[int, ...], size: int, cost: Cost) -> Balance:
    """cuts: boundaries of the documents; the last one, the tokens of the stream, is a multiple of size. Every rank finds the same."""
    documents = [(a, b) for a, b in pairwise(cuts) if b > a]
    found = sorted({b - a for a, b in documents if b - a >= 2 * size}, reverse=True)
    choices = [cuts[-1] + 1, *found[:: max(1, len(found) // CHOICES)], *found[-1:]]
    tried = []
    for long in dict.fromkeys(choices):
        pieces = _assign(documents, size, cuts[-1], long, cost)
        tried.append((*weigh(pieces, cost), pieces))
    work, rows, pieces = min(tried, key=lambda t: (max(t[0]) + KEYS * cost.key * t[1] / size, t[1]))
    return Balance(tuple(tuple(joined([(start, stop) for _, start, stop in p])) for p in pieces), work, rows)
