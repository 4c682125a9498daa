"""The short convolution on a GPU: autograd around the programs of `triton_kernels`. Only the inputs are kept for the backward."""

from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ltrain.kernels.segments import ceil_div
from ltrain.kernels.short_conv import triton_kernels as kernels

TOKENS, CHANNELS = 64, 64  # of one program


class _Places(NamedTuple):
    """int32 on the device."""

    bounds: Tensor  # [N + 1]
    starts: Tensor  # [T]: the first token of each token's segment
    segments: Tensor  # [T]: its number; not read without a state, and then the starts


@lru_cache(maxsize=16)  # all layers of a micro-batch share it
def _places(bounds: tuple[int, ...], device: torch.device, state: bool) -> _Places:
    cuts = torch.tensor(bounds, dtype=torch.int32)
    numbers = torch.arange(len(bounds) - 1, dtype=torch.int32)
    starts = torch.repeat_interleave(cuts[:-1], cuts.diff()).to(device, non_blocking=True)
    segments = torch.repeat_interleave(numbers, cuts.diff()).to(device, non_blocking=True) if state else starts
    return _Places(cuts.to(device, non_blocking=True), starts, segments)


class _ShortConv(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, state: Tensor | None, bounds: tuple[int, ...], silu: bool) -> Tensor:
        places, y = _places(bounds, x.device, state is not None), x.new_empty(x.shape)
        ctx.grid = ceil_div(len(x), TOKENS), ceil_div(x.shape[1], CHANNELS)
        ctx.options = {"W": weight.shape[1], "BT": TOKENS, "BC": CHANNELS, "num_warps": 4}
        ctx.flags = {"STATE": state is not None, "SILU": silu}
        kernels.forward[ctx.grid](
            x, x if state is None else state, weight, places.starts, places.segments, y, *x.shape, x.stride(0), **ctx.flags, **ctx.options
        )
        ctx.save_for_backward(x, weight, state)
        ctx.places = places
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        x, weight, state = ctx.saved_tensors
        bounds, starts, segments = ctx.places
        dz, dx = x.new_empty(x.shape), x.new_empty(x.shape)
        dweight = x.new_empty(ctx.grid[0], *weight.shape, dtype=torch.float32)
        kernels.backward[ctx.grid](
            x, x if state is None else state, weight, starts, segments, grads[0].contiguous(), dz, dweight, *x.shape, x.stride(0),
            **ctx.flags, **ctx.options
        )  # fmt: skip
        kernels.input_gradient[ctx.grid](dz, weight, starts, dx, *x.shape, **ctx.options)
        dstate = None
        if state is not None and ctx.needs_input_grad[2]:
            dstate = torch.empty_like(state)
            grid = len(state), ctx.grid[1]
            kernels.state_gradient[grid](dz, weight, bounds, dstate, x.shape[1], W=weight.shape[1], BC=CHANNELS, num_warps=1)
        return dx, dweight.sum(0).to(weight.dtype), dstate, None, None


def short_conv(x: Tensor, weight: Tensor, bounds: list[int], silu: bool, state: Tensor | None) -> Tensor:
    """x [T, C], weight [C, W], state [N, W - 1, C]: the inputs before each segment, None: zeros -> [T, C]"""
    before = None if state is None or not state.shape[1] else state.contiguous()
    y: Tensor = _ShortConv.apply(x if x.stride(1) == 1 else x.contiguous(), weight.contiguous(), before, tuple(bounds), silu)
    return y
