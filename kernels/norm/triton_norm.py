"""Norms of heads on a GPU. Inputs alone are kept for the backward; weights' gradients are summed in the same order every time."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ltrain.kernels.norm import triton_kernels as kernels
from ltrain.kernels.segments import TRITON_TYPES, ceil_div, device_refusal, power_of_two

NUMBERS = 2048  # of a program at a time
WIDEST = 1024  # head
PROGRAMS = 1024  # that sum a weight's gradient: several for each processor


def refusal(x: Tensor, *others: Tensor, width: int) -> str | None:
    """Why the kernels do not take these tensors, or None."""
    if why := device_refusal(x):
        return why
    if x.dtype not in TRITON_TYPES or any(other.dtype != x.dtype for other in others):
        return f"takes bfloat16, float16 or float32, all inputs of one type, not {', '.join(str(t.dtype) for t in (x, *others))}"
    if width > WIDEST:
        return f"takes heads of at most {WIDEST}, not {width}"
    return None


def _laid(x: Tensor) -> Tensor:
    return x if x.stride(2) == 1 else x.contiguous()


def _tiles(x: Tensor) -> dict[str, int]:
    block = power_of_two(x.shape[2])
    return {"ROWS": max(1, NUMBERS // block), "BD": block, "num_warps": 4}


class _L2Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, eps: float) -> Tensor:
        ctx.save_for_backward(x)
        ctx.eps = eps
        y, tiles = torch.empty(x.shape, dtype=x.dtype, device=x.device), _tiles(x)
        rows = x.shape[0] * x.shape[1]
        kernels.l2_norm[(ceil_div(rows, tiles["ROWS"]),)](x, y, rows, x.stride(0), x.stride(1), x.shape[1], x.shape[2], eps, **tiles)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (x,) = ctx.saved_tensors
        grad, dx, tiles = _laid(grads[0]), torch.empty(x.shape, dtype=x.dtype, device=x.device), _tiles(x)
        rows = x.shape[0] * x.shape[1]
        strides = x.stride(0), x.stride(1), grad.stride(0), grad.stride(1)
        kernels.l2_norm_gradients[(ceil_div(rows, tiles["ROWS"]),)](x, grad, dx, rows, *strides, x.shape[1], x.shape[2], ctx.eps, **tiles)
        return dx, None


def l2_norm(x: Tensor, eps: float) -> Tensor:
    """x [T, H, D] -> [T, H, D]"""
    y: Tensor = _L2Norm.apply(_laid(x), eps)
    return y


class _L2NormedParts(torch.autograd.Function):
    """The first programs of a launch norm heads of q and k, the others copy rows of v."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, heads: int, width: int, eps: float) -> tuple[Tensor, Tensor, Tensor]:
        tokens, rest = len(x), x.shape[1] - 2 * heads * width
        q, k = (x.new_empty(tokens, heads, width) for _ in range(2))
        v = x.new_empty(tokens, rest)
        block, columns = power_of_two(width), min(NUMBERS, power_of_two(rest))
        rows = max(1, NUMBERS // block)
        norms = ceil_div(tokens * 2 * heads, rows)
        ctx.grid = (norms + tokens * ceil_div(rest, columns),)
        ctx.sizes = tokens, x.stride(0), norms, heads, width, rest, eps
        ctx.options = {"ROWS": rows, "BD": block, "COLUMNS": columns, "num_warps": 4}
        kernels.l2_normed_parts[ctx.grid](x, q, k, v, *ctx.sizes, **ctx.options)
        ctx.save_for_backward(x)
        return q, k, v

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (x,) = ctx.saved_tensors
        dx = x.new_empty(x.shape)
        kernels.l2_normed_parts_gradients[ctx.grid](x, *(grad.contiguous() for grad in grads), dx, *ctx.sizes, **ctx.options)
        return dx, None, None, None


def l2_normed_parts(x: Tensor, heads: int, width: int, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """x [T, C] -> q and k [T, heads, width], v [T, C - 2 heads x width]"""
    q, k, v = _L2NormedParts.apply(x if x.stride(1) == 1 else x.contiguous(), heads, width, eps)
    return q, k, v


class _GatedRMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, z: Tensor, eps: float, gate: str) -> Tensor:
        ctx.save_for_backward(x, weight, z)
        ctx.eps, ctx.gate = eps, gate
        y, tiles = torch.empty(x.shape, dtype=x.dtype, device=x.device), _tiles(x)
        rows = x.shape[0] * x.shape[1]
        strides = x.stride(0), x.stride(1), z.stride(0), z.stride(1)
        kernels.gated_rms_norm[(ceil_div(rows, tiles["ROWS"]),)](
            x, weight, z, y, rows, *strides, x.shape[1], x.shape[2], eps, SILU=gate == "silu", **tiles
        )
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        x, weight, z = ctx.saved_tensors
        grad, tiles = _laid(grads[0]), _tiles(x)
        dx, dz = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (x, z))
        rows = x.shape[0] * x.shape[1]
        programs = min(PROGRAMS, ceil_div(rows, tiles["ROWS"]))
        parts = torch.empty(programs, x.shape[2], dtype=torch.float32, device=x.device)
        strides = x.stride(0), x.stride(1), z.stride(0), z.stride(1), grad.stride(0), grad.stride(1)
        kernels.gated_rms_norm_gradients[(programs,)](
            x, weight, z, grad, dx, dz, parts, rows, *strides, x.shape[1], x.shape[2], ctx.eps, SILU=ctx.gate == "silu", **tiles
        )
        return dx, parts.sum(0).to(weight.dtype), dz, None, None


def gated_rms_norm(x: Tensor, weight: Tensor, z: Tensor, eps: float, gate: str) -> Tensor:
    """x, z [T, H, D], weight [D] -> [T, H, D]"""
    y: Tensor = _GatedRMSNorm.apply(_laid(x), weight.contiguous(), _laid(z), eps, gate)
    return y
