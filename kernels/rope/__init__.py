"""Rotary position embedding of the first numbers of every head.

Backends: `reference` (torch) and `triton` (on a GPU: what is read is read once, where torch takes seven passes); `auto` takes triton wherever it
runs. Source: Su et al. 2021, "RoFormer".
"""

import torch
from torch import Tensor

from ltrain.kernels.segments import choose, permitted, wants_triton

__all__ = ["rotate"]


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, pairs: bool) -> Tensor:
    half = cos.shape[-1]
    turning, rest = x.split((2 * half, x.shape[-1] - 2 * half), dim=-1)
    first, second = turning.unflatten(-1, (half, 2)).unbind(-1) if pairs else turning.split(half, dim=-1)
    turned = first * cos - second * sin, second * cos + first * sin
    together = torch.stack(turned, dim=-1).flatten(-2) if pairs else torch.cat(turned, dim=-1)
    return torch.cat((together.to(x.dtype), rest), dim=-1) if rest.shape[-1] else together.to(x.dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor, pairs: bool = False, *, backend: str = "auto") -> Tensor:
    """Each head's first 2R numbers turned by its token's R angles, in the tables' precision. Differentiable in x.

    Args:
        x: [T, H, D].
        cos, sin: [T, 1, R] of the angles, 2R <= D; without gradients.
        pairs: whether numbers 2i and 2i + 1 turn together (GPT-J); else i and R + i (NeoX).
        backend: auto | reference | triton.

    Returns:
        [T, H, D] in x's type; what lies behind the first 2R numbers is left as it is.

    Raises:
        ValueError: shapes or backend do not fit.
    """
    if x.ndim != 3 or cos.shape != sin.shape or cos.shape[:-1] != (len(x), 1) or 2 * cos.shape[-1] > x.shape[-1]:
        raise ValueError(
            f"x is [T, H, D] and cos and sin [T, 1, R], 2R <= D, but the shapes are {list(x.shape)}, {list(cos.shape)} and {list(sin.shape)}"
        )
    choose(backend, ("reference", "triton"))
    if x.numel() and cos.shape[-1] and wants_triton(backend, x):
        from ltrain.kernels.rope import triton_rope

        if permitted(triton_rope.refusal(x, cos), backend, "reference or auto"):
            return triton_rope.rotate(x, cos, sin, pairs)
    return _rotate(x, cos, sin, pairs)
