"""The options that came with the families, over tensor ranks: gradients and a trained step as on one rank."""

from typing import Any

import pytest
import torch

from ltrain.config import Config
from ltrain.families import family
from tests.families import cases
from tests.parallel.parity import Layout, Reference, assemble, config, on_ranks, step_batches, worst

MODELS: dict[str, dict[str, Any]] = {
    # biases, a head of its own, dense layers among the experts, zero-centred norms, a gated shared expert
    "qwen3_next": cases.config("qwen3_next", attention_bias=True, mlp_only_layers=[1]),
    "llama": cases.config("llama", attention_bias=True, mlp_bias=True, tie_word_embeddings=True),
    "gpt2": cases.config("gpt2"),  # learned positions
}


def moved(stack: Any) -> None:
    """Biases, zero-centred weights and the like away from the constants they start at."""
    with torch.no_grad():
        for name, param in stack.named_parameters():
            if name.endswith("bias") or "norm" in name:
                param.add_(0.25)


def on_ranks_moved(config: Config) -> dict[str, Any]:
    from unittest.mock import patch

    from tests.parallel import parity

    prepare = parity.prepare
    with patch.object(parity, "prepare", lambda stack: (prepare(stack), moved(stack))):
        return on_ranks(config, 0)


@pytest.mark.parametrize("model_type", MODELS)
@pytest.mark.parametrize("layout", [Layout(tensor=2), Layout(context=2)], ids=str)
def test_gradients_in_float64(pool: Any, model_type: str, layout: Layout) -> None:
    model = family(model_type).to_model(MODELS[model_type])
    model.init_std = 0.1
    run = config(layout, "fp64", model)
    reference = Reference(run)
    moved(reference.stack)
    loss = reference.backward(step_batches(0))
    results = pool(2).run(on_ranks_moved, run)
    error, name = worst(assemble(results), reference.gradients())
    assert error < 1e-10, f"{name} is off by {error:.1e}"
    assert [r["losses"][0] for r in results] == pytest.approx([loss] * 2, rel=1e-12)
    held = results[0]["held"]
    cut = 2 if layout.tensor == 2 else 1
    for key, parameter in reference.stack.named_parameters():
        if key.endswith(("qkv.bias", "up.bias")):
            assert held[key] == parameter.numel() // cut
        elif key.endswith(("out.bias", "down.bias", "shared_gate")):
            assert held[key] == parameter.numel()
