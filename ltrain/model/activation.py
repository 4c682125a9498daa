"""What happens between the two projections of a feed-forward."""

from collections.abc import Callable
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from ltrain.model.options.ffn import FeedForwardOptions

FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),
}


@dataclass(frozen=True)
class Activation:
    """activation(gate) * up, or activation(up) alone, with the scales and limits of `FeedForwardOptions`."""

    name: str = "silu"
    gated: bool = True
    gate_scale: float = 1.0
    alpha: float = 1.0
    limit: float = 0.0
    clamp: str = "before"
    up_offset: float = 0.0

    @classmethod
    def of(cls, options: FeedForwardOptions, limit: float) -> "Activation":
        o = options
        return cls(o.activation, o.gated, o.gate_scale, o.alpha, limit, o.clamp, o.up_offset)

    @property
    def parts(self) -> int:
        """Widths that the projection before it gives for one of the projection after it."""
        return 2 if self.gated else 1

    def __call__(self, *parts: Tensor) -> Tensor:
        """gate and up, or up alone, [..., inner] each -> [..., inner]"""
        gate = parts[0] if self.gate_scale == 1 else parts[0] * self.gate_scale
        if self.limit and self.clamp == "before":
            gate = gate.clamp(max=self.limit)
        gate = gate * (gate * self.alpha).sigmoid() if self.alpha != 1 else FUNCTIONS[self.name](gate)
        if not self.gated:
            return gate
        if self.limit and self.clamp == "after":
            gate = gate.clamp(max=self.limit)
        up = parts[1].clamp(-self.limit, self.limit) if self.limit else parts[1]
        return gate * (up + self.up_offset if self.up_offset else up)

    def fused(self, x: Tensor) -> Tensor:
        """[..., parts * inner], gate before up -> [..., inner]"""
        return self(*x.chunk(self.parts, dim=-1))
