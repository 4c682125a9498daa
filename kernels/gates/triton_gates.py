"""Decays per channel, and values times a step, on a GPU. Inputs alone are kept for the backward; sums are made in the same order every time."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ltrain.kernels.gates import KINDS, SIGMOID_SHARE
from ltrain.kernels.gates import triton_kernels as kernels
from ltrain.kernels.segments import TRITON_TYPES, ceil_div, device_refusal, plain_refusal, power_of_two

COLUMNS = 256  # of a program
ROWS = 8  # at a time
PROGRAMS = 1024  # in all: several for each processor
NUMBERS = 2048  # of a program of `scale`


def refusal(a: Tensor, bias: Tensor) -> str | None:
    """Why the kernels do not take these tensors, or None."""
    if why := device_refusal(a):
        return why
    if a.dtype not in TRITON_TYPES or bias.dtype != torch.float32:
        return f"takes a in bfloat16, float16 or float32 and bias in float32, not {a.dtype} and {bias.dtype}"
    return None


class _ChannelDecay(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a: Tensor, A_log: Tensor | None, bias: Tensor, heads: int, kind: int, bound: float) -> Tensor:
        ctx.save_for_backward(a, A_log, bias)
        ctx.kind, ctx.bound = kind, bound
        (tokens, width), rate = a.shape, None if A_log is None else A_log.float().exp()
        y = torch.empty(tokens, heads, width // heads, dtype=torch.float32, device=a.device)
        grid = (ceil_div(tokens, ROWS), ceil_div(width, COLUMNS))
        kernels.decays[grid](
            a, rate, bias, y, tokens, a.stride(0), width, width // heads, bound, SIGMOID_SHARE, KIND=kind, ROWS=ROWS, BC=COLUMNS, num_warps=4
        )
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        a, A_log, bias = ctx.saved_tensors
        grad = grads[0].contiguous()
        (tokens, width), rate = a.shape, None if A_log is None else A_log.float().exp()
        columns = ceil_div(width, COLUMNS)
        programs = max(1, min(PROGRAMS // columns, ceil_div(tokens, ROWS)))
        da = torch.empty(a.shape, dtype=a.dtype, device=a.device)
        parts = torch.empty(2, programs, width, dtype=torch.float32, device=a.device)  # of bias, and of A_log by channel
        kernels.decay_gradients[programs, columns](
            *(a, rate, bias, grad, da, parts, tokens, a.stride(0), width, width // grad.shape[1], ctx.bound, SIGMOID_SHARE),
            KIND=ctx.kind,
            ROWS=ROWS,
            BC=COLUMNS,
            num_warps=4,
        )
        dbias, dA = parts.sum(1)
        return da, None if A_log is None else dA.view(grad.shape[1], -1).sum(1).to(A_log.dtype), dbias, None, None, None


def channel_decay(a: Tensor, A_log: Tensor | None, bias: Tensor, heads: int, kind: str, bound: float) -> Tensor:
    """-> [T, H, K] float32"""
    a = a if a.stride(1) == 1 else a.contiguous()
    y: Tensor = _ChannelDecay.apply(a, A_log, bias.contiguous(), heads, KINDS.index(kind), bound)
    return y


def scaled_refusal(x: Tensor, factors: Tensor) -> str | None:
    """Why the kernels do not take these tensors, or None."""
    if why := plain_refusal(x):
        return why
    return None if factors.dtype in TRITON_TYPES else f"takes factors in bfloat16, float16 or float32, not {factors.dtype}"


class _Scaled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, factors: Tensor) -> Tensor:
        ctx.save_for_backward(x, factors)
        y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        _scale(x, factors, x, y, factors, False)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        x, factors = ctx.saved_tensors
        dx, dfactors = torch.empty(x.shape, dtype=x.dtype, device=x.device), torch.empty_like(factors)
        _scale(grads[0].contiguous(), factors, x, dx, dfactors, True)
        return dx, dfactors


def _scale(x: Tensor, factors: Tensor, other: Tensor, y: Tensor, dots: Tensor, dotted: bool) -> None:
    (tokens, heads, width), padded = x.shape, power_of_two(x.shape[2])
    rows = max(1, NUMBERS // padded)
    kernels.scale[(ceil_div(tokens * heads, rows),)](
        *(x, factors, other, y, dots, tokens * heads, heads, x.stride(0), x.stride(1), other.stride(0), other.stride(1)),
        D=width,
        BD=padded,
        ROWS=rows,
        DOTTED=dotted,
        num_warps=4,
    )


def scaled(x: Tensor, factors: Tensor) -> Tensor:
    x = x if x.stride(2) == 1 else x.contiguous()
    y: Tensor = _Scaled.apply(x, factors.contiguous())
    return y
