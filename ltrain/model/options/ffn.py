"""Feed-forward layers and routed experts."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from ltrain.schema import ABOVE_0, Choices, ConfigError, Limits, check_multiple, default_of

if TYPE_CHECKING:
    from ltrain.config import ParallelConfig


@dataclass
class FeedForwardOptions:
    """What every feed-forward has, dense or an expert: its width and what happens between its two projections."""

    activation: str = "silu"  # silu | gelu | gelu_tanh | relu | relu2 (squared; So et al. 2021); gated silu is SwiGLU, gated gelu GeGLU
    gated: bool = True  # activation(gate) x up (Shazeer 2020); without, activation(up)
    bias: bool = False  # of every projection: of the dense feed-forward, of experts and shared expert
    gate_scale: float = 1.0  # times what the activation is applied to (Falcon-H1)
    alpha: float = 1.0  # silu: x sigmoid(alpha x) (gpt-oss)
    limit: float = 0.0  # largest of the gate, and largest of the other factor either way; 0: none
    clamp: str = "before"  # where the gate meets `limit`: before the activation (gpt-oss) | after it (Step 3.5)
    up_offset: float = 0.0  # the other factor is up + this (gpt-oss: 1)

    def check_activation(self, key: str) -> None:
        for name in ("gate_scale", "limit", "up_offset"):
            if not self.gated and getattr(self, name) != default_of(self, name):
                raise ConfigError(f"{key}.{name}={getattr(self, name):g} has no effect with gated: false: write gated: true, or take it out")
        if self.alpha != 1 and self.activation != "silu":
            raise ConfigError(f"{key}.alpha={self.alpha:g} has no effect with activation: {self.activation}: write activation: silu, or take it out")


@dataclass
class MoEOptions(FeedForwardOptions):
    """Routed experts beside a shared expert.

    score: softmax, renormalised, is also the softmax of the chosen logits alone (gpt-oss, Granite); sigmoid, not renormalised, is also
    the sigmoid of the chosen logits (Llama 4).
    """

    CHOICES: ClassVar[Choices] = {
        "activation": ("silu", "gelu", "gelu_tanh", "relu", "relu2"),
        "clamp": ("before", "after"),
        "score": ("softmax", "sigmoid"),
        "group_score": ("max", "top2"),
        "router_dtype": ("float32", "model"),
    }
    LIMITS: ClassVar[Limits] = dict.fromkeys(("scale", "alpha", "gate_scale", "groups", "top_groups"), ABOVE_0)

    experts: int = 8  # 0: one dense feed-forward of width `inner` instead, and with inner: 0 none at all
    top_k: int = 2
    inner: int = 256  # width of one expert
    latent: int = 0  # experts work in so many dimensions, between a projection down and one up (Nemotron 3 Super); 0: in all
    shared_inner: int = 256  # width of the shared expert; 0: none
    shared_gate: bool = False  # the shared expert's output times sigmoid of one number per token
    shared_limit: float = 0.0  # the shared expert's `limit`
    score: str = "sigmoid"  # softmax | sigmoid
    router_bias: bool = False  # added to the router's logits (gpt-oss)
    router_dtype: str = "float32"  # of the product that gives the logits: float32 | model; scores are float32 in both
    groups: int = 1  # experts stand in so many groups, of which each token first chooses top_groups (DeepSeek-V2 and V3)
    top_groups: int = 1
    group_score: str = "top2"  # what a group is chosen by: max (its best expert's score) | top2 (the sum of its two best)
    renormalise: bool = True  # weights of the chosen experts sum to 1
    scale: float = 1.0  # times the weights
    scale_input: bool = False  # weights multiply what goes into the experts (Llama 4), not what comes out
    aux_loss: float = 1e-3  # coefficient of the load-balancing loss (Fedus et al. 2021), per micro-batch
    bias_rate: float = 1e-3  # step of the balancing bias without auxiliary loss (Wang et al. 2024); 0: it stays as it is

    @property
    def absent(self) -> bool:
        """Whether the layer has no feed-forward."""
        return not self.experts and not self.inner

    def check(self, key: str, parallel: "ParallelConfig") -> None:
        """Refuse, in one sentence (ConfigError) that names `key`, options that do not go together or do not divide over the ranks."""
        self.check_activation(key)
        limits = (self.limit, self.shared_limit if self.experts and self.shared_inner else 0)
        if self.clamp != "before" and not any(limits):
            raise ConfigError(f"{key}.clamp={self.clamp} has no effect without a limit: write {key}.limit, or take it out")
        if self.experts:
            self._check_experts(key)
        dense = "shared_inner" if self.experts else "inner"
        check_multiple(f"{key}.{dense}", getattr(self, dense), "parallel.tensor", parallel.tensor)
        check_multiple(f"{key}.experts", self.experts, "parallel.expert", parallel.expert)

    def _check_experts(self, key: str) -> None:
        if not self.inner:
            raise ConfigError(f"{key}.inner=0 leaves {self.experts} experts no width: write at least 1, or experts: 0 too for no feed-forward")
        if not 1 <= self.top_k <= self.experts:
            raise ConfigError(f"{key}.top_k={self.top_k} is not from 1 to experts={self.experts}: write a number in that range")
        for name in ("shared_gate", "shared_limit"):
            if getattr(self, name) and not self.shared_inner:
                value = str(getattr(self, name)).lower()
                raise ConfigError(f"{key}.{name}={value} has no effect without a shared expert: write shared_inner, or take it out")
        if self.shared_limit and not self.gated:
            raise ConfigError(f"{key}.shared_limit={self.shared_limit:g} has no effect with gated: false: write gated: true, or take it out")
        if self.groups == 1 and self.group_score != "top2":
            raise ConfigError(f"{key}.group_score={self.group_score} has no effect with groups: 1: write the number of groups, or take it out")
        check_multiple(f"{key}.experts", self.experts, f"{key}.groups", self.groups)
        if self.top_groups > self.groups:
            raise ConfigError(f"{key}.top_groups={self.top_groups} is more than groups={self.groups}: write at most {self.groups}")
        size = self.experts // self.groups
        if self.top_k > self.top_groups * size:
            chosen = f"top_groups={self.top_groups} groups of {size} experts"
            raise ConfigError(f"{key}.top_k={self.top_k} is more than the experts in {chosen}: write a smaller top_k, or a larger top_groups")
        if self.groups > 1 and self.group_score == "top2" and size < 2:
            raise ConfigError(f"{key}.group_score=top2 needs groups of two experts or more, and groups={self.groups} have {size}: write max")
