"""The loss of an index is logged as one rank would have it, whatever the layout."""

import pytest

from ltrain.config import ModelConfig
from ltrain.model.options import MoEOptions
from tests.parallel.parity import Layout, config, on_ranks

LAYOUTS = [(1, Layout()), (2, Layout(tensor=2)), (2, Layout(context=2)), (2, Layout(pipeline=2, recompute="full")), (4, Layout(tensor=2, context=2))]


def index_losses(pool, world: int, layout: Layout) -> list[float]:
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
    results = pool(world).run(on_ranks, config(layout, "fp64", model), 0, timeout=240)
    assert all(result["index"] == results[0]["index"] for result in results)
    return results[0]["index"]


@pytest.mark.parametrize(("world", "layout"), LAYOUTS[1:], ids=str)
def test_every_layout_logs_the_loss_of_one_rank(pool, world, layout):
    found, expected = index_losses(pool, world, layout), index_losses(pool, *LAYOUTS[0])
    assert min(expected) > 0.1
    assert found == pytest.approx(expected, rel=1e-9)
