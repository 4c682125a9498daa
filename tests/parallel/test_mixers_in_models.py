"""Every mixer in a whole model that the engine trains: cross entropy, experts, and context ranks with each other kind of ranks and
each recomputation, against one device without megatron: losses, gradients before and after an update, and their norms, in float64.

A model has up to six mixers of different families. Each model is trained on two layouts, which between them have context ranks with tensor, expert
and pipeline ranks; over the models all pairs of degrees, ways to cut the stream and recomputations are there. LTRAIN_TEST_ALL=1 trains each model on
all of them.
"""

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from itertools import combinations, product
from typing import Any
from unittest.mock import patch

import pytest
import torch

from ltrain.config import Config, ModelConfig, ParallelConfig
from ltrain.model.options import MIXERS, MoEOptions
from ltrain.model.router import update_biases
from ltrain.model.stack import Stack
from ltrain.parallel.context.layout import KINDS
from tests.model.mixers.cases import CASES, HIDDEN, specs_of
from tests.model.mixers.test_contract import jitter
from tests.parallel import parity
from tests.parallel.mixers import supported
from tests.parallel.parity import Layout, Reference, assemble, config, on_ranks, prepare, step_batches, worst

ALL = os.environ.get("LTRAIN_TEST_ALL") == "1"
TOGETHER = 6  # mixers of a model
STEPS, MICRO_BATCHES = 2, 2  # between them the streams of all kinds that `micro_batch` has
RATE = 0.2  # of descent in float64, for which the engine has no optimizer
RECOMPUTE = ("none", "selective", "full")


def refused(name: str, kind: str) -> bool:
    return any(kind in spec.options.refuses() for spec in specs_of(name))


TRAINED = [name for name in CASES if not refused(name, "training")]
SINGLE = [name for name in TRAINED if len(CASES[name]) == 1]
MODELS = [(*SINGLE[i :: -(-len(SINGLE) // TOGETHER)],) for i in range(-(-len(SINGLE) // TOGETHER))]
MODELS += [(name,) for name in TRAINED if len(CASES[name]) > 1]


def model_of(names: tuple[str, ...]) -> ModelConfig:
    cases = [case for name in names for case in CASES[name]]
    layers = {f"layer_{i}": {"mixer": mixer, **options} for i, (mixer, options) in enumerate(cases)}
    ffn = MoEOptions(experts=4, top_k=2, inner=16, shared_inner=16, aux_loss=0.05, bias_rate=0.01)
    return ModelConfig(hidden=HIDDEN, depth=len(layers), pattern=list(layers), layers=layers, ffn=ffn, init_std=0.2)


def everywhere(names: tuple[str, ...]) -> list[tuple[int, dict[str, int]]]:
    """Ranks and degrees that such a model is trained on: first those that have tensor, context, expert and pipeline ranks at once."""
    heads = [name for name in names if any(spec.options.softmax_heads() for spec in specs_of(name))]
    ulysses = 2 if heads and all(supported(name, ParallelConfig(tensor=2, context=2, ulysses=2)) for name in heads) else 1
    stages: dict[str, int] = {"expert": 4} if any(refused(name, "pipeline") for name in names) else {"pipeline": 2, "expert": 2}
    return [
        (8, {"tensor": 2, "context": 2, **stages}),
        (4, {"context": 2, "expert": 2}),  # and data
        (4, {"tensor": 2, "context": 2, "ulysses": ulysses}),
        (4, {"context": 4, "ulysses": ulysses}),
    ]


def every_layout(names: tuple[str, ...]) -> list[tuple[int, Layout]]:
    return [
        (world, Layout(**sizes, context_layout=kind, recompute=how)) for (world, sizes), kind, how in product(everywhere(names), KINDS, RECOMPUTE)
    ]


def layouts(names: tuple[str, ...], number: int) -> list[tuple[int, Layout]]:
    """Ranks and their layout, for the so-manieth model: all degrees at once, and in turn one of the others with another recomputation. Three models
    after one another, and every third one, differ in all that goes round."""
    if ALL:
        return every_layout(names)
    first, *others = everywhere(names)
    turn = number + number // 3
    return [
        (world, Layout(**sizes, context_layout=KINDS[kind % 3], recompute=RECOMPUTE[how % 3]))
        for (world, sizes), kind, how in ((first, turn + number, number), (others[turn % 3], number, number + 1))
    ]


RUNS = [pytest.param(names, *run, id=f"{'+'.join(names)}-{run[0]}-{run[1]}") for n, names in enumerate(MODELS) for run in layouts(names, n)]


@contextmanager
def small() -> Iterator[None]:
    """`parity` with so few micro-batches, and weights that hide nothing. On one thread: several wait longer for one another than tensors of this size
    take, ten times as long where other processes have the cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with patch.object(parity, "MICRO_BATCHES", MICRO_BATCHES), patch.object(parity, "prepare", hide_nothing):
            yield
    finally:
        torch.set_num_threads(threads)


def hide_nothing(stack: Stack) -> None:
    """As `prepare`, and no norm's weights of 1 and no bias of 0."""
    prepare(stack)
    jitter(stack)


@torch.no_grad()
def descend(engine: Any, _: float) -> float:
    """A step of the engine without the optimizer, which is not for float64. Its norm counts parameters as megatron's optimizer does."""
    import torch.distributed as dist
    from megatron.core.tensor_parallel.layers import param_is_not_tensor_parallel_duplicate
    from megatron.core.transformer.module import param_is_not_shared

    square = torch.zeros((), dtype=torch.float64)
    for param in engine.params.values():
        if param_is_not_shared(param) and param_is_not_tensor_parallel_duplicate(param, engine.mesh.tensor):
            square += param.main_grad.square().sum() / engine.replicas(param).size()
        param.sub_(param.main_grad, alpha=RATE)
    dist.all_reduce(square)
    engine.move_biases()
    return float(square.sqrt())


def trained_on_ranks(asked: Config) -> dict[str, Any]:
    """On every rank of a pool, as `on_ranks`, by plain descent."""
    from ltrain.parallel.engines.megatron import MegatronEngine

    with small(), patch.object(MegatronEngine, "step", descend):
        return on_ranks(asked, STEPS, later=True)


@cache
def alone(names: tuple[str, ...]) -> dict[str, Any]:
    """On one device."""
    found: dict[str, Any] = {"losses": [], "gradients": [], "norms": [], "aux": []}
    with small():
        reference = Reference(config(Layout(), "fp64", model_of(names)))
        for step in range(STEPS):
            found["losses"].append(reference.backward(step_batches(step)))
            found["aux"].append(reference.aux)
            found["gradients"].append(reference.gradients())
            found["norms"].append(float(torch.stack([p.grad.norm() for p in reference.stack.parameters() if p.grad is not None]).norm()))
            with torch.no_grad():
                for param in reference.stack.parameters():
                    param.sub_(param.grad, alpha=RATE)
            for router in reference.stack.routers().values():
                update_biases([router], router.load.unsqueeze(0))
                router.load.zero_()
    found["biases"] = {name: router.bias for name, router in reference.stack.routers().items()}
    found["margin"] = reference.margin
    return found


def test_every_mixer_is_in_a_model_that_is_trained() -> None:
    """But for those that refuse to be."""
    assert sorted(name for names in MODELS for name in names) == sorted(TRAINED)
    mixers = {spec.mixer for name in TRAINED for spec in specs_of(name)}
    assert mixers == set(MIXERS) - {"cross_attention", "none"}, "a mixer without a case"
    for number, names in enumerate(MODELS):
        chosen = [layout for _, layout in layouts(names, number)]
        assert len({layout.recompute for layout in chosen}) > 1
        assert all(layout.context > 1 for layout in chosen)
        assert any(layout.tensor > 1 for layout in chosen) and any(layout.expert > 1 for layout in chosen)
        assert any(layout.pipeline > 1 for layout in chosen) or any(refused(name, "pipeline") for name in names)


def test_the_models_have_all_pairs_of_what_a_layout_is() -> None:
    """Two degrees, a way to cut the stream or a recomputation that any model could have together, some model has."""

    def pairs(of: Iterable[tuple[int, Layout]]) -> set[Any]:
        found = set()
        for world, layout in of:
            parts = {key: value for key, value in vars(layout).items() if key not in ("tie", "inner_ring")}
            parts["data"] = world // (layout.tensor * layout.context * layout.pipeline)
            found |= set(combinations(parts.items(), 2))
        return found

    possible = pairs(run for names in MODELS for run in every_layout(names))
    assert possible - pairs(run for number, names in enumerate(MODELS) for run in layouts(names, number)) == set()


@pytest.mark.parametrize(("names", "world", "layout"), RUNS)
def test_as_on_one_device(pool: Any, names: tuple[str, ...], world: int, layout: Layout) -> None:
    expected = alone(names)
    assert expected["margin"] > 1e-9, "two experts are nearly tied: another seed, or a rounding error would look like a wrong layout"
    results = pool(world).run(trained_on_ranks, config(layout, "fp64", model_of(names)), timeout=240)
    for which, gradients in zip(("gradients", "later"), expected["gradients"], strict=True):
        error, name = worst(assemble(results, which), gradients)
        assert error < 1e-9, f"{which}: {name} is off by {error:.1e}"
    for result in results:
        assert result["losses"] == pytest.approx(expected["losses"], rel=1e-11)
        assert result["norms"] == pytest.approx(expected["norms"], rel=1e-10)
        assert result["aux"] == pytest.approx(expected["aux"], rel=1e-11)
        for router, bias in result["biases"].items():
            torch.testing.assert_close(bias, expected["biases"][router], rtol=0, atol=1e-9)
