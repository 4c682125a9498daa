"""The keys that a lightning indexer selects for each query, inside the documents of a packed stream, and what trains it before it selects.

By blocks of queries: memory is linear in the stream, and every score of a block is made before most are dropped. Plain torch, but for the
selection, which has kernels of its own on a GPU; `latent` has the attention over what is selected and its loss. Source: DeepSeek Sparse
Attention (DeepSeek-AI 2025, DeepSeek-V3.2 report, section 2).
"""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ltrain.kernels.segments import Part, accumulator, choose, permitted, wants_triton

__all__ = ["index_loss", "in_fp8", "index_scores", "rounded_to_fp8", "select"]

SCORES = 1 << 24  # scores held at a time
LARGEST = torch.finfo(torch.float8_e4m3fn).max
TINY = torch.finfo(torch.float32).tiny * LARGEST  # of a row of zeros


class Block(NamedTuple):
    """Some queries of a document, and the keys that the last of them may see."""

    rows: slice
    keys: slice
    first: int  # the first query's place in its document

    def places(self, device: torch.device) -> Tensor:
        """[rows]: of the queries in their document."""
        return torch.arange(self.first, self.first + self.rows.stop - self.rows.start, device=device)

    def later(self, device: torch.device) -> Tensor:
        """[rows, keys]: the keys behind each query."""
        return torch.arange(self.keys.stop - self.keys.start, device=device) > self.places(device).unsqueeze(1)


def blocks(parts: Iterable[Part], heads: int, least: int = 16) -> Iterator[Block]:
    """All queries in their order, so many at a time that their scores stay below SCORES, but at least so many."""
    for part in parts:
        before = part.first - part.begin
        step = max(SCORES // (heads * max(before + part.stop - part.start, 1)), least)
        for at in range(part.start, part.stop, step):
            stop = min(at + step, part.stop)
            yield Block(slice(at, stop), slice(part.begin, part.first + stop - part.start), before + at - part.start)


def index_scores(q: Tensor, k: Tensor, weights: Tensor) -> Tensor:
    """sum_h w_h relu(q_h k^T) in float32 or wider: q [R, H, D], k [n, D] (or [R, n, D]), weights [R, H] -> [R, n]"""
    wide = accumulator(q.dtype)
    return (weights.to(wide).unsqueeze(1) @ (q.to(wide) @ k.to(wide).mT).relu()).squeeze(1)


def in_fp8(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [..., D] -> e4m3 numbers [..., D] and float32 sizes [...], above 0, which give x when multiplied."""
    wide = x.float()
    sizes = wide.abs().amax(-1).clamp_(min=TINY) / LARGEST
    return (wide / sizes.unsqueeze(-1)).to(torch.float8_e4m3fn), sizes


def rounded_to_fp8(x: Tensor) -> Tensor:
    """What `in_fp8` leaves of x, in float32"""
    numbers, sizes = in_fp8(x)
    return numbers.float() * sizes.unsqueeze(-1)


@torch.no_grad()
def select(q: Tensor, k: Tensor, weights: Tensor, parts: list[Part], top_k: int, *, fp8: bool = False, backend: str = "auto") -> Tensor:
    """The top_k keys of highest index score for each query, among those of its document up to itself.

    Args:
        q: [T, H, D]; k: [n, D]; weights: [T, H], of the indexer.
        parts: which queries belong to which keys.
        top_k: at least 1.
        fp8: round queries and keys to e4m3 first, each row of a head with a size of its own (as DeepSeek-V3.2 does): products take half of
            the time on a GPU that has them.
        backend: auto | reference (torch) | triton (on a GPU); auto takes triton wherever it runs. Of keys with equal scores triton takes the
            first, torch any.

    Returns:
        [T, top_k] int32 numbers of keys in no particular order, the last -1 where there are fewer.

    Raises:
        ValueError: backend does not exist, or is triton, which does not take these tensors.
    """
    choose(backend, ("reference", "triton"))
    if len(q) and wants_triton(backend, q):
        from ltrain.kernels.sparse_attention import triton_select

        if permitted(triton_select.refusal(q, k, fp8), backend, "reference or auto"):
            return triton_select.select(q, k, weights, parts, top_k, fp8)
    if fp8:
        q, k = rounded_to_fp8(q), rounded_to_fp8(k)
    found = torch.full((len(q), top_k), -1, dtype=torch.int32, device=q.device)
    for block in blocks(parts, q.shape[1]):
        rows, keys, _ = block
        scores = index_scores(q[rows], k[keys], weights[rows]).masked_fill_(block.later(q.device), -torch.inf)
        best = scores.topk(min(top_k, scores.shape[1]), dim=-1)
        found[rows, : best.indices.shape[1]] = (best.indices + keys.start).masked_fill(best.values == -torch.inf, -1).int()
    return found


def probabilities(q: Tensor, k: Tensor, seen: Tensor, scale: float) -> Tensor:
    """q [R, H, D], k [n, Hk, D], seen [R, n] or [H, R, n] -> [H, R, n] in float32 or wider"""
    k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    scores = torch.einsum("qhd,khd->hqk", q, k).to(accumulator(q.dtype)) * scale
    return scores.masked_fill(~seen, -torch.inf).softmax(-1)


def _cross_entropy(target: Tensor, q: Tensor, k: Tensor, weights: Tensor, seen: Tensor) -> Tensor:
    """target [R, n] -> -sum target ln softmax(index scores among the seen)"""
    log_p = index_scores(q, k, weights).masked_fill(~seen, -torch.inf).log_softmax(-1)
    return -(target * log_p.masked_fill(~seen, 0.0)).sum()


def index_loss(q: Tensor, k: Tensor, index: tuple[Tensor, Tensor, Tensor], parts: list[Part], *, scale: float, heads: int) -> Tensor:
    """What trains the indexer in its dense stage, or where every key is selected: the cross entropy of its softmax with the attention that it
    serves, over all keys so far, summed over queries (equation 3 of the report, but for the entropy of the target, which has no gradient).
    Differentiable in the indexer's tensors alone.

    Args:
        q, k: [T, H, D], [n, Hk, D] of the attention.
        index: q [T, Hi, Di], k [n, Di] and weights [T, Hi] of the indexer.
        parts: which queries belong to which keys.
        scale: of the attention's scores.
        heads: query heads of the whole attention, of which q may hold a part: the losses of the parts add up to the whole's.
    """
    total = torch.zeros((), dtype=accumulator(q.dtype), device=q.device)
    for block in blocks(parts, q.shape[1]):
        rows, keys, _ = block
        seen = ~block.later(q.device)
        with torch.no_grad():
            target = probabilities(q[rows], k[keys], seen, scale).sum(0) / heads
        total = total + checkpoint(
            _cross_entropy, target, index[0][rows], index[1][keys], index[2][rows], seen, use_reentrant=False, preserve_rng_state=False
        )
    return total
