"""Native sparse attention."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

from ltrain.model.options.base import MixerOptions
from ltrain.model.options.rope import RopeOptions
from ltrain.schema import AT_LEAST_1, ConfigError, Limits, check_multiple

if TYPE_CHECKING:
    from ltrain.config import ParallelConfig


@dataclass
class NSAOptions(MixerOptions):
    """Native sparse attention: compressed blocks, the blocks that these make important, and a window, gated (Yuan et al. 2025)."""

    LIMITS: ClassVar[Limits] = {
        **dict.fromkeys(("heads", "kv_heads", "head_dim", "compressed", "stride", "block_size", "window"), AT_LEAST_1),
        "top_blocks": ("at least 3: the first block and the two nearest are always seen", lambda x: x >= 3),
    }

    heads: int = 16
    kv_heads: int = 1
    head_dim: int = 64
    compressed: int = 32  # tokens that are made one key and value
    stride: int = 16  # tokens from one such block to the next
    block_size: int = 64  # tokens of a block that is selected as a whole
    top_blocks: int = 16  # blocks that a token sees, the document's first and its two nearest among them
    window: int = 512  # a token sees the last so many, itself included
    rope: RopeOptions | None = field(default_factory=RopeOptions)  # of queries and single keys; compressed ones have positions inside a block

    def check(self, key: str, parallel: "ParallelConfig") -> None:
        check_multiple(f"{key}.heads", self.heads, f"{key}.kv_heads", self.kv_heads)
        check_multiple(f"{key}.kv_heads", self.kv_heads, "parallel.tensor", parallel.tensor)
        check_multiple(f"{key}.compressed", self.compressed, f"{key}.stride", self.stride)
        check_multiple(f"{key}.block_size", self.block_size, f"{key}.stride", self.stride)
        if self.compressed > self.block_size:
            raise ConfigError(f"{key}.compressed={self.compressed} is more than block_size={self.block_size}: write at most that")
        if self.rope is not None:
            self.rope.check(f"{key}.rope", self.head_dim)

    def softmax_heads(self) -> dict[str, tuple[int, int]]:
        return {"": (self.heads, self.kv_heads)}
