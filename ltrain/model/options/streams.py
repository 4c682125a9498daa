"""Several residual streams."""

from dataclasses import dataclass
from typing import ClassVar

from ltrain.schema import ABOVE_0, AT_LEAST_1, ConfigError, Limits, default_of


@dataclass
class StreamOptions:
    """Residual streams beside each other, which every mixer and feed-forward reads and adds to with weights of its own: manifold-constrained
    hyper-connections (Zhu et al. 2024; Xie et al. 2025)."""

    LIMITS: ClassVar[Limits] = {**dict.fromkeys(("count", "iterations"), AT_LEAST_1), "eps": ABOVE_0}

    count: int = 1  # 1: the usual one
    iterations: int = 20  # of Sinkhorn and Knopp, after which rows and columns of the weights between streams sum to about 1
    eps: float = 1e-6  # added to weights and to the sums that divide them

    def check(self, key: str) -> None:
        """Refuse, in one sentence (ConfigError) that names `key`, options without effect."""
        for name in ("iterations", "eps"):
            if self.count == 1 and getattr(self, name) != default_of(self, name):
                raise ConfigError(f"{key}.{name}={getattr(self, name):g} has no effect with count: 1: write count: 2 or more, or take it out")
