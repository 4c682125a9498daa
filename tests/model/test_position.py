import math

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from ltrain.model.options import RopeOptions
from ltrain.model.position import inverse_frequencies, rotary_tables, rotary_width, rotate


@pytest.mark.parametrize(
    "rope",
    [
        RopeOptions(scaling="linear", factor=8.0),
        RopeOptions(scaling="yarn", factor=32.0, original_length=2048),
        RopeOptions(scaling="yarn", factor=4.0, original_length=4096, base=1e6, fraction=0.5),
        RopeOptions(scaling="yarn", factor=16.0, original_length=512, beta_fast=16, beta_slow=2, attention_factor=1.5),
        RopeOptions(scaling="yarn", factor=2.0, original_length=64, base=100.0),
        RopeOptions(scaling="yarn", factor=1.0, original_length=4096),
    ],
)
def test_frequencies_are_those_of_transformers(rope: RopeOptions) -> None:
    parameters = {"rope_type": rope.scaling, "rope_theta": rope.base, "factor": rope.factor, "partial_rotary_factor": rope.fraction}
    if rope.scaling == "yarn":
        parameters |= {"original_max_position_embeddings": rope.original_length, "beta_fast": rope.beta_fast, "beta_slow": rope.beta_slow}
        if rope.attention_factor:
            parameters["attention_factor"] = rope.attention_factor
    config = LlamaConfig(hidden_size=256, num_attention_heads=4, head_dim=64, rope_parameters=parameters)
    expected, factor = ROPE_INIT_FUNCTIONS[rope.scaling](config, "cpu")
    ours, our_factor = inverse_frequencies(rotary_width(64, rope), rope)
    torch.testing.assert_close(ours, expected.double(), rtol=1e-6, atol=0)
    assert our_factor == pytest.approx(factor, rel=1e-12)


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
