"""Layers that share blocks of attention and a feed-forward, against transformers' own shared block of Zamba2.

In float64, but for the norms and the softmax of transformers, which are in float32 always.
"""

import sys
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import functional_call

from ltrain.config import Config, ConfigError, validate
from ltrain.model.layers import LocalLayers, seed_parameters
from ltrain.model.options import ModelConfig, MoEOptions, SharedOptions
from ltrain.model.sequence import Sequence
from ltrain.model.stack import Stack
from tests.model.mixers.test_contract import jitter

HIDDEN, RANK, EPS, VOCAB = 16, 4, 1e-3, 32
LENGTHS = [5, 1, 2, 9]


def model(shared: SharedOptions | None = None, **kinds: dict[str, Any]) -> ModelConfig:
    recurrence = {"mixer": "linear_recurrence", "key_heads": 2, "value_heads": 2, "key_dim": 8, "value_dim": 8, "ffn": "none"}
    layers: dict[str, dict[str, Any]] = {
        "plain": recurrence,
        "uses": {**recurrence, "block": {"shared": True}},
        "inside": {"mixer": "attention", "heads": 4, "kv_heads": 4, "head_dim": 8, "gate": "none", "qk_norm": "none", "rope": None, "scale": 0.5},
    }
    for name, kind in kinds.items():
        layers[name] = {**layers[name], **kind}
    return ModelConfig(
        hidden=HIDDEN,
        depth=5,
        pattern=["uses", "plain", "uses", "uses", "plain"],
        layers=layers,
        ffn=MoEOptions(experts=0, inner=24, activation="gelu"),
        shared=shared or SharedOptions(blocks=2, layer="inside", adapter_rank=RANK, adapt_mixer=True),
        norm_eps=EPS,
        tie_embeddings=False,
    )


def build(recompute: str = "none", made: ModelConfig | None = None) -> Stack:
    stack = Stack(made or model(), VOCAB, LocalLayers(std=0.3, eps=EPS, dtype=torch.float64), recompute=recompute)
    seed_parameters(stack, 0)
    jitter(stack)
    return stack.eval()


def theirs(stack: Stack, block: int, uses: list[tuple[int, str]]) -> Any:
    """transformers' block in the words of our weights: x, e [T, hidden] and a layer -> what it gives before the layer's projection.

    uses: number of each use among all of them, and the layer's name.
    """
    with pytest.MonkeyPatch.context() as patch:
        for name in ("fla", "mamba_ssm", "causal_conv1d", "kernels"):
            patch.setitem(sys.modules, name, None)
        from transformers.models.zamba2.configuration_zamba2 import Zamba2Config
        from transformers.models.zamba2.modeling_zamba2 import Zamba2AttentionDecoderLayer
    config = Zamba2Config(
        hidden_size=HIDDEN,
        intermediate_size=24,
        num_attention_heads=4,
        num_hidden_layers=5,
        layers_block_type=["hybrid", "mamba", "hybrid", "hybrid", "mamba"],
        num_mem_blocks=2,
        use_shared_attention_adapter=True,
        adapter_rank=RANK,
        rms_norm_eps=EPS,
        attn_implementation="eager",
    )
    module = Zamba2AttentionDecoderLayer(config, block_id=block).double()
    p = dict(stack.named_parameters())
    weights: dict[str, Tensor] = {"input_layernorm.weight": p[f"shared.{block}.mixer_norm.weight"]}
    q, k, v = p[f"shared.{block}.mixer.qkv.weight"].chunk(3)
    weights |= {"self_attn.q_proj.weight": q, "self_attn.k_proj.weight": k, "self_attn.v_proj.weight": v}
    weights |= {"self_attn.o_proj.weight": p[f"shared.{block}.mixer.out.weight"], "pre_ff_layernorm.weight": p[f"shared.{block}.ffn_norm.weight"]}
    weights |= {"feed_forward.gate_up_proj.weight": p[f"shared.{block}.ffn.up.weight"]}
    weights |= {"feed_forward.down_proj.weight": p[f"shared.{block}.ffn.down.weight"]}
    for number, layer in uses:
        own = f"layers.{layer}.shared."
        for i, (part, low) in enumerate(zip("qkv", p[f"{own}mixer_adapter.down.weight"].chunk(3), strict=True)):
            weights[f"self_attn.linear_{part}_adapter_list.{number}.0.weight"] = low
            weights[f"self_attn.linear_{part}_adapter_list.{number}.1.weight"] = p[f"{own}mixer_adapter.up.{i}.weight"]
        weights[f"feed_forward.gate_up_proj_adapter_list.{number}.0.weight"] = p[f"{own}ffn_adapter.down.weight"]
        weights[f"feed_forward.gate_up_proj_adapter_list.{number}.1.weight"] = p[f"{own}ffn_adapter.up.0.weight"]
    assert weights.keys() == module.state_dict().keys()

    def run(x: Tensor, e: Tensor, layer: int) -> Tensor:
        outputs = []
        for a, b in zip(x.split(LENGTHS), e.split(LENGTHS), strict=True):
            mask = torch.full((len(a), len(a)), -torch.inf, dtype=x.dtype).triu(1)[None, None]
            outputs.append(functional_call(module, weights, (a[None], b[None], layer), {"attention_mask": mask})[0])
        return torch.cat(outputs)

    return run


def test_a_stack_as_transformers_makes_it() -> None:
    stack, seq = build(), Sequence.of(LENGTHS)
    tokens = torch.randint(0, VOCAB, (sum(LENGTHS),), generator=torch.Generator().manual_seed(2))
    blocks = [theirs(stack, 0, [(0, "0"), (2, "3")]), theirs(stack, 1, [(1, "2")])]
    of_layer = {"0": blocks[0], "2": blocks[1], "3": blocks[0]}
    assert stack.embed is not None and stack.norm is not None
    e = x = stack.embed.weight[tokens]
    for name, block in stack.blocks():
        assert block.mixer is not None and block.mixer_norm is not None
        read = x
        if name in of_layer:
            assert block.shared is not None
            read = x + of_layer[name](x, e, int(name)) @ block.shared.projection.weight.T
        x = x + block.mixer(block.mixer_norm(read), seq)
    expected = stack.norm(x)
    found = stack(tokens, Sequence.of(LENGTHS))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    weight = torch.linspace(-1, 1, found.numel(), dtype=found.dtype).view_as(found)
    params = {name: p for name, p in stack.named_parameters() if name != "head.weight"}
    expected_gradients = torch.autograd.grad((expected * weight).sum(), list(params.values()))
    for name, a, b in zip(params, torch.autograd.grad((found * weight).sum(), list(params.values())), expected_gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-3 * float(a.abs().max()), msg=f"{name}: {{}}".format)
        assert a.abs().max() > 0, name


def test_recomputation_decoding_and_costs() -> None:
    tokens = torch.randint(0, VOCAB, (12,), generator=torch.Generator().manual_seed(2))
    gradients = []
    for recompute in ("none", "selective", "full"):
        stack = build(recompute)
        stack(tokens, Sequence.of([5, 7])).square().sum().backward()
        gradients.append({name: p.grad for name, p in stack.named_parameters() if p.grad is not None})
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(gradients[2], gradients[0], rtol=1e-12, atol=1e-14)
    with torch.no_grad():
        expected = stack.logits(stack(tokens, Sequence.of([12])))
        logits, state = stack.prefill(tokens[:10], Sequence.of([10]))
        torch.testing.assert_close(logits, expected[9:10])
        for t in (10, 11):
            logits, state = stack.decode(tokens[t : t + 1], state, Sequence.step(torch.tensor([t])))
            torch.testing.assert_close(logits, expected[t : t + 1])
    inside = 2 * HIDDEN * 96 + 32 * HIDDEN + 3 * HIDDEN * 24
    adapters = RANK * (3 * 2 * HIDDEN + 96 + HIDDEN + 48)
    assert stack.num_params().total == sum(p.numel() for p in stack.parameters())
    assert stack.flops(8, 8)["shared"] == 3 * (2 * 8 * (inside + adapters + HIDDEN**2) + 8 * 4 * 32 * 9 / 2)
    assert stack.state_bytes(8) - build(made=model(SharedOptions(), uses={"block": {}})).state_bytes(8) == 3 * 2 * 32 * 8 * 2


@pytest.mark.parametrize(
    ("shared", "kinds", "message"),
    [
        ({"blocks": 0, "layer": "", "adapter_rank": 4}, {"uses": {"block": {}}}, "adapter_rank=4 has no effect with blocks: 0"),
        ({"adapter_rank": 0, "adapt_mixer": True}, {}, "adapt_mixer=true has no effect with adapter_rank: 0"),
        ({"layer": ""}, {}, "needs model.shared.layer"),
        ({"blocks": 4}, {}, "model.shared.blocks=4 is more than the 3 layers"),
        ({"blocks": 0, "layer": ""}, {}, "block.shared=true has no effect with model.shared.blocks=0"),
        ({}, {"uses": {"block": {"shared": True, "form": "post"}}}, "write form: pre"),
        ({}, {"inside": {"ffn": {"experts": 4}}}, "needs attention and a dense feed-forward"),
        ({}, {"inside": {"block": {"form": "post"}}}, "model.layers.inside.block has no effect in a shared block"),
    ],
)
def test_what_does_not_fit_is_refused(shared: dict[str, Any], kinds: dict[str, Any], message: str) -> None:
    made = model(SharedOptions(**{"blocks": 2, "layer": "inside", **shared}), **kinds)
    if not made.shared.layer:
        del made.layers["inside"]
    with pytest.raises(ConfigError, match=message):
        validate(Config(model=made))


def test_stages_cannot_share() -> None:
    config = Config(model=model())
    validate(config)
    config.parallel.pipeline = 2
    with pytest.raises(ConfigError, match="parallel.pipeline=2 does not work with model.shared"):
        validate(config)
