"""What a run of tokens makes of the state before it: M and E of every kind of recurrence, against running all of it."""

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from ltrain.kernels.linear_recurrence.generalised import generalised_delta, step
from ltrain.kernels.recurrence import Elementwise, GeneralisedDelta, Linear, Recurrence, Selective
from ltrain.model.mixers.mlstm import Largest

TOKENS = 37


def normal(*shape: int, seed: int = 0, tokens: int = TOKENS) -> Tensor:
    return torch.randn(tokens, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(hash((seed, *shape)) % 2**31))


def unit(x: Tensor) -> Tensor:
    return x / x.norm(dim=-1, keepdim=True)


def delta(tokens: int = TOKENS) -> GeneralisedDelta:
    r, k, c = (normal(3, 8, seed=n, tokens=tokens) for n in range(3))
    c = unit(c)
    return GeneralisedDelta(
        r, -0.6 * normal(3, 8, seed=3, tokens=tokens).sigmoid(), k, normal(3, 5, tokens=tokens), c * normal(3, 8, tokens=tokens).sigmoid(), c
    )


KINDS: dict[str, Recurrence] = {
    "add": Linear(normal(2, 8), normal(2, 8, seed=1), normal(4, 5), None, None, 0.5),
    "decay by head": Linear(normal(2, 8), normal(2, 8, seed=1), normal(4, 5), -normal(4).exp() / 9, None, 0.5),
    "decay by channel": Linear(normal(2, 8), normal(2, 8, seed=1), normal(4, 5), -normal(4, 8).exp() / 9, None, 0.5),
    "delta": Linear(normal(2, 8), unit(normal(2, 8, seed=1)), normal(4, 5), -normal(4).exp() / 9, normal(4, seed=5).sigmoid(), 0.5),
    "generalised delta": delta(),
    "elementwise": Elementwise(normal(3, 2).sigmoid(), normal(3, 2, seed=1)),
    "selective": Selective(normal(6), normal(6, seed=1).exp(), 0.1 + torch.rand(6, 4, dtype=torch.float64), normal(4), normal(4, seed=1)),
    "largest": Largest(-normal(3).exp() / 9, normal(3, seed=1)),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cut", [0, 1, 16, 36])
def test_maps_compose_to_what_all_tokens_make(kind: str, cut: int) -> None:
    every = KINDS[kind]
    first, second = every.rows(0, cut), every.rows(cut, TOKENS)
    whole, final = every.run(every.alone, final=True)
    assert final is not None and final.shape == (1, *every.state_shape)
    _, state = first.ends(begun=False)
    output, after = second.run(second.alone, state.unsqueeze(0), final=True)
    assert after is not None
    torch.testing.assert_close(output, whole[cut:], rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(after, final, rtol=1e-11, atol=1e-11)
    m, e = second.ends(begun=True)
    assert m is not None and m.shape == every.map_shape and e.shape == every.state_shape
    torch.testing.assert_close(second.join(m, state, e), final[0], rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "largest"])
def test_the_transposed_map_takes_gradients_back(kind: str) -> None:
    every = KINDS[kind]
    state = torch.randn(1, *every.state_shape, dtype=torch.float64, generator=torch.Generator().manual_seed(9)).requires_grad_()
    _, final = every.run(every.alone, state, final=True)
    assert final is not None
    grad = torch.randn_like(final)
    m, _ = every.ends(begun=True)
    assert m is not None
    torch.testing.assert_close(every.join(m, grad[0], torch.zeros_like(grad[0]), transpose=True), torch.autograd.grad(final, state, grad)[0][0])


@pytest.mark.parametrize("lengths", [[1], [16], [17, 0, 3, 33], [0, 5, 15, 2]], ids=str)
@pytest.mark.parametrize("initial", [False, True])
def test_generalised_delta_is_its_steps(lengths: list[int], initial: bool) -> None:
    inputs = [x.requires_grad_() for x in delta(sum(lengths)).tensors.values()]
    bounds = [sum(lengths[:n]) for n in range(len(lengths) + 1)]
    state = torch.randn(len(lengths), 3, 8, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    before = state if initial else torch.zeros_like(state)
    got = generalised_delta(*inputs, torch.tensor(bounds, dtype=torch.int32), initial_state=state if initial else None)
    rows, finals = [], []
    for n, (a, b) in enumerate(pairwise(bounds)):
        now = before[n : n + 1]
        for t in range(a, b):
            y, now = step(*(x[t : t + 1] for x in inputs), now)
            rows.append(y)
        finals.append(now)
    want = torch.cat(rows), torch.cat(finals)
    leaves = [*inputs, *([state] if initial else [])]
    weights = [torch.randn_like(x) for x in want]
    grads = [torch.autograd.grad(found, leaves, weights, retain_graph=True) for found in (got, want)]
    for a, b in zip((*got, *grads[0]), (*want, *grads[1]), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
