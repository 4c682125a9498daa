"""Multi-head latent attention."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

from ltrain.model.options.base import MixerOptions
from ltrain.model.options.rope import RopeOptions
from ltrain.schema import ABOVE_0, AT_LEAST_1, Choices, ConfigError, Limits, check_multiple, default_of

if TYPE_CHECKING:
    from ltrain.config import ParallelConfig


@dataclass
class MLAOptions(MixerOptions):
    """Multi-head latent attention: keys and values made of one small latent for each token (DeepSeek-V2, Liu et al. 2024)."""

    CHOICES: ClassVar[Choices] = {
        "gate": ("none", "head"),
        "select": ("none", "index", "shared"),
        "index_loss": ("none", "dense", "sparse"),
    }
    LIMITS: ClassVar[Limits] = {
        **dict.fromkeys(("heads", "kv_rank", "nope_dim", "rope_dim", "value_dim", "temperature_length"), AT_LEAST_1),
        **dict.fromkeys(("top_k", "index_heads", "index_dim"), AT_LEAST_1),
        "latent_norm_eps": ABOVE_0,
    }

    heads: int = 8
    q_rank: int = 0  # width of the queries' latent; 0: queries are projected from the input
    kv_rank: int = 64  # width of the latent that a token's keys and values are made of
    nope_dim: int = 32  # width of a query and key without position, which the latent gives
    rope_dim: int = 16  # width with position; all heads share one such key
    value_dim: int = 32
    bias: bool = False  # of the projections into the latents and of the output
    latent_norm_eps: float = 1e-6  # of the norms of the latents, whatever model.norm_eps
    gate: str = "none"  # none | head (each head's output times sigmoid of a number that the input gives: Ling 3.0)
    temperature: float = 0.0  # queries times 1 + temperature x ln(1 + floor((position + temperature_offset) / temperature_length))
    temperature_length: int = 8192
    temperature_offset: int = 0
    # A token sees the top_k tokens that a lightning indexer scores highest (DSA: DeepSeek-V3.2): none (it sees all) | index (an indexer of
    # this layer's own) | shared (what the layer before it chose: GLM-5)
    select: str = "none"
    top_k: int = 2048
    index_heads: int = 64
    index_dim: int = 128  # of which the first rope_dim numbers turn
    index_pairs: bool = False  # RopeOptions.pairs of the indexer
    index_fp8: bool = False  # the indexer chooses by queries and keys in 8 bits; its loss sees them as they are
    index_loss: str = "sparse"  # none (it is not trained) | dense (warm-up: attention sees all, the indexer learns its weights) | sparse
    index_loss_weight: float = 1.0
    rope: RopeOptions | None = field(default_factory=lambda: RopeOptions(pairs=True))  # null: the rope_dim numbers do not turn (Kimi Linear)

    @property
    def head_dim(self) -> int:
        """What turns, for `RopeOptions.check`."""
        return self.rope_dim

    def check(self, key: str, parallel: "ParallelConfig") -> None:
        check_multiple(f"{key}.heads", self.heads, "parallel.tensor", parallel.tensor)
        if self.rope is not None:
            self.rope.check(f"{key}.rope", self.rope_dim)
            if self.rope.fraction != 1:
                raise ConfigError(f"{key}.rope.fraction={self.rope.fraction:g} has no effect: rope_dim says how many numbers turn, take it out")
        idle = ["top_k"] if self.select == "none" else []
        idle += ["index_heads", "index_dim", "index_pairs", "index_fp8", "index_loss", "index_loss_weight"] if self.select != "index" else []
        for name in idle:
            if getattr(self, name) != default_of(self, name):
                raise ConfigError(f"{key}.{name}={getattr(self, name)} has no effect with select: {self.select}: write select: index, or take it out")
        if self.select == "index" and self.index_dim < self.rope_dim:
            raise ConfigError(f"{key}.index_dim={self.index_dim} is below rope_dim={self.rope_dim}, the numbers that turn: write at least that")
        if self.index_loss == "none" and self.index_loss_weight != 1:
            raise ConfigError(f"{key}.index_loss_weight={self.index_loss_weight:g} has no effect with index_loss: none: take it out")
        if not self.temperature and (self.temperature_length, self.temperature_offset) != (8192, 0):
            raise ConfigError(f"{key}.temperature_length and temperature_offset have no effect with temperature=0: write a temperature")

    def softmax_heads(self) -> dict[str, tuple[int, int]]:
        return {"": (self.heads, self.heads)}

    def gives(self) -> str:
        return "select=index" if self.select == "index" else ""

    def takes(self) -> tuple[str, str]:
        return ("select=shared", "select=index") if self.select == "shared" else ("", "")

    def refuses(self) -> dict[str, str]:
        return {"pipeline": "what a layer selects does not cross stages yet"} if self.select == "shared" else {}
