"""What a model is made of: the `model:` part of a config. No torch here, so that a config can be read and refused quickly."""

from dataclasses import dataclass, field
from typing import Any


@dataclass
class RopeOptions:
    """Rotary position embedding (Su et al. 2021) and how its frequencies are stretched past the pre-training length."""

    base: float = 10000.0
    fraction: float = 1.0  # the part of each head's width that rotates
    scaling: str = "none"  # none | linear (position interpolation, Chen et al. 2023) | yarn (Peng et al. 2023)
    factor: float = 1.0  # target length / original length, for linear and yarn
    original_length: int = 4096  # tokens the model was pre-trained at, for yarn
    beta_fast: float = 32.0  # yarn: rotations over original_length above which a frequency is kept
    beta_slow: float = 1.0  # yarn: rotations below which it is interpolated by `factor`
    attention_factor: float | None = None  # yarn: scale of cos and sin; null gives 0.1 ln(factor) + 1


@dataclass
class AttentionOptions:
    """Softmax attention with grouped K/V heads (GQA; MHA and MQA are its ends)."""

    heads: int = 8
    kv_heads: int = 2
    head_dim: int = 64
    qk_norm: bool = True  # RMSNorm over each head's query and key
    gate: bool = True  # output times sigmoid of a projection of the input (Qiu et al. 2025)
    rope: RopeOptions | None = field(default_factory=RopeOptions)  # null: no position (NoPE)


@dataclass
class LinearRecurrenceOptions:
    """State S_t = decay_t S_{t-1} + update: one K x V matrix per value head.

    decay=head, update=delta is Gated DeltaNet (Yang et al. 2024); decay=none, update=delta is DeltaNet;
    decay=head, update=add is gated linear attention with one decay per head; decay=none, update=add is linear attention.
    """

    decay: str = "head"  # none | head
    update: str = "delta"  # add | delta
    key_heads: int = 4
    value_heads: int = 4  # a multiple of key_heads
    key_dim: int = 64
    value_dim: int = 64
    conv_width: int = 4  # causal depthwise convolution before q, k and v


# Mixer name in a config -> (module under ltrain.model.mixers, options, what the name fixes among the options).
MIXERS: dict[str, tuple[str, type, dict[str, Any]]] = {
    "attention": ("attention", AttentionOptions, {}),
    "linear_recurrence": ("linear_recurrence", LinearRecurrenceOptions, {}),
    "gated_delta_net": ("linear_recurrence", LinearRecurrenceOptions, {"decay": "head", "update": "delta"}),
    "delta_net": ("linear_recurrence", LinearRecurrenceOptions, {"decay": "none", "update": "delta"}),
}


@dataclass
class MoEOptions:
    """Routed experts (SwiGLU each) beside a shared expert."""

    experts: int = 8  # 0: a dense SwiGLU of width `inner` instead
    top_k: int = 2
    inner: int = 256  # width of one expert
    shared_inner: int = 256  # width of the shared expert; 0: none
    score: str = "sigmoid"  # softmax | sigmoid
    renormalise: bool = True  # weights of the chosen experts sum to 1
    scale: float = 1.0  # times the weights
    aux_loss: float = 1e-3  # coefficient of the load-balancing loss (Fedus et al. 2021), per micro-batch
    bias_rate: float = 1e-3  # step of the balancing bias without auxiliary loss (Wang et al. 2024); 0: no bias


@dataclass
class ModelConfig:
    vocab: int = 0  # 0: the tokenizer's
    hidden: int = 192
    depth: int = 4  # layers; the pattern is repeated over them
    pattern: list[str] = field(default_factory=lambda: ["gated_delta_net"] * 3 + ["attention"])
    layers: dict[str, dict[str, Any]] = field(default_factory=dict)  # layer kind -> {mixer: name, its options..., ffn: its options}
    ffn: MoEOptions = field(default_factory=MoEOptions)
    norm_eps: float = 1e-6
    tie_embeddings: bool = True
    z_loss: float = 1e-4  # coefficient of mean(logsumexp(logits)^2) (Chowdhery et al. 2022)
    init_std: float = 0.02
