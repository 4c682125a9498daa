"""Every operator's programs compile for a Hopper GPU, in bfloat16, and fit its shared memory."""

import pytest
import torch

from ltrain.plan.operators import Sizes, operators
from tests.kernels.interpreter import GPU, INTERPRETED

pytestmark = pytest.mark.skipif(GPU or INTERPRETED, reason="compiles for a GPU that is not there")

SIZES = Sizes(heads=2, kv_heads=1, selected=64, hidden=128, vocab=256, experts=4)


@pytest.mark.parametrize("name", sorted(set(operators(SIZES)) - {"norm", "experts"}))
def test_programs_of_an_operator(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.kernels.compiled import compiling

    operator = operators(SIZES)[name]
    x = operator.inputs(200, torch.bfloat16, torch.Generator().manual_seed(0))
    leaves = {key: t.requires_grad_() for key, t in x.items() if t.is_floating_point() and key not in operator.fixed}
    with compiling(monkeypatch) as found:
        out = operator.run(leaves | {key: t for key, t in x.items() if key not in leaves}, "triton")
        torch.autograd.grad(out, list(leaves.values()), torch.ones_like(out), allow_unused=True)
    assert found
