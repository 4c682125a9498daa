"""Combinations of a model's options that would be without effect, or cannot be: refused where the config is read."""

from pathlib import Path
from typing import Any

import pytest

from ltrain.config import load
from ltrain.schema import ConfigError


def write(path: Path, rope: dict[str, Any] | None = None, ffn: dict[str, Any] | None = None) -> Path:
    """A config of one layer kind with 16 rotating numbers."""
    lines = ["model:", "  pattern: [full]", "  layers:", "    full:", "      mixer: attention", "      head_dim: 16"]
    if rope is not None:
        lines.append(f"      rope: {rope}")
    if ffn is not None:
        lines.append(f"      ffn: {ffn}")
    file = path / "config.yaml"
    file.write_text("\n".join(lines).replace("True", "true").replace("False", "false") + "\n")
    return file


EIGHT = [1.0] * 8


@pytest.mark.parametrize(
    "rope",
    [
        {"scaling": "ntk", "factor": 4},
        {"scaling": "dynamic", "factor": 2, "original_length": 64, "length": 128},
        {"scaling": "yarn", "factor": 8, "mscale": 1, "mscale_all_dim": 0.5, "truncate": False},
        {"scaling": "longrope", "original_length": 64, "length": 128, "factor": 2, "short_factor": EIGHT, "long_factor": EIGHT},
        {"scaling": "longrope", "attention_factor": 1.1, "short_factor": EIGHT, "long_factor": EIGHT},
        {"scaling": "llama3", "factor": 8, "original_length": 64, "low_freq_factor": 2, "high_freq_factor": 3},
    ],
)
def test_every_scaling_loads(tmp_path: Path, rope: dict[str, Any]) -> None:
    assert load(write(tmp_path, rope)).model.layers["full"]["rope"] == rope


@pytest.mark.parametrize(
    ("rope", "message"),
    [
        ({"scaling": "spiral"}, "expected one of none, linear, ntk, dynamic, yarn, longrope, llama3"),
        ({"scaling": "ntk"}, "scaling=ntk has no effect with factor: 1"),
        ({"scaling": "ntk", "factor": 2, "original_length": 8}, "original_length=8 has no effect with scaling: ntk"),
        ({"scaling": "linear", "factor": 2, "length": 9000}, "length=9000 has no effect with scaling: linear: write scaling: dynamic"),
        ({"scaling": "dynamic", "factor": 2, "length": 100}, "length=100 is below original_length=4096"),
        ({"scaling": "dynamic", "factor": 2, "fraction": 0.125}, "needs at least two frequencies"),
        ({"scaling": "yarn", "factor": 2, "mscale": 1}, "have an effect only together"),
        (
            {"scaling": "yarn", "factor": 2, "mscale": 1, "mscale_all_dim": 1, "attention_factor": 1.2},
            "mscale has no effect with attention_factor=1.2",
        ),
        ({"scaling": "llama3", "factor": 2, "truncate": False}, "truncate=False has no effect with scaling: llama3"),
        ({"scaling": "llama3", "factor": 2, "low_freq_factor": 5}, "high_freq_factor=4 is below low_freq_factor=5"),
        ({"scaling": "yarn", "factor": 2, "high_freq_factor": 8}, "high_freq_factor=8.0 has no effect with scaling: yarn: write scaling: llama3"),
        ({"scaling": "longrope", "factor": 2, "short_factor": [1.0], "long_factor": EIGHT}, "short_factor holds 1 numbers and 8 frequencies rotate"),
        ({"scaling": "longrope", "factor": 2, "short_factor": EIGHT, "long_factor": [0.0] * 8}, r"long_factor is \[0.0.*, expected numbers above 0"),
        (
            {"scaling": "longrope", "factor": 2, "attention_factor": 1.1, "short_factor": EIGHT, "long_factor": EIGHT},
            "factor=2 has no effect with attention_factor",
        ),
    ],
)
def test_a_rope_option_without_effect_is_refused(tmp_path: Path, rope: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load(write(tmp_path, rope))


@pytest.mark.parametrize(
    ("ffn", "message"),
    [
        ({"experts": 4, "shared_inner": 0, "shared_limit": 7.0}, r"model.layers.full.ffn.shared_limit=7.0 has no effect without a shared expert"),
        ({"experts": 4, "gated": False, "limit": 7.0}, r"model.layers.full.ffn.limit=7 has no effect with gated: false"),
        ({"experts": 0, "activation": "gelu", "alpha": 1.7}, r"model.layers.full.ffn.alpha=1.7 has no effect with activation: gelu"),
        ({"experts": 0, "clamp": "after"}, r"model.layers.full.ffn.clamp=after has no effect without a limit"),
        ({"experts": 4, "group_score": "max"}, r"model.layers.full.ffn.group_score=max has no effect with groups: 1"),
        ({"experts": 4, "groups": 3}, r"model.layers.full.ffn.experts=4 is not a multiple of model.layers.full.ffn.groups=3"),
        ({"experts": 4, "groups": 2, "top_groups": 3}, r"model.layers.full.ffn.top_groups=3 is more than groups=2"),
        ({"experts": 8, "groups": 8, "top_k": 2}, r"top_k=2 is more than the experts in top_groups=1 groups of 1 experts"),
        ({"experts": 4, "groups": 4, "top_groups": 2}, r"group_score=top2 needs groups of two experts or more"),
        ({"shared_inner": 0, "shared_gate": True}, r"shared_gate=true has no effect without a shared expert"),
    ],
)
def test_a_feed_forward_option_without_effect_is_refused(tmp_path: Path, ffn: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load(write(tmp_path, ffn=ffn))


def test_a_gate_of_no_expert_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"model.ffn.shared_gate=True has no effect with model.ffn.experts=0"):
        load(write(tmp_path), ["model.ffn.experts=0", "model.ffn.shared_gate=true"])
