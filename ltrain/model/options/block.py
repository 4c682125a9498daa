"""How a layer joins its mixer, its feed-forward and the residual stream."""

from dataclasses import dataclass
from typing import ClassVar

from ltrain.schema import ABOVE_0, Choices, ConfigError, Limits, default_of


@dataclass
class BlockOptions:
    """x + mixer(norm(x)), then x + ffn(norm(x)), and its other forms.

    pre: as above. post: x + norm(f(x)) (OLMo 2). sandwich: x + norm(f(norm(x))) (Gemma 2). parallel: n = norm(x), x + mixer(n) + ffn(n)
    (GPT-J, Command R). parallel_norms: x + mixer(norm(x)) + ffn(norm(x)), the two norms with weights of their own (GPT-NeoX, Falcon 40B).
    normed_residual: n = norm(x), n + f(n): what is added to is the norm's output (MiniMax-01).
    """

    CHOICES: ClassVar[Choices] = {"form": ("pre", "post", "sandwich", "parallel", "parallel_norms", "normed_residual")}
    LIMITS: ClassVar[Limits] = dict.fromkeys(("mixer_scale", "ffn_scale", "mixer_residual_scale", "ffn_residual_scale"), ABOVE_0)

    shared: bool = False  # one of the blocks of model.shared adds to what the mixer reads
    form: str = "pre"  # pre | post | sandwich | parallel | parallel_norms | normed_residual
    mixer_scale: float = 1.0  # times what the mixer adds to the residual stream (Granite's residual multiplier, MiniMax-01's beta)
    ffn_scale: float = 1.0  # times what the feed-forward adds to it
    mixer_residual_scale: float = 1.0  # times what the mixer's output is added to (MiniMax-01's alpha)
    ffn_residual_scale: float = 1.0  # times what the feed-forward's output is added to

    # what the mixer and the feed-forward add is multiplied with tanh of a number each, learned from 0 (Flamingo, Alayrac et al. 2022): a layer
    gated: bool = False  # put into a trained model changes nothing at first

    @property
    def side_by_side(self) -> bool:
        """Whether mixer and feed-forward read the same hidden states."""
        return self.form in ("parallel", "parallel_norms")

    def check(self, key: str, mixer: bool, ffn: bool) -> None:
        """Refuse, in one sentence (ConfigError) that names `key`, what layers with or without a mixer and a feed-forward cannot have."""
        if self.side_by_side and self.ffn_residual_scale != 1:
            raise ConfigError(f"{key}.ffn_residual_scale has no effect with form: {self.form}, whose one sum takes mixer_residual_scale: take it out")
        if self.shared and (self.form != "pre" or not mixer):
            raise ConfigError(f"{key}.shared=true needs a mixer behind a norm of its own: write form: pre and a mixer, or take it out")
        for part, there in (("mixer", mixer), ("ffn", ffn)):
            for name in (f"{part}_scale", f"{part}_residual_scale"):
                if not there and getattr(self, name) != default_of(self, name):
                    raise ConfigError(f"{key}.{name} has no effect without {'a mixer' if part == 'mixer' else 'a feed-forward'}: take it out")

    def check_streams(self, key: str) -> None:
        """Refuse what goes with one residual stream only."""
        if self.form not in ("pre", "post", "sandwich") or self.shared:
            given = "shared=true" if self.shared else f"form={self.form}"
            raise ConfigError(f"{key}.{given} does not go with several residual streams: write form: pre, post or sandwich, or model.streams.count=1")
        for name in ("mixer_residual_scale", "ffn_residual_scale"):
            if getattr(self, name) != 1:
                raise ConfigError(f"{key}.{name} has no effect with several residual streams, which have weights of their own: take it out")
