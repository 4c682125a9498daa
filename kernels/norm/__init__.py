"""Norms over the last axis. RMSNorm: torch's fused kernel on a GPU, two passes of plain torch elsewhere.

`l2_norm`, `l2_normed_parts` and `gated_rms_norm` have backends: `reference` (torch) and `triton` (on a GPU: one pass forwards, and one
backwards that makes everything between inputs and output again); `auto` takes triton wherever it runs.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ltrain.kernels.segments import choose, permitted, plain_only, wants_triton

__all__ = ["GATES", "gated_rms_norm", "l2_norm", "l2_normed_parts", "rms_norm"]

GATES: dict[str, Callable[[Tensor], Tensor]] = {"silu": F.silu, "sigmoid": torch.sigmoid}


class _RMSNorm(torch.autograd.Function):
    """Two passes over x instead of the five that the plain formula takes: norms are a third of a small model's time on a CPU."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, offset: float) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        scale = torch.rsqrt(torch.linalg.vecdot(wide, wide) / x.shape[-1] + eps).unsqueeze(-1)  # [..., 1]
        ctx.save_for_backward(x, weight, scale)
        ctx.offset = offset
        return (wide * scale * (weight.to(wide.dtype) + offset if offset else weight)).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, Tensor, None, None]:
        x, weight, scale = ctx.saved_tensors
        grad = grads[0].to(scale.dtype)
        normed = x * scale
        weighted = grad * (weight.to(grad.dtype) + ctx.offset if ctx.offset else weight)
        mean = torch.linalg.vecdot(weighted, normed).unsqueeze(-1) / x.shape[-1]
        dx = (weighted - normed * mean) * scale
        return (dx.to(x.dtype), (grad * normed).flatten(0, -2).sum(0).to(weight.dtype), None, None)


def rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float = 0.0) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * (offset + weight), computed in float32 or wider (Zhang & Sennrich 2019). Differentiable in x and weight.

    Args:
        x: [..., width].
        weight: [width].

    Returns:
        [..., width] in x's type.
    """
    if x.is_cuda and x.dtype != torch.float64 and x.numel() and not plain_only():
        return F.rms_norm(x, x.shape[-1:], weight.to(x.dtype) if not offset else (weight.float() + offset).to(x.dtype), eps)
    normed: Tensor = _RMSNorm.apply(x, weight, eps, offset)
    return normed


def _takes(x: Tensor, backend: str, others: tuple[Tensor, ...] = (), width: int | None = None) -> bool:
    """width: of a head, where that is not the last axis."""
    choose(backend, ("reference", "triton"))
    if not x.numel() or not wants_triton(backend, x):
        return False
    from ltrain.kernels.norm import triton_norm

    return permitted(triton_norm.refusal(x, *others, width=width or x.shape[-1]), backend, "reference or auto")


def l2_norm(x: Tensor, eps: float = 1e-6, *, backend: str = "auto") -> Tensor:
    """x / sqrt(sum(x^2) + eps) over the last axis, computed in float32 or wider. Differentiable.

    Args:
        x: [T, H, width].

    Returns:
        [T, H, width] in x's type.

    Raises:
        ValueError: x has other axes, or backend does not fit.
    """
    if x.ndim != 3:
        raise ValueError(f"x is [tokens, heads, width], but has {x.ndim} axes")
    if _takes(x, backend):
        from ltrain.kernels.norm import triton_norm

        return triton_norm.l2_norm(x, eps)
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return (wide * torch.rsqrt(wide.square().sum(-1, keepdim=True) + eps)).to(x.dtype)


def l2_normed_parts(x: Tensor, heads: int, width: int, eps: float = 1e-6, *, backend: str = "auto") -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values that lie side by side, apart: the first two normed as by `l2_norm`. Differentiable, its gradient made in one piece.

    Args:
        x: [T, C], of which the first 2 heads x width columns are queries and keys.

    Returns:
        q and k [T, heads, width] and v [T, C - 2 heads x width].

    Raises:
        ValueError: the width of x, or backend does not fit.
    """
    keys = heads * width
    if x.ndim != 2 or x.shape[1] <= 2 * keys:
        raise ValueError(f"x is [tokens, C] with C above the {2 * keys} columns of queries and keys, but has shape {list(x.shape)}")
    if _takes(x, backend, width=width):
        from ltrain.kernels.norm import triton_norm

        return triton_norm.l2_normed_parts(x, heads, width, eps)
    q, k, v = x.split((keys, keys, x.shape[1] - 2 * keys), dim=-1)
    q, k = (l2_norm(part.unflatten(-1, (heads, width)), eps, backend=backend) for part in (q, k))
    return q, k, v


def gated_rms_norm(x: Tensor, weight: Tensor, z: Tensor, eps: float, gate: str, *, backend: str = "auto") -> Tensor:
    """RMSNorm of x, as `rms_norm`, times gate(z). Differentiable in x, weight and z.

    Args:
        x, z: [T, H, width].
        weight: [width].
        gate: of GATES.

    Returns:
        [T, H, width] in x's type.

    Raises:
        ValueError: shapes, gate or backend do not fit.
    """
    if x.ndim != 3 or z.shape != x.shape or weight.shape != x.shape[2:]:
        given = ", ".join(str(list(t.shape)) for t in (x, z, weight))
        raise ValueError(f"x and z are [tokens, heads, width] and weight [width], but have shapes {given}")
    if gate not in GATES:
        raise ValueError(f"gate={gate!r} is not known: write one of {', '.join(GATES)}")
    if _takes(x, backend, (z,)):
        from ltrain.kernels.norm import triton_norm

        return triton_norm.gated_rms_norm(x, weight, z, eps, gate)
    return (rms_norm(x, weight, eps) * GATES[gate](z)).to(x.dtype)
