"""The matrix LSTM."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from ltrain.model.options.base import MixerOptions
from ltrain.schema import ABOVE_0, AT_LEAST_1, Limits, check_multiple

if TYPE_CHECKING:
    from ltrain.config import ParallelConfig


@dataclass
class MLSTMOptions(MixerOptions):
    """mLSTM: a matrix memory with exponential input gates, sigmoid forget gates and a normaliser (Beck et al. 2024, 2025)."""

    LIMITS: ClassVar[Limits] = {
        **dict.fromkeys(("heads", "key_dim", "value_dim"), AT_LEAST_1),
        "gate_softcap": ("above 0 and at most 60: e^60 times a million tokens is still a float32", lambda x: 0 < x <= 60),
        "norm_eps": ABOVE_0,
    }

    heads: int = 4
    key_dim: int = 32
    value_dim: int = 64
    gate_softcap: float = 15.0  # input and forget gates become softcap x tanh(gate / softcap): exp of them stays a number
    bias: bool = False  # of the projections and the norm; the two gates have one always
    norm_eps: float = 1e-6  # of the LayerNorm inside each head of the output

    def check(self, key: str, parallel: "ParallelConfig") -> None:
        check_multiple(f"{key}.heads", self.heads, "parallel.tensor", parallel.tensor)
