"""Rotary position embedding on a GPU. Nothing but the angles is kept for the backward, which turns gradients the other way."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ltrain.kernels.rope import triton_kernels as kernels
from ltrain.kernels.segments import TRITON_TYPES, ceil_div, device_refusal, power_of_two

NUMBERS = 2048  # of a program


def refusal(x: Tensor, cos: Tensor) -> str | None:
    """Why the kernel does not take these tensors, or None."""
    if why := device_refusal(x):
        return why
    if x.dtype not in TRITON_TYPES or cos.dtype != torch.float32:
        return f"takes x in bfloat16, float16 or float32 and angles in float32, not {x.dtype} and {cos.dtype}"
    return None


def _turned(x: Tensor, cos: Tensor, sin: Tensor, pairs: bool, sign: float) -> Tensor:
    (tokens, heads, width), half = x.shape, cos.shape[-1]
    if x.stride(2) != 1:
        x = x.contiguous()
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    block, rest = power_of_two(half), width - 2 * half
    at_once = max(1, NUMBERS // power_of_two(width))
    grid = (ceil_div(tokens * heads, at_once),)
    sizes = tokens * heads, x.stride(0), x.stride(1), heads, half, width, sign
    options = {"ROWS": at_once, "BR": block, "BREST": power_of_two(rest) if rest else 0, "PAIRS": pairs}
    kernels.turn[grid](x, cos, sin, y, *sizes, **options, num_warps=4)
    return y


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, pairs: bool) -> Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.pairs = pairs
        return _turned(x, cos, sin, pairs, 1.0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        cos, sin = ctx.saved_tensors
        return _turned(grads[0], cos, sin, ctx.pairs, -1.0), None, None, None


def rotate(x: Tensor, cos: Tensor, sin: Tensor, pairs: bool) -> Tensor:
    """x [T, H, D], cos and sin [T, 1, R] -> [T, H, D]"""
    y: Tensor = _Rotate.apply(x, cos.contiguous(), sin.contiguous(), pairs)
    return y
