"""What happens between the two projections of a feed-forward."""

from dataclasses import dataclass

from torch import Tensor

from ltrain.kernels.glu import Gating, gated, gated_halves
from ltrain.model.options.ffn import FeedForwardOptions


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

    @property
    def gating(self) -> Gating:
        return Gating(self.name, self.gate_scale, self.alpha, self.limit, self.clamp, self.up_offset)

    def __call__(self, *parts: Tensor) -> Tensor:
        """gate and up, or up alone, [..., inner] each -> [..., inner]"""
        return gated(parts[0], parts[1], self.gating) if self.gated else self.gating.activated(parts[0])

    def fused(self, x: Tensor) -> Tensor:
        """[..., parts * inner], gate before up -> [..., inner]"""
        return gated_halves(x, self.gating) if self.gated else self(x)
