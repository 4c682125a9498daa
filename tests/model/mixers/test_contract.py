"""What every mixer promises, in every form of it that tests/model/mixers/cases lists."""

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from ltrain.model.layers import LocalLayers, seed_parameters
from ltrain.model.mixers.base import Mixer
from ltrain.model.sequence import Sequence
from ltrain.schema import ConfigError
from tests.model.mixers.cases import CASES, HIDDEN, build, decodes

LENGTHS = [1, 2, 63, 64, 65, 5]  # around the chunks of the recurrences
DECODED = [name for name in CASES if decodes(name)]


def built(name: str, dtype: torch.dtype = torch.float64) -> Mixer:
    """The case's mixer, with weights that hide nothing: no ones in norms, no zeros in biases."""
    module = build(name, LocalLayers(std=0.3, dtype=dtype))
    seed_parameters(module, 0)
    jitter(module)
    return module


@torch.no_grad()
def jitter(module: torch.nn.Module) -> None:
    """Move every vector off the constant it may start at, each number by the same share of itself on any layout."""
    for key, param in module.named_parameters():
        if param.ndim == 1:
            param.mul_(1.1).add_(0.05 * (1 + len(key) % 3))


def inputs(count: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(count, HIDDEN, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).to(dtype)


def floats(state: Any) -> list[Tensor]:
    """The floating-point tensors of a state, however it nests them."""
    if isinstance(state, Tensor):
        return [state] if state.is_floating_point() else []
    if dataclasses.is_dataclass(state):
        return [t for f in dataclasses.fields(state) for t in floats(getattr(state, f.name))]
    if isinstance(state, dict):
        return [t for value in state.values() for t in floats(value)]
    return [t for value in state for t in floats(value)] if isinstance(state, (list, tuple)) else []


@pytest.mark.parametrize("name", CASES)
def test_no_document_sees_another(name: str) -> None:
    """A packed stream gives the outputs and the gradients of each document alone."""
    module, x = built(name), inputs(sum(LENGTHS))
    weight = torch.randn(x.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(2))
    found = []
    for parts in ([LENGTHS], [[n] for n in LENGTHS]):
        module.zero_grad()
        leaf = x.clone().requires_grad_()
        pieces = zip(parts, leaf.split([sum(p) for p in parts]), weight.split([sum(p) for p in parts]), strict=True)
        outputs = []
        for lengths, piece, w in pieces:
            seq = Sequence.of(lengths)
            seq.aux_weight = sum(lengths) / sum(LENGTHS)  # a loss of the mixer's own is a mean over tokens
            y = module(piece, seq)
            (y * w).sum().backward()
            outputs.append(y.detach())
        assert leaf.grad is not None
        gradients = {"y": torch.cat(outputs), "x": leaf.grad, **{k: p.grad.clone() for k, p in module.named_parameters() if p.grad is not None}}
        found.append(gradients)
    assert found[0].keys() == found[1].keys() == {"y", "x", *(k for k, _ in module.named_parameters())}
    for key, packed in found[0].items():
        torch.testing.assert_close(packed, found[1][key], rtol=1e-8, atol=1e-9 * (1 + float(packed.abs().max())), msg=f"{key}: {{}}".format)
        assert packed.abs().max() > 0, f"{key} is zero"


@pytest.mark.parametrize("name", DECODED)
@torch.no_grad()
def test_decoding_goes_on_from_a_prefill(name: str) -> None:
    """One token after the other, from states of unequal documents, gives what one forward of each whole document gives."""
    module, lengths, steps = built(name), [1, 30, 66], 7
    whole = [inputs(n + steps).roll(i, 0) for i, n in enumerate(lengths)]
    y, state = module.prefill(torch.cat([x[:n] for x, n in zip(whole, lengths, strict=True)]), Sequence.of(lengths))
    found = [list(part) for part in y.split(lengths)]
    for step in range(steps):
        positions = torch.tensor(lengths) + step
        y, state = module.decode(torch.stack([x[n + step] for x, n in zip(whole, lengths, strict=True)]), state, Sequence.step(positions))
        for rows, row in zip(found, y, strict=True):
            rows.append(row)
    for x, rows in zip(whole, found, strict=True):
        torch.testing.assert_close(torch.stack(rows), module(x, Sequence.of([len(x)])), rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("name", [name for name in CASES if name not in DECODED])
@torch.no_grad()
def test_what_does_not_decode_sees_later_tokens_and_says_so(name: str) -> None:
    module, x = built(name), inputs(9)
    other = torch.cat((x[:-1], -x[-1:]))
    assert not torch.allclose(module(x, Sequence.of([9]))[-2], module(other, Sequence.of([9]))[-2])
    for call in (
        lambda: module.prefill(x, Sequence.of([9])),
        lambda: module.decode(x[:1], [None] * len(CASES[name]), Sequence.step(torch.tensor([9]))),
    ):
        with pytest.raises(ConfigError, match="does not decode"):
            call()


@pytest.mark.parametrize("name", [name for name in CASES if name not in DECODED and len(CASES[name]) == 1])
@pytest.mark.parametrize("context", [1, 5, 48])
def test_what_sees_later_tokens_counts_those_it_sees(name: str, context: int) -> None:
    """By the gradients: which tokens each token's output depends on."""
    module: Any = built(name)
    x = inputs(context).requires_grad_()
    y = module(x, Sequence.of([context]))
    seen = sum(int((torch.autograd.grad(row.sum(), x, retain_graph=True)[0].abs().sum(-1) > 0).sum()) for row in y)
    assert module._seen(context) * context == pytest.approx(seen)


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_costs_are_what_the_mixer_says(name: str) -> None:
    module = built(name, torch.float32)
    for context in (1, 40, 130):
        state = module.prefill(inputs(context, torch.float32), Sequence.of([context]))[1] if name in DECODED else None
        assert module.state_bytes(context, 4) == sum(4 * t.numel() for t in floats(state))
    assert module.num_params() == sum(p.numel() for p in module.parameters())
    assert module.flops(64, 64) >= 2 * 64 * sum(p.numel() for p in module.parameters() if p.ndim == 2) * 0.9
