"""A convolution between two gates."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from ltrain.model.options.base import MixerOptions
from ltrain.schema import AT_LEAST_1, Limits, check_multiple

if TYPE_CHECKING:
    from ltrain.config import ParallelConfig


@dataclass
class GatedConvOptions(MixerOptions):
    """Gated short convolution: C * conv(B * x), all three projections of the input (LFM2, Liquid AI 2025)."""

    LIMITS: ClassVar[Limits] = {**dict.fromkeys(("inner", "conv_width"), AT_LEAST_1)}

    inner: int = 192  # channels
    conv_width: int = 3  # causal depthwise convolution
    bias: bool = False  # of the projections and the convolution

    def check(self, key: str, parallel: "ParallelConfig") -> None:
        check_multiple(f"{key}.inner", self.inner, "parallel.tensor", parallel.tensor)
