"""Multi-token prediction against its formula, document by document in float64."""

from typing import Any

import pytest
import torch
from torch import Tensor

from ltrain.config import Config, ConfigError, load, validate
from ltrain.model.layers import LocalLayers, seed_parameters
from ltrain.model.mtp import MTPHead, ahead
from ltrain.model.options import ModelConfig, MoEOptions, MTPOptions
from ltrain.model.sequence import Sequence
from ltrain.model.stack import Stack
from tests.model.mixers.test_contract import jitter

LENGTHS, VOCAB, EPS = [4, 1, 2, 3, 9], 32, 1e-3


def build(mtp: MTPOptions, **changes: Any) -> Stack:
    attention = {"mixer": "attention", "heads": 4, "kv_heads": 2, "head_dim": 4}
    layers = {
        "full": attention,
        "ahead": {**attention, "qk_norm": "none", "ffn": {"experts": 4, "top_k": 2, "inner": 8, "shared_inner": 8, "aux_loss": 0.0}},
    }
    model = ModelConfig(hidden=16, depth=2, pattern=["full"], layers=layers, ffn=MoEOptions(experts=0, inner=24), norm_eps=EPS, mtp=mtp, **changes)
    stack = Stack(model, VOCAB, LocalLayers(std=0.3, eps=EPS, dtype=torch.float64))
    seed_parameters(stack, 0)
    jitter(stack)
    return stack


def stream() -> tuple[Tensor, Tensor, Sequence]:
    tokens = torch.randint(0, VOCAB, (sum(LENGTHS),), generator=torch.Generator().manual_seed(3))
    labels, seq = tokens.roll(-1), Sequence.of(LENGTHS)
    labels[seq.cu_seqlens[1:].long() - 1] = -100
    return tokens, labels, seq


def test_nothing_is_predicted_across_the_end_of_a_document() -> None:
    tokens, labels, seq = torch.tensor([1, 2, 3, 4, 5, 6, 7]), torch.tensor([2, 3, 4, -100, -100, 7, -100]), Sequence.of([4, 1, 2])
    first, second = ahead(tokens, labels, seq.cu_seqlens, 2)
    assert first.tokens.tolist() == [2, 3, 4, 0, 0, 7, 0]
    assert first.labels.tolist() == [3, 4, -100, -100, -100, -100, -100]
    assert second.tokens.tolist() == [3, 4, 0, 0, 0, 0, 0]
    assert second.labels.tolist() == [4, -100, -100, -100, -100, -100, -100]


@pytest.mark.parametrize("shared", [False, True])
def test_loss_and_gradients(shared: bool) -> None:
    stack = build(MTPOptions(depth=2, layer="ahead", shared=shared), tie_embeddings=False, embed_scale=3.0)
    tokens, labels, seq = stream()
    assert stack.embed is not None and stack.head is not None
    embedding, output = stack.embed.weight, stack.head.weight

    def normed(norm: Any, x: Tensor) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + EPS).sqrt() * norm.weight  # type: ignore[no-any-return]

    def plain() -> Tensor:
        """Each document alone; positions past what it can be given are left out, which nothing before them can see."""
        total = torch.zeros((), dtype=torch.float64)
        for document in tokens.split(LENGTHS):
            x, n = stack(document, Sequence.of([len(document)])), len(document)
            for k in (1, 2):
                if n - k < 1:
                    break
                head = stack.mtp["0" if shared else str(k - 1)]
                assert isinstance(head, MTPHead)
                both = torch.cat((normed(head.enorm, 3.0 * embedding[document[k:]]), normed(head.hnorm, x[: n - k])), -1)
                x = normed(head.norm, head.block(both @ head.projection.weight.T, Sequence.of([n - k])))
                if n - k > 1:
                    total = total - (x[:-1] @ output.T).log_softmax(-1).gather(-1, document[k + 1 :, None]).sum() / 2
        return total

    def ours() -> Tensor:
        objective, loss = stack.further_loss(stack(tokens, seq), ahead(tokens, labels, seq.cu_seqlens, 2), seq, factor=0.5)
        torch.testing.assert_close(objective.detach() * 2, loss)
        return objective * 2

    found, expected = ours(), plain()
    torch.testing.assert_close(found, expected)
    params = dict(stack.named_parameters())
    assert any(name.startswith("mtp.1.") for name in params) != shared
    assert set(stack.routers()) == ({"mtp.0.block.ffn.router"} if shared else {"mtp.0.block.ffn.router", "mtp.1.block.ffn.router"})
    expected_grads = torch.autograd.grad(expected, list(params.values()))
    for name, a, b in zip(params, torch.autograd.grad(found, list(params.values())), expected_grads, strict=True):
        torch.testing.assert_close(a, b, msg=f"{name}: {{}}".format)
        assert a.abs().max() > 0, name


def test_costs_count_every_head() -> None:
    none, two, shared = (build(mtp) for mtp in (MTPOptions(), MTPOptions(depth=2), MTPOptions(depth=2, shared=True)))
    block = sum(p.numel() for p in two.layers["1"].parameters())
    assert two.num_params().total - none.num_params().total == 2 * (block + 2 * 16 * 16 + 3 * 16)
    assert shared.num_params().total - none.num_params().total == block + 2 * 16 * 16 + 3 * 16
    assert (
        two.flops(8, 8)["mtp"]
        == shared.flops(8, 8)["mtp"]
        == none.flops(8, 8)["ffn"] + none.flops(8, 8)["full"] + 2 * (none.flops(8, 8)["head"] + 8 * 4 * 16 * 16)
    )


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.mtp.weight=0.1"], "model.mtp.weight=0.1 has no effect with depth: 0"),
        (["model.mtp.depth=1", "model.mtp.shared=true"], "model.mtp.shared=true has no effect with depth: 1"),
        (["model.mtp.depth=1", "model.mtp.layer=attentoin"], "did you mean attention"),
        (["model.mtp.depth=1", "model.mtp.weight=0"], "expected above 0"),
    ],
)
def test_what_has_no_effect_is_refused(tmp_path: Any, overrides: list[str], message: str) -> None:
    (tmp_path / "config.yaml").write_text("model: {}\n")
    with pytest.raises(ConfigError, match=message):
        load(tmp_path / "config.yaml", overrides)


def test_a_layer_kind_of_the_heads_alone() -> None:
    model = build(MTPOptions(depth=1, layer="ahead")).model
    validate(Config(model=model))
    model.layers["ahead"]["heads"] = 3
    with pytest.raises(ConfigError, match=r"model.layers.ahead.heads=3"):
        validate(Config(model=model))
