"""Attention by its definition: all scores at once, masked. Memory grows with queries x keys."""

from itertools import pairwise

import torch
from torch import Tensor

from ltrain.kernels.attention.pairs import Mask, Pair, Score
from ltrain.kernels.segments import accumulator


def attention(
    q: Tensor, k: Tensor, v: Tensor, bounds: list[int], scale: float, mask: Mask, starts: list[int], score: Score, sinks: Tensor | None
) -> Tensor:
    """softmax(scale q k^T) v inside segments, under a mask, in q's type. Differentiable by autograd."""
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)  # [T, H, D], [T, H, Dv]
    lengths = torch.tensor([b - a for a, b in pairwise(bounds)], dtype=torch.int64)
    segment = torch.repeat_interleave(lengths).to(q.device)
    row = torch.arange(len(q), device=q.device)
    position = row + torch.repeat_interleave(torch.tensor([s - a for s, a in zip(starts, bounds, strict=False)]), lengths).to(q.device)
    behind = row[:, None] - row
    seen = segment[:, None] == segment  # [T, T]
    if mask.causal:
        seen &= behind >= 0
    if mask.window:
        seen &= (behind.abs() < mask.window) | (position < mask.anchors + mask.globals) | (position[:, None] < mask.globals)
    if mask.chunk:
        seen &= position[:, None] // mask.chunk == position // mask.chunk
    scores = torch.einsum("qhd,khd->hqk", q, k) * scale
    if score.softcap:
        scores = score.softcap * (scores / score.softcap).tanh()
    added = score.added(behind, q.shape[1])
    scores = scores if added is None else scores + added.to(scores)
    scores = scores.masked_fill(~seen, -torch.inf)
    if sinks is not None:  # one more column, which has no value
        scores = torch.cat((scores, sinks.to(scores)[:, None, None].expand(-1, len(q), 1)), -1)
    return torch.einsum("hqk,khd->qhd", scores.softmax(-1)[..., : len(k)], v)


def _scores(q: Tensor, k: Tensor, pairs: list[Pair], scale: float) -> Tensor:
    """[H, Tq, Tk] scaled scores plus the log of how many pairs hold each query and key (-inf where none does)."""
    count = torch.zeros(len(q), len(k), dtype=q.dtype, device=q.device)
    for q_start, q_len, k_start, k_len, causal, window, gap in pairs:
        seen, place = torch.ones(q_len, k_len, dtype=q.dtype, device=q.device), k_len - q_len + gap
        if causal or window:
            seen = seen.tril(place - gap if causal else place + window - 1)
        count[q_start : q_start + q_len, k_start : k_start + k_len] += seen.triu(place - window + 1) if window else seen
    return torch.einsum("qhd,khd->hqk", q, k.repeat_interleave(q.shape[1] // k.shape[1], 1)) * scale + count.log()


def forward_pairs(q: Tensor, k: Tensor, v: Tensor, pairs: list[Pair], scale: float) -> tuple[Tensor, Tensor]:
    q, k, v = (x.to(accumulator(x.dtype)) for x in (q, k, v))
    scores = _scores(q, k, pairs, scale)
    lse = scores.logsumexp(-1)  # [H, Tq]
    p = (scores - lse.masked_fill(lse == -torch.inf, 0.0).unsqueeze(-1)).exp()
    return torch.einsum("hqk,khd->qhd", p, v.repeat_interleave(q.shape[1] // k.shape[1], 1)), lse.T.contiguous()


def backward_pairs(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, pairs: list[Pair], scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    dout, q, k, v, out = (x.to(accumulator(x.dtype)) for x in (dout, q, k, v, out))
    group = q.shape[1] // k.shape[1]
    p = (_scores(q, k, pairs, scale) - lse.T.masked_fill(lse.T == -torch.inf, 0.0).unsqueeze(-1)).exp()  # [H, Tq, Tk]
    dv = torch.einsum("hqk,qhd->khd", p, dout)
    dp = torch.einsum("qhd,khd->hqk", dout, v.repeat_interleave(group, 1))
    ds = p * (dp - (dout * out).sum(-1).T.unsqueeze(-1)) * scale
    dq = torch.einsum("hqk,khd->qhd", ds, k.repeat_interleave(group, 1))
    dk = torch.einsum("hqk,qhd->khd", ds, q)
    return dq, dk.unflatten(1, (-1, group)).sum(2), dv.unflatten(1, (-1, group)).sum(2)  # [Tk, Hk, D], [Tk, Hk, Dv]
