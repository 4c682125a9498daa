"""Pairs as intervals, for kernels that go through blocks of rows: which rows of the other side each row of a block sees.

Query row r of a pair sees the key rows from r + left to r + right that are the pair's; key row c is seen by the query rows from c - right to
c - left that are the pair's. So one plan serves a kernel over blocks of queries and, its sides exchanged, one over blocks of keys.
Everything is made on the host, with no loop over pairs.
"""

from collections.abc import Iterable
from functools import lru_cache
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ltrain.kernels.attention.pairs import Pair

SPAN = 7  # numbers of a span
RANGE = 4  # and of a range


class Plan(NamedTuple):
    """What the programs of a kernel read, int32 on the device.

    A span is what one pair gives rows of a block: rows [start, stop) see of the other side's rows [first, last) those from row + left to
    row + right, and are `apart` of `Pair` from them. A range is a stretch [begin, end) of the other side that a run of spans [from, to) covers
    without a gap, no two of which hold the same row: documents far shorter than a block share the tiles of one range.
    """

    order: Tensor  # [blocks]: blocks, those with the most to do first
    bounds: Tensor  # [blocks + 1]: where a block's ranges begin
    ranges: Tensor  # [n, RANGE]: begin, end, from, to
    spans: Tensor  # [m, SPAN]: start, stop, first, last, left, right, apart


def spans_of(pairs: Iterable[Pair]) -> np.ndarray:
    """[pairs, SPAN] int64, of the queries; left and right are no farther than the keys reach."""
    table = np.fromiter(chain.from_iterable(pairs), np.int64).reshape(-1, len(Pair._fields))
    q_start, q_len, k_start, k_len, causal, window, gap = table.T
    q_stop, k_stop, apart = q_start + q_len, k_start + k_len, k_start - q_start + k_len - q_len + gap
    all_left, all_right = k_start - q_stop, k_stop - q_start
    left = np.where(window > 0, np.maximum(apart - window + 1, all_left), all_left)
    right = np.where(causal > 0, apart - gap, np.where(window > 0, apart + window - 1, all_right))
    return np.stack((q_start, q_stop, k_start, k_stop, left, np.minimum(right, all_right), apart), 1)


def exchanged(spans: np.ndarray) -> np.ndarray:
    """The same of the keys."""
    q_start, q_stop, k_start, k_stop, left, right, apart = spans.T
    return np.stack((k_start, k_stop, q_start, q_stop, -right, -left, apart), 1)


def arrange(spans: np.ndarray, rows: int, block: int) -> tuple[np.ndarray, ...]:
    """The numbers of a `Plan` for rows [0, rows), `block` of them at a time."""
    blocks = -(-rows // block)
    begins = spans[:, 0] // block
    counts = (spans[:, 1] - 1) // block - begins + 1
    spans, where = np.repeat(spans, counts, 0), np.repeat(begins - np.cumsum(counts) + counts, counts) + np.arange(counts.sum())
    spans[:, 0], spans[:, 1] = np.maximum(spans[:, 0], where * block), np.minimum(spans[:, 1], (where + 1) * block)
    begin, end = np.maximum(spans[:, 2], spans[:, 0] + spans[:, 4]), np.minimum(spans[:, 3], spans[:, 1] + spans[:, 5])
    sorted_ = np.lexsort((begin, spans[:, 0], where))
    sorted_ = sorted_[(begin < end)[sorted_]]
    spans, where, begin, end = spans[sorted_], where[sorted_], begin[sorted_], end[sorted_]
    # each touches the one before, so that together they leave no gap: the joint range is never longer than its spans' are one by one
    joins = (where[1:] == where[:-1]) & (spans[1:, 0] >= spans[:-1, 1]) & (begin[1:] <= end[:-1]) & (end[1:] >= begin[:-1])
    first = np.flatnonzero(np.append(True, ~joins)[: len(spans)])
    if len(first):
        begin, end = np.minimum.reduceat(begin, first), np.maximum.reduceat(end, first)
    ranges = np.stack((begin, end, first, np.append(first[1:], len(spans))[: len(first)]), 1)
    work = np.bincount(where[first], end - begin, blocks)
    return np.argsort(-work, kind="stable"), np.searchsorted(where[first], np.arange(blocks + 1)), ranges, spans


@lru_cache(maxsize=256)  # all layers of a micro-batch share it
def plan(pairs: tuple[Pair, ...], keys: bool, rows: int, block: int, device: torch.device) -> Plan:
    """For a kernel over blocks of queries, or of keys, of which there are `rows`. No pair is empty."""
    spans = spans_of(pairs)
    parts = arrange(exchanged(spans) if keys else spans, rows, block)
    # one copy to the device; each begins at a multiple of 16 bytes, as tensors of their own would: Triton compiles once for all
    starts = np.cumsum([0, *(-(-part.size // 4) * 4 for part in parts)])
    flat = np.zeros(max(starts[-1], 4), np.int32)
    for part, start in zip(parts, starts, strict=False):
        flat[start : start + part.size] = part.ravel()
    on_device = torch.from_numpy(flat).to(device, non_blocking=True)
    found: list[Any] = [on_device[start : start + part.size].view(part.shape) for part, start in zip(parts, starts, strict=False)]
    return Plan(*found)
