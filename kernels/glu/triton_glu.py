"""Gated activations on a GPU. Gate and up alone are kept for the backward."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ltrain.kernels.glu import Gating
from ltrain.kernels.glu import triton_kernels as kernels
from ltrain.kernels.segments import ceil_div, plain_refusal

NUMBERS = 1024  # of a program
AFTER = {"before": False, "after": True}


def refusal(gate: Tensor) -> str | None:
    """Why the kernels do not take this tensor, or None."""
    return plain_refusal(gate)


def _rows(x: Tensor) -> Tensor:
    """[..., width] -> [rows, width], a view where the leading axes lie as one does, with numbers side by side."""
    x = x.flatten(0, -2) if x.ndim > 1 else x.unsqueeze(0)
    return x if x.stride(-1) == 1 else x.contiguous()


def _launch(how: Gating) -> tuple[tuple[float, ...], dict[str, Any]]:
    numbers = how.gate_scale, how.alpha, how.limit, how.up_offset
    name = "silu" if how.alpha != 1 else how.name  # x sigmoid(alpha x) is SiLU for alpha = 1
    return numbers, {"NAME": name, "LIMITED": how.limit != 0, "AFTER": AFTER[how.clamp], "N": NUMBERS, "num_warps": 4}


class _Gated(torch.autograd.Function):
    """Of gate and up, or of one tensor that holds both, whose gradient is then one tensor."""

    @staticmethod
    def forward(ctx: Any, how: Gating, *parts: Tensor) -> Tensor:
        gate, up = map(_rows, parts if len(parts) == 2 else parts[0].chunk(2, dim=-1))
        out = gate.new_empty(gate.shape)
        numbers, options = _launch(how)
        kernels.forward[(ceil_div(out.numel(), NUMBERS),)](
            gate, up, out, out.numel(), out.shape[1], gate.stride(0), up.stride(0), *numbers, **options
        )
        ctx.save_for_backward(*parts)
        ctx.how = how
        return out.view(*parts[0].shape[:-1], out.shape[1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        parts = ctx.saved_tensors
        gate, up = map(_rows, parts if len(parts) == 2 else parts[0].chunk(2, dim=-1))
        together = gate.new_empty(len(gate), 2 * gate.shape[1]) if len(parts) == 1 else gate.new_empty(2, *gate.shape)
        dgate, dup = together.chunk(2, dim=-1) if len(parts) == 1 else together
        dout = grads[0].contiguous()
        numbers, options = _launch(ctx.how)
        strides = gate.stride(0), up.stride(0), dgate.stride(0)
        grid = (ceil_div(gate.numel(), NUMBERS),)
        kernels.backward[grid](gate, up, dout, dgate, dup, gate.numel(), gate.shape[1], *strides, *numbers, **options)
        found = (together,) if len(parts) == 1 else (dgate, dup)
        return None, *(grad.view(part.shape) for grad, part in zip(found, parts, strict=True))


def gated(gate: Tensor, up: Tensor, how: Gating) -> Tensor:
    out: Tensor = _Gated.apply(how, gate, up)
    return out


def gated_halves(x: Tensor, how: Gating) -> Tensor:
    out: Tensor = _Gated.apply(how, x)
    return out
