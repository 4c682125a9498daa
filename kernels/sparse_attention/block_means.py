"""Attention over the blocks of tokens whose mean key a query likes best.

Source: MoBA (Lu et al. 2025, arXiv 2502.13189), section 2. Plain torch, by blocks of queries.
"""

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ltrain.kernels.segments import Part, accumulator
from ltrain.kernels.sparse_attention import blocks


def _chosen(q: Tensor, means: Tensor, own: Tensor, top: int) -> Tensor:
    """q [R, H, D], means [n, Hk, D], own [R], the block of each query -> [H, R, n], whether a block is seen: the query's own, and of those
    before it the top - 1 with the largest product of query and mean."""
    means = means.repeat_interleave(q.shape[1] // means.shape[1], 1)
    scores = torch.einsum("rhd,nhd->hrn", q, means).to(accumulator(q.dtype))
    number = torch.arange(len(means), device=q.device)
    scores = scores.masked_fill(number > own.unsqueeze(1), -torch.inf).masked_fill(number == own.unsqueeze(1), torch.inf)
    best = scores.topk(min(top, len(means)), dim=-1)
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, best.indices, best.values > -torch.inf)


def _means(k: Tensor, block: int) -> Tensor:
    """k [n, Hk, D] -> the mean key of each whole or cut block [blocks, Hk, D]"""
    number = torch.arange(len(k), device=k.device) // block
    sums = k.new_zeros(-(-len(k) // block), *k.shape[1:], dtype=accumulator(k.dtype)).index_add_(0, number, k.to(accumulator(k.dtype)))
    return (sums / torch.bincount(number).to(sums)[:, None, None]).to(k.dtype)


def _attend(q: Tensor, k: Tensor, v: Tensor, seen: Tensor, later: Tensor, scale: float, block: int) -> Tensor:
    """seen [H, R, blocks], later [R, n]"""
    group = q.shape[1] // k.shape[1]
    scores = torch.einsum("qhd,khd->hqk", q, k.repeat_interleave(group, 1)).to(accumulator(q.dtype)) * scale
    hidden = ~seen.repeat_interleave(block, -1)[..., : len(k)] | later
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(hidden, -torch.inf).softmax(-1).to(v.dtype), v.repeat_interleave(group, 1))


def block_attention(q: Tensor, k: Tensor, v: Tensor, parts: list[Part], *, scale: float, block: int, top: int) -> Tensor:
    """Causal attention of each query over its own block and the top - 1 best of those before it, head by head, inside documents.

    Blocks are counted from a document's first token. The choice has no gradient; differentiable in q, k and v.

    Args:
        q: [T, H, D]; k, v: [n, Hk, D], [n, Hk, Dv].
        parts: which queries belong to which keys.
        block: tokens of a block. top: blocks that a query sees, its own among them.

    Returns:
        [T, H, Dv] in v's type.
    """
    outputs = [v.new_zeros(0, q.shape[1], v.shape[2])]
    for part in parts:
        means = _means(k[part.begin : part.first + part.stop - part.start].detach(), block)
        for some in blocks([part], q.shape[1]):
            rows, keys, _ = some
            seen = _chosen(q[rows].detach(), means[: -(-(keys.stop - keys.start) // block)], some.places(q.device) // block, top)
            args = (q[rows], k[keys], v[keys], seen, some.later(q.device), scale, block)
            outputs.append(checkpoint(_attend, *args, use_reentrant=False, preserve_rng_state=False) if torch.is_grad_enabled() else _attend(*args))
    return torch.cat(outputs)


def decode_block_attention(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, *, scale: float, block: int, top: int) -> Tensor:
    """One query per document over its cached keys, its own among them: q [N, H, D], k [N, L, Hk, D], v [N, L, Hk, Dv] of which lengths [N]
    are valid, in order -> [N, H, Dv] in v's type."""
    rows = []
    for n, length in enumerate(lengths.tolist()):
        keys = k[n, :length]
        own = torch.tensor([(length - 1) // block], device=q.device)
        seen = _chosen(q[n : n + 1], _means(keys, block), own, top)
        nothing = torch.zeros(1, length, dtype=torch.bool, device=q.device)
        rows.append(_attend(q[n : n + 1], keys, v[n, :length], seen, nothing, scale, block))
    return torch.cat(rows)
