"""Linear cross entropy over a vocabulary that gloo ranks share out, chunk by chunk, against the plain formula on one."""

from typing import Any
from unittest.mock import patch

import pytest
import torch

from tests.kernels.linear_heads import VOCAB, inputs, objective

FORM = {"z_loss": 0.01, "scale": 0.7, "softcap": 2.0, "factor": 1 / 23}


def on_ranks(accumulate: bool) -> tuple[list[torch.Tensor], torch.Tensor, torch.Tensor]:
    """On every rank of a pool: the three sums, x's gradient summed over the ranks, and that of this rank's rows of the weight."""
    import torch.distributed as dist

    from ltrain.kernels.cross_entropy import fused, linear_cross_entropy_sum
    from ltrain.parallel.layers import VocabShards

    group = dist.group.WORLD
    assert group is not None
    x, whole, labels = inputs(29)
    weight = whole.detach().chunk(dist.get_world_size())[dist.get_rank()].clone().requires_grad_()
    main = torch.zeros_like(weight) if accumulate else None
    with patch.object(fused, "CHUNK_REFERENCE", 8 * len(weight) * 8):
        found = linear_cross_entropy_sum(x, weight, labels, **FORM, weight_grad=main, shards=VocabShards(len(weight), group))
    found.objective.backward()
    with torch.no_grad(), pytest.raises(ValueError, match="has the whole vocabulary on each rank"):
        linear_cross_entropy_sum(x, weight, labels, shards=VocabShards(len(weight), group), backend="chunked")
    assert x.grad is not None and (weight.grad is None) == accumulate
    dist.all_reduce(x.grad)
    grad = weight.grad if main is None else main
    assert grad is not None
    return [value.detach() for value in found], x.grad, grad


@pytest.mark.parametrize("accumulate", [False, True])
def test_sums_and_gradients(pool: Any, accumulate: bool) -> None:
    x, weight, labels = inputs(29)
    expected = objective(x, weight, labels, **FORM)
    grad_x, grad_weight = torch.autograd.grad(expected[0], (x, weight))
    results = pool(2).run(on_ranks, accumulate)
    for values, found, _ in results:
        torch.testing.assert_close(values, [value.detach() for value in expected])
        torch.testing.assert_close(found, grad_x)
    assert VOCAB % 2 == 0
    torch.testing.assert_close(torch.cat([grad for *_, grad in results]), grad_weight)
