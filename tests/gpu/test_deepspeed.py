"""engine=deepspeed on GPUs, against the Megatron engine on the same GPUs."""

from typing import Any

import pytest
import torch

from ltrain.config import DeepSpeedConfig
from tests.parallel.parity import Layout, assemble, config, on_ranks, worst
from tests.parallel.pool import Pools

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
two = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")


def run(gpus: Pools, world: int, layout: Layout, precision: str, steps: int, zero: int = 0, offload: str = "none") -> list[dict[str, Any]]:
    """zero 0: the Megatron engine."""
    asked = config(layout, precision)
    if zero:
        asked.engine, asked.deepspeed = "deepspeed", DeepSpeedConfig(zero, offload)
    results: list[dict[str, Any]] = gpus(world).run(on_ranks, asked, steps, "cuda", timeout=300)
    return results


def compare(found: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    error, name = worst(assemble(found), assemble(expected))
    assert error < 1e-5, f"{name} is off by {error:.1e}"
    for result in found:
        assert result["losses"] == pytest.approx(expected[0]["losses"], abs=1e-5)
        assert result["norms"] == pytest.approx(expected[0]["norms"], rel=1e-4)


@pytest.mark.parametrize("offload", ["none", "cpu"])
@pytest.mark.parametrize("zero", [1, 2, 3])
def test_one_gpu_trains_as_the_megatron_engine(gpus: Pools, zero: int, offload: str) -> None:
    compare(run(gpus, 1, Layout(), "fp32", 10, zero, offload), run(gpus, 1, Layout(), "fp32", 10))


@pytest.mark.parametrize("offload", ["none", "cpu"])
@pytest.mark.parametrize("zero", [1, 2, 3])
def test_bf16_is_as_near_to_float32_as_the_megatron_engine(gpus: Pools, zero: int, offload: str) -> None:
    """DeepSpeed adds the micro-batches' gradients up in bf16 where megatron keeps float32 sums."""
    (exact,), (half,) = run(gpus, 1, Layout(), "fp32", 3), run(gpus, 1, Layout(), "bf16", 3)
    (found,) = run(gpus, 1, Layout(), "bf16", 3, zero, offload)
    (error, name), (allowed, _) = worst(assemble([found]), assemble([exact])), worst(assemble([half]), assemble([exact]))
    assert error < 1.5 * allowed, f"{name} is off by {error:.1e}, the megatron engine by {allowed:.1e}"
    assert found["losses"] == pytest.approx(half["losses"], abs=1e-3)
    assert found["norms"] == pytest.approx(half["norms"], rel=1e-2)


TWO = [Layout(), Layout(tensor=2), Layout(context=2, recompute="full"), Layout(tensor=2, expert=2)]


@two
@pytest.mark.parametrize("layout", TWO, ids=str)
@pytest.mark.parametrize(("zero", "offload"), [(1, "none"), (2, "cpu"), (3, "none"), (3, "cpu")])
def test_two_gpus_train_as_the_megatron_engine(gpus: Pools, zero: int, offload: str, layout: Layout) -> None:
    compare(run(gpus, 2, layout, "fp32", 10, zero, offload), run(gpus, 2, layout, "fp32", 10))
