"""Prefill, decoding and scores on GPUs against the full forward of one CPU in float64."""

import pytest
import torch

from tests.parallel.parity import Layout
from tests.parallel.pool import Pools
from tests.parallel.test_inference import PROMPTS, ROOM, expected, on_rank

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
two = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    ("world", "layout"),
    [(1, Layout()), *(pytest.param(2, layout, marks=two) for layout in (Layout(context=2), Layout(tensor=2), Layout(expert=2)))],
    ids=str,
)
def test_decoding_on_gpus_is_the_full_forward_of_a_cpu(gpus: Pools, world: int, layout: Layout, precision: str) -> None:
    """In bf16 an expert may be chosen otherwise for a token, so that only most of the numbers are near."""
    logits, losses = expected()
    for result in gpus(world).run(on_rank, layout, PROMPTS, precision, "cuda", timeout=300):
        found = torch.cat([result["logits"][:, row] for row in range(len(PROMPTS))]).double()
        wanted = torch.cat([whole[-ROOM - 1 :] for whole in logits])
        off = (found - wanted).abs() / wanted.abs().max()
        if precision == "fp32":
            assert off.max() < 1e-4
            torch.testing.assert_close(torch.cat(result["loss"]), torch.cat(losses), rtol=1e-4, atol=1e-4)
        else:
            assert off.quantile(0.9) < 0.05
            assert torch.cat(result["loss"]).mean() == pytest.approx(torch.cat(losses).mean(), rel=2e-2)
