"""Attention over selected latents on a GPU: autograd around the programs of `triton_kernels`.

The backward goes through the queries so many at a time that what they add to their keys' gradients, D numbers for each query and slot,
stays below PAIRS rows: memory is linear in the stream.
"""

import os
from collections.abc import Iterator
from typing import Any

import torch
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable

from ltrain.kernels.sparse_attention import triton_kernels as kernels

WIDEST, WIDEST_REST = 512, 128  # of values, and of what keys have beyond them: what the accumulators of one program hold
PAIRS = 1 << 20  # of queries and slots at a time in the backward: 1.2 GB of parts for 576 numbers in bfloat16
WARPS = 8  # with 4, tiles of 64 are in the range that Triton 3.4 to 3.7 gets wrong on Hopper


def refusal(q: Tensor, latent: Tensor, width: int) -> str | None:
    """Why the kernels do not take these tensors, or None."""
    if not (q.is_cuda or os.environ.get("TRITON_INTERPRET") == "1"):
        return f"runs on CUDA, not on {q.device.type}"
    if q.dtype not in (torch.bfloat16, torch.float16, torch.float32) or q.dtype != latent.dtype:
        return f"takes q and latent in one type of bfloat16, float16 or float32, not {q.dtype} and {latent.dtype}"
    if width > WIDEST or q.shape[2] - width > WIDEST_REST:
        return f"takes values of at most {WIDEST} numbers and keys of at most {WIDEST_REST} more, not {width} and {q.shape[2] - width}"
    return None


def power(number: int, most: int) -> int:
    """The next power of two that a tile can have as its side, at most `most`."""
    return min(most, max(16, triton.next_power_of_2(number)))


def _options(q: Tensor, width: int, heads: int, slots: int) -> dict[str, Any]:
    """Compile-time options; heads, slots: of a tile."""
    exact = q.dtype == torch.float32
    if exact:  # twice the bytes
        heads = slots = 16
    return {
        "D": q.shape[2],
        "R": width,
        "BR": power(width, WIDEST),
        "BP": power(q.shape[2] - width, WIDEST_REST),
        "BH": power(q.shape[1], heads),
        "BK": slots,
        "DOT": "ieee" if exact else "tf32",
        "num_warps": WARPS,
    }


# (heads, slots) of a tile, and how many loads are under way, of each kernel
ATTEND = (64, 64), 1
KEY_PARTS = (32, 64), 1
QUERY_GRADIENTS = (64, 32), 2


def stops(indices: Tensor) -> Tensor:
    """indices [T, K] -> [T] int32, the number of slots up to the last that holds a key"""
    found = indices.new_empty(len(indices), dtype=torch.int32)
    kernels.ends[(len(indices),)](indices, found, indices.shape[1], BK=power(indices.shape[1], 1024), num_warps=4)
    return found


def chunks(indices: Tensor) -> Iterator[slice]:
    """All queries, so many at a time that they have at most PAIRS slots."""
    step = max(PAIRS // max(indices.shape[1], 1), 1)
    for first in range(0, len(indices), step):
        yield slice(first, min(first + step, len(indices)))


def add_parts(parts: Tensor, indices: Tensor, total: Tensor) -> None:
    """total [n, W] float32 += the parts [queries, K, W] of the keys that indices [queries, K] name, in the queries' order"""
    keys, order = indices.flatten().sort(stable=True)
    bounds = torch.searchsorted(keys, torch.arange(len(total) + 1, device=keys.device, dtype=keys.dtype))
    width = parts.shape[-1]
    kernels.add_parts[(len(total),)](parts, order, bounds, total, W=width, BW=power(width, 1024), B=8, num_warps=4)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, latent: Tensor, indices: Tensor, width: int, scale: float) -> tuple[Tensor, Tensor]:
        rows, heads, _ = q.shape
        out, lse, last = q.new_empty(rows, heads, width), q.new_empty(rows, heads, dtype=torch.float32), stops(indices)
        tile, stages = ATTEND
        options = _options(q, width, *tile)
        grid = (rows, triton.cdiv(heads, options["BH"]))
        kernels.attend[grid](q, latent, indices, last, out, lse, scale, heads, indices.shape[1], **options, num_stages=stages)
        ctx.save_for_backward(q, latent, indices, last, out, lse)
        ctx.width, ctx.scale = width, scale
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        q, latent, indices, last, out, lse = ctx.saved_tensors
        dout, dlse = grads[0].contiguous(), grads[1]
        (_, heads, wide), slots = q.shape, indices.shape[1]
        delta = torch.linalg.vecdot(dout.float(), out.float()) - dlse
        dq, dlatent = torch.empty_like(q), torch.zeros_like(latent, dtype=torch.float32)
        for some in chunks(indices):
            rows = some.stop - some.start
            ds, parts = q.new_empty(rows, slots, heads), q.new_empty(rows, slots, wide)
            tile, stages = KEY_PARTS
            options = _options(q, ctx.width, *tile)
            kernels.key_parts[rows, triton.cdiv(slots, options["BK"])](
                *(q, latent, indices, last, lse, delta, dout, ds, parts, some.start, ctx.scale, heads, slots), **options, num_stages=stages
            )
            tile, stages = QUERY_GRADIENTS
            options = _options(q, ctx.width, *tile)
            kernels.query_gradients[rows, triton.cdiv(heads, options["BH"])](
                latent, indices, last, ds, dq, some.start, heads, slots, **options, num_stages=stages
            )
            add_parts(parts, indices[some], dlatent)
        return dq, dlatent.to(latent.dtype), None, None, None


def latent_attention(q: Tensor, latent: Tensor, indices: Tensor, width: int, scale: float) -> tuple[Tensor, Tensor]:
    """-> out [T, H, width] in q's type, lse [T, H] float32"""
    out, lse = _Attention.apply(q.contiguous(), latent.contiguous(), indices.contiguous(), width, scale)
    return out, lse
