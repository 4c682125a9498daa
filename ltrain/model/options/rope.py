"""Rotary position embedding."""

from dataclasses import dataclass, field
from typing import ClassVar

from ltrain.schema import ABOVE_0, AT_LEAST_1, Choices, ConfigError, Limits, default_of

# Field -> the scalings that read it.
_READ_BY = {
    "original_length": ("yarn", "dynamic", "longrope", "llama3"),
    "length": ("dynamic", "longrope"),
    "attention_factor": ("yarn", "longrope"),
    **dict.fromkeys(("beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"), ("yarn",)),
    **dict.fromkeys(("short_factor", "long_factor"), ("longrope",)),
    **dict.fromkeys(("low_freq_factor", "high_freq_factor"), ("llama3",)),
}


@dataclass
class RopeOptions:
    """Rotary position embedding (Su et al. 2021) and how its frequencies are stretched past the pre-training length."""

    CHOICES: ClassVar[Choices] = {"scaling": ("none", "linear", "ntk", "dynamic", "yarn", "longrope", "llama3")}
    LIMITS: ClassVar[Limits] = {
        "original_length": AT_LEAST_1,
        "base": ("above 1", lambda x: x > 1),
        "fraction": ("above 0 and at most 1", lambda x: 0 < x <= 1),
        "factor": ("at least 1", lambda x: x >= 1),
        **dict.fromkeys(("beta_slow", "attention_factor", "mscale", "mscale_all_dim", "low_freq_factor"), ABOVE_0),
        **dict.fromkeys(("short_factor", "long_factor"), ("numbers above 0", lambda x: all(f > 0 for f in x))),
    }

    base: float = 10000.0
    fraction: float = 1.0  # the part of each head's width that rotates
    pairs: bool = False  # numbers 2i and 2i + 1 of a head turn together, as in GPT-J and DeepSeek; otherwise i and i + half, as in GPT-NeoX and Llama
    scaling: str = "none"  # none | linear (position interpolation) | ntk | dynamic | yarn | longrope | llama3
    factor: float = 1.0  # target length / original length; ntk: base x factor^(d / (d - 2)) (bloc97 2023)
    original_length: int = 4096  # tokens the model was pre-trained at, for dynamic, yarn, longrope and llama3
    length: int = 0  # tokens the model is used at, for dynamic (its base) and longrope (which factors); 0: original_length
    beta_fast: float = 32.0  # yarn: rotations over original_length above which a frequency is kept
    beta_slow: float = 1.0  # yarn: rotations below which it is interpolated by `factor`
    attention_factor: float | None = None  # of cos and sin; null: 0.1 ln(factor) + 1 (yarn), sqrt(1 + ln(factor) / ln(original_length)) (longrope)
    mscale: float | None = None  # yarn, with mscale_all_dim: attention factor (0.1 mscale ln(factor) + 1) / (0.1 mscale_all_dim ln(factor) + 1)
    mscale_all_dim: float | None = None  # yarn: see mscale
    truncate: bool = True  # yarn: the ramp between kept and interpolated frequencies starts and ends at whole indices
    short_factor: list[float] = field(default_factory=list)  # longrope: what each frequency is divided by where length <= original_length
    long_factor: list[float] = field(default_factory=list)  # longrope: what each frequency is divided by where length > original_length
    low_freq_factor: float = 1.0  # llama3: rotations over original_length below which a frequency is divided by factor
    high_freq_factor: float = 4.0  # llama3: rotations above which it is kept

    def check(self, key: str, head_dim: int) -> None:
        """Refuse, in one sentence (ConfigError) that names `key`, what does not go together for heads of this width."""
        width = int(self.fraction * head_dim)  # what is over is dropped, as MiMo-V2's 0.334 of 192 asks
        if width < 2 or width % 2:
            raise ConfigError(f"{key}.fraction={self.fraction:g} rotates {width} of head_dim={head_dim}: write a fraction that gives an even number")
        if self.scaling == "none" and self.factor != 1:
            raise ConfigError(f"{key}.factor={self.factor:g} has no effect with scaling: none: write scaling: linear or yarn, or factor: 1")
        if self.scaling not in ("none", "longrope") and self.factor == 1:
            raise ConfigError(f"{key}.scaling={self.scaling} has no effect with factor: 1: write target length / original length as factor")
        for name, scalings in _READ_BY.items():
            value, default = getattr(self, name), default_of(self, name)
            if self.scaling not in scalings and value != default:
                raise ConfigError(f"{key}.{name}={value} has no effect with scaling: {self.scaling}: write scaling: {scalings[0]}, or take it out")
        if self.beta_fast < self.beta_slow:
            raise ConfigError(f"{key}.beta_fast={self.beta_fast:g} is below beta_slow={self.beta_slow:g}: write a larger beta_fast")
        if self.high_freq_factor < self.low_freq_factor:
            low = self.low_freq_factor
            raise ConfigError(f"{key}.high_freq_factor={self.high_freq_factor:g} is below low_freq_factor={low:g}: write a larger one")
        if (self.mscale is None) != (self.mscale_all_dim is None):
            raise ConfigError(f"{key}.mscale and {key}.mscale_all_dim have an effect only together: write both, or neither")
        if self.attention_factor is not None and self.mscale is not None:
            raise ConfigError(f"{key}.mscale has no effect with attention_factor={self.attention_factor:g}: take one of the two out")
        if self.scaling in ("ntk", "dynamic") and width == 2:
            raise ConfigError(f"{key}.scaling={self.scaling} needs at least two frequencies, but 2 numbers rotate: write a larger fraction")
        if self.length and self.length < self.original_length:
            raise ConfigError(f"{key}.length={self.length} is below original_length={self.original_length}: write 0, or a longer length")
        if self.scaling == "longrope":
            if self.attention_factor is not None and self.factor != 1:
                raise ConfigError(f"{key}.factor={self.factor:g} has no effect with attention_factor: take one of the two out")
            if self.original_length == 1:
                raise ConfigError(f"{key}.original_length=1 leaves no position to stretch: write the length the model was pre-trained at")
            for name in ("short_factor", "long_factor"):
                if len(getattr(self, name)) != width // 2:
                    raise ConfigError(
                        f"{key}.{name} holds {len(getattr(self, name))} numbers and {width // 2} frequencies rotate: write one number for each"
                    )
