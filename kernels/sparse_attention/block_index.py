"""Attention over the blocks of tokens that an index branch scores highest for each group of heads.

The attention has two backends: `reference` (torch, by blocks of queries) and `triton` (on a GPU, deterministic); `auto` takes triton wherever
it runs. The index and its loss are plain torch.
Source: MiniMax Sparse Attention (Lai et al. 2026, arXiv 2606.13392).
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ltrain.kernels.segments import Part, accumulator, choose, permitted, wants_triton
from ltrain.kernels.sparse_attention import blocks, probabilities
from ltrain.kernels.sparse_attention.block_means import attend, best_blocks

Index = tuple[Tensor, Tensor]  # queries [T, Hk, Di], one for each K/V head, and keys [n, Di]


def _products(q: Tensor, k: Tensor) -> Tensor:
    """q [R, Hk, Di], k [n, Di] -> [Hk, R, n] in float32 or wider"""
    wide = accumulator(q.dtype)
    return torch.einsum("rhd,nd->hrn", q.to(wide), k.to(wide))


def _best(q: Tensor, k: Tensor, later: Tensor, own: Tensor, block: int, top: int, local: int) -> tuple[Tensor, Tensor]:
    """q [R, Hk, Di], k [n, Di], later [R, n], own [R] -> `best_blocks`, a block's score being the largest of its keys up to the query."""
    scores = F.pad(_products(q, k).masked_fill(later, -torch.inf), (0, -len(k) % block), value=-torch.inf)
    return best_blocks(scores.unflatten(-1, (-1, block)).amax(-1), own, top, local)


@torch.no_grad()
def select_blocks(index: Index, parts: list[Part], *, block: int, top: int, local: int) -> Tensor:
    """The blocks that each K/V head of each query sees: the last `local`, its own among them, and those of the highest index score before.

    Blocks are counted from a document's first token.

    Returns:
        [T, Hk, top] int64 numbers of blocks, -1 where there are fewer.
    """
    q, k = index
    found = torch.full((*q.shape[:2], top), -1, dtype=torch.int64, device=q.device)
    for some in blocks(parts, q.shape[1]):
        rows, keys, _ = some
        best, there = _best(q[rows], k[keys], some.later(q.device), some.places(q.device) // block, block, top, local)
        found[rows, :, : best.shape[-1]] = best.masked_fill(~there, -1).transpose(0, 1)
    return found


def _seen(indices: Tensor, count: int) -> Tensor:
    """indices [R, Hk, top] (-1: none) -> [Hk, R, count], whether a block is among them."""
    there = (indices >= 0).to(torch.int32)
    counts = torch.zeros(*indices.shape[:2], count, dtype=torch.int32, device=indices.device)
    return (counts.scatter_add_(-1, indices.clamp(min=0), there) > 0).transpose(0, 1)


def selected_block_attention(
    q: Tensor, k: Tensor, v: Tensor, indices: Tensor, parts: list[Part], *, scale: float, block: int, backend: str = "auto"
) -> Tensor:
    """Causal attention over the blocks chosen for each K/V head, inside documents. Differentiable in q, k and v.

    Args:
        q: [T, H, D]; k, v: [n, Hk, D], [n, Hk, Dv].
        indices: [T, Hk, top], of `select_blocks`.
        parts: which queries belong to which keys.
        backend: auto | reference | triton.

    Returns:
        [T, H, Dv] in v's type.

    Raises:
        ValueError: backend does not exist, or is triton, which does not take these.
    """
    choose(backend, ("reference", "triton"))
    if q.numel() and wants_triton(backend, q):
        from ltrain.kernels.sparse_attention import triton_blocks

        if permitted(triton_blocks.refusal(q, k, v, k.shape[1], parts, scale), backend, "reference or auto"):
            return triton_blocks.attend(q, k, v, indices, triton_blocks.cut(tuple(parts), len(q), block, q.device), scale)[0]
    outputs = [v.new_zeros(0, q.shape[1], v.shape[2])]
    for some in blocks(parts, q.shape[1]):
        rows, keys, _ = some
        seen = _seen(indices[rows], -(-(keys.stop - keys.start) // block)).repeat_interleave(q.shape[1] // k.shape[1], 0)
        args = (q[rows], k[keys], v[keys], seen, some.later(q.device), scale, block)
        outputs.append(checkpoint(attend, *args, use_reentrant=False, preserve_rng_state=False) if torch.is_grad_enabled() else attend(*args))
    return torch.cat(outputs)


def _cross_entropy(target: Tensor, q: Tensor, k: Tensor, seen: Tensor) -> Tensor:
    """target [Hk, R, n] -> -sum target ln softmax(index products among the seen)"""
    log_p = (_products(q, k) * q.shape[-1] ** -0.5).masked_fill(~seen, -torch.inf).log_softmax(-1)
    return -(target * log_p.masked_fill(~seen, 0.0)).sum()


def index_loss(q: Tensor, k: Tensor, index: Index, indices: Tensor | None, parts: list[Part], *, scale: float, block: int, kv_heads: int) -> Tensor:
    """What trains the index branch: over the tokens that each K/V head sees, the cross entropy of its softmax with the mean attention of the
    heads it serves, summed over queries and averaged over K/V heads. Differentiable in the index alone.

    Args:
        q, k: [T, H, D], [n, Hk, D] of the attention.
        indices: [T, Hk, top], of `select_blocks`; None: each sees all tokens so far (warm-up).
        kv_heads: of the whole attention, of which k may hold a part: the losses of the parts add up to the whole's.
    """
    total, group = torch.zeros((), dtype=accumulator(q.dtype), device=q.device), q.shape[1] // k.shape[1]
    for some in blocks(parts, q.shape[1]):
        rows, keys, _ = some
        count, seen = keys.stop - keys.start, (~some.later(q.device)).expand(k.shape[1], -1, -1)
        if indices is not None:
            seen = seen & _seen(indices[rows], -(-count // block)).repeat_interleave(block, -1)[..., :count]
        with torch.no_grad():
            p = probabilities(q[rows], k[keys], seen.repeat_interleave(group, 0), scale)
            target = p.unflatten(0, (-1, group)).mean(1) / kv_heads
        args = (target, index[0][rows], index[1][keys], seen)
        total = total + checkpoint(_cross_entropy, *args, use_reentrant=False, preserve_rng_state=False)
    return total


def block_scores(q: Tensor, k: Tensor, numbers: Tensor, count: int) -> Tensor:
    """One query per document, q [N, Hk, Di], and keys k [N, L, Di] in blocks with numbers [N, L] (negative: no key) below count -> the largest
    product of each block [N, Hk, count] in float32 or wider, -inf where it has no key here."""
    wide = accumulator(q.dtype)
    products = torch.einsum("nhd,nld->nhl", q.to(wide), k.to(wide)).masked_fill_((numbers < 0).unsqueeze(1), -torch.inf)
    places = numbers.clamp(min=0).unsqueeze(1).expand(products.shape)
    return products.new_full((*q.shape[:2], count), -torch.inf).scatter_reduce_(-1, places, products, "amax")
