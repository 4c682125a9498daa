"""Multi-token prediction."""

from dataclasses import dataclass
from typing import ClassVar

from ltrain.schema import ABOVE_0, ConfigError, Limits, default_of


@dataclass
class MTPOptions:
    """Heads that predict tokens further ahead, trained beside the model (DeepSeek-V3, 2024)."""

    LIMITS: ClassVar[Limits] = {"weight": ABOVE_0}

    depth: int = 0  # tokens that each position predicts beyond the next one; 0: none
    weight: float = 0.3  # of their mean loss in what is trained
    layer: str = ""  # the layer kind of each head; '': that of the model's last layer
    shared: bool = False  # one head's weights serve all depths

    def check(self, key: str) -> None:
        """Refuse, in one sentence (ConfigError) that names `key`, options without effect."""
        for name in ("weight", "layer", "shared"):
            if not self.depth and getattr(self, name) != default_of(self, name):
                raise ConfigError(f"{key}.{name}={getattr(self, name)} has no effect with depth: 0: write depth: 1 or more, or take it out")
        if self.shared and self.depth == 1:
            raise ConfigError(f"{key}.shared=true has no effect with depth: 1: write depth: 2 or more, or take it out")
