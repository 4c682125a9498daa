"""Attention to what an encoder gave."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from ltrain.model.options.base import MixerOptions
from ltrain.schema import AT_LEAST_1, Choices, Limits, check_multiple

if TYPE_CHECKING:
    from ltrain.config import ParallelConfig


@dataclass
class CrossAttentionOptions(MixerOptions):
    """Cross-attention to the encoder's output that comes with each document (Vaswani et al. 2017; Flamingo, Alayrac et al. 2022).

    With `block.gated`, the layers that Flamingo and Llama 3.2 Vision put between those of a language model.
    """

    CHOICES: ClassVar[Choices] = {"qk_norm": ("none", "head")}
    LIMITS: ClassVar[Limits] = dict.fromkeys(("heads", "kv_heads", "head_dim", "memory_length"), AT_LEAST_1)

    heads: int = 8
    kv_heads: int = 2
    head_dim: int = 64
    memory_width: int = 0  # of a row of the encoder's output; 0: model.hidden
    memory_length: int = 1024  # rows that a document has, where operations and bytes are counted: the stream says how many there are
    qk_norm: str = "head"  # of queries and keys: none (Flamingo) | head (inside each: Llama 3.2 Vision)

    def check(self, key: str, parallel: "ParallelConfig") -> None:
        check_multiple(f"{key}.heads", self.heads, f"{key}.kv_heads", self.kv_heads)
        check_multiple(f"{key}.kv_heads", self.kv_heads, "parallel.tensor", parallel.tensor)

    def refuses(self) -> dict[str, str]:
        return {
            "pipeline": "the encoder's output does not cross stages yet",
            "training": "documents of the data have no encoder's output: give it to the model's forward, as its memory",
        }
