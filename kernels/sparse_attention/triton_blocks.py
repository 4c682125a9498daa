"""Attention over selected blocks of keys on a GPU: autograd around the programs of `triton_kernels_blocks`.

One scheme serves selections of a K/V head (NSA, an index branch) and of a query head (MoBA): by block, gathering the queries that chose it. By
query, a program of 16 heads would read 32 KiB of keys and values for each block of 64 tokens of 128 numbers, and have rows for a quarter of a
tensor core's tile; of one head, a sixteenth of that. By block it reads 4 KiB of queries and writes as much of output, its tiles are full
whatever the group, and the sum over a query's blocks reads the latter once more: 12 KiB instead of 32, and for blocks of 512 that one head
chose 1 KiB instead of 256. The gradients of keys need the lists of queries anyway. They are made by a stable sort of the selection, and a list
too long for one program is cut into items, so that a block that all queries chose holds nothing up; each number is summed by one program in
one order, without atomic additions.

What pairs of queries and blocks write before it is summed takes at most PARTS bytes: the stream goes through in chunks of queries.
Compressed blocks that ended before a query are one selected block, the document's, of which the query sees so many.
"""

from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ltrain.kernels.segments import TRITON_TYPES, Part, ceil_div, device_refusal, documents, power_of_two
from ltrain.kernels.sparse_attention import triton_kernels_blocks as kernels

WIDEST = 256  # of heads: what a program has room for
MOST_TOGETHER = 64  # heads that share a selection
MOST = 1 << 30  # rows: their numbers and sums of two are int32
PARTS = 1 << 31  # bytes that pairs write at a time: int32 addresses rest on it
EXTRA = 1 << 29  # bytes of gradients of keys and values that are not the first item's of their block
SUMMED = 32  # rows at a time where nothing is multiplied


class Tiles(NamedTuple):
    rows: int  # heads of queries
    columns: int  # keys
    warps: int  # 8: with 4, narrow tiles are in the range that Triton 3.4 to 3.7 gets wrong on Hopper
    stages: int  # loads under way
    run: int  # tiles of rows that one program takes at the most (of keys' gradients, at the least)


# whether a block is one tile of keys -> by the width of heads up to which they hold, for inputs of 16 bits
ATTEND = {True: {128: Tiles(64, 64, 8, 3, 16), 256: Tiles(64, 32, 8, 2, 16)}, False: {128: Tiles(128, 64, 8, 3, 1), 256: Tiles(64, 64, 8, 2, 1)}}
QUERY_GRADIENTS = {
    True: {128: Tiles(64, 64, 8, 2, 16), 256: Tiles(64, 32, 8, 2, 16)},
    False: {128: Tiles(128, 64, 8, 2, 1), 256: Tiles(64, 32, 8, 2, 1)},
}
KEY_GRADIENTS = {
    True: {128: Tiles(64, 64, 8, 2, 16), 256: Tiles(32, 32, 8, 2, 16)},
    False: {128: Tiles(64, 128, 8, 2, 16), 256: Tiles(32, 64, 8, 2, 16)},
}
# for float32, whose products take no tensor cores
EXACT = {True: {128: Tiles(64, 32, 8, 1, 4), 256: Tiles(32, 16, 8, 1, 4)}, False: {128: Tiles(32, 32, 8, 1, 1), 256: Tiles(32, 16, 8, 1, 1)}}


class Layout(NamedTuple):
    """The blocks that keys are cut into, document by document, and what queries see of them, int32 on the device."""

    starts: Tensor  # [blocks]: rows of keys
    stops: Tensor  # [blocks]
    bases: Tensor  # [T]: the number of the first block of each query's document
    highs: Tensor  # [T]: the row of keys at which what a query sees ends
    longest: int  # block
    most: int  # blocks of a document


def _on_device(device: torch.device, *arrays: np.ndarray) -> Iterator[Tensor]:
    return (torch.from_numpy(array.astype(np.int32)).to(device, non_blocking=True) for array in arrays)


def numbered(parts: Iterable[Part], count: Callable[[int], int]) -> dict[int, tuple[int, int]]:
    """Where each document's keys begin -> its first block's number among all, and how many it has: `count` of its tokens."""
    found, first = {}, 0
    for begin, end in documents(parts).items():
        found[begin] = first, count(end - begin)
        first += found[begin][1]
    return found


@lru_cache(maxsize=8)  # all layers of a micro-batch share it
def cut(parts: tuple[Part, ...], tokens: int, block: int, device: torch.device) -> Layout:
    """Documents in blocks of `block` keys, of which a query sees those up to its own."""
    numbers, nothing = numbered(parts, lambda n: -(-n // block)), np.zeros(0, np.int64)
    starts, stops = [nothing], [nothing]
    for begin, end in documents(parts).items():
        starts.append(np.arange(begin, end, block))
        stops.append(np.minimum(starts[-1] + block, end))
    bases, highs = np.zeros(tokens, np.int64), np.zeros(tokens, np.int64)
    for part in parts:
        bases[part.start : part.stop] = numbers[part.begin][0]
        highs[part.start : part.stop] = np.arange(part.first, part.first + part.stop - part.start) + 1
    longest = max((end - begin for begin, end in documents(parts).items()), default=0)
    on_starts, on_stops, on_bases, on_highs = _on_device(device, np.concatenate(starts), np.concatenate(stops), bases, highs)
    return Layout(on_starts, on_stops, on_bases, on_highs, min(block, longest), -(-longest // block))


@lru_cache(maxsize=8)
def ended(parts: tuple[Part, ...], tokens: int, length: int, stride: int, device: torch.device) -> Layout:
    """Compressed keys, one after every `stride` tokens of a document for `length` of them: each document's are one block, of which a query
    sees those whose tokens have ended."""
    numbers = numbered(parts, lambda n: max((n - length) // stride + 1, 0))
    starts = np.array([first for first, _ in numbers.values()], np.int64)
    counts = np.array([count for _, count in numbers.values()], np.int64)
    order = {begin: n for n, begin in enumerate(numbers)}
    bases, highs = np.zeros(tokens, np.int64), np.zeros(tokens, np.int64)
    for part in parts:
        bases[part.start : part.stop] = order[part.begin]
        place = np.arange(part.stop - part.start) + part.first - part.begin
        highs[part.start : part.stop] = numbers[part.begin][0] + np.maximum((place - length + 1) // stride + 1, 0)
    on_starts, on_stops, on_bases, on_highs = _on_device(device, starts, starts + counts, bases, highs)
    return Layout(on_starts, on_stops, on_bases, on_highs, int(counts.max(initial=0)), min(len(starts), 1))


@lru_cache(maxsize=8)
def _in_order(parts: tuple[Part, ...], tokens: int) -> bool:
    """Whether queries of a document that come later see more of it: what a list's queries are searched by."""
    at, reached = 0, dict[int, int]()
    for part in parts:
        if part.start != at or part.first < reached.get(part.begin, 0):
            return False
        at, reached[part.begin] = part.stop, part.first + part.stop - part.start
    return at == tokens


def refusal(q: Tensor, k: Tensor, v: Tensor, selections: int, parts: list[Part], scale: float) -> str | None:
    """Why the kernels do not take these tensors, of which queries have so many selections each, or None."""
    if why := device_refusal(q):
        return why
    if q.dtype not in TRITON_TYPES or not q.dtype == k.dtype == v.dtype:
        return f"takes q, k and v in one type of bfloat16, float16 or float32, not {q.dtype}, {k.dtype} and {v.dtype}"
    if max(q.shape[2], v.shape[2]) > WIDEST:
        return f"takes heads up to {WIDEST} wide, not {max(q.shape[2], v.shape[2])}"
    if q.shape[1] // selections > MOST_TOGETHER:
        return f"takes at most {MOST_TOGETHER} query heads with one selection, not {q.shape[1] // selections}"
    if not scale > 0:
        return f"takes a scale above 0, not {scale}"
    if max(len(q), len(k)) > MOST:
        return f"takes at most {MOST} tokens, not {max(len(q), len(k))}"
    return None if _in_order(tuple(parts), len(q)) else "takes parts that follow each other, of all queries, those of a document in its order"


def padded(width: int) -> int:
    """The power of two that a tile has as its side."""
    return max(16, power_of_two(width))


def _options(q: Tensor, k: Tensor, v: Tensor, indices: Tensor, longest: int, table: dict[bool, dict[int, Tiles]]) -> tuple[dict[str, Any], int]:
    """Compile-time options, and the pairs that one program is to take."""
    width, exact = max(q.shape[2], v.shape[2]), q.dtype == torch.float32
    one, several = (next(found for most, found in of.items() if width <= most) for of in (EXACT if exact else table).values())
    whole = longest <= one.columns
    tiles = one if whole else several
    together = q.shape[1] // indices.shape[1]
    in_tile = power_of_two(together)
    rows = max(tiles.rows, in_tile)
    options = {
        "H": q.shape[1],
        "HK": k.shape[1],
        "M": together,
        "MP": in_tile,
        "TOP": indices.shape[2],
        "D": q.shape[2],
        "DV": v.shape[2],
        "BD": padded(q.shape[2]),
        "BV": padded(v.shape[2]),
        "ROWS": rows,
        "COLUMNS": min(tiles.columns, padded(longest)),
        "WHOLE": whole,
        "DOT": "ieee" if exact else "tf32",
        "num_warps": tiles.warps,
        "num_stages": tiles.stages,
    }
    return options, rows // in_tile * tiles.run


class Lists(NamedTuple):
    """The pairs of a chunk of queries, for each K/V head and block one after another: K/V head * blocks + block numbers a list."""

    order: Tensor  # [pairs] int32: query * selections * top + selection * top + slot; behind `bounds` those without a block
    bounds: Tensor  # [lists + 1]: where each begins

    @classmethod
    def of(cls, indices: Tensor, bases: Tensor, kv_heads: int, blocks: int) -> "Lists":
        """indices [R, S, top], bases [R]"""
        kv = torch.arange(indices.shape[1], device=indices.device, dtype=torch.int32) // (indices.shape[1] // kv_heads)
        numbers = indices + (kv * blocks).unsqueeze(1) + bases[:, None, None]
        found, order = numbers.masked_fill_(indices < 0, kv_heads * blocks).flatten().sort(stable=True)
        lists = torch.arange(kv_heads * blocks + 1, device=indices.device, dtype=torch.int32)
        return cls(order.to(torch.int32), torch.searchsorted(found, lists))

    def items(self, size: int) -> tuple[Tensor, Tensor]:
        """[n, ITEM] int32, all stretches of at most `size` pairs of a list, and behind them empty ones; and [lists + 1] int32, where those
        of a list that are not its first are in `extra` ones."""
        counts = self.bounds.diff()
        pieces, lists = (counts + (size - 1)) // size, len(counts)
        ends, extra = pieces.cumsum(0), (pieces - 1).clamp_(min=0).cumsum(0)
        number = torch.arange(min(lists, len(self.order)) + len(self.order) // size, device=counts.device)
        which = torch.searchsorted(ends, number, right=True)
        real, which = which < lists, which.clamp(max=lists - 1)
        nth = number - (ends - pieces)[which]
        begin = self.bounds[which] + nth * size
        end = torch.minimum(begin + size, self.bounds[which + 1])
        of_extra = torch.where(nth > 0, extra[which] - pieces[which] + nth, -1)
        table = torch.stack((which, begin, end, of_extra), 1).masked_fill_(~real.unsqueeze(1), 0)
        return table.to(torch.int32), torch.nn.functional.pad(extra, (1, 0)).to(torch.int32)


def _chunks(q: Tensor, v: Tensor, top: int) -> Iterator[slice]:
    """All queries, so many at a time that what their pairs write has at most PARTS bytes."""
    step = max(PARTS // (q.shape[1] * top * max(q.shape[2], v.shape[2]) * q.element_size()), 1)
    for first in range(0, len(q), step):
        yield slice(first, min(first + step, len(q)))


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, indices: Tensor, layout: Layout, scale: float) -> tuple[Tensor, Tensor]:
        (tokens, heads, _), width, blocks = q.shape, v.shape[2], len(layout.starts)
        selections, top = indices.shape[1:]
        out, lse = q.new_empty(tokens, heads, width), q.new_empty(tokens, heads, dtype=torch.float32)
        options, size = _options(q, k, v, indices, layout.longest, ATTEND)
        kept: list[Tensor] = []
        for some in _chunks(q, v, top):
            lists = Lists.of(indices[some], layout.bases[some], k.shape[1], blocks)
            items, _ = lists.items(size)
            to = out[some], lse[some]
            rows = len(to[0]) * heads
            # of a single block, what a pair writes is the result; a query without a block writes nothing
            parts = (to[0].zero_(), to[1].fill_(-torch.inf)) if top == 1 else (q.new_empty(rows * top, width), lse.new_empty(rows * top))
            kernels.attend[(len(items),)](
                *(q[some], k, v, lists.order, items, layout.starts, layout.stops, layout.highs[some], *parts, float(scale), blocks), **options
            )
            if top > 1:
                kernels.merge[(ceil_div(rows, SUMMED),)](
                    *(*parts, indices[some], *to, rows, options["M"], top), DV=width, BV=options["BV"], ROWS=SUMMED, num_warps=4
                )
            kept += lists
        ctx.save_for_backward(q, k, v, indices, out, lse, *kept)
        ctx.layout, ctx.scale = layout, scale
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        q, k, v, indices, out, lse, *kept = ctx.saved_tensors
        layout, scale, dout, dlse = ctx.layout, float(ctx.scale), grads[0].contiguous(), grads[1].contiguous()
        heads, blocks, kv_heads, top = q.shape[1], len(layout.starts), k.shape[1], indices.shape[2]
        dq, dk, dv = torch.empty_like(q), torch.zeros_like(k, dtype=torch.float32), torch.zeros_like(v, dtype=torch.float32)
        of_queries, size = _options(q, k, v, indices, layout.longest, QUERY_GRADIENTS)
        of_keys, least = _options(q, k, v, indices, layout.longest, KEY_GRADIENTS)
        tiles = ceil_div(layout.longest, of_keys["COLUMNS"])
        widths = {name: of_keys[name] for name in ("D", "DV", "BD", "BV", "COLUMNS")}
        for some, *of_lists in zip(_chunks(q, v, top), kept[::2], kept[1::2], strict=True):
            lists = Lists(*of_lists)
            chosen, to = indices[some], dq[some]
            rows, pairs = len(to) * heads, len(lists.order)
            rest = lse.new_empty(rows, kernels.REST.value)
            kernels.remember[(ceil_div(rows, SUMMED),)](
                *(out[some], dout[some], lse[some], dlse[some], rest, rows), DV=widths["DV"], BV=widths["BV"], ROWS=SUMMED, num_warps=4
            )
            around = layout.starts, layout.stops, layout.highs[some], dout[some], rest
            items, _ = lists.items(size)
            parts = to.zero_() if top == 1 else q.new_empty(rows * top, q.shape[2])
            kernels.query_gradients[(len(items),)](*(q[some], k, v, lists.order, items, *around, parts, scale, blocks), **of_queries)
            if top > 1:
                kernels.add[(ceil_div(rows, SUMMED),)](
                    *(parts, chosen, to, rows, of_keys["M"], top), D=widths["D"], BD=widths["BD"], ROWS=SUMMED, num_warps=4
                )
            del parts
            in_block = tiles * widths["COLUMNS"]
            longest_list = max(least, ceil_div(pairs * in_block * (widths["D"] + widths["DV"]) * 4, EXTRA))
            items, bounds = lists.items(longest_list)
            extra = [dk.new_empty(pairs // longest_list * in_block, widths[name]) for name in ("D", "DV")]
            if tiles:
                kernels.key_gradients[len(items), tiles](*(q[some], k, v, lists.order, items, *around, dk, dv, *extra, scale, blocks), **of_keys)
                kernels.add_extra[kv_heads * blocks, tiles](
                    *(*extra, bounds, layout.starts, layout.stops, dk, dv, blocks, kv_heads), **widths, num_warps=8
                )
        return dq, dk.to(k.dtype), dv.to(v.dtype), None, None, None


def attend(q: Tensor, k: Tensor, v: Tensor, indices: Tensor, layout: Layout, scale: float) -> tuple[Tensor, Tensor]:
    """Attention over the keys of selected blocks up to what each query sees. Differentiable in q, k and v, through both results.

    Args:
        q: [T, H, D]; k, v: [n, Hk, D], [n, Hk, Dv], cut into blocks by the layout.
        indices: [T, S, top], S a multiple of Hk and a divisor of H: the blocks of its document that each run of H / S heads sees, none twice; -1:
            none, anywhere in a row.

    Returns:
        out [T, H, Dv] in q's type, and the natural log-sum-exp [T, H] in float32; 0 and -inf where nothing is seen.
    """
    given = q.contiguous(), k.contiguous(), v.contiguous(), indices.to(torch.int32).contiguous()
    out, lse = _Attention.apply(*given, layout, scale)
    return out, lse
