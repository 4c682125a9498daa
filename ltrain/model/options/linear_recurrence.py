"""Linear recurrences with a matrix state."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

from ltrain.model.options.base import MixerOptions
from ltrain.model.options.rope import RopeOptions
from ltrain.schema import ABOVE_0, AT_LEAST_1, Choices, ConfigError, Limits, check_multiple, default_of

if TYPE_CHECKING:
    from ltrain.config import ParallelConfig

DATA_DECAYS = ("head", "channel")  # those that the input gives


@dataclass
class LinearRecurrenceOptions(MixerOptions):
    """Linear recurrence with a matrix state: S_t = decay_t S_{t-1} + update, one K x V matrix for each value head.

    The mixers below fix some of these options: what is left of a published layer is written beside them.
    """

    CHOICES: ClassVar[Choices] = {
        "decay": ("none", "lightning", "retention", *DATA_DECAYS),
        "decay_gate": ("softplus", "sigmoid", "bounded"),
        "update": ("add", "delta"),
        "activation": ("silu", "none"),
        "feature_map": ("none", "elu", "relu"),
        "qk_norm": ("l2", "head", "none"),
        "gate": ("silu", "sigmoid", "none"),
        "norm": ("head", "group", "all", "none"),
    }
    LIMITS: ClassVar[Limits] = {
        **dict.fromkeys(("key_heads", "value_heads", "key_dim", "value_dim"), AT_LEAST_1),
        **dict.fromkeys(("beta_scale", "scale", "norm_eps", "decay_bound"), ABOVE_0),
        "step_limits": ("empty, or a lower and a higher limit", lambda x: not x or (len(x) == 2 and 0 <= x[0] < x[1])),
    }

    # Constant for each head: lightning (Qin et al. 2024: less in deeper layers) | retention (Sun et al. 2023). From the input: head | channel
    decay: str = "head"  # none | lightning | retention | head (one number for each) | channel (one for each of a head's key_dim)
    # Of what the input gives, a: softplus (-exp(A_log) softplus(a + dt_bias)) | sigmoid (ln sigmoid(a + dt_bias) / 16: GLA)
    decay_gate: str = "softplus"  # | bounded (-decay_bound sigmoid(exp(A_log) (a + dt_bias)))
    decay_bound: float = 5.0  # for bounded: the largest decay
    decay_rank: int = 0  # a comes through so many numbers (low rank); 0: from the input at once
    update: str = "delta"  # add | delta (the error of what the state recalls for the key)
    beta_scale: float = 1.0  # the delta rule's strength is this times sigmoid: 2 lets eigenvalues be negative (Grazzi et al. 2024)
    step: bool = False  # what is written is multiplied with the step softplus(a + dt_bias) (Mamba-2)
    step_limits: list[float] = field(default_factory=list)  # between which the step is kept; empty: it is free
    key_heads: int = 4
    value_heads: int = 4  # a multiple of key_heads
    key_dim: int = 64
    value_dim: int = 64
    conv_width: int = 4  # causal depthwise convolution before q, k and v; 0: none
    conv_bias: bool = False
    activation: str = "silu"  # of q, k and v, behind the convolution: silu | none
    feature_map: str = "none"  # of q and k (Katharopoulos et al. 2020): none | elu (elu(x) + 1) | relu
    qk_norm: str = "l2"  # of q and k: l2 (unit length) | head (RMSNorm with weights inside each head: Ling 2.5) | none
    rope: RopeOptions | None = None  # null: no position but the decay
    scale: float | None = None  # what q is multiplied with; null: key_dim ^ -0.5
    normaliser: bool = False  # the output is divided by what the keys alone would give
    skip: bool = False  # the output gets v times a learned number of each head (Mamba's D)
    gate: str = "silu"  # of the output, of a projection of the input: silu | sigmoid | none
    gate_rank: int = 0  # that projection comes through so many numbers (low rank); 0: from the input at once
    gate_first: bool = False  # the gate before the norm (Mamba-2); otherwise behind it
    norm: str = "head"  # RMSNorm of the output: head (inside each) | group (of a key head's value heads) | all (over all heads) | none
    norm_groups: int = 0  # for norm: group, so many groups of value heads; 0: one for each key head
    norm_eps: float | None = None  # null: model.norm_eps
    bias: bool = False  # of the projections in and out
    # Times what the projection of the input gives: q, k, v, and of gate, beta and decay those that are part of it; empty: all 1 (Falcon-H1)
    part_scales: list[float] = field(default_factory=list)

    @property
    def has_step(self) -> bool:
        """Whether the decay is a softplus step times a rate."""
        return self.decay in DATA_DECAYS and self.decay_gate == "softplus"

    @property
    def part_widths(self) -> dict[str, int]:
        """What the projection of the input gives at once: q, k, v, the output's gate, and for each value head the strength beta and the decay."""
        keys, values = self.key_heads * self.key_dim, self.value_heads * self.value_dim
        parts = {"q": keys, "k": keys, "v": values}
        if self.gate != "none" and not self.gate_rank:
            parts["gate"] = values
        if self.update == "delta":
            parts["beta"] = self.value_heads
        if self.decay in DATA_DECAYS and not self.decay_rank:
            parts["decay"] = self.value_heads * (self.key_dim if self.decay == "channel" else 1)
        return parts

    def check(self, key: str, parallel: "ParallelConfig") -> None:
        check_multiple(f"{key}.value_heads", self.value_heads, f"{key}.key_heads", self.key_heads)
        check_multiple(f"{key}.key_heads", self.key_heads, "parallel.tensor", parallel.tensor)
        if self.part_scales and len(self.part_scales) != len(self.part_widths):
            raise ConfigError(
                f"{key}.part_scales has {len(self.part_scales)} numbers for {len(self.part_widths)} parts: {', '.join(self.part_widths)}"
            )
        if self.rope is not None:
            self.rope.check(f"{key}.rope", self.key_dim)
        idle = [
            *((name, "decay: head or channel", self.decay in DATA_DECAYS) for name in ("decay_gate", "decay_rank")),
            ("decay_bound", "decay_gate: bounded", self.decay_gate == "bounded"),
            ("beta_scale", "update: delta", self.update == "delta"),
            ("step", "decay: head and decay_gate: softplus", self.has_step and self.decay == "head"),
            ("step_limits", "decay_gate: softplus", self.has_step),
            ("conv_bias", "conv_width above 0", self.conv_width > 0),
            ("normaliser", "update: add", self.update == "add"),
            *((name, "a gate", self.gate != "none") for name in ("gate_rank", "gate_first")),
            ("norm_eps", "a norm", self.norm != "none"),
            ("norm_groups", "norm: group", self.norm == "group"),
        ]
        for name, needs, applies in idle:
            if not applies and getattr(self, name) != default_of(self, name):
                raise ConfigError(f"{key}.{name}={getattr(self, name)} has no effect without {needs}: take it out, or write that")
        if self.norm_groups:
            check_multiple(f"{key}.value_heads", self.value_heads, f"{key}.norm_groups", self.norm_groups)
            check_multiple(f"{key}.norm_groups", self.norm_groups, "parallel.tensor", parallel.tensor)
        if self.conv_width and self.activation == "none":
            raise ConfigError(
                f"{key}.activation=none does not go with a convolution, which ends with SiLU: write {key}.conv_width=0, or activation: silu"
            )
        if self.norm == "none" and self.gate_first:
            raise ConfigError(f"{key}.gate_first=true has no effect with norm: none: take it out")
