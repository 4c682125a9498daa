"""What the options of every mixer answer."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from ltrain.schema import Choices, Limits

if TYPE_CHECKING:
    from ltrain.config import ParallelConfig


class MixerOptions:
    """Base of each mixer's options, which are a dataclass."""

    CHOICES: ClassVar[Choices] = {}
    LIMITS: ClassVar[Limits] = {}
    PAPERS: ClassVar[dict[str, str]] = {}  # a mixer's name in MIXERS -> what it is, with its paper; without: the docstring's first paragraph

    def check(self, key: str, parallel: "ParallelConfig") -> None:
        """Refuse, in one sentence (ConfigError) that names `key`, options that do not go together or do not divide over the ranks."""

    def refuses(self) -> dict[str, str]:
        """Parallelism (tensor, context, pipeline), `decode` or `training` -> why a layer with these options does not work under it; the rest it
        supports. Training is on next tokens; what it refuses serves models that are loaded or built in Python, with a loss of their own."""
        return {}

    def softmax_heads(self) -> dict[str, tuple[int, int]]:
        """Heads and K/V heads of each attention that `parallel.ulysses` may divide, by the key under this mixer's ('': its own)."""
        return {}

    def gives(self) -> str:
        """The option by which a layer with these options leaves something to later ones, as in a config; '': it leaves nothing."""
        return ""

    def takes(self) -> tuple[str, str]:
        """The option by which it needs what an earlier layer left, and the one by which that layer `gives` it; empty: it needs nothing."""
        return "", ""


@dataclass
class NoMixerOptions(MixerOptions):
    """Of a layer without a mixer."""
