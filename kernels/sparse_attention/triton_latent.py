"""Attention over selected latents, and the indexer's loss, on a GPU: autograd around the programs of `triton_kernels`.

The backward goes through so many queries at a time that they have at most PAIRS slots, for each of which it stores the heads' weights and
what the query adds to its key's gradient: memory is linear in the stream.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ltrain.kernels.segments import TRITON_TYPES, ceil_div, device_refusal, power_of_two
from ltrain.kernels.sparse_attention import triton_kernels as kernels

WIDEST, WIDEST_REST = 512, 64  # of values, and of what keys have beyond them: what a program has room for
WIDEST_INDEX = 128  # of the indexer's heads
PAIRS = 1 << 20  # of queries and slots at a time in the backward: 1.9 GB for 128 heads and 576 numbers in bfloat16
INDEX_PAIRS = 1 << 22  # in that of the indexer's loss: 1.1 GB for 128 numbers
WARPS = 8  # with 4, narrow tiles are in the range that Triton 3.4 to 3.7 gets wrong on Hopper


def refusal(q: Tensor, latent: Tensor, width: int) -> str | None:
    """Why the kernels do not take these tensors, or None."""
    if why := device_refusal(q):
        return why
    if q.dtype not in TRITON_TYPES or q.dtype != latent.dtype:
        return f"takes q and latent in one type of bfloat16, float16 or float32, not {q.dtype} and {latent.dtype}"
    if width > WIDEST or q.shape[2] - width > WIDEST_REST:
        return f"takes values of at most {WIDEST} numbers and keys of at most {WIDEST_REST} more, not {width} and {q.shape[2] - width}"
    return None


def index_refusal(q: Tensor, latent: Tensor, index: tuple[Tensor, Tensor, Tensor]) -> str | None:
    """Why the kernels do not take these tensors for the indexer's loss, or None."""
    why = refusal(q, latent, min(q.shape[2], WIDEST))
    if why is None and not q.dtype == index[0].dtype == index[1].dtype:
        why = f"takes the indexer's q and k in the attention's {q.dtype}, not {index[0].dtype} and {index[1].dtype}"
    if why is None and index[0].shape[2] > WIDEST_INDEX:
        why = f"takes indexers with heads of at most {WIDEST_INDEX}, not {index[0].shape[2]}"
    return why


def power(number: int, most: int) -> int:
    """The next power of two that a tile can have as its side, at most `most`."""
    return min(most, max(16, power_of_two(number)))


class Tiles(NamedTuple):
    heads: int
    slots: int
    stages: int  # loads under way
    warps: int = WARPS

    def options(self, x: Tensor) -> dict[str, Any]:
        """Compile-time options that all kernels have, for inputs like x."""
        exact = x.dtype == torch.float32  # twice the bytes
        launch = {"num_warps": self.warps, "num_stages": self.stages}
        return {"BK": 16 if exact else self.slots, "DOT": "ieee" if exact else "tf32", **launch}

    def of_heads(self, x: Tensor) -> int:
        return power(x.shape[1], 16 if x.dtype == torch.float32 else self.heads)


ATTEND = Tiles(64, 64, 2)
GRADIENTS = Tiles(64, 64, 1)
INDEX_TERMS = Tiles(32, 128, 2)
INDEX_GRADIENTS = Tiles(64, 64, 2)


def _options(q: Tensor, width: int, tiles: Tiles) -> dict[str, Any]:
    rest = q.shape[2] - width
    sizes = {"D": q.shape[2], "R": width, "BR": power(width, WIDEST), "BP": power(rest, WIDEST_REST), "BH": tiles.of_heads(q)}
    return sizes | tiles.options(q)


def _index_options(q: Tensor, tiles: Tiles) -> dict[str, Any]:
    """Of the indexer's queries [T, Hi, Di]"""
    return {"DI": q.shape[2], "BD": power(q.shape[2], WIDEST_INDEX), "BI": tiles.of_heads(q), **tiles.options(q)}


def stops(indices: Tensor) -> Tensor:
    """indices [T, K] -> [T] int32, the number of slots up to the last that holds a key"""
    found = indices.new_empty(len(indices), dtype=torch.int32)
    kernels.ends[(len(indices),)](indices, found, indices.shape[1], BK=power(indices.shape[1], 1024), num_warps=4)
    return found


def chunks(indices: Tensor, pairs: int) -> Iterator[slice]:
    """All queries, so many at a time that they have at most so many slots."""
    step = max(pairs // max(indices.shape[1], 1), 1)
    for first in range(0, len(indices), step):
        yield slice(first, min(first + step, len(indices)))


def add_parts(parts: Tensor, indices: Tensor, total: Tensor) -> None:
    """total [n, W] float32 += the parts [queries, K, W] of the keys that indices [queries, K] name, in the queries' order"""
    keys, order = indices.flatten().sort(stable=True)
    bounds = torch.searchsorted(keys, torch.arange(len(total) + 1, device=keys.device, dtype=keys.dtype))
    width = parts.shape[-1]
    wide = power(width, 1024)
    kernels.add_parts[(len(total),)](parts, order, bounds, total, W=width, BW=wide, B=max(8, 4096 // wide), num_warps=4)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, latent: Tensor, indices: Tensor, width: int, scale: float) -> tuple[Tensor, Tensor]:
        rows, heads, _ = q.shape
        out, lse, last = q.new_empty(rows, heads, width), q.new_empty(rows, heads, dtype=torch.float32), stops(indices)
        options = _options(q, width, ATTEND)
        grid = (rows, ceil_div(heads, options["BH"]))
        kernels.attend[grid](q, latent, indices, last, out, lse, scale, heads, indices.shape[1], **options)
        ctx.save_for_backward(q, latent, indices, last, out, lse)
        ctx.width, ctx.scale = width, scale
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        q, latent, indices, last, out, lse = ctx.saved_tensors
        dout, dlse = grads[0].contiguous(), grads[1].contiguous()
        (_, heads, wide), slots = q.shape, indices.shape[1]
        dq, dlatent = torch.empty_like(q), torch.zeros_like(latent, dtype=torch.float32)
        options = _options(q, ctx.width, GRADIENTS)
        for some in chunks(indices, PAIRS):
            rows = some.stop - some.start
            weights, factors = q.new_empty(rows, 2, heads, slots), q.new_empty(rows, 2, heads, wide)
            kernels.score_gradients[rows, ceil_div(heads, options["BH"])](
                *(q, latent, indices, last, out, lse, dlse, dout, dq, weights, factors, some.start, ctx.scale, heads, slots), **options
            )
            # dK = dS^T Q, and where keys are values P^T dO besides: one product, whose sums are rounded once
            add_parts(weights.flatten(1, 2).mT @ factors.flatten(1, 2), indices[some], dlatent)
        return dq, dlatent.to(latent.dtype), None, None, None


def latent_attention(q: Tensor, latent: Tensor, indices: Tensor, width: int, scale: float) -> tuple[Tensor, Tensor]:
    """-> out [T, H, width] in q's type, lse [T, H] float32"""
    out, lse = _Attention.apply(q.contiguous(), latent.contiguous(), indices.contiguous(), width, scale)
    return out, lse


class _IndexLoss(torch.autograd.Function):
    """Keeps the gradients of the indexer's scores, [T, K] like the indices: making them again takes the attention of all heads."""

    @staticmethod
    def forward(
        ctx: Any, iq: Tensor, ik: Tensor, weights: Tensor, q: Tensor, latent: Tensor, lse: Tensor, indices: Tensor, scale: float, share: float
    ) -> Tensor:
        heads, slots, last = q.shape[1], indices.shape[1], stops(indices)
        # where values end does not matter here
        options = _options(q, min(q.shape[2], WIDEST), INDEX_TERMS) | _index_options(iq, INDEX_TERMS)
        loss = torch.zeros((), dtype=torch.float32, device=q.device)
        dscores = torch.empty(indices.shape, dtype=torch.float32, device=q.device) if any(ctx.needs_input_grad) else None
        for some in chunks(indices, INDEX_PAIRS):
            rows = some.stop - some.start
            target = q.new_zeros(rows, slots, dtype=torch.float32)
            scores = torch.full_like(target, -torch.inf)
            kernels.index_terms[rows, ceil_div(slots, options["BK"])](
                *(q, latent, lse, iq, ik, weights, indices, last, target, scores, some.start, scale, share, heads, slots, iq.shape[1]),
                **options,
            )
            log_p = scores - scores.logsumexp(1, keepdim=True)
            loss -= torch.linalg.vecdot(target, log_p.masked_fill(scores == -torch.inf, 0.0)).sum()
            if dscores is not None:
                torch.addcmul(-target, log_p.exp(), target.sum(1, keepdim=True), out=dscores[some])
        ctx.save_for_backward(iq, ik, weights, indices, last, dscores)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        iq, ik, weights, indices, last, dscores = ctx.saved_tensors
        (rows, heads, width), slots = iq.shape, indices.shape[1]
        options = _index_options(iq, INDEX_GRADIENTS)
        diq, dweights, dik = torch.empty_like(iq), torch.empty_like(weights), torch.zeros_like(ik, dtype=torch.float32)
        factor = grads[0].to(torch.float32)
        kernels.index_query_gradients[rows, ceil_div(heads, options["BI"])](
            iq, ik, weights, indices, last, dscores, factor, diq, dweights, heads, slots, **options
        )
        for some in chunks(indices, INDEX_PAIRS):
            parts = iq.new_empty(some.stop - some.start, slots, width)
            kernels.index_key_parts[len(parts), ceil_div(slots, options["BK"])](
                iq, ik, weights, indices, last, dscores, parts, some.start, heads, slots, **options
            )
            add_parts(parts, indices[some], dik)
        return diq, (dik * factor).to(ik.dtype), dweights, *[None] * 6


def latent_index_loss(
    q: Tensor, latent: Tensor, lse: Tensor, index: tuple[Tensor, Tensor, Tensor], indices: Tensor, scale: float, share: float
) -> Tensor:
    """-> the loss [] in float32; share: what the heads' attention is multiplied with"""
    rest = (x.detach().contiguous() for x in (q, latent, lse.float(), indices))
    loss: Tensor = _IndexLoss.apply(*(x.contiguous() for x in index), *rest, scale, share)
    return loss
