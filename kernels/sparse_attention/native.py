"""The compressed and the selected branch of native sparse attention.

Backends: `reference` (torch, by blocks of queries) and `triton` (on a GPU, deterministic); `auto` takes triton wherever it runs.
Source: NSA (Yuan et al. 2025, arXiv 2502.11089), sections 3.3.1 and 3.3.2.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ltrain.kernels.segments import Part, accumulator, choose, documents, permitted, wants_triton
from ltrain.kernels.sparse_attention import blocks


class Shape(NamedTuple):
    """Tokens of each kind of block, and how many are selected."""

    length: int  # of a compressed block (l)
    stride: int  # from one compressed block to the next (d)
    block: int  # of a selected block (l')
    top: int  # selected blocks, the first of the document and the two nearest among them (n)

    def compressed(self, tokens: int) -> int:
        """How many compressed blocks lie in so many tokens of a document."""
        return max((tokens - self.length) // self.stride + 1, 0)

    def weighed(self, tokens: int) -> int:
        """Of how many blocks that may be selected all compressed blocks that they share tokens with lie in so many tokens of a document."""
        return max((tokens - self.length + self.stride) // self.block, 0)

    def first_of(self, selected: int) -> int:
        """The first compressed block that shares tokens with this one that may be selected."""
        return max((selected * self.block - self.length) // self.stride + 1, 0)


def shared_units(compressed: int, selected: int, shape: Shape, device: torch.device) -> Tensor:
    """[compressed, selected]: how many strides a compressed and a selected block share (equation 9)."""
    first = torch.arange(compressed, device=device) * shape.stride  # tokens
    begin = torch.arange(selected, device=device) * shape.block
    overlap = torch.minimum(first[:, None] + shape.length, begin + shape.block) - torch.maximum(first[:, None], begin)
    return overlap.clamp(min=0) // shape.stride


def _attend(
    q: Tensor, turned: Tensor, kc: Tensor, vc: Tensor, k: Tensor, v: Tensor, position: Tensor, scale: float, shape: Shape
) -> tuple[Tensor, Tensor]:
    """Queries [R, H, D] of one document at position [R]; kc, vc [n, Hk, ...] compressed, k, v [t, Hk, ...] -> both branches [R, H, Dv]"""
    wide, group = accumulator(q.dtype), q.shape[1] // k.shape[1]
    ended = torch.arange(len(kc), device=q.device) * shape.stride + shape.length - 1 <= position[:, None]  # [R, n]: wholly in the past
    scores = torch.einsum("rhd,nhd->hrn", q, kc.repeat_interleave(group, 1)).to(wide) * scale
    # without any ended block a query has no compressed branch, not an average of what it must not see
    p = scores.masked_fill(~ended, -torch.inf).softmax(-1).where(ended, 0.0) if len(kc) else scores
    compressed = torch.einsum("hrn,nhd->rhd", p.to(vc.dtype), vc.repeat_interleave(group, 1))

    blocks = -(-len(k) // shape.block)
    with torch.no_grad():
        importance = p @ shared_units(len(kc), blocks, shape, q.device).to(wide)  # [H, R, blocks]
        importance = importance.unflatten(0, (-1, group)).sum(1)  # one choice for the heads of a K/V head (equation 10)
        number, own = torch.arange(blocks, device=q.device), (position // shape.block)[:, None]
        importance = importance.masked_fill((number == 0) | (number == own) | (number == own - 1), torch.inf).masked_fill(number > own, -torch.inf)
        best = importance.topk(min(shape.top, blocks), dim=-1)
        seen = torch.zeros_like(importance, dtype=torch.bool).scatter_(-1, best.indices, best.values > -torch.inf)
        seen = seen.repeat_interleave(shape.block, -1)[..., : len(k)] & (torch.arange(len(k), device=q.device) <= position[:, None])
    scores = torch.einsum("rhd,nhd->hrn", turned, k.repeat_interleave(group, 1)).to(wide) * scale
    p = scores.masked_fill(~seen.repeat_interleave(group, 0), -torch.inf).softmax(-1)
    return compressed, torch.einsum("hrn,nhd->rhd", p.to(v.dtype), v.repeat_interleave(group, 1))


def native_attention(
    q: Tensor, turned: Tensor, kc: Tensor, vc: Tensor, k: Tensor, v: Tensor, parts: list[Part], *, scale: float, shape: Shape, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """Every query over the compressed blocks that end before it, and over the tokens of the blocks that these make important.

    Args:
        q, turned: [T, H, D], queries for compressed and for single keys (which may be rotated).
        kc, vc: [blocks, Hk, D], [blocks, Hk, Dv], the compressed blocks of all documents, one after another, `shape.compressed` of each.
        k, v: [n, Hk, D], [n, Hk, Dv].
        parts: which queries belong to which keys, of which each document's end with its last query.
        backend: auto | reference | triton.

    Returns:
        The compressed and the selected branch, [T, H, Dv] in v's type. The choice has no gradient; all else is differentiable.

    Raises:
        ValueError: backend does not exist, or is triton, which does not take these.
    """
    choose(backend, ("reference", "triton"))
    if q.numel() and wants_triton(backend, q):
        from ltrain.kernels.sparse_attention import triton_blocks, triton_choice

        why = triton_blocks.refusal(turned, k, v, k.shape[1], parts, scale) or triton_blocks.refusal(q, kc, vc, kc.shape[1], parts, scale)
        if permitted(why, backend, "reference or auto"):
            of_parts, each = (tuple(parts), len(q)), torch.zeros(len(q), kc.shape[1], 1, dtype=torch.int32, device=q.device)
            ended = triton_blocks.ended(*of_parts, shape.length, shape.stride, q.device)
            compressed, lse = triton_blocks.attend(q, kc, vc, each, ended, scale)
            indices = triton_choice.important_blocks(q.detach(), kc.detach(), lse.detach(), parts, scale, *shape)
            selected, _ = triton_blocks.attend(turned, k, v, indices, triton_blocks.cut(*of_parts, shape.block, q.device), scale)
            return compressed, selected
    first, blocks_before = {}, 0
    for begin, end in documents(parts).items():
        first[begin], blocks_before = blocks_before, blocks_before + shape.compressed(end - begin)
    outputs: list[tuple[Tensor, Tensor]] = []
    for some in blocks(parts, q.shape[1]):
        rows, keys, _ = some
        n, position = first[keys.start], some.places(q.device)
        mine = slice(n, n + shape.compressed(keys.stop - keys.start))
        args = (q[rows], turned[rows], kc[mine], vc[mine], k[keys], v[keys], position, scale, shape)
        outputs.append(checkpoint(_attend, *args, use_reentrant=False, preserve_rng_state=False) if torch.is_grad_enabled() else _attend(*args))
    nothing = v.new_zeros(0, q.shape[1], v.shape[2])
    compressed, selected = (torch.cat([nothing, *branch]) for branch in (zip(*outputs, strict=True) if outputs else ((), ())))
    return compressed, selected


def decode_importance(scores: Tensor, lse: Tensor, numbers: Tensor, count: int, shape: Shape) -> Tensor:
    """What compressed blocks with these scores [N, Hk, G, B] and numbers [N, B] (negative: none) make of `count` selected blocks (equations 9 and
    10): lse [N, Hk, G] over all compressed blocks, of which these may be a part -> [N, Hk, count]"""
    p = (scores - lse.masked_fill(lse == -torch.inf, 0.0).unsqueeze(-1)).exp().sum(2)  # [N, Hk, B]
    first = numbers.clamp(min=0) * shape.stride
    block = first // shape.block  # it may reach over into one more
    inside = torch.minimum(first + shape.length, (block + 1) * shape.block) - first
    found = p.new_zeros(*p.shape[:2], count + 1)
    for target, tokens in ((block, inside), (block + 1, shape.length - inside)):
        units = (tokens // shape.stride).masked_fill(numbers < 0, 0)
        found.scatter_add_(-1, target.clamp(max=count).unsqueeze(1).expand(p.shape), p * units.unsqueeze(1))
    return found[..., :count]
