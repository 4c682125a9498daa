"""The model as a whole."""

from dataclasses import dataclass, field
from typing import Any, ClassVar

from ltrain.model.options.block import BlockOptions
from ltrain.model.options.ffn import MoEOptions
from ltrain.model.options.mtp import MTPOptions
from ltrain.model.options.shared import SharedOptions
from ltrain.model.options.streams import StreamOptions
from ltrain.schema import ABOVE_0, AT_LEAST_1, Choices, Limits


@dataclass
class ModelConfig:
    CHOICES: ClassVar[Choices] = {"norm": ("rms", "rms_zero_centred", "layer", "layer_bias")}
    LIMITS: ClassVar[Limits] = {
        **dict.fromkeys(("hidden", "depth"), AT_LEAST_1),
        **dict.fromkeys(("norm_eps", "init_std", "embed_scale", "logit_scale"), ABOVE_0),
        "pattern": ("a list of at least one layer kind", lambda x: len(x) > 0),
    }

    vocab: int = 0  # 0: the tokenizer's
    hidden: int = 192
    depth: int = 4  # layers; the pattern is repeated over them
    pattern: list[str] = field(default_factory=lambda: ["gated_delta_net"] * 3 + ["attention"])
    layers: dict[str, dict[str, Any]] = field(default_factory=dict)  # layer kind -> {mixer: name, its options..., ffn: {...} or none, block: {...}}
    ffn: MoEOptions = field(default_factory=MoEOptions)
    block: BlockOptions = field(default_factory=BlockOptions)
    norm: str = "rms"  # and of queries and keys: rms | rms_zero_centred (times 1 + weight) | layer (LayerNorm) | layer_bias
    norm_eps: float = 1e-6
    embed_scale: float = 1.0  # times the embeddings (Gemma: sqrt(hidden); Granite)
    learned_positions: int = 0  # embeddings of the first so many positions of a document are added (GPT-2); 0: none
    embed_norm: bool = False  # a norm of the embeddings (BLOOM)
    logit_scale: float = 1.0  # times the logits (Command R; Granite: 1 / logits_scaling)
    logit_softcap: float = 0.0  # logits become softcap x tanh(logits / softcap) (Gemma 2); 0: not
    tie_embeddings: bool = True
    streams: StreamOptions = field(default_factory=StreamOptions)
    shared: SharedOptions = field(default_factory=SharedOptions)
    mtp: MTPOptions = field(default_factory=MTPOptions)
    z_loss: float = 1e-4  # coefficient of mean(logsumexp(logits)^2) (Chowdhery et al. 2022)
    init_std: float = 0.02

    @property
    def embeds_last(self) -> bool:
        """Whether the last pipeline stage holds the embedding too, as its head or for further predictions."""
        return self.tie_embeddings or self.mtp.depth > 0
