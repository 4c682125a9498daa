"""RMSNorm over the last axis: torch's fused kernel on a GPU, two passes of plain torch elsewhere."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ltrain.kernels.segments import plain_only

__all__ = ["rms_norm"]


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
