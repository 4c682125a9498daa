"""RWKV-7."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from ltrain.model.options.base import MixerOptions
from ltrain.schema import ABOVE_0, AT_LEAST_1, Choices, ConfigError, Limits, check_multiple

if TYPE_CHECKING:
    from ltrain.config import ParallelConfig


@dataclass
class RWKV7Options(MixerOptions):
    """RWKV-7's time mixing: a generalised delta rule behind a token shift (Peng et al. 2025)."""

    CHOICES: ClassVar[Choices] = {"value_mix": ("none", "source", "mix")}
    LIMITS: ClassVar[Limits] = {
        **dict.fromkeys(("heads", "head_dim", "decay_rank", "rate_rank", "gate_rank", "value_rank"), AT_LEAST_1),
        "norm_eps": ABOVE_0,
    }

    heads: int = 4
    head_dim: int = 64  # of keys and values
    decay_rank: int = 64  # numbers that the decay comes through
    rate_rank: int = 64  # the in-context learning rate
    gate_rank: int = 128  # the output gate
    value_mix: str = "none"  # none | source (later layers see these values) | mix (values are mixed with those of the last source)
    value_rank: int = 32  # with mix: how much comes through so many numbers
    norm_eps: float = 64e-5  # of the LayerNorm inside each head of the output

    def check(self, key: str, parallel: "ParallelConfig") -> None:
        check_multiple(f"{key}.heads", self.heads, "parallel.tensor", parallel.tensor)
        if self.value_mix != "mix" and self.value_rank != 32:
            raise ConfigError(f"{key}.value_rank={self.value_rank} has no effect with value_mix: {self.value_mix}: take it out")

    def gives(self) -> str:
        return "value_mix=source" if self.value_mix == "source" else ""

    def takes(self) -> tuple[str, str]:
        return ("value_mix=mix", "value_mix=source") if self.value_mix == "mix" else ("", "")

    def refuses(self) -> dict[str, str]:
        return {"pipeline": "values of a source do not cross stages yet"} if self.value_mix == "mix" else {}
