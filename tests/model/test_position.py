import math

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from ltrain.kernels.rope import rotate
from ltrain.model.options import RopeOptions
from ltrain.model.position import inverse_frequencies, rotary_tables, rotary_width

FACTORS = [1.0 + i / 8 for i in range(32)]


@pytest.mark.parametrize(
    "rope",
    [
        RopeOptions(scaling="linear", factor=8.0),
        RopeOptions(scaling="dynamic", factor=4.0, original_length=512, length=2048),
        RopeOptions(scaling="dynamic", factor=2.0, original_length=512, base=1e6, fraction=0.5),
        RopeOptions(scaling="dynamic", factor=8.0, original_length=4096, length=131072),
        RopeOptions(scaling="llama3", factor=8.0, original_length=8192, base=5e5),
        RopeOptions(scaling="llama3", factor=32.0, original_length=2048, low_freq_factor=2.0, high_freq_factor=9.0, fraction=0.25),
        RopeOptions(scaling="longrope", factor=8.0, original_length=4096, short_factor=FACTORS, long_factor=FACTORS[::-1]),
        RopeOptions(scaling="longrope", factor=8.0, original_length=4096, length=32768, short_factor=FACTORS, long_factor=FACTORS[::-1]),
        RopeOptions(scaling="longrope", original_length=64, length=65, attention_factor=1.2, short_factor=FACTORS, long_factor=FACTORS[::-1]),
        RopeOptions(scaling="yarn", factor=40.0, original_length=4096, mscale=1.0, mscale_all_dim=0.8),
        RopeOptions(scaling="yarn", factor=32.0, original_length=4096, base=150000.0, truncate=False),
        RopeOptions(scaling="yarn", factor=32.0, original_length=2048),
        RopeOptions(scaling="yarn", factor=4.0, original_length=4096, base=1e6, fraction=0.5),
        RopeOptions(scaling="yarn", factor=16.0, original_length=512, beta_fast=16, beta_slow=2, attention_factor=1.5),
        RopeOptions(scaling="yarn", factor=2.0, original_length=64, base=100.0),
        RopeOptions(scaling="yarn", factor=1.0, original_length=4096),
    ],
)
def test_frequencies_are_those_of_transformers(rope: RopeOptions) -> None:
    parameters = {"rope_type": rope.scaling, "rope_theta": rope.base, "factor": rope.factor, "partial_rotary_factor": rope.fraction}
    names = {
        "yarn": ("beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim", "truncate"),
        "longrope": ("short_factor", "long_factor", "attention_factor"),
        "llama3": ("low_freq_factor", "high_freq_factor"),
    }.get(rope.scaling, ())
    parameters |= {name: getattr(rope, name) for name in names if getattr(rope, name) is not None}
    if names:
        parameters["original_max_position_embeddings"] = rope.original_length
    config = LlamaConfig(
        hidden_size=256, num_attention_heads=4, head_dim=64, rope_parameters=parameters, max_position_embeddings=rope.original_length
    )
    expected, factor = ROPE_INIT_FUNCTIONS[rope.scaling](config, "cpu", seq_len=rope.length or None)
    ours, our_factor = inverse_frequencies(rotary_width(64, rope), rope)
    torch.testing.assert_close(ours, expected.double(), rtol=2e-6, atol=0)  # theirs is float32
    assert our_factor == pytest.approx(factor, rel=1e-12)


def test_ntk_divides_the_lowest_frequency_by_the_factor_and_keeps_the_highest() -> None:
    plain, _ = inverse_frequencies(64, RopeOptions(base=1e4))
    ours, factor = inverse_frequencies(64, RopeOptions(base=1e4, scaling="ntk", factor=16.0))
    torch.testing.assert_close(ours[[0, -1]] / plain[[0, -1]], torch.tensor([1.0, 1 / 16], dtype=torch.float64), rtol=1e-12, atol=0)
    assert factor == 1.0 and bool((ours[1:] < plain[1:]).all())


def test_llama3_by_hand() -> None:
    """Over 64 tokens kept above 4 rotations, divided by 8 below 1, a ramp between: the frequencies are 1, 1/2, 1/4, 1/8."""
    ours, _ = inverse_frequencies(8, RopeOptions(base=16.0, scaling="llama3", factor=8.0, original_length=64))
    third, last = ((64 / 4 / (2 * math.pi) - 1) / 3, (64 / 8 / (2 * math.pi) - 1) / 3)  # rotations are 10.2, 5.1, 2.5 and 1.3
    expected = [1.0, 0.5, (third + (1 - third) / 8) / 4, (last + (1 - last) / 8) / 8]
    torch.testing.assert_close(ours, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=0)


def test_unscaled_frequencies() -> None:
    ours, factor = inverse_frequencies(8, RopeOptions(base=10000.0))
    torch.testing.assert_close(ours, torch.tensor([1.0, 0.1, 0.01, 0.001], dtype=torch.float64))
    assert factor == 1.0


def test_tables_are_exact_at_a_million_tokens() -> None:
    rope = RopeOptions(base=1e4)
    positions = torch.tensor([0, 131_071, 1_000_003, 2**24 + 1])
    cos, sin = rotary_tables(positions, 64, rope, torch.float32)
    for row, position in enumerate(positions.tolist()):
        for i in (0, 1, 7, 31):
            angle = math.fmod(position * 1e4 ** (-2 * i / 64), 2 * math.pi)
            assert cos[row, 0, i] == pytest.approx(math.cos(angle), abs=1e-6)
            assert sin[row, 0, i] == pytest.approx(math.sin(angle), abs=1e-6)


def test_scores_depend_on_distance_only_and_the_rest_does_not_turn() -> None:
    rope = RopeOptions(fraction=0.5)
    q, k = torch.randn(2, 1, 1, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def score(i: int, j: int) -> float:
        def turned(x: torch.Tensor, p: int) -> torch.Tensor:
            return rotate(x, *rotary_tables(torch.tensor([p]), rotary_width(16, rope), rope, torch.float64))

        assert torch.equal(turned(q, i)[..., 8:], q[..., 8:])
        return float((turned(q, i) * turned(k, j)).sum())

    assert score(5, 2) == pytest.approx(score(1003, 1000), rel=1e-9)
    assert score(5, 2) != pytest.approx(score(5, 3), rel=1e-3)


@pytest.mark.parametrize("fraction", [0.0, 0.19, 1.5])
def test_a_fraction_without_pairs_is_refused(fraction: float) -> None:
    with pytest.raises(ValueError, match=r"rope\.fraction"):
        rotary_width(16, RopeOptions(fraction=fraction))
