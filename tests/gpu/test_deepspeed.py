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


def compare(found: list[dict[str, Any]], expected: list[dict[str, Any]], precision: str) -> None:
    fp32 = precision == "fp32"
    error, name = worst(assemble(found), assemble(expected))
    assert error < (1e-5 if fp32 else 1e-2), f"{name} is off by {error:.1e}"
    for result in found:
        assert result["losses"] == pytest.approx(expected[0]["losses"], abs=1e-5 if fp32 else 1e-3)
        assert result["norms"] == pytest.approx(expected[0]["norms"], rel=1e-4 if fp32 else 1e-2)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("offload", ["none", "cpu"])
@pytest.mark.parametrize("zero", [1, 2, 3])
def test_one_gpu_trains_as_the_megatron_engine(gpus: Pools, zero: int, offload: str, precision: str) -> None:
    steps = 10 if precision == "fp32" else 3
    compare(run(gpus, 1, Layout(), precision, steps, zero, offload), run(gpus, 1, Layout(), precision, steps), precision)


TWO = [Layout(), Layout(tensor=2), Layout(context=2, recompute="full"), Layout(tensor=2, expert=2)]


@two
@pytest.mark.parametrize("layout", TWO, ids=str)
@pytest.mark.parametrize(("zero", "offload"), [(1, "none"), (2, "cpu"), (3, "none"), (3, "cpu")])
def test_two_gpus_train_as_the_megatron_engine(gpus: Pools, zero: int, offload: str, layout: Layout) -> None:
    compare(run(gpus, 2, layout, "fp32", 10, zero, offload), run(gpus, 2, layout, "fp32", 10), "fp32")
