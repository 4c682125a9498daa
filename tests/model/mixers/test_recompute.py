"""Every mixer, in every form of it, under recomputation: the same numbers."""

from typing import Any

import pytest
import torch

from ltrain.model.layers import LocalLayers, seed_parameters
from ltrain.model.options import ModelConfig, MoEOptions
from ltrain.model.sequence import Sequence
from ltrain.model.stack import Stack
from tests.model.mixers.cases import CASES, HIDDEN
from tests.model.mixers.test_contract import jitter

VOCAB, LENGTHS = 32, [1, 37, 30]


def run(layers: list[tuple[str, dict[str, Any]]], recompute: str) -> list[Any]:
    kinds = {str(i): {"mixer": mixer, **options} for i, (mixer, options) in enumerate(layers)}
    model = ModelConfig(hidden=HIDDEN, depth=len(kinds), pattern=list(kinds), layers=kinds, ffn=MoEOptions(experts=0, inner=32))
    stack = Stack(model, VOCAB, LocalLayers(std=0.3, dtype=torch.float64, depth=model.depth), recompute=recompute)
    seed_parameters(stack, 0)
    jitter(stack)
    tokens = torch.arange(sum(LENGTHS)) * 7 % VOCAB
    seq = Sequence.of(LENGTHS)
    loss = stack.loss(stack(tokens, seq), tokens.roll(-1)).objective
    loss.backward()
    missing = [name for name, p in stack.named_parameters() if p.grad is None]
    assert missing == []
    return [loss.detach(), {name: p.grad for name, p in stack.named_parameters()}]


@pytest.mark.parametrize("name", CASES)
def test_recomputation_changes_nothing(name: str) -> None:
    plain = run(CASES[name], "none")
    for recompute in ("selective", "full"):
        torch.testing.assert_close(run(CASES[name], recompute), plain, rtol=0, atol=0, msg=f"{recompute}: {{}}".format)
