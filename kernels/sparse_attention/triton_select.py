"""The lightning indexer's selection on a GPU: launches of the programs of `triton_kernels`.

Scores of a block of queries, at most SCORES, are made by matrix products and read by the selection while they are in the cache or near it.
Making them again for each of its passes would cost more: a score of 64 heads of 128 is 16384 operations, and 4 bytes to read again.
"""

from functools import lru_cache

import torch
from torch import Tensor

from ltrain.kernels.segments import TRITON_TYPES, Part, ceil_div, device_refusal, power_of_two
from ltrain.kernels.sparse_attention import blocks, in_fp8
from ltrain.kernels.sparse_attention import triton_kernels as kernels

WIDEST = 128  # of the indexer's heads
TILE, EXACT_TILE = (64, 256), (32, 32)  # queries and keys; of float32
LEAST = 128  # queries at a time, whatever their keys: fewer leave most of a GPU idle (512 MiB of scores for a million keys)
BLOCK = 4096  # scores that the selection reads at a time
SAMPLE = 4096  # of a long row's scores
CHOSEN = 4  # times as many keys as are taken have room among those that a sample leaves
FP8_CAPABILITY = 8, 9  # the first that has products of e4m3 numbers
LEAST_WIDTH, LEAST_FP8_WIDTH = 16, 32  # of the tiles of a product


def refusal(q: Tensor, k: Tensor, fp8: bool) -> str | None:
    """Why the kernels do not take these tensors, or None."""
    if why := device_refusal(q):
        return why
    if q.dtype not in TRITON_TYPES or q.dtype != k.dtype:
        return f"takes q and k in one type of bfloat16, float16 or float32, not {q.dtype} and {k.dtype}"
    if q.shape[2] > WIDEST:
        return f"takes heads of at most {WIDEST}, not {q.shape[2]}"
    if fp8 and q.is_cuda and torch.cuda.get_device_capability(q.device) < FP8_CAPABILITY:
        return f"multiplies e4m3 numbers on GPUs from compute capability {'.'.join(map(str, FP8_CAPABILITY))} on, which {q.device} is not"
    return None


@lru_cache(maxsize=4)  # all layers of a micro-batch share it; 8 bytes a token on the device
def _ranges(parts: tuple[Part, ...], tokens: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """The first key that each query sees and how many, [T] int32; a query of no part sees none."""
    begins, counts = torch.zeros(2, tokens, dtype=torch.int32)
    for part in parts:
        begins[part.start : part.stop] = part.begin
        before = part.first - part.begin
        counts[part.start : part.stop] = torch.arange(before + 1, before + 1 + part.stop - part.start)
    return begins.to(device, non_blocking=True), counts.to(device, non_blocking=True)


def beyond(part: Part, top_k: int) -> Part:
    """The queries of a part that see more than top_k keys."""
    few = min(max(top_k - (part.first - part.begin), 0), part.stop - part.start)
    return Part(part.start + few, part.stop, part.begin, part.first + few)


def select(q: Tensor, k: Tensor, weights: Tensor, parts: list[Part], top_k: int, fp8: bool) -> Tensor:
    """-> [T, top_k] int32, in the keys' order"""
    sizes = None
    if fp8:
        (q, of_queries), (k, sizes) = in_fp8(q), in_fp8(k)
        weights = weights.float() * of_queries
    q, k, weights = q.contiguous(), k.contiguous(), weights.contiguous()
    tokens, heads, width = q.shape
    found = torch.empty(tokens, top_k, dtype=torch.int32, device=q.device)
    kernels.everything[(tokens,)](*_ranges(tuple(parts), tokens, q.device), found, top_k, BK=1024, num_warps=4)
    exact = q.dtype == torch.float32
    queries, keys = EXACT_TILE if exact else TILE
    padded = max(LEAST_FP8_WIDTH if fp8 else LEAST_WIDTH, power_of_two(width))
    options = {"D": width, "BD": padded, "BM": queries, "BN": keys, "DOT": "ieee" if exact else "tf32"}
    for block in blocks((beyond(part, top_k) for part in parts), 1, LEAST):
        rows, seen = block.rows.stop - block.rows.start, block.keys.stop - block.keys.start
        stride = ceil_div(seen, 16) * 16
        scores = torch.empty(rows, stride, dtype=torch.float32, device=q.device)
        grid = ceil_div(seen, keys), ceil_div(rows, queries)
        of_keys = None if sizes is None else sizes[block.keys]
        args = (q[block.rows], k[block.keys], weights[block.rows], of_keys, scores, rows, seen, stride, block.first, heads)
        kernels.index_scores[grid](*args, **options, num_warps=8, num_stages=2)
        chosen = CHOSEN * top_k
        room = torch.empty(rows if seen > 2 * chosen else 0, chosen, dtype=torch.int32, device=q.device)
        kernels.best_keys[(rows,)](
            *(scores, found[block.rows], room, stride, block.first, block.keys.start, top_k, chosen if len(room) else 0, BLOCK, SAMPLE),
            num_warps=8,
        )
    return found
