"""The engine on GPUs: one GPU against plain torch on the CPU, several against one."""

from typing import Any

import pytest
import torch

from tests.parallel.parity import Layout, Reference, assemble, config, on_ranks, step_batches, worst
from tests.parallel.pool import Pools

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
two = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")


def run(gpus: Pools, world: int, layout: Layout, precision: str, steps: int) -> list[dict[str, Any]]:
    results: list[dict[str, Any]] = gpus(world).run(on_ranks, config(layout, precision), steps, "cuda", timeout=300)
    return results


def test_one_gpu_trains_as_plain_torch_does_on_the_cpu(gpus: Pools) -> None:
    reference = Reference(config(Layout(), "fp32"))
    losses = [reference.backward(step_batches(0))]
    gradients = reference.gradients()
    norms = [reference.step(0)]
    for step in range(1, 10):
        losses.append(reference.backward(step_batches(step)))
        norms.append(reference.step(step))
    (result,) = run(gpus, 1, Layout(), "fp32", 10)
    error, name = worst(assemble([result]), gradients)
    assert error < 1e-5, f"{name} is off by {error:.1e}"
    assert result["losses"] == pytest.approx(losses, abs=1e-5)
    assert result["norms"] == pytest.approx(norms, rel=1e-4)


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_bf16_is_near_float32(gpus: Pools, recompute: str) -> None:
    (exact,) = run(gpus, 1, Layout(), "fp32", 3)
    (half,) = run(gpus, 1, Layout(recompute=recompute), "bf16", 3)
    assert half["losses"] == pytest.approx(exact["losses"], rel=1e-2)
    assert half["norms"] == pytest.approx(exact["norms"], rel=0.1)


TWO = [
    Layout(context=2),
    Layout(context=2, context_layout="contiguous"),
    Layout(tensor=2),
    Layout(expert=2),
    Layout(pipeline=2),
    Layout(tensor=2, expert=2),
]


@two
@pytest.mark.parametrize("layout", TWO, ids=str)
def test_two_gpus_equal_one_in_float32(gpus: Pools, layout: Layout) -> None:
    (one,) = run(gpus, 1, Layout(), "fp32", 10)
    results = run(gpus, 2, layout, "fp32", 10)
    error, name = worst(assemble(results), assemble([one]))
    assert error < 1e-5, f"{name} is off by {error:.1e}"
    for result in results:
        assert result["losses"] == pytest.approx(one["losses"], abs=1e-5)
        assert result["norms"] == pytest.approx(one["norms"], rel=1e-4)


@two
@pytest.mark.parametrize("layout", TWO, ids=str)
def test_two_gpus_are_near_one_in_bf16(gpus: Pools, layout: Layout) -> None:
    (one,) = run(gpus, 1, Layout(), "bf16", 1)
    for result in run(gpus, 2, layout, "bf16", 1):
        assert result["losses"][0] == pytest.approx(one["losses"][0], rel=1e-3)
