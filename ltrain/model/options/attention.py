"""Softmax attention."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

from ltrain.model.options.base import MixerOptions
from ltrain.model.options.rope import RopeOptions
from ltrain.schema import ABOVE_0, AT_LEAST_1, Choices, ConfigError, Limits, check_multiple, default_of

if TYPE_CHECKING:
    from ltrain.config import ParallelConfig


@dataclass
class AttentionOptions(MixerOptions):
    """Softmax attention with grouped K/V heads (Vaswani et al. 2017; GQA: Ainslie et al. 2023), MHA and MQA at its ends."""

    CHOICES: ClassVar[Choices] = {
        "kv": ("own", "source", "shared"),
        "qk_norm": ("none", "head", "full", "weightless"),
        "gate": ("none", "elementwise", "head"),
        "block_score": ("mean", "index"),
        "index_loss": ("none", "dense", "sparse"),
    }
    LIMITS: ClassVar[Limits] = {
        **dict.fromkeys(("heads", "kv_heads", "head_dim", "temperature_length", "top_blocks", "index_dim"), AT_LEAST_1),
        **dict.fromkeys(("scale", "value_scale"), ABOVE_0),
    }

    heads: int = 8
    kv_heads: int = 2
    head_dim: int = 64  # width of a query and a key
    value_dim: int = 0  # width of a value; 0: head_dim
    # own | source (later layers use them too) | shared (those of the last source that sees the same tokens: cross-layer attention,
    kv: str = "own"  # Brandon et al. 2024; Gemma 3n and 4), keys and values
    causal: bool = True  # a token sees those before it; false: the whole of its document, as in encoders (Devlin et al. 2018), without decoding
    window: int = 0  # a token sees the last so many, itself included; 0: all; causal: false: those less than so many away on either side
    chunk: int = 0  # a token sees those whose position divided by it gives the same whole number (Llama 4); 0: all
    anchors: int = 0  # and the document's first so many, whatever the window (StreamingLLM)
    # causal: false: the document's first so many see all of it and all see them, whatever the window (Longformer, Beltagy et al. 2020; with the
    globals: int = 0  # same projections as the others: BigBird, Zaheer et al. 2020)
    # A token sees the last blocks of so many tokens, its own among them, and of the earlier ones those that suit it best; 0: all
    block_size: int = 0
    top_blocks: int = 8  # blocks that it sees
    local_blocks: int = 1  # of them, the last ones that it always sees
    # mean (each head by a block's mean key: MoBA, Lu et al. 2025) | index (each K/V head by the best key of an index branch, one for all heads:
    block_score: str = "mean"  # MiniMax Sparse Attention, Lai et al. 2026), what blocks are chosen by
    index_dim: int = 128  # width of a query and key of the index
    # none (the index is not trained) | dense (warm-up: attention sees all, the index learns its weights) | sparse (among the tokens seen)
    index_loss: str = "sparse"
    index_loss_weight: float = 1.0
    sinks: bool = False  # a learned score for each head that takes its share of the softmax and gives nothing (gpt-oss)
    qk_norm: str = "head"  # of queries and keys: none | head (inside each) | full (over all heads: OLMo 2) | weightless (inside each: Llama 4)
    qk_norm_after_rope: bool = False  # otherwise before
    gate: str = "elementwise"  # output times sigmoid of a projection of the input (Qiu et al. 2025): none | elementwise | head (a number for each)
    qkv_bias: bool = False  # of the projections to queries, keys, values and the gate
    out_bias: bool = False  # of the output projection
    scale: float | None = None  # what scores are multiplied with; null: head_dim ^ -0.5
    softcap: float = 0.0  # scores become softcap x tanh(score / softcap) (Gemma 2); 0: as they are
    value_scale: float = 1.0  # times the values (MiMo-V2)
    temperature: float = 0.0  # queries times 1 + temperature x ln(1 + floor((position + temperature_offset) / temperature_length)) (Llama 4)
    temperature_length: int = 8192
    temperature_offset: int = 0
    differential: bool = False  # pairs of heads give what one softmax sees less what the other sees (Ye et al. 2024)
    alibi: bool = False  # scores minus a slope of each head times the distance (Press et al. 2021)
    # scores plus a learned number of the distance's bucket for each head (T5, Raffel et al. 2020); causal: false: half of them for each side; 0: none
    relative_buckets: int = 0
    relative_distance: int = 128  # from which on all share the last bucket
    rope: RopeOptions | None = field(default_factory=RopeOptions)  # null: no position (NoPE)

    def check(self, key: str, parallel: "ParallelConfig") -> None:
        check_multiple(f"{key}.heads", self.heads, f"{key}.kv_heads", self.kv_heads)
        check_multiple(f"{key}.kv_heads", self.kv_heads, "parallel.tensor", parallel.tensor)
        if self.rope is not None:
            self.rope.check(f"{key}.rope", self.head_dim)
        if not self.causal:
            for name in ("anchors", "block_size"):
                if getattr(self, name):
                    raise ConfigError(f"{key}.{name}={getattr(self, name)} goes with a causal mask: take it out, or write {key}.causal=true")
        if self.globals and self.causal:  # which hides from them what comes after: all see them, and that is what anchors are
            raise ConfigError(f"{key}.globals={self.globals} goes with causal=false: write {key}.anchors={self.globals}, or {key}.causal=false")
        if self.globals and not self.window:
            raise ConfigError(f"{key}.globals={self.globals} has no effect without a window: write {key}.window, or take it out")
        if self.window and self.chunk:
            raise ConfigError(f"{key}.window={self.window} and {key}.chunk={self.chunk} exclude each other: write one of the two")
        for name in ("window", "chunk", "sinks", "softcap", "alibi", "relative_buckets"):
            if self.block_size and getattr(self, name):
                raise ConfigError(f"{key}.block_size={self.block_size} does not go with {name}={getattr(self, name)}: take one of the two out")
        if self.differential:
            check_multiple(f"{key}.kv_heads", self.kv_heads, "the 2 of each pair x parallel.tensor", 2 * parallel.tensor)
            for name, plain in (("value_dim", 0), ("block_size", 0), ("sinks", False), ("alibi", False), ("relative_buckets", 0)):
                if getattr(self, name) != plain:
                    raise ConfigError(f"{key}.{name}={getattr(self, name)} does not go with differential=true: take one of the two out")
            for name, other in (("qk_norm", "full"), ("gate", "head")):
                if getattr(self, name) == other:
                    raise ConfigError(f"{key}.{name}={other} does not go with differential=true, whose heads are pairs: write another {name}")
        if self.kv != "own" and (self.block_size or self.differential):
            raise ConfigError(f"{key}.kv={self.kv} goes with plain attention: take block_size and differential out, or write kv: own")
        if self.kv == "shared" and self.value_scale != 1:
            raise ConfigError(f"{key}.value_scale={self.value_scale:g} has no effect with kv: shared: write it in the source alone")
        self._check_blocks(key)
        if self.anchors and not self.window:
            raise ConfigError(f"{key}.anchors={self.anchors} has no effect without a window: write {key}.window, or take it out")
        hides = limited(self) and self.causal  # a cache without what is hidden does not know how far away its keys are
        if self.alibi and (self.rope is not None or hides):
            raise ConfigError(f"{key}.alibi=true goes with no other position and sees all tokens: write {key}.rope=null and no window or chunk")
        if not self.relative_buckets and self.relative_distance != 128:
            raise ConfigError(f"{key}.relative_distance={self.relative_distance} has no effect without relative_buckets: take it out")
        if self.relative_buckets and (self.rope is not None or hides or self.alibi):
            raise ConfigError(
                f"{key}.relative_buckets goes with no other position and sees all tokens: write {key}.rope=null, no window and no alibi"
            )
        sides = 1 if self.causal else 2
        if self.relative_buckets % sides:
            raise ConfigError(
                f"{key}.relative_buckets={self.relative_buckets} does not divide over the sides of causal=false: write {self.relative_buckets + 1}"
            )
        if self.relative_buckets and not 4 * sides <= self.relative_buckets < 2 * sides * self.relative_distance:
            raise ConfigError(
                f"{key}.relative_buckets={self.relative_buckets}, half of them for one distance each, is not from {4 * sides} to below "
                f"{2 * sides} x relative_distance"
            )
        if self.qk_norm_after_rope and (self.rope is None or self.qk_norm == "none"):
            raise ConfigError(f"{key}.qk_norm_after_rope=true has no effect without both RoPE and a qk_norm: take it out")
        if not self.temperature and (self.temperature_length, self.temperature_offset) != (8192, 0):
            raise ConfigError(f"{key}.temperature_length and temperature_offset have no effect with temperature=0: write a temperature")
        if self.value_dim == self.head_dim:
            raise ConfigError(f"{key}.value_dim={self.value_dim} is head_dim, which 0 says too: take it out")

    def _check_blocks(self, key: str) -> None:
        idle = [] if self.block_size else ["top_blocks", "local_blocks", "block_score"]
        for name in idle:
            if getattr(self, name) != default_of(self, name):
                raise ConfigError(f"{key}.{name}={getattr(self, name)} has no effect without blocks: write {key}.block_size, or take it out")
        if self.local_blocks > self.top_blocks:
            raise ConfigError(f"{key}.local_blocks={self.local_blocks} is above top_blocks={self.top_blocks}, all that are seen: write at most that")
        if self.block_score != "index":
            if self.block_size and not self.local_blocks:
                raise ConfigError(f"{key}.local_blocks=0 would choose a token's own block by the mean of later ones too: write at least 1")
            for name in ("index_dim", "index_loss", "index_loss_weight"):
                if getattr(self, name) != default_of(self, name):
                    raise ConfigError(f"{key}.{name}={getattr(self, name)} has no effect with block_score: mean: write block_score: index")
            return
        turning = int(self.head_dim * self.rope.fraction) if self.rope is not None else 0
        if self.index_dim < turning:
            raise ConfigError(f"{key}.index_dim={self.index_dim} is below the {turning} numbers that turn: write at least that")
        if self.index_loss == "none" and self.index_loss_weight != 1:
            raise ConfigError(f"{key}.index_loss_weight={self.index_loss_weight:g} has no effect with index_loss: none: take it out")

    def _source(self) -> str:
        seen = [f"{name}={getattr(self, name)}" for name in ("window", "chunk", "anchors", "globals") if getattr(self, name)]
        seen += [] if self.causal else ["causal=false"]
        return " and ".join(["kv=source", f"kv_heads={self.kv_heads}", f"head_dim={self.head_dim}", *seen])

    def gives(self) -> str:
        return self._source() if self.kv == "source" else ""

    def takes(self) -> tuple[str, str]:
        return ("kv=shared", self._source()) if self.kv == "shared" else ("", "")

    def softmax_heads(self) -> dict[str, tuple[int, int]]:
        pairs = 2 if self.differential else 1
        return {} if self.block_size else {"": (self.heads // pairs, self.kv_heads // pairs)}

    def refuses(self) -> dict[str, str]:
        found = {}
        if not self.causal:
            found = {
                "decode": "each new token would change what all before it give",
                "training": "each token would see the next one, which it is to predict: write causal: true",
            }
        return {**found, "pipeline": "keys and values of a source do not cross stages yet"} if self.kv == "shared" else found


def limited(options: AttentionOptions) -> bool:
    """Whether some tokens of a document are hidden from later ones."""
    return bool(options.window or options.chunk)
