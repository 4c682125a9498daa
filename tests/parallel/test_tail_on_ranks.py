"""A stream that does not divide is filled up by a tail, of which nothing is seen: losses, gradients, norms and router statistics are those of one
rank on the stream without it."""

from functools import cache
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from ltrain.config import Config
from ltrain.parallel.context.layout import KINDS, ContextLayout
from tests.parallel.parity import (
    MICRO_BATCHES,
    Layout,
    Reference,
    assemble,
    config,
    config_of_blocks,
    micro_batch,
    on_ranks,
    prepared_engine,
    step_batches,
    worst,
)

TOKENS = 49
CASES = [  # ranks, their layout, and what each rank's rows are a multiple of
    *((2, Layout(context=2, context_layout=kind), 1) for kind in KINDS),
    *((2, Layout(context=2, context_layout=kind), 16) for kind in KINDS),
    (2, Layout(tensor=2), 1),
    (2, Layout(tensor=2, expert=2, recompute="full"), 16),
    (2, Layout(pipeline=2), 16),
    (4, Layout(tensor=2, context=2, expert=4), 16),  # of the tail alone, in zigzag half of a rank's rows
    (4, Layout(context=4, context_layout="contiguous", expert=2, recompute="selective"), 32),  # two ranks of nothing else
    (4, Layout(tensor=2, pipeline=2), 16),
    (4, Layout(context=4, ulysses=2), 1),
]


def filled(config: Config, multiple: int, steps: int, broken: str = "") -> dict[str, Any]:
    """As `on_ranks`, on each rank a multiple of rows; broken: what forgets the tail."""
    from ltrain.parallel.engines import base

    with patch.object(base, "rows_multiple", lambda _: multiple):
        if not broken:
            return on_ranks(config, steps)
        forgets = patch.object(ContextLayout, "counted", lambda *_: None)
        if broken == "document":  # the last one goes on in the tail
            fill = ContextLayout.fill

            def joined(layout: ContextLayout, batch: Any) -> Any:
                batch = fill(layout, batch)
                batch.cu_seqlens = torch.cat((batch.cu_seqlens[:-2], batch.cu_seqlens[-1:]))
                batch.labels[-layout.tail - 1 :] = batch.tokens[-layout.tail - 1 :]
                return batch

            forgets = patch.object(ContextLayout, "fill", joined)
        with forgets:
            return on_ranks(config, steps)


@cache
def expected(precision: str, steps: int) -> dict[str, Any]:
    reference = Reference(config(Layout(), precision, tokens=TOKENS))
    found: dict[str, Any] = {"losses": [], "norms": [], "aux": []}
    for step in range(max(steps, 1)):
        found["losses"].append(reference.backward(step_batches(step, TOKENS)))
        found["aux"].append(reference.aux)
        if step == 0:
            found["gradients"] = reference.gradients()
            found["loads"] = {name: router.load.clone() for name, router in reference.stack.routers().items()}
        if steps:
            found["norms"].append(reference.step(step))
    assert reference.margin > 3e-6, "two experts are nearly tied: another seed"
    return found | {"biases": {name: router.bias for name, router in reference.stack.routers().items()}}


def loads(results: list[dict[str, Any]]) -> dict[str, Tensor]:
    """Of all ranks; a pipeline stage has the routers of its layers."""
    return {name: torch.stack([r["loads"][name] for r in results if name in r["loads"]]).sum(0) for r in results for name in r["loads"]}


@pytest.mark.parametrize(("world", "layout", "multiple"), CASES, ids=str)
def test_nothing_is_seen_of_the_tail_in_float64(pool: Any, world: int, layout: Layout, multiple: int) -> None:
    one = expected("fp64", 0)
    results: list[dict[str, Any]] = pool(world).run(filled, config(layout, "fp64", tokens=TOKENS), multiple, 0, timeout=240)
    error, name = worst(assemble(results), one["gradients"])
    assert error < 1e-10, f"{name} is off by {error:.1e}"
    found = loads(results)
    assert found.keys() == one["loads"].keys()
    for router, load in one["loads"].items():
        assert torch.equal(found[router], load), router
        assert int(load.sum()) == 2 * TOKENS * MICRO_BATCHES  # two experts for each token
    for result in results:
        assert result["losses"] == pytest.approx(one["losses"], rel=1e-12)
        assert result["aux"] == pytest.approx(one["aux"], rel=1e-10)


@pytest.mark.parametrize("engine", ["megatron", "deepspeed"])
@pytest.mark.parametrize(("world", "layout", "multiple"), CASES[3:8:2], ids=str)
def test_training_steps_are_those_of_one_rank(pool: Any, world: int, layout: Layout, multiple: int, engine: str) -> None:
    one, asked = expected("fp32", 3), config(layout, "fp32", tokens=TOKENS)
    asked.engine = engine
    for result in pool(world).run(filled, asked, multiple, 3, timeout=240):
        assert result["losses"] == pytest.approx(one["losses"], abs=1e-5)
        assert result["norms"] == pytest.approx(one["norms"], rel=1e-4)
        for router, bias in result["biases"].items():
            torch.testing.assert_close(bias, one["biases"][router], rtol=0, atol=1e-6)


def test_other_blocks_and_predictions_further_ahead(pool: Any) -> None:
    layout = Layout(tensor=2, context=2)
    asked = config_of_blocks(layout, "fp64")
    asked.data.tokens, asked.train.tokens_per_step = TOKENS, TOKENS * MICRO_BATCHES
    reference = Reference(asked)
    loss = reference.backward(step_batches(0, TOKENS))
    results: list[dict[str, Any]] = pool(4).run(filled, asked, 16, 0, timeout=240)
    error, name = worst(assemble(results), reference.gradients())
    assert error < 1e-10, f"{name} is off by {error:.1e}"
    assert results[0]["losses"][0] == pytest.approx(loss, rel=1e-12)
    assert results[0]["further"][0] == pytest.approx(reference.further, rel=1e-12)


def squares(config: Config, multiple: int) -> dict[str, float]:
    """On each rank: of its tokens before the tail, the squares of each layer's output, added up."""
    from ltrain.parallel import cpu
    from ltrain.parallel.engines import base
    from ltrain.parallel.mesh import Mesh

    cpu.install()
    mesh = Mesh(config.parallel, torch.device("cpu"))
    try:
        with patch.object(base, "rows_multiple", lambda _: multiple):
            engine = prepared_engine(config, mesh)
        ((batch, found),) = engine.layer_norms([micro_batch(0, TOKENS)])
        counted = engine.layout.counted(mesh.tensor.rank(), mesh.tensor.size())
        rows = counted.rows if counted else len(batch.tokens)
        return {name: norm**2 * rows for name, norm in found.items()}
    finally:
        mesh.close()


def test_norms_of_layers_are_of_the_tokens_before_the_tail(pool: Any) -> None:
    (whole,) = pool(1).run(squares, config(Layout(), "fp64", tokens=TOKENS), 1)
    parts = pool(4).run(squares, config(Layout(tensor=2, context=2, context_layout="contiguous"), "fp64", tokens=TOKENS), 32)
    assert len(whole) == 4 and not any(parts[-1].values())  # the last rank has the tail alone
    for name, total in whole.items():
        assert sum(part[name] for part in parts) == pytest.approx(total, rel=1e-5), name


def test_a_tail_that_counts_for_routers_is_seen(pool: Any) -> None:
    results = pool(2).run(filled, config(Layout(context=2), "fp64", tokens=TOKENS), 16, 0, "counted")
    one = expected("fp64", 0)
    error, name = worst(assemble(results), one["gradients"])
    assert error > 1e-3 and "router" in name
    assert any(not torch.equal(load, one["loads"][router]) for router, load in loads(results).items())
    assert results[0]["aux"] != pytest.approx(one["aux"], rel=1e-4)


def test_a_tail_with_labels_is_seen(pool: Any) -> None:
    with pytest.raises(Exception, match="labels do not add up"):
        pool(2).run(filled, config(Layout(context=2), "fp64", tokens=TOKENS), 16, 0, "document")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("tokens", "size", "multiple", "tail"), [(48, 2, 1, 0), (49, 2, 16, 15), (65, 4, 16, 63), (2, 4, 2, 6), (7, 1, 1, 0)])
def test_the_layout_fills_a_stream_up(kind: str, tokens: int, size: int, multiple: int, tail: int) -> None:
    layouts = [ContextLayout.filled(tokens, rank, size, kind, multiple=multiple) for rank in range(size)]
    assert {(layout.tokens, layout.tail) for layout in layouts} == {(tokens + tail, tail)}
    assert layouts[0].local_tokens % multiple == 0
    if tokens != 49:
        return
    batch = layouts[0].fill(micro_batch(0, tokens))
    assert batch.cu_seqlens.tolist() == [0, 37, 38, 40, 49, 64] and batch.positions[-tail:].tolist() == list(range(tail))
    assert not batch.tokens[-tail:].any() and set(batch.labels[-tail - 1 :].tolist()) == {-100}
    cut = [layout.of(batch.cu_seqlens) for layout in layouts]
    here = [counted.here for layout in cut if (counted := layout.counted())]
    assert sum(here) == tokens
    for layout, count in zip(cut, here, strict=True):
        places = layout.take(torch.arange(layout.tokens))
        assert (places < tokens).tolist() == [True] * count + [False] * (len(places) - count)
        shares = [counted.rows for rank in range(2) if (counted := layout.counted(rank, 2))]
        assert shares == [int((share < tokens).sum()) for share in places.chunk(2)]
    with pytest.raises(ValueError, match="fills up 49"):
        layouts[0].fill(micro_batch(0, 48))


def test_learned_positions_that_end_before_the_tail_are_refused(pool: Any) -> None:
    asked = config(Layout(context=2), "fp64", tokens=TOKENS)
    asked.model.learned_positions = 8
    with pytest.raises(Exception, match="model.learned_positions=8 are too few .* write data.tokens=64"):
        pool(2).run(filled, asked, 16, 0)
