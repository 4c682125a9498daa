"""Which blocks a query selects, on a GPU: launches of the programs of `triton_kernels_choice`.

Scores of blocks are made for so many queries at a time that they take at most SCORES numbers, and only for queries that have more blocks
than they select. Making attention to compressed blocks again from its log-sum-exp takes one product for each of them, a quarter of what the
attention itself took forwards.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ltrain.kernels.segments import Part, ceil_div, power_of_two
from ltrain.kernels.sparse_attention import triton_kernels_choice as kernels
from ltrain.kernels.sparse_attention.triton_blocks import Layout, cut, numbered, padded
from ltrain.kernels.sparse_attention.triton_select import beyond

SCORES = 1 << 26  # at a time: 256 MiB
READ = 4096  # of them, by a program that chooses
# rows (queries) and columns (compressed blocks, or blocks) of a tile, warps, and how many loads are under way; of float32
IMPORTANCE, EXACT_IMPORTANCE = (64, 128, 8, 2), (32, 32, 8, 1)
PRODUCTS, EXACT_PRODUCTS = (128, 64, 8, 2), (32, 32, 8, 1)


def _everything(layout: Layout, block: int, selections: int, top: int) -> Tensor:
    """[T, selections, top] int32: all blocks up to a query's own, of which those of most documents are fewer than top."""
    own = (layout.highs - 1 - layout.starts[layout.bases]) // block
    slots = torch.arange(top, device=own.device, dtype=torch.int32)
    found = slots.where(slots <= own.unsqueeze(1), -1)
    return found.unsqueeze(1).repeat(1, selections, 1)


def _runs(parts: list[Part], block: int, selections: int, top: int) -> Iterator[tuple[slice, int, int, int]]:
    """The queries that have more than top blocks, some of a document at a time: which they are, the first one's place, where the document's
    keys begin, and the numbers that a row of scores has."""
    for part in (beyond(part, top * block) for part in parts if part.start < part.stop):
        before = part.first - part.begin
        stride = ceil_div(ceil_div(before + part.stop - part.start, block), 16) * 16
        step = max(SCORES // (selections * stride) // 128 * 128, 128)
        for start in range(part.start, part.stop, step):
            yield slice(start, min(start + step, part.stop)), before + start - part.start, part.begin, stride


def _options(q: Tensor, tile: tuple[int, int, int, int], exact: tuple[int, int, int, int]) -> dict[str, Any]:
    wide = q.dtype == torch.float32
    rows, columns, warps, stages = exact if wide else tile
    sizes = {"H": q.shape[1], "D": q.shape[2], "BD": padded(q.shape[2])}
    return {**sizes, "ROWS": rows, "COLUMNS": columns, "DOT": "ieee" if wide else "tf32", "num_warps": warps, "num_stages": stages}


def _best(scores: Tensor, found: Tensor, place: int, block: int, first: int, local: int) -> None:
    """scores [R, S, stride] -> found [R, S, top]"""
    rows, selections, stride = scores.shape
    width = power_of_two(stride)
    together = max(READ // width, 1)
    kernels.best_blocks[(ceil_div(rows * selections, together),)](
        *(scores, found, rows * selections, place, stride, selections, found.shape[2], block, first, local),
        ROWS=together,
        B=width,
        num_warps=min(max(width // 1024, 4), 16),
    )


@torch.no_grad()
def important_blocks(q: Tensor, kc: Tensor, lse: Tensor, parts: list[Part], scale: float, length: int, stride: int, block: int, top: int) -> Tensor:
    """What NSA selects: q [T, H, D], kc [n, Hk, D] and lse [T, H] of the compressed branch -> [T, Hk, top] int32, -1 where there are fewer."""
    q, kc, lse, kv_heads = q.contiguous(), kc.contiguous(), lse.contiguous(), kc.shape[1]
    tokens = cut(tuple(parts), len(q), block, q.device)
    top = min(top, max(tokens.most, 1))
    found = _everything(tokens, block, kv_heads, top)
    options = _options(q, IMPORTANCE, EXACT_IMPORTANCE)
    # so many that the compressed blocks of all of them fit into a tile of columns, where they can
    together = min(max(((options["COLUMNS"] - 1) * stride - length) // block, 1), 128)
    options |= {"HK": kv_heads, "LENGTH": length, "STEP": stride, "BLOCK": block, "TOGETHER": together, "BJ": padded(together)}
    options["EXACT"] = q.dtype == torch.float32 or length > 256 * stride
    of_document = numbered(parts, lambda n: max((n - length) // stride + 1, 0))
    for rows, place, begin, width in _runs(parts, block, kv_heads, top):
        n = rows.stop - rows.start
        scores = torch.empty(n, kv_heads, width, dtype=torch.float32, device=q.device)
        first, count = of_document[begin]
        grid = ceil_div(width, together), ceil_div(n, options["ROWS"]), kv_heads
        kernels.importance[grid](q[rows], kc[first : first + count], lse[rows], scores, n, place, count, width, float(scale), **options)
        _best(scores, found[rows], place, block, 1, 2)
    return found


@torch.no_grad()
def liked_blocks(q: Tensor, k: Tensor, parts: list[Part], block: int, top: int, local: int) -> Tensor:
    """What MoBA selects: q [T, H, D], k [n, Hk, D] -> [T, H, top] int32, -1 where there are fewer."""
    q, k, heads = q.contiguous(), k.contiguous(), q.shape[1]
    layout = cut(tuple(parts), len(q), block, q.device)
    top = min(top, max(layout.most, 1))
    found = _everything(layout, block, heads, top)
    options, means = _options(q, PRODUCTS, EXACT_PRODUCTS) | {"HK": k.shape[1], "BLOCK": block}, None
    number: dict[int, tuple[int, int]] = {}
    for rows, place, begin, width in _runs(parts, block, heads, top):
        if means is None:  # no document needs them until one has more blocks than a query selects
            means = k.new_empty(len(layout.starts), *k.shape[1:])
            kernels.means[len(means), k.shape[1]](
                *(k, means, layout.starts, layout.stops), HK=k.shape[1], D=options["D"], BD=options["BD"], ROWS=32, num_warps=4
            )
            number = numbered(parts, lambda n: -(-n // block))
        n, (first, count) = rows.stop - rows.start, number[begin]
        scores = torch.empty(n, heads, width, dtype=torch.float32, device=q.device)
        grid = ceil_div(width, options["COLUMNS"]), ceil_div(n, options["ROWS"]), heads
        kernels.products[grid](q[rows], means[first : first + count], scores, n, place, count, width, **options)
        _best(scores, found[rows], place, block, 0, local)
    return found
