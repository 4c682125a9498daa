"""Every layout trains the same model: gradients, losses, gradient norms and balancing biases against one device without megatron."""

import os
import re
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from ltrain.parallel.context.layout import ContextLayout
from tests.parallel.parity import (
    MICRO_BATCHES,
    Layout,
    Reference,
    assemble,
    broken_on_ranks,
    config,
    config_of_blocks,
    on_ranks,
    step_batches,
    worst,
)

WORLD_2 = [
    Layout(),
    Layout(expert=2),
    Layout(tensor=2),
    Layout(tensor=2, expert=2, recompute="full"),
    Layout(context=2),
    Layout(context=2, context_layout="contiguous", expert=2),
    Layout(pipeline=2),
    Layout(pipeline=2, tie=False),
]
WORLD_4 = [
    Layout(expert=4),
    Layout(tensor=2, context=2),
    Layout(tensor=2, context=2, expert=4, recompute="full"),
    Layout(tensor=2, context=2, expert=2, context_layout="contiguous", recompute="selective"),
    Layout(tensor=2, pipeline=2),
    Layout(tensor=2, pipeline=2, expert=2, recompute="selective"),
    Layout(context=2, pipeline=2, expert=2, recompute="full"),
    Layout(context=2, pipeline=2, context_layout="balanced"),
    Layout(context=4),
    Layout(context=4, ulysses=2, recompute="full"),
    Layout(context=4, inner_ring=2, recompute="full"),
    Layout(tensor=2, context=2, ulysses=2, context_layout="balanced"),
    Layout(context=4, context_layout="balanced", recompute="selective"),
    Layout(context=4, expert=2, context_layout="contiguous"),
    Layout(tensor=4, expert=4),
    Layout(pipeline=4),
    Layout(tensor=2, expert=2),  # and data
    Layout(context=2, expert=4),  # and data
    Layout(pipeline=2, expert=2),  # and data
]
CASES = [pytest.param(2, layout, id=f"2-{layout}") for layout in WORLD_2] + [pytest.param(4, layout, id=f"4-{layout}") for layout in WORLD_4]

# Ten steps of training take longer than a gradient: every second layout here, all of them with LTRAIN_TEST_ALL=1.
TRAINED = CASES if os.environ.get("LTRAIN_TEST_ALL") == "1" else CASES[::2]


def run(pool: Any, world: int, layout: Layout, precision: str, steps: int) -> list[dict[str, Any]]:
    results: list[dict[str, Any]] = pool(world).run(on_ranks, config(layout, precision), steps, timeout=240)
    return results


@cache
def expected_gradients(precision: str, tie: bool) -> tuple[dict[str, Tensor], float]:
    reference = Reference(config(Layout(tie=tie), precision))
    loss = reference.backward(step_batches(0))
    assert reference.margin > 3e-6, "two experts are nearly tied: another seed, or a rounding error would look like a wrong layout"
    return reference.gradients(), loss


@cache
def expected_run(tie: bool, steps: int = 10) -> dict[str, Any]:
    reference = Reference(config(Layout(tie=tie), "fp32"))
    losses, norms = [], []
    for step in range(steps):
        losses.append(reference.backward(step_batches(step)))
        norms.append(reference.step(step))
    assert reference.margin > 3e-6
    return {"losses": losses, "norms": norms, "biases": {n: r.bias for n, r in reference.stack.routers().items()}}


@pytest.mark.parametrize(("world", "layout"), CASES)
def test_gradients_in_float64(pool: Any, world: int, layout: Layout) -> None:
    gradients, loss = expected_gradients("fp64", layout.tie)
    results = run(pool, world, layout, "fp64", steps=0)
    error, name = worst(assemble(results), gradients)
    assert error < 1e-10, f"{name} is off by {error:.1e}"
    for result in results:
        assert result["losses"][0] == pytest.approx(loss, rel=1e-12)


@pytest.mark.parametrize(("world", "layout"), TRAINED)
def test_training_in_float32(pool: Any, world: int, layout: Layout) -> None:
    gradients, _ = expected_gradients("fp32", layout.tie)
    expected = expected_run(layout.tie)
    results = run(pool, world, layout, "fp32", steps=10)
    error, name = worst(assemble(results), gradients)
    assert error < 1e-5, f"{name} is off by {error:.1e}"
    for result in results:
        assert result["losses"] == pytest.approx(expected["losses"], abs=1e-5)
        assert result["norms"] == pytest.approx(expected["norms"], rel=1e-4)
        for router, bias in result["biases"].items():
            torch.testing.assert_close(bias, expected["biases"][router], rtol=0, atol=1e-6)
    check_shards(results, layout, world)


# Which parameters are cut, by name. Written by hand and not read from the model's declarations, so that a layer that is
# declared whole by mistake fails here.
OVER_TENSOR = re.compile(
    r"(embed|head)\.weight"  # over the vocabulary
    r"|layers\.\d+\.mixer\.(qkv|input|out)\.weight"  # columns and rows of the mixers
    r"|layers\.\d+\.mixer\.(conv|A_log|dt_bias)"  # with the heads
    r"|layers\.\d+\.ffn\.shared\.(up|down)\.weight"
)
OVER_EXPERT = re.compile(r"layers\.\d+\.ffn\.experts\.(up|down)")
WHOLE = re.compile(r"norm\.weight|layers\.\d+\.(mixer_norm|ffn_norm|mixer\.(norm|q_norm|k_norm))\.weight|layers\.\d+\.ffn\.router\.weight")


def parts_of(name: str, layout: Layout) -> int:
    """Over how many ranks the parameter is cut."""
    (parts,) = [n for rule, n in ((OVER_TENSOR, layout.tensor), (OVER_EXPERT, layout.expert), (WHOLE, 1)) if rule.fullmatch(name)]
    return parts


def check_shards(results: list[dict[str, Any]], layout: Layout, world: int) -> None:
    """Every rank holds the part that its layout says, so that replication cannot pass for sharding."""
    whole = {name: param.numel() for name, param in Reference(config(Layout(tie=layout.tie), "fp32")).stack.named_parameters()}
    stages: dict[str, int] = {}
    for result in results:
        for name, numel in result["held"].items():
            assert numel * parts_of(name, layout) == whole[name], name
            stages[name] = stages.get(name, 0) + 1
    # a pipeline stage holds its own layers only; a tied embedding is on the first and the last
    for name, holders in stages.items():
        copies = 2 if layout.pipeline > 1 and layout.tie and name == "embed.weight" else 1
        assert holders == world // layout.pipeline * copies, name
    assert stages.keys() == whole.keys()


@pytest.mark.parametrize(
    "layout", [Layout(tensor=2, pipeline=2, expert=2, recompute="selective", tie=False), Layout(tensor=2, context=2, recompute="full")], ids=str
)
def test_blocks_norms_and_logits_of_other_kinds(pool: Any, layout: Layout) -> None:
    reference = Reference(config_of_blocks(layout, "fp64"))
    loss = reference.backward(step_batches(0))
    results: list[dict[str, Any]] = pool(4).run(on_ranks, config_of_blocks(layout, "fp64"), 0, timeout=240)
    error, name = worst(assemble(results), reference.gradients())
    assert error < 1e-10, f"{name} is off by {error:.1e}"
    assert results[0]["losses"][0] == pytest.approx(loss, rel=1e-12)
    assert results[0]["further"][0] == pytest.approx(reference.further, rel=1e-12)
    assert reference.further > 1


@pytest.mark.parametrize(
    ("what", "layout"), [("ring", Layout(context=2)), ("halo", Layout(context=2)), ("scan", Layout(context=2)), ("tensor", Layout(tensor=2))]
)
def test_a_broken_layout_is_seen(pool: Any, what: str, layout: Layout) -> None:
    """The comparison above fails by far when an exchange forgets the other ranks."""
    gradients, _ = expected_gradients("fp64", layout.tie)
    error, _ = worst(assemble(pool(2).run(broken_on_ranks, config(layout, "fp64"), what)), gradients)
    assert error > 1e-3


def test_micro_batches_cross_the_cuts() -> None:
    """The inputs are hostile: documents over several ranks, of one token, and one that continues an earlier stream."""
    batches = step_batches(0)
    assert len(batches) == MICRO_BATCHES
    assert any(len(b.cu_seqlens) == 2 for b in batches)
    assert any(1 in b.cu_seqlens.diff() for b in batches)
    assert all(int(b.positions[0]) == 17 for b in batches)
    for kind, batch in (("contiguous", batches[1]), ("zigzag", batches[2])):
        shares = [ContextLayout(len(batch.labels), rank, 2, kind).take(batch.labels) for rank in range(2)]
        assert [bool((share >= 0).any()) for share in shares] == [False, True], kind
