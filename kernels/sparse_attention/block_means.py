"""Attention over the blocks of tokens whose mean key a query likes best.

Backends: `reference` (torch, by blocks of queries) and `triton` (on a GPU, deterministic); `auto` takes triton wherever it runs.
Source: MoBA (Lu et al. 2025, arXiv 2502.13189), section 2.
"""

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ltrain.kernels.segments import Part, accumulator, choose, permitted, wants_triton
from ltrain.kernels.sparse_attention import blocks


def best_blocks(scores: Tensor, own: Tensor, top: int, local: int = 1) -> tuple[Tensor, Tensor]:
    """scores [h, R, n] of blocks, own [R], the block of each query -> numbers of the blocks that it sees [h, R, top] and whether there is
    such a block: the last `local` up to its own, and the best of those before them."""
    behind = own.unsqueeze(1) - torch.arange(scores.shape[-1], device=scores.device)
    scores = scores.masked_fill(behind < 0, -torch.inf).masked_fill((behind >= 0) & (behind < local), torch.inf)
    best = scores.topk(min(top, scores.shape[-1]), dim=-1)
    return best.indices, best.values > -torch.inf


def _chosen(q: Tensor, means: Tensor, own: Tensor, top: int, local: int) -> Tensor:
    """q [R, H, D], means [n, Hk, D], own [R], the block of each query -> [H, R, n], whether a block is seen: by the product of query and mean."""
    means = means.repeat_interleave(q.shape[1] // means.shape[1], 1)
    scores = torch.einsum("rhd,nhd->hrn", q, means).to(accumulator(q.dtype))
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, *best_blocks(scores, own, top, local))


def _means(k: Tensor, block: int) -> Tensor:
    """k [n, Hk, D] -> the mean key of each whole or cut block [blocks, Hk, D]"""
    number = torch.arange(len(k), device=k.device) // block
    sums = k.new_zeros(-(-len(k) // block), *k.shape[1:], dtype=accumulator(k.dtype)).index_add_(0, number, k.to(accumulator(k.dtype)))
    return (sums / torch.bincount(number).to(sums)[:, None, None]).to(k.dtype)


def attend(q: Tensor, k: Tensor, v: Tensor, seen: Tensor, later: Tensor, scale: float, block: int) -> Tensor:
    """q [R, H, D], k and v [n, Hk, D], seen [H, R, blocks], later [R, n], the keys behind each query -> [R, H, Dv]"""
    group = q.shape[1] // k.shape[1]
    scores = torch.einsum("qhd,khd->hqk", q, k.repeat_interleave(group, 1)).to(accumulator(q.dtype)) * scale
    hidden = ~seen.repeat_interleave(block, -1)[..., : len(k)] | later
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(hidden, -torch.inf).softmax(-1).to(v.dtype), v.repeat_interleave(group, 1))


def block_attention(
    q: Tensor, k: Tensor, v: Tensor, parts: list[Part], *, scale: float, block: int, top: int, local: int = 1, backend: str = "auto"
) -> Tensor:
    """Causal attention of each query over the last `local` blocks, its own among them, and the best of those before, head by head, in documents.

    Blocks are counted from a document's first token. The choice has no gradient; differentiable in q, k and v.

    Args:
        q: [T, H, D]; k, v: [n, Hk, D], [n, Hk, Dv].
        parts: which queries belong to which keys.
        block: tokens of a block. top: blocks that a query sees, the last `local` among them.
        backend: auto | reference | triton.

    Returns:
        [T, H, Dv] in v's type.

    Raises:
        ValueError: backend does not exist, or is triton, which does not take these.
    """
    choose(backend, ("reference", "triton"))
    if q.numel() and wants_triton(backend, q):
        from ltrain.kernels.sparse_attention import triton_blocks, triton_choice

        if permitted(triton_blocks.refusal(q, k, v, q.shape[1], parts, scale), backend, "reference or auto"):
            indices = triton_choice.liked_blocks(q.detach(), k.detach(), parts, block, top, local)
            return triton_blocks.attend(q, k, v, indices, triton_blocks.cut(tuple(parts), len(q), block, q.device), scale)[0]
    outputs = [v.new_zeros(0, q.shape[1], v.shape[2])]
    for part in parts:
        means = _means(k[part.begin : part.first + part.stop - part.start].detach(), block)
        for some in blocks([part], q.shape[1]):
            rows, keys, _ = some
            seen = _chosen(q[rows].detach(), means[: -(-(keys.stop - keys.start) // block)], some.places(q.device) // block, top, local)
            args = (q[rows], k[keys], v[keys], seen, some.later(q.device), scale, block)
            outputs.append(checkpoint(attend, *args, use_reentrant=False, preserve_rng_state=False) if torch.is_grad_enabled() else attend(*args))
    return torch.cat(outputs)
