"""Rotary position embedding and the stretching of its frequencies past the pre-training length."""

import math

import torch
from torch import Tensor

from ltrain.model.options import RopeOptions
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
    yarn: divided by `factor` where a frequency turns less than beta_slow times over original_length, kept where it turns more
    than beta_fast times, a linear ramp over the index between (NTK-by-parts), with cos and sin scaled by 0.1 ln(factor) + 1
    (Peng et al. 2023).
    """
    index = torch.arange(width // 2, dtype=torch.float64, device=device)
    kept = rope.base ** (-2 * index / width)
    if rope.scaling == "none":
        return kept, 1.0
    if rope.scaling == "linear":
        return kept / rope.factor, 1.0
    if rope.scaling != "yarn":
        raise ValueError(f"rope.scaling={rope.scaling!r} is not known: write none, linear or yarn")

    def turning(rotations: float) -> float:
        """The (fractional) index whose frequency turns so many times over original_length."""
        return width * math.log(rope.original_length / (rotations * 2 * math.pi)) / (2 * math.log(rope.base))

    low = max(math.floor(turning(rope.beta_fast)), 0)
    high = min(math.ceil(turning(rope.beta_slow)), width - 1)
    # A ramp of no width would divide by zero: it becomes a step.
    ramp = ((index - low) / max(high - low, 1e-3)).clamp(0, 1)
    attention_factor = rope.attention_factor
    if attention_factor is None:
        attention_factor = 0.1 * math.log(rope.factor) + 1.0 if rope.factor > 1 else 1.0
    return kept / rope.factor * ramp + kept * (1 - ramp), attention_factor


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


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [T, H, D] with its first 2 x cos.shape[-1] numbers turned, paired as (i, i + width / 2), in the tables' precision."""
    half = cos.shape[-1]
    first, second, rest = x.split((half, half, x.shape[-1] - 2 * half), dim=-1)
    turned = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)
    return torch.cat((turned, rest), dim=-1) if rest.shape[-1] else turned
