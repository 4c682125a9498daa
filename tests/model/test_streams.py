"""Several residual streams against transformers' hyper-connections of DeepSeek-V4, and against the formula in float64."""

from typing import Any

import pytest
import torch
from torch import Tensor

from ltrain.config import Config, ConfigError, load, validate
from ltrain.model.layers import LocalLayers, seed_parameters
from ltrain.model.mtp import ahead
from ltrain.model.options import ModelConfig, MoEOptions, MTPOptions, StreamOptions
from ltrain.model.sequence import Sequence
from ltrain.model.stack import Stack
from ltrain.model.streams import Connection, Gathered
from tests.model.mixers.test_contract import jitter

HIDDEN, COUNT, EPS, VOCAB = 16, 3, 1e-3, 32
LENGTHS = [5, 1, 2, 9]
OPTIONS = StreamOptions(COUNT, iterations=4, eps=1e-5)


def test_weights_are_those_of_transformers() -> None:
    from transformers.models.deepseek_v4.configuration_deepseek_v4 import DeepseekV4Config
    from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4HyperConnection, DeepseekV4HyperHead

    config = DeepseekV4Config(hidden_size=HIDDEN, hc_mult=COUNT, hc_sinkhorn_iters=4, hc_eps=1e-5, rms_norm_eps=EPS)
    layers = LocalLayers(std=0.3, eps=EPS, dtype=torch.float32)
    connection, gathered = Connection(HIDDEN, OPTIONS, layers), Gathered(HIDDEN, OPTIONS, layers)
    theirs, head = DeepseekV4HyperConnection(config), DeepseekV4HyperHead(config)
    for module in (connection, gathered):
        seed_parameters(module, 0)
        jitter(module)
    theirs.load_state_dict({"fn": connection.weights.weight, "base": connection.weights.base, "scale": connection.weights.scale})
    head.load_state_dict({"hc_fn": gathered.weights.weight, "hc_base": gathered.weights.base, "hc_scale": gathered.weights.scale})
    x = torch.randn(1, 11, COUNT, HIDDEN, generator=torch.Generator().manual_seed(1))
    post, comb, collapsed = theirs(x)
    read, give, between = connection(x[0].flatten(-2))
    for a, b in ((read, collapsed), (give, post), (between, comb), (gathered(x[0].flatten(-2)), head(x))):
        torch.testing.assert_close(a, b[0], rtol=1e-5, atol=1e-5)


def model(**changes: Any) -> ModelConfig:
    attention = {"mixer": "attention", "heads": 4, "kv_heads": 2, "head_dim": 4}
    moe = {"experts": 4, "top_k": 2, "inner": 8, "shared_inner": 8, "aux_loss": 0.0}
    layers = {"pre": attention, "sandwich": {**attention, "block": {"form": "sandwich", "mixer_scale": 0.7}}, "feeds": {"mixer": "none", "ffn": moe}}
    model = ModelConfig(hidden=HIDDEN, depth=3, pattern=["pre", "sandwich", "feeds"], layers=layers, ffn=MoEOptions(experts=0, inner=24))
    model.norm_eps, model.streams, model.mtp = EPS, OPTIONS, MTPOptions(depth=1, layer="pre")
    for name, value in changes.items():
        setattr(model, name, value)
    return model


def build(recompute: str = "none", start: int = 0, stop: int | None = None) -> Stack:
    stack = Stack(model(), VOCAB, LocalLayers(std=0.3, eps=EPS, dtype=torch.float64), start, stop, recompute)
    seed_parameters(stack, 0)
    jitter(stack)
    return stack


def weights(module: Any, x: Tensor) -> list[Tensor]:
    """x [T, n, hidden] -> each token's raw weights."""
    flat = x.flatten(-2)
    raw = flat / (flat.square().mean(-1, keepdim=True) + EPS).sqrt() @ module.weight.T
    scale = torch.cat([s.expand(n) for s, n in zip(module.scale, module.parts, strict=True)])
    return list((raw * scale + module.base).split(module.parts, -1))


def plain(stack: Stack, x: Tensor, seq: Sequence) -> Tensor:
    """Blocks of a stack on streams [T, n, hidden], a sum over streams at a time."""
    o = OPTIONS
    for _, block in stack.blocks():
        for connection, before, part, after, scale in (
            (block.mixer_streams, block.mixer_norm, block.mixer, block.mixer_post_norm, block.spec.block.mixer_scale),
            (block.ffn_streams, block.ffn_norm, block.ffn, block.ffn_post_norm, 1.0),
        ):
            if connection is None:
                continue
            assert before is not None and part is not None
            read, give, raw = weights(connection.weights, x)
            between = raw.unflatten(-1, (COUNT, COUNT)).softmax(-1) + o.eps
            for i in range(o.iterations):
                between = between / (between.sum(-1, keepdim=True) + o.eps) if i else between
                between = between / (between.sum(-2, keepdim=True) + o.eps)
            y = part(before(sum((read[:, n, None].sigmoid() + o.eps) * x[:, n] for n in range(COUNT))), seq)
            y = scale * (y if after is None else after(y))
            x = torch.stack(
                [sum(between[:, m, n, None] * x[:, m] for m in range(COUNT)) + 2 * give[:, n, None].sigmoid() * y for n in range(COUNT)], 1
            )
    return x


def tokens() -> Tensor:
    return torch.randint(0, VOCAB, (sum(LENGTHS),), generator=torch.Generator().manual_seed(2))


def test_a_stack_and_its_gradients() -> None:
    stack, seq = build(), Sequence.of(LENGTHS)
    assert stack.embed is not None and stack.gathered is not None and stack.norm is not None
    x = stack.embed.weight[tokens()]
    streams = plain(stack, x.unsqueeze(1).expand(-1, COUNT, -1), seq)
    (last,) = weights(stack.gathered.weights, streams)
    expected = stack.norm(sum((last[:, n, None].sigmoid() + OPTIONS.eps) * streams[:, n] for n in range(COUNT)))
    found = stack(tokens(), seq)
    torch.testing.assert_close(found, expected)
    weight = torch.linspace(-1, 1, found.numel(), dtype=found.dtype).view_as(found)
    params = {name: p for name, p in stack.named_parameters() if not name.startswith("mtp.")}
    expected_gradients = torch.autograd.grad((expected * weight).sum(), list(params.values()))
    for name, a, b in zip(params, torch.autograd.grad((found * weight).sum(), list(params.values())), expected_gradients, strict=True):
        torch.testing.assert_close(a, b, msg=f"{name}: {{}}".format)
        assert a.abs().max() > 0, name


def test_stages_recomputation_and_decoding() -> None:
    results = []
    for recompute in ("none", "selective", "full"):
        stack, seq = build(recompute), Sequence.of(LENGTHS)
        labels = tokens().roll(-1)
        hidden = stack(tokens(), seq)
        loss = stack.loss(hidden, labels).objective + stack.further_loss(hidden, ahead(tokens(), labels, seq.cu_seqlens, 1), seq)[0]
        loss.backward()
        results.append({"loss": loss.detach(), **{name: p.grad for name, p in stack.named_parameters()}})
    torch.testing.assert_close(results[1], results[0], rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(results[2], results[0], rtol=1e-12, atol=1e-14)
    first, last = build(stop=1), build(start=1)
    cut = first(tokens(), Sequence.of(LENGTHS))
    assert cut.shape == (sum(LENGTHS), COUNT * HIDDEN)
    torch.testing.assert_close(last(cut, Sequence.of(LENGTHS)), hidden, rtol=0, atol=0)
    stack.eval()
    with torch.no_grad():
        expected = stack.logits(stack(tokens(), Sequence.of([17])))
        logits, state = stack.prefill(tokens()[:16], Sequence.of([16]))
        torch.testing.assert_close(logits, expected[15:16])
        logits, _ = stack.decode(tokens()[16:], state, Sequence.step(torch.tensor([16])))
    torch.testing.assert_close(logits, expected[16:])
    connections = 5 * 2 * 8 * (15 * COUNT * HIDDEN + (COUNT * COUNT + 2 * COUNT) * HIDDEN)
    assert stack.flops(8, 8)["streams"] == connections


@pytest.mark.parametrize(
    ("block", "message"),
    [
        ({"form": "parallel"}, "form=parallel does not go with several residual streams"),
        ({"form": "normed_residual"}, "form=normed_residual does not go with several residual streams"),
        ({"mixer_residual_scale": 0.5}, "mixer_residual_scale has no effect with several residual streams"),
    ],
)
def test_what_goes_with_one_stream_is_refused(block: dict[str, Any], message: str) -> None:
    made = model()
    validate(Config(model=made))
    made.layers["pre"] = {**made.layers["pre"], "block": block}
    with pytest.raises(ConfigError, match=message):
        validate(Config(model=made))


def test_options_without_effect_are_refused(tmp_path: Any) -> None:
    (tmp_path / "config.yaml").write_text("model: {}\n")
    with pytest.raises(ConfigError, match="model.streams.iterations=3 has no effect with count: 1"):
        load(tmp_path / "config.yaml", ["model.streams.iterations=3"])
