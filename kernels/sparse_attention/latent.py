"""Attention over selected latents, and the loss of the indexer that selects them.

This is multi-head latent attention in its absorbed form, where all heads share one key and value per token: a query that the expansion of
keys has been multiplied into meets latents themselves, and gets a sum of latents, which the expansion of values turns into the head's
output. What is gathered for each selected key is one latent, not keys and values of every head.

Backends: `reference` (torch, by blocks of queries) and `triton` (on a GPU, deterministic); `auto` takes triton wherever it runs.
Source: DeepSeek Sparse Attention (DeepSeek-AI 2025, DeepSeek-V3.2 report, section 2).
"""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ltrain.kernels import sparse_attention
from ltrain.kernels.segments import accumulator, choose, permitted, wants_triton

__all__ = ["latent_attention", "latent_index_loss"]


def _check(q: Tensor, latent: Tensor, indices: Tensor) -> None:
    if q.ndim != 3 or latent.ndim != 2 or q.shape[2] != latent.shape[1]:
        raise ValueError(f"q is [T, H, D] and latent [n, D], but the shapes are {list(q.shape)} and {list(latent.shape)}")
    if indices.ndim != 2 or len(indices) != len(q) or indices.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"indices must be [{len(q)}, K] of int32 or int64, but is {list(indices.shape)} of {indices.dtype}")


def _blocks(indices: Tensor, numbers: int) -> Iterator[slice]:
    """All queries, so many at a time that `numbers` for each of their slots stay below SCORES in all."""
    step = max(sparse_attention.SCORES // max(indices.shape[1] * numbers, 1), 1)
    for at in range(0, len(indices), step):
        yield slice(at, at + step)


def _scores(q: Tensor, latent: Tensor, indices: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Scores [R, H, K] in float32 or wider, -inf where there is no key, and the latents [R, K, D] of the slots"""
    wide, gathered = accumulator(q.dtype), latent[indices.clamp(min=0)]
    return (torch.einsum("rhd,rkd->rhk", q.to(wide), gathered.to(wide)) * scale).masked_fill((indices < 0).unsqueeze(1), -torch.inf), gathered


def _attend(q: Tensor, latent: Tensor, indices: Tensor, width: int, scale: float) -> tuple[Tensor, Tensor]:
    scores, gathered = _scores(q, latent, indices, scale)
    lse = scores.logsumexp(-1)
    p = (scores - lse.masked_fill(lse == -torch.inf, 0.0).unsqueeze(-1)).exp()
    return torch.einsum("rhk,rkd->rhd", p, gathered[..., :width].to(p.dtype)).to(q.dtype), lse


def latent_attention(q: Tensor, latent: Tensor, indices: Tensor, *, width: int, scale: float, backend: str = "auto") -> tuple[Tensor, Tensor]:
    """softmax(scale q k^T) v over each query's selected keys alone, k being latents and v their first `width` numbers.

    Differentiable in q and latent, through both results.

    Args:
        q: [T, H, D], with the expansion of keys multiplied into it.
        latent: [n, D], of one type with q.
        indices: [T, K] int32 or int64, rows of latent, none twice for a query; -1: none, anywhere in a row.
        width: numbers of a latent that are its value.
        scale: what scores are multiplied with.
        backend: auto | reference | triton.

    Returns:
        out [T, H, width] in q's type, and the natural log-sum-exp [T, H] of the scores in float32 or wider; a query without keys has zeros
        and -inf.

    Raises:
        ValueError: shapes, types or backend do not fit.
    """
    _check(q, latent, indices)
    if not 0 < width <= q.shape[2]:
        raise ValueError(f"width={width} must be a part of the latent's {q.shape[2]} numbers")
    choose(backend, ("reference", "triton"))
    if q.numel() and indices.numel() and wants_triton(backend, q):
        from ltrain.kernels.sparse_attention import triton_latent

        if permitted(triton_latent.refusal(q, latent, width), backend, "reference or auto"):
            return triton_latent.latent_attention(q, latent, indices, width, scale)
    outs, sums = [q.new_zeros(0, q.shape[1], width)], [q.new_zeros(0, q.shape[1], dtype=accumulator(q.dtype))]
    for rows in _blocks(indices, q.shape[1] + q.shape[2]):
        args = (q[rows], latent, indices[rows], width, scale)
        out, lse = checkpoint(_attend, *args, use_reentrant=False, preserve_rng_state=False) if torch.is_grad_enabled() else _attend(*args)
        outs.append(out)
        sums.append(lse)
    return torch.cat(outs), torch.cat(sums)


def _cross_entropy(target: Tensor, q: Tensor, k: Tensor, weights: Tensor, indices: Tensor) -> Tensor:
    """target [R, K], k [n, D] -> -sum target ln softmax(index scores of the slots)"""
    there = indices >= 0
    scores = sparse_attention.index_scores(q, k[indices.clamp(min=0)], weights).masked_fill(~there, torch.finfo(target.dtype).min)
    return -(target * scores.log_softmax(-1).masked_fill(~there, 0.0)).sum()


def latent_index_loss(
    q: Tensor,
    latent: Tensor,
    lse: Tensor,
    index: tuple[Tensor, Tensor, Tensor],
    indices: Tensor,
    *,
    scale: float,
    heads: int,
    backend: str = "auto",
) -> Tensor:
    """What trains the indexer in its sparse stage, as `index_loss` in the absorbed form: over each query's selected keys the cross entropy of
    the indexer's softmax with the mean attention of all heads, summed over queries. Differentiable in the indexer's tensors alone.

    Args:
        q, latent, scale: of `latent_attention`, where values are the first numbers of a latent.
        lse: [T, H], the log-sum-exp that it returned.
        index: q [T, Hi, Di], k [n, Di] and weights [T, Hi] of the indexer.
        indices: [T, K] int32 or int64, -1: none.
        heads: query heads of the whole attention, of which q may hold a part: the losses of the parts add up to the whole's.
        backend: auto | reference | triton.

    Returns:
        [] in float32 or wider.

    Raises:
        ValueError: shapes, types or backend do not fit.
    """
    _check(q, latent, indices)
    iq, ik, weights = index
    if lse.shape != q.shape[:2]:
        raise ValueError(f"lse must be {list(q.shape[:2])}, but is {list(lse.shape)}")
    if iq.ndim != 3 or ik.ndim != 2 or len(iq) != len(q) or len(ik) != len(latent) or iq.shape[2] != ik.shape[1] or weights.shape != iq.shape[:2]:
        raise ValueError(
            f"the indexer's q is [{len(q)}, Hi, Di], k [{len(latent)}, Di] and weights [{len(q)}, Hi], but the shapes are {list(iq.shape)}, "
            f"{list(ik.shape)} and {list(weights.shape)}"
        )
    choose(backend, ("reference", "triton"))
    if q.numel() and iq.numel() and indices.numel() and wants_triton(backend, q):
        from ltrain.kernels.sparse_attention import triton_latent

        if permitted(triton_latent.index_refusal(q, latent, index), backend, "reference or auto"):
            return triton_latent.latent_index_loss(q, latent, lse, index, indices, scale, 1 / heads)
    total = torch.zeros((), dtype=accumulator(q.dtype), device=q.device)
    for rows in _blocks(indices, q.shape[1] + q.shape[2] + iq.shape[1] + iq.shape[2]):
        with torch.no_grad():
            scores, _ = _scores(q[rows], latent, indices[rows], scale)
            target = (scores - lse[rows].masked_fill(lse[rows] == -torch.inf, 0.0).unsqueeze(-1)).exp().sum(1) / heads
        args = (target, iq[rows], ik, weights[rows], indices[rows])
        total = total + checkpoint(_cross_entropy, *args, use_reentrant=False, preserve_rng_state=False)
    return total
