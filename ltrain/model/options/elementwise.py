"""Recurrences whose state is multiplied number by number."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from ltrain.model.options.base import MixerOptions
from ltrain.schema import ABOVE_0, AT_LEAST_1, Choices, ConfigError, Limits, check_multiple

if TYPE_CHECKING:
    from ltrain.config import ParallelConfig


@dataclass
class MambaOptions(MixerOptions):
    """Mamba: a selective state space of `states` numbers for each channel (Gu & Dao 2023)."""

    CHOICES: ClassVar[Choices] = {"inner_norm": ("none", "weighted", "weightless")}
    LIMITS: ClassVar[Limits] = {**dict.fromkeys(("inner", "states", "step_rank", "conv_width"), AT_LEAST_1), "inner_norm_eps": ABOVE_0}

    inner: int = 384  # channels
    states: int = 16
    step_rank: int = 12  # the step of each channel comes through so many numbers
    conv_width: int = 4  # causal depthwise convolution with SiLU
    conv_bias: bool = True
    bias: bool = False  # of the projections in and out
    inner_norm: str = "none"  # RMSNorm of the step's numbers, B and C: none | weighted (Jamba) | weightless (Falcon Mamba)
    inner_norm_eps: float | None = None  # null: model.norm_eps

    def check(self, key: str, parallel: "ParallelConfig") -> None:
        check_multiple(f"{key}.inner", self.inner, "parallel.tensor", parallel.tensor)
        if self.inner_norm == "none" and self.inner_norm_eps is not None:
            raise ConfigError(f"{key}.inner_norm_eps={self.inner_norm_eps:g} has no effect with inner_norm: none: take it out")


@dataclass
class RGLRUOptions(MixerOptions):
    """Real-gated linear recurrent unit behind a convolution, beside a GELU branch (Griffin, De et al. 2024)."""

    LIMITS: ClassVar[Limits] = dict.fromkeys(("inner", "blocks", "conv_width"), AT_LEAST_1)

    inner: int = 192  # channels
    blocks: int = 4  # of channels, each with gates of its own
    conv_width: int = 4

    def check(self, key: str, parallel: "ParallelConfig") -> None:
        check_multiple(f"{key}.inner", self.inner, f"{key}.blocks", self.blocks)
        check_multiple(f"{key}.blocks", self.blocks, "parallel.tensor", parallel.tensor)
