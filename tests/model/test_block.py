"""Forms of a block, norms, and what happens to embeddings and logits, against their formulas in float64."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from ltrain.config import Config, ConfigError, load, resolve_layers, validate
from ltrain.model.block import Block
from ltrain.model.layers import LocalLayers, seed_parameters
from ltrain.model.options import ModelConfig, MoEOptions
from ltrain.model.sequence import Sequence
from ltrain.model.stack import Stack
from tests.model.mixers.test_contract import jitter

HIDDEN, LENGTHS, EPS = 16, [5, 1, 2, 9], 1e-3
Build = Callable[..., Stack]


def model(kind: dict[str, Any], **changes: Any) -> ModelConfig:
    attention = {"mixer": "attention", "heads": 4, "kv_heads": 2, "head_dim": 4}
    ffn = MoEOptions(experts=0, inner=24)
    return ModelConfig(hidden=HIDDEN, depth=1, pattern=["layer"], layers={"layer": {**attention, **kind}}, ffn=ffn, norm_eps=EPS, **changes)


def block(kind: dict[str, Any], recompute: str = "none", **changes: Any) -> Block:
    made = model(kind, **changes)
    module = Block(HIDDEN, resolve_layers(made)[0], LocalLayers.of(made, dtype=torch.float64), recompute)
    seed_parameters(module, 0)
    jitter(module)
    return module


def normed(norm: torch.nn.Module | None, x: Tensor, kind: str) -> Tensor:
    assert norm is not None
    if kind.startswith("layer"):
        x = x - x.mean(-1, keepdim=True)
    y = x / (x.square().mean(-1, keepdim=True) + EPS).sqrt() * (norm.weight + (kind == "rms_zero_centred"))
    return y + norm.bias if kind == "layer_bias" else y  # type: ignore[no-any-return]


def formula(b: Block, x: Tensor, kind: str) -> Tensor:
    """The two sums of each form, written out."""
    seq, o = Sequence.of(LENGTHS), b.spec.block

    def mixer(x: Tensor) -> Tensor:
        assert b.mixer is not None
        return b.mixer(x, seq)  # type: ignore[no-any-return]

    def ffn(x: Tensor) -> Tensor:
        assert b.ffn is not None
        return b.ffn(x, seq)  # type: ignore[no-any-return]

    alpha, beta, ffn_alpha, ffn_beta = o.mixer_residual_scale, o.mixer_scale, o.ffn_residual_scale, o.ffn_scale
    if o.form == "pre":
        x = alpha * x + beta * mixer(normed(b.mixer_norm, x, kind))
        return ffn_alpha * x + ffn_beta * ffn(normed(b.ffn_norm, x, kind))
    if o.form == "post":
        x = alpha * x + beta * normed(b.mixer_post_norm, mixer(x), kind)
        return ffn_alpha * x + ffn_beta * normed(b.ffn_post_norm, ffn(x), kind)
    if o.form == "sandwich":
        x = alpha * x + beta * normed(b.mixer_post_norm, mixer(normed(b.mixer_norm, x, kind)), kind)
        return ffn_alpha * x + ffn_beta * normed(b.ffn_post_norm, ffn(normed(b.ffn_norm, x, kind)), kind)
    if o.form == "parallel":
        n = normed(b.norm, x, kind)
        return alpha * x + beta * mixer(n) + ffn_beta * ffn(n)
    if o.form == "parallel_norms":
        return alpha * x + beta * mixer(normed(b.mixer_norm, x, kind)) + ffn_beta * ffn(normed(b.ffn_norm, x, kind))
    x = normed(b.mixer_norm, x, kind)
    x = alpha * x + beta * mixer(x)
    x = normed(b.ffn_norm, x, kind)
    return ffn_alpha * x + ffn_beta * ffn(x)


def backward(module: Block, compute: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    x = torch.randn(sum(LENGTHS), HIDDEN, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    module.zero_grad()
    y = compute(x)
    (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)).sum().backward()
    assert x.grad is not None
    return {"y": y.detach(), "x": x.grad, **{n: p.grad for n, p in module.named_parameters() if p.grad is not None}}


SCALES = {"mixer_scale": 0.6, "ffn_scale": 1.7, "mixer_residual_scale": 0.8}


@pytest.mark.parametrize("kind", ["rms", "rms_zero_centred", "layer", "layer_bias"])
@pytest.mark.parametrize("form", ["pre", "post", "sandwich", "parallel", "parallel_norms", "normed_residual"])
def test_forms(form: str, kind: str) -> None:
    scales = SCALES if form.startswith("parallel") else {**SCALES, "ffn_residual_scale": 1.3}
    module = block({"block": {"form": form, **scales}}, norm=kind)
    found = backward(module, lambda x: module(x, Sequence.of(LENGTHS)))
    expected = backward(module, lambda x: formula(module, x, kind))
    assert found.keys() == expected.keys() == {"y", "x", *(n for n, _ in module.named_parameters())}
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-10, atol=1e-12, msg=f"{name}: {{}}".format)


@pytest.mark.parametrize("form", ["pre", "post", "sandwich", "parallel", "parallel_norms", "normed_residual"])
def test_recomputation_and_decoding(form: str) -> None:
    kind = {"block": {"form": form, **SCALES}, "ffn": {"experts": 4, "top_k": 2, "inner": 8, "shared_inner": 8}}
    results = []
    for recompute in ("none", "selective", "full"):
        module = block(kind, recompute, norm="layer_bias")
        results.append(backward(module, lambda x, m=module: m(x, Sequence.of(LENGTHS))))  # type: ignore[misc]
    assert results[0].keys() == results[1].keys() == results[2].keys()
    for name, value in results[0].items():
        torch.testing.assert_close(results[1][name], value, rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(results[2][name], value, rtol=1e-12, atol=1e-14)
    with torch.no_grad():
        x = torch.randn(7, HIDDEN, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        whole = module(x, Sequence.of([7]))
        y, state = module.prefill(x[:6], Sequence.of([6]))
        last, _ = module.decode(x[6:], state, Sequence.step(torch.tensor([6])))
    torch.testing.assert_close(torch.cat((y, last)), whole, rtol=1e-10, atol=1e-12)


def test_layers_of_one_part() -> None:
    """As in Nemotron-H: the two layers, one after the other, are one layer of the usual kind."""
    usual = block({})
    mixes = block({"ffn": "none"})
    made = model({})
    made.layers, made.pattern = {"layer": {"mixer": "none"}}, ["layer"]
    feeds = Block(HIDDEN, resolve_layers(made)[0], LocalLayers.of(made, dtype=torch.float64))
    usual_state = usual.state_dict()
    mixes.load_state_dict({n: v for n, v in usual_state.items() if n.startswith("mixer")})
    feeds.load_state_dict({n: v for n, v in usual_state.items() if n.startswith("ffn")})
    x, seq = torch.randn(sum(LENGTHS), HIDDEN, dtype=torch.float64), Sequence.of(LENGTHS)
    torch.testing.assert_close(feeds(mixes(x, seq), seq), usual(x, seq), rtol=0, atol=0)
    assert (feeds.state_bytes(9), mixes.state_bytes(9)) == (0, usual.state_bytes(9))
    assert {**mixes.flops(9, 9), **feeds.flops(9, 9)} == usual.flops(9, 9)


def test_a_stack_of_single_layers_decodes() -> None:
    made = model({"ffn": "none"}, tie_embeddings=False)
    made.layers["moe"] = {"mixer": "none", "ffn": {"experts": 4, "top_k": 2, "inner": 8, "shared_inner": 8}}
    made.pattern, made.depth = ["layer", "moe", "none"], 3
    stack = Stack(made, 32, LocalLayers(std=0.3, eps=EPS, dtype=torch.float64)).eval()
    seed_parameters(stack, 0)
    tokens = torch.arange(12) % 32
    with torch.no_grad():
        expected = stack.logits(stack(tokens, Sequence.of([12])))
        logits, state = stack.prefill(tokens[:11], Sequence.of([11]))
        torch.testing.assert_close(logits, expected[10:11])
        logits, _ = stack.decode(tokens[11:], state, Sequence.step(torch.tensor([11])))
    torch.testing.assert_close(logits, expected[11:])
    assert set(stack.routers()) == {"layers.1.ffn.router"}
    assert stack.flops(12, 12)["ffn"] > 0


def test_embeddings_and_logits() -> None:
    made = model({}, norm="layer_bias", embed_scale=3.0, embed_norm=True, logit_scale=0.7, logit_softcap=2.0, tie_embeddings=False, z_loss=0.1)
    stack = Stack(made, 32, LocalLayers.of(made, dtype=torch.float64))
    seed_parameters(stack, 0)
    jitter(stack)
    assert stack.embed is not None and stack.head is not None
    with torch.no_grad():
        stack.head.weight.mul_(30)  # so that the cap bends
    tokens = torch.randint(0, 32, (sum(LENGTHS),), generator=torch.Generator().manual_seed(2))
    labels, seq = tokens.roll(-1), Sequence.of(LENGTHS)
    labels[3] = -100
    x = normed(stack.embed_norm, 3.0 * stack.embed.weight[tokens], "layer_bias")
    hidden = normed(stack.norm, stack.layers["0"](x, seq), "layer_bias")
    logits = 2.0 * (0.7 * hidden @ stack.head.weight.T / 2.0).tanh()
    z = logits.logsumexp(-1)[labels >= 0].square().sum()
    expected = torch.nn.functional.cross_entropy(logits, labels, ignore_index=-100, reduction="sum") + 0.1 * z
    expected_grads = torch.autograd.grad(expected, list(stack.parameters()))
    torch.testing.assert_close(stack.logits(stack(tokens, seq)), logits)
    objective = stack.loss(stack(tokens, seq), labels).objective
    torch.testing.assert_close(objective, expected)
    for a, b in zip(torch.autograd.grad(objective, list(stack.parameters())), expected_grads, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"norm": "layernorm"}, "did you mean layer?"),
        ({"block.form": "sandwhich"}, "did you mean sandwich?"),
        ({"block.mixer_scale": 0.0}, "expected above 0"),
        ({"block.form": "parallel", "block.ffn_residual_scale": 0.5}, "ffn_residual_scale has no effect with form: parallel"),
        ({"block.form": "parallel", "ffn": "none"}, "block.form=parallel has no effect in model.layers.layer, which has not a feed-forward"),
        ({"block.ffn_scale": 0.5, "ffn": "none"}, "block.ffn_scale has no effect without a feed-forward"),
        ({"block.mixer_scale": 0.5, "mixer": "none"}, "block.mixer_scale has no effect without a mixer"),
        ({"mixer": "none", "ffn": "none"}, "neither a mixer nor a feed-forward"),
        ({"ffn": {"experts": 4, "inner": 0}}, "leaves 4 experts no width"),
    ],
)
def test_what_has_no_effect_is_refused(changes: dict[str, Any], message: str) -> None:
    made = model({})
    made.norm = changes.pop("norm", made.norm)
    if changes.get("mixer") == "none":
        made.layers["layer"] = {}
    for key, value in changes.items():
        part, _, option = key.partition(".")
        made.layers["layer"][part] = {**made.layers["layer"].get(part, {}), option: value} if option else value
    with pytest.raises(ConfigError, match=message.replace("?", r"\?")):
        validate(Config(model=made))


def test_scales_of_all_layers_serve_those_that_have_the_part() -> None:
    made = model({})
    made.block.ffn_scale = 0.5
    made.layers["mixes"] = {"mixer": "attention", "ffn": "none"}
    made.pattern, made.depth = ["layer", "mixes"], 2
    validate(Config(model=made))
    made.pattern, made.depth = ["mixes"], 1
    del made.layers["layer"]
    with pytest.raises(ConfigError, match=r"model.block.ffn_scale has no effect without a feed-forward"):
        validate(Config(model=made))


def test_the_old_name_of_the_zero_centred_norm(tmp_path: Any) -> None:
    """Checkpoints hold the config that they were trained with."""
    path = tmp_path / "config.yaml"
    path.write_text("model: {norm_zero_centred: true}\n")
    assert load(path).model.norm == "rms_zero_centred"
