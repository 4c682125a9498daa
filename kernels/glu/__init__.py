"""Gated activations: f(gate) * up between the two projections of a feed-forward (Shazeer 2020, "GLU Variants Improve Transformer").

Backends: `reference` (torch) and `triton` (on a GPU: one pass forwards and one backwards, which makes everything between gate and output again);
`auto` takes triton wherever it runs.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor

from ltrain.kernels.segments import choose, permitted, wants_triton

__all__ = ["FUNCTIONS", "Gating", "gated", "gated_halves"]

FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),
}


class Gating(NamedTuple):
    """f(gate_scale gate) * (up + up_offset), limited where limit is not 0."""

    name: str = "silu"  # of FUNCTIONS
    gate_scale: float = 1.0
    alpha: float = 1.0  # other than 1: f(x) = x sigmoid(alpha x)
    limit: float = 0.0  # of up to both sides, and of the gate from above
    clamp: str = "before"  # the gate: before or after f
    up_offset: float = 0.0

    def activated(self, gate: Tensor) -> Tensor:
        """What becomes of the gate alone."""
        gate = gate if self.gate_scale == 1 else gate * self.gate_scale
        if self.limit and self.clamp == "before":
            gate = gate.clamp(max=self.limit)
        return gate * (gate * self.alpha).sigmoid() if self.alpha != 1 else FUNCTIONS[self.name](gate)


def _gated(gate: Tensor, up: Tensor, how: Gating) -> Tensor:
    gate = how.activated(gate)
    if how.limit:
        gate = gate.clamp(max=how.limit) if how.clamp == "after" else gate
        up = up.clamp(-how.limit, how.limit)
    return gate * (up + how.up_offset if how.up_offset else up)


def _takes(gate: Tensor, backend: str) -> bool:
    choose(backend, ("reference", "triton"))
    if not gate.numel() or not wants_triton(backend, gate):
        return False
    from ltrain.kernels.glu import triton_glu

    return permitted(triton_glu.refusal(gate), backend, "reference or auto")


def gated(gate: Tensor, up: Tensor, how: Gating, *, backend: str = "auto") -> Tensor:
    """gate and up [..., inner] of one type -> [..., inner]. Differentiable in both.

    Raises:
        ValueError: shapes, types or backend do not fit.
    """
    if gate.shape != up.shape or gate.dtype != up.dtype:
        raise ValueError(f"gate and up have one shape and type, but are {list(gate.shape)} of {gate.dtype} and {list(up.shape)} of {up.dtype}")
    if _takes(gate, backend):
        from ltrain.kernels.glu import triton_glu

        return triton_glu.gated(gate, up, how)
    return _gated(gate, up, how)


def gated_halves(x: Tensor, how: Gating, *, backend: str = "auto") -> Tensor:
    """x [..., 2 inner], gate before up -> [..., inner]. Its gradient is made in one piece.

    Raises:
        ValueError: an odd width, or backend does not fit.
    """
    if x.shape[-1] % 2:
        raise ValueError(f"x holds gate and up, each half as wide, but has {x.shape[-1]} numbers in its last axis")
    if _takes(x, backend):
        from ltrain.kernels.glu import triton_glu

        return triton_glu.gated_halves(x, how)
    gate, up = x.chunk(2, dim=-1)
    return _gated(gate, up, how)
