from collections.abc import Callable

import pytest
import torch

from ltrain.model.layers import LocalLayers, Shard, declare, layout_of, pieces, seed_parameters, shard_of
from ltrain.model.norm import RMSNorm
from ltrain.model.stack import Stack


class ShardedLayers(LocalLayers):
    """One rank's part of the parameters, without any exchange: enough to see what it would hold."""

    def __init__(self, shard: Shard, depth: int):
        super().__init__(std=0.3, depth=depth, dtype=torch.float64)
        self.shard = shard


@pytest.mark.parametrize("shard", [Shard(0, 2, 0, 2), Shard(1, 2, 1, 2), Shard(1, 2, 0, 1), Shard(0, 1, 3, 4)])
def test_a_rank_holds_slices_of_the_whole_model(build: Callable[..., Stack], shard: Shard) -> None:
    whole = dict(build().named_parameters())
    local = build(layers=ShardedLayers(shard, 4))
    for name, param in local.named_parameters():
        full, layout = whole[name].detach(), layout_of(param)
        for axis, size in ((layout.axis, shard.tensor_size), (0 if layout.experts else None, shard.expert_size)):
            if axis is not None:
                assert param.shape[axis] == full.shape[axis] // size
        expected = torch.full_like(param, float("nan"))
        for piece in pieces(name, param):
            source: torch.Tensor = full
            if layout.experts:
                source = full[int(piece.name.split(".")[-2])]
            corner = tuple(slice(s, s + n) for s, n in zip(piece.start, param[piece.index].shape, strict=True))
            expected[piece.index] = source[corner]
        assert torch.equal(param, expected), name  # nothing of it was left out by the pieces, either


def test_every_part_of_a_fused_projection_is_sharded(build: Callable[..., Stack]) -> None:
    """Rank 1 of 2 holds the second half of q and the second half of k, not the second half of both together."""
    name = "layers.1.mixer.qkv.weight"
    whole = dict(build().named_parameters())[name]
    local = dict(build(layers=ShardedLayers(Shard(1, 2), 4)).named_parameters())[name]
    q, k, v, gate = whole.split((32, 16, 16, 32))
    assert torch.equal(local, torch.cat((q[16:], k[8:], v[8:], gate[16:])))


@pytest.mark.parametrize("tie", [True, False])
def test_stages_start_from_the_weights_of_the_whole(build: Callable[..., Stack], tie: bool) -> None:
    whole = dict(build(tie_embeddings=tie).named_parameters())
    stages = [build(start=0, stop=1, tie_embeddings=tie), build(start=1, stop=3, tie_embeddings=tie), build(start=3, tie_embeddings=tie)]
    seen: dict[str, torch.Tensor] = {}
    for stage in stages:
        for name, param in stage.named_parameters():
            assert torch.equal(param, whole[name]), name
            seen[name] = param
    assert seen.keys() == whole.keys()
    assert ("embed.weight" in dict(stages[-1].named_parameters())) == tie
    assert "head.weight" not in whole if tie else "head.weight" in whole


def test_seeds_and_names_give_different_weights(build: Callable[..., Stack]) -> None:
    model = build()
    before = {name: param.clone() for name, param in model.named_parameters()}
    seed_parameters(model, 1)
    for name, param in model.named_parameters():
        constant = "norm" in name
        assert torch.equal(param, before[name]) == constant, name
    experts = model.layers["0"].ffn.experts.up  # type: ignore[union-attr]
    assert not torch.equal(experts[0], experts[1])  # type: ignore[index]


def test_declaration_stays_on_the_parameter(build: Callable[..., Stack]) -> None:
    layers = LocalLayers()
    norm = layers.norm(4)
    assert isinstance(norm, RMSNorm)
    assert layout_of(norm.weight).partial_gradient and not layout_of(norm.weight).decay
    other = declare(torch.nn.Parameter(torch.ones(2)), layout_of(norm.weight), Shard(1, 2))
    assert shard_of(other).tensor_rank == 1


def test_heads_that_do_not_divide_are_refused() -> None:
    with pytest.raises(ValueError, match=r"kv_heads=2 does not divide over parallel\.tensor=4"):
        ShardedLayers(Shard(0, 4), 1).heads(2, "kv_heads")


@pytest.mark.parametrize("shape", [(5, 8), (3, 2, 8), (0, 8)])
def test_rms_norm(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    norm = RMSNorm(torch.nn.Parameter(torch.rand(8, dtype=torch.float64)), 1e-3)
    reference = torch.nn.functional.rms_norm(x, (8,), norm.weight, 1e-3)
    torch.testing.assert_close(norm(x), reference)
    weight = torch.randn(shape, dtype=torch.float64)
    ours = torch.autograd.grad((norm(x) * weight).sum(), (x, norm.weight))
    theirs = torch.autograd.grad((reference * weight).sum(), (x, norm.weight))
    torch.testing.assert_close(ours, theirs)


def test_rms_norm_of_bfloat16_is_computed_in_float32() -> None:
    x = (100 + torch.randn(64, 8)).to(torch.bfloat16).requires_grad_()
    norm = RMSNorm(torch.nn.Parameter(torch.rand(8).to(torch.bfloat16)), 1e-6)
    y = norm(x)
    expected = torch.nn.functional.rms_norm(x.detach().double(), (8,), norm.weight.detach().double(), 1e-6)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.double(), expected, rtol=2**-8, atol=0)
    y.sum().backward()
    assert x.grad is not None and x.grad.dtype == torch.bfloat16 and norm.weight.grad.dtype == torch.bfloat16  # type: ignore[union-attr]
