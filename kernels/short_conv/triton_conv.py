"""The short convolution on a GPU: autograd around the programs of `triton_kernels`. Only the inputs are kept for the backward."""

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ltrain.kernels.segments import ceil_div, plain_refusal
from ltrain.kernels.short_conv import triton_kernels as kernels

TOKENS, CHANNELS = 64, 64  # of one program


def refusal(x: Tensor, initial_state: Tensor | None) -> str | None:
    """Why the kernels do not take these tensors, or None."""
    if why := plain_refusal(x):
        return why
    if initial_state is not None:
        return "begins every segment from zeros, without an initial_state"
    return None


@lru_cache(maxsize=64)  # all layers of a micro-batch share it
def _starts(bounds: tuple[int, ...], device: torch.device) -> Tensor:
    """[T] int32: the first token of each token's segment."""
    cuts = torch.tensor(bounds, dtype=torch.int32)
    return torch.repeat_interleave(cuts[:-1], cuts.diff()).to(device, non_blocking=True)


class _ShortConv(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bounds: tuple[int, ...], silu: bool) -> Tensor:
        starts, y = _starts(bounds, x.device), x.new_empty(x.shape)
        ctx.grid = ceil_div(len(x), TOKENS), ceil_div(x.shape[1], CHANNELS)
        ctx.options = {"W": weight.shape[1], "BT": TOKENS, "BC": CHANNELS, "num_warps": 4}
        kernels.forward[ctx.grid](x, weight, starts, y, *x.shape, x.stride(0), SILU=silu, **ctx.options)
        ctx.save_for_backward(x, weight, starts)
        ctx.silu = silu
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        x, weight, starts = ctx.saved_tensors
        dz, dx = x.new_empty(x.shape), x.new_empty(x.shape)
        dweight = x.new_empty(ctx.grid[0], *weight.shape, dtype=torch.float32)
        kernels.backward[ctx.grid](x, weight, starts, grads[0].contiguous(), dz, dweight, *x.shape, x.stride(0), SILU=ctx.silu, **ctx.options)
        kernels.input_gradient[ctx.grid](dz, weight, starts, dx, *x.shape, **ctx.options)
        return dx, dweight.sum(0).to(weight.dtype), None, None


def short_conv(x: Tensor, weight: Tensor, bounds: list[int], silu: bool) -> Tensor:
    """x [T, C], weight [C, W] -> [T, C], from zeros before each segment"""
    y: Tensor = _ShortConv.apply(x if x.stride(1) == 1 else x.contiguous(), weight.contiguous(), tuple(bounds), silu)
    return y
