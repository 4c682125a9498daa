"""A small hybrid of every part, in float64."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from ltrain.model.layers import LocalLayers, seed_parameters
from ltrain.model.options import ModelConfig, MoEOptions
from ltrain.model.stack import Stack

VOCAB = 64


def config(**changes: Any) -> ModelConfig:
    model = ModelConfig(
        hidden=32,
        depth=4,
        pattern=["gated_delta_net", "attention", "additive", "nope"],
        layers={
            "gated_delta_net": {"mixer": "gated_delta_net", "key_heads": 2, "value_heads": 4, "key_dim": 8, "value_dim": 16},
            "additive": {"mixer": "linear_recurrence", "update": "add", "key_heads": 2, "value_heads": 2, "key_dim": 8, "value_dim": 8},
            "attention": {"mixer": "attention", "heads": 4, "kv_heads": 2, "head_dim": 8, "rope": {"fraction": 0.5}},
            "nope": {
                "mixer": "attention",
                "heads": 4,
                "kv_heads": 2,
                "head_dim": 8,
                "rope": None,
                "gate": "none",
                "qk_norm": "none",
                "ffn": {"experts": 0, "inner": 48},
            },
        },
        ffn=MoEOptions(experts=4, top_k=2, inner=16, shared_inner=16, aux_loss=0.01),
    )
    for key, value in changes.items():
        assert hasattr(model, key), key
        setattr(model, key, value)
    return model


@pytest.fixture
def build() -> Callable[..., Stack]:
    """build(layers=..., start=..., recompute=..., **changes of the config) -> a seeded model."""

    def make(layers: LocalLayers | None = None, start: int = 0, stop: int | None = None, recompute: str = "none", **changes: Any) -> Stack:
        model = config(**changes)
        layers = layers or LocalLayers(std=0.3, depth=model.depth, dtype=torch.float64)
        stack = Stack(model, VOCAB, layers, start, stop, recompute)
        seed_parameters(stack, 0)
        return stack

    return make
