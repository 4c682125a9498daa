"""Rotary position embedding and the stretching of its frequencies past the pre-training length."""

import math

import torch
from torch import Tensor

from ltrain.model.options import AttentionOptions, MLAOptions, RopeOptions
from ltrain.model.sequence import Sequence


def rotary_width(head_dim: int, rope: RopeOptions) -> int:
    """How many numbers of each head rotate: the first `fraction` of them, an even number."""
    width = int(head_dim * rope.fraction)
    if width < 2 or width % 2 or width > head_dim:
        raise ValueError(
            f"rope.fraction={rope.fraction} of head_dim={head_dim} makes {width} numbers rotate: choose one that gives an even count in 2..{head_dim}"
        )
    return width


def inverse_frequencies(width: int, rope: RopeOptions, device: torch.device | str | None = None) -> tuple[Tensor, float]:
    """Radians per token [width / 2] in float64, and the factor on cos and sin.

    none: base^(-2i/width) (Su et al. 2021). linear: divided by `factor` (position interpolation, Chen et al. 2023).
    ntk: the base grown so that the lowest frequency is divided by `factor` and the highest kept (bloc97 2023).
    dynamic: as ntk with the factor that `length` needs, `factor * length / original_length - (factor - 1)` (emozilla 2023).
    yarn: divided by `factor` where a frequency turns less than beta_slow times over original_length, kept where it turns more
    than beta_fast times, a linear ramp over the index between (NTK-by-parts, Peng et al. 2023).
    longrope: each divided by its own factor, found by search (Ding et al. 2024).
    llama3: as yarn with a ramp over the rotations (Grattafiori et al. 2024).

    dynamic and longrope go by the configured `length`, for every document alike: a model is trained and decoded with the
    frequencies that it is used with at that length, and no document's depend on its neighbours or on how far decoding has come.
    """
    index = torch.arange(width // 2, dtype=torch.float64, device=device)
    kept = stretched_base(width, rope) ** (-2 * index / width)
    if rope.scaling in ("none", "ntk", "dynamic"):
        return kept, 1.0
    if rope.scaling == "linear":
        return kept / rope.factor, 1.0
    if rope.scaling == "yarn":
        ramp = _yarn_ramp(index, width, rope)
    elif rope.scaling == "llama3":
        rotations = rope.original_length * kept / (2 * math.pi)  # over original_length
        between = max(rope.high_freq_factor - rope.low_freq_factor, 1e-9)  # of no width it is a step (Llama 4 Scout)
        ramp = 1 - ((rotations - rope.low_freq_factor) / between).clamp(0, 1)
    elif rope.scaling == "longrope":
        divisors = rope.long_factor if rope.length > rope.original_length else rope.short_factor
        return kept / torch.tensor(divisors, dtype=torch.float64, device=device), _attention_factor(rope)
    else:
        raise ValueError(f"rope.scaling={rope.scaling!r} is not known: write none, linear, ntk, dynamic, yarn, longrope or llama3")
    return kept / rope.factor * ramp + kept * (1 - ramp), _attention_factor(rope)


def stretched_base(width: int, rope: RopeOptions) -> float:
    """The base of the frequencies of `width` rotating numbers: grown where scaling is ntk or dynamic."""
    factor = 1.0
    if rope.scaling == "ntk":
        factor = rope.factor
    elif rope.scaling == "dynamic":
        factor = rope.factor * max(rope.length, rope.original_length) / rope.original_length - (rope.factor - 1)
    return rope.base if factor == 1 else rope.base * factor ** (width / (width - 2))


def _yarn_ramp(index: Tensor, width: int, rope: RopeOptions) -> Tensor:
    """How far each frequency [width / 2] is interpolated, 0..1."""

    def turning(rotations: float) -> float:
        """The (fractional) index whose frequency turns so many times over original_length."""
        return width * math.log(rope.original_length / (rotations * 2 * math.pi)) / (2 * math.log(rope.base))

    low, high = turning(rope.beta_fast), turning(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, width - 1)
    # A ramp of no width would divide by zero: it becomes a step.
    return ((index - low) / max(high - low, 1e-3)).clamp(0, 1)


def _attention_factor(rope: RopeOptions) -> float:
    """What cos and sin are multiplied with."""

    def temperature(scale: float) -> float:
        return 0.1 * scale * math.log(rope.factor) + 1.0

    if rope.attention_factor is not None:
        return rope.attention_factor
    if rope.scaling == "yarn":
        return temperature(rope.mscale) / temperature(rope.mscale_all_dim) if rope.mscale and rope.mscale_all_dim else temperature(1.0)
    if rope.scaling == "longrope":
        return math.sqrt(1 + math.log(rope.factor) / math.log(rope.original_length))
    return 1.0


def rotary_tables(positions: Tensor, width: int, rope: RopeOptions, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin [T, 1, width / 2] of positions [T] (int64), in `dtype`.

    Angles are float64: a float32 product is already wrong by 0.03 rad at a million tokens.
    """
    frequencies, factor = inverse_frequencies(width, rope, positions.device)
    angles = (positions.to(torch.float64).unsqueeze(-1) * frequencies).unsqueeze(1)  # [T, 1, width / 2]
    return (angles.cos() * factor).to(dtype), (angles.sin() * factor).to(dtype)


def shared_rotary_tables(seq: Sequence, width: int, rope: RopeOptions, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """`rotary_tables` of the sequence's positions, computed by the first layer that asks."""
    key = f"rotary {width} {rope} {dtype}"
    if f"{key} cos" not in seq.shared:
        seq.shared[f"{key} cos"], seq.shared[f"{key} sin"] = rotary_tables(seq.positions, width, rope, dtype)
    return seq.shared[f"{key} cos"], seq.shared[f"{key} sin"]


def query_temperature(positions: Tensor, options: AttentionOptions | MLAOptions) -> Tensor:
    """[T, 1, 1], what grows a query with its position, in float64 (Llama 4; log-n scaling, Nakanishi 2025)."""
    steps = torch.floor((positions.double() + options.temperature_offset) / options.temperature_length)
    return (1 + options.temperature * steps.log1p())[:, None, None]


def alibi_slopes(heads: int) -> Tensor:
    """[heads] in float32 (Press et al. 2021): 2^(-8i/n) for the largest power of two n within heads, then those of 2n between them."""
    power = 1 << (heads.bit_length() - 1)
    slopes = [2 ** (-8 * i / power) for i in range(1, power + 1)]
    slopes += [2 ** (-4 * i / power) for i in range(1, 2 * (heads - power), 2)]
    return torch.tensor(slopes, dtype=torch.float32)
