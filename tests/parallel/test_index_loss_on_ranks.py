"""The loss of an index is logged as one rank would have it, whatever the layout."""

from functools import cache

import pytest
from torch import Tensor

from ltrain.config import ModelConfig
from ltrain.model.options import MoEOptions
from tests.parallel.parity import TOKENS, Layout, assemble, config, on_ranks, worst

LAYOUTS = [(2, Layout(tensor=2)), (2, Layout(context=2)), (2, Layout(pipeline=2, recompute="full")), (4, Layout(tensor=2, context=2))]


@cache
def index_losses(pool, world: int, layout: Layout, tokens: int = TOKENS) -> tuple[list[float], dict[str, Tensor]]:
    """The losses, and whole gradients, in which those of the indexers come from these alone."""
    model = ModelConfig(
        hidden=32,
        depth=2,
        pattern=["latents", "blocks"],
        layers={
            "latents": {
                "mixer": "mla",
                "heads": 4,
                "q_rank": 16,
                "kv_rank": 16,
                "nope_dim": 8,
                "rope_dim": 4,
                "value_dim": 8,
                "select": "index",
                "index_heads": 16,  # with few, many scores are 0, and any of equal keys may be selected
                "index_dim": 8,
                "top_k": 8,
                "index_loss_weight": 0.5,
            },
            "blocks": {
                "mixer": "attention",
                "heads": 8,
                "kv_heads": 4,
                "head_dim": 8,
                "block_size": 4,
                "block_score": "index",
                "index_dim": 8,
                "top_blocks": 3,
            },
        },
        ffn=MoEOptions(experts=0, inner=32),
        init_std=0.05,
    )
    results = pool(world).run(on_ranks, config(layout, "fp64", model, tokens), 0, timeout=240)
    assert all(result["index"] == results[0]["index"] for result in results)
    return results[0]["index"], assemble(results)


@pytest.mark.parametrize("tokens", [TOKENS, 49], ids=["whole", "with a tail"])
@pytest.mark.parametrize(("world", "layout"), LAYOUTS, ids=str)
def test_every_layout_has_the_loss_of_one_rank(pool, world, layout, tokens):
    (found, gradients), (expected, whole) = index_losses(pool, world, layout, tokens), index_losses(pool, 1, Layout(), tokens)
    assert min(expected) > 0.1
    assert found == pytest.approx(expected, rel=1e-9)
    error, name = worst(gradients, whole)
    assert error < 1e-9, f"{name} is off by {error:.1e}"
