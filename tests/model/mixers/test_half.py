"""Every mixer with weights and activations in bfloat16: near float64, forward, and from a prefill to decoding."""

import pytest
import torch

from ltrain.model.sequence import Sequence
from tests.model.mixers.cases import CASES
from tests.model.mixers.test_contract import DECODED, built, inputs

LENGTHS = [1, 2, 130, 13]
SELECTS = {  # rounding makes them select other tokens
    *("attention-moba", "attention-moba-local", "attention-msa"),
    *("mla-dsa", "mla-dsa-shared", "nsa", "nsa-apart-nope"),
}


@pytest.mark.parametrize("name", [name for name in CASES if name != "mla-dsa-fp8"])  # 8 bits turn a little rounding into another selection
def test_bfloat16_is_near_float64(name: str) -> None:
    half, wide = built(name, torch.bfloat16), built(name)
    wide.load_state_dict({key: value.double() for key, value in half.state_dict().items()})
    x = inputs(sum(LENGTHS)).bfloat16()
    y, expected = half(x, Sequence.of(LENGTHS)), wide(x.double(), Sequence.of(LENGTHS))
    bound = 0.15 if name in SELECTS else 0.02 * len(CASES[name])
    assert y.dtype == torch.bfloat16
    assert (y.double() - expected).norm() < bound * expected.norm()
    y.sum().backward()
    for key, param in half.named_parameters():
        assert param.grad is not None and param.grad.isfinite().all(), key
    if name not in DECODED:
        return
    with torch.no_grad():
        whole = x[-LENGTHS[-1] :]
        y, state = half.prefill(whole[:10], Sequence.of([10]))
        rows = [*y]
        for t in range(10, len(whole)):
            y, state = half.decode(whole[t : t + 1], state, Sequence.step(torch.tensor([t])))
            assert y.dtype == torch.bfloat16
            rows += [*y]
        alone = wide(whole.double(), Sequence.of([len(whole)]))
        assert (torch.stack(rows).double() - alone).norm() < bound * alone.norm()
