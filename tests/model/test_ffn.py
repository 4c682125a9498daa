"""Feed-forwards of every kind against the formulas of the papers, token by token in float64."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from ltrain.model.ffn import MoE, build_ffn
from ltrain.model.layers import LocalLayers, seed_parameters
from ltrain.model.options import MoEOptions
from ltrain.model.sequence import Sequence
from tests.model.mixers.test_contract import jitter

TOKENS, HIDDEN = 33, 16


def activation(o: MoEOptions, limit: float, h: Tensor) -> Tensor:
    """h: what the first projection gives, the gate before up."""
    functions: dict[str, Callable[[Tensor], Tensor]] = {
        "silu": lambda x: x / (1 + (-o.alpha * x).exp()),
        "gelu": lambda x: x * 0.5 * (1 + (x / 2**0.5).erf()),
        "gelu_tanh": lambda x: 0.5 * x * (1 + ((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)).tanh()),
        "relu": lambda x: x * (x > 0),
        "relu2": lambda x: x**2 * (x > 0),
    }
    function, bound = functions[o.activation], torch.tensor(limit or float("inf"), dtype=h.dtype)
    if not o.gated:
        return function(h)
    gate, up = h.chunk(2, -1)
    gate = gate * o.gate_scale
    gate = function(gate.minimum(bound)) if o.clamp == "before" else function(gate).minimum(bound)
    return gate * (up.minimum(bound).maximum(-bound) + o.up_offset)


KINDS: dict[str, dict[str, object]] = {
    "geglu": {"activation": "gelu_tanh"},
    "gelu": {"activation": "gelu", "gated": False, "bias": True},
    "relu": {"activation": "relu", "shared_inner": 0},
    "nemotron": {"activation": "relu2", "gated": False, "latent": 12, "bias": True},
    "gpt_oss": {"alpha": 1.702, "limit": 0.4, "up_offset": 1.0, "bias": True, "router_bias": True, "score": "softmax", "shared_inner": 0},
    "step": {"limit": 0.3, "clamp": "after", "shared_limit": 0.2},
    "falcon_h1": {"gate_scale": 0.7},
    "llama4": {"scale_input": True, "renormalise": False, "top_k": 1},
    "scaled_input": {"scale_input": True, "bias": True, "latent": 8},
    "shared_gate": {"shared_gate": True},
}


@pytest.mark.parametrize("name", KINDS)
def test_feed_forwards(name: str) -> None:
    o = MoEOptions(**{"experts": 5, "top_k": 2, "inner": 8, "shared_inner": 12, **KINDS[name]})  # type: ignore[arg-type]
    moe = MoE(HIDDEN, o, LocalLayers(std=0.4, dtype=torch.float64))
    seed_parameters(moe, 0)
    jitter(moe)
    x = torch.randn(TOKENS, HIDDEN, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    seq, p = Sequence.of([TOKENS]), dict(moe.named_parameters())

    def linear(x: Tensor, name: str, expert: int | None = None) -> Tensor:
        weight, bias = (p[f"{name}.weight"], p.get(f"{name}.bias")) if expert is None else (p[name][expert], p.get(f"{name}_bias"))
        assert (bias is not None) == o.bias
        y = x @ weight.T
        return y if bias is None else y + (bias if expert is None else bias[expert])

    def plain() -> Tensor:
        weights, indices = moe.router(x, seq)
        inside = linear(x, "latent_down") if o.latent else x
        rows = []
        for t in range(TOKENS):
            y = torch.zeros_like(inside[t])
            for w, e in zip(weights[t], indices[t].tolist(), strict=True):
                z = inside[t] * w if o.scale_input else inside[t]
                z = linear(activation(o, o.limit, linear(z, "experts.up", e)), "experts.down", e)
                y = y + (z if o.scale_input else w * z)
            rows.append(y)
        routed = torch.stack(rows)
        routed = linear(routed, "latent_up") if o.latent else routed
        if not o.shared_inner:
            return routed
        shared = linear(activation(o, o.shared_limit, linear(x, "shared.up")), "shared.down")
        return routed + (shared * (x @ p["shared_gate"].T).sigmoid() if o.shared_gate else shared)

    def run(f: Callable[[], Tensor]) -> dict[str, Tensor]:
        y = f()
        names, params = zip(*moe.named_parameters(), strict=True)
        gradients = torch.autograd.grad((y * torch.arange(HIDDEN)).square().sum(), [x, *params])
        return {"y": y.detach(), **dict(zip(("x", *names), gradients, strict=True))}

    found, expected = run(lambda: moe(x, seq)), run(plain)
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, msg=f"{key}: {{}}".format)
        assert value.abs().max() > 0, key
    if o.latent:
        assert p["experts.up"].shape[-1] == o.latent
    assert moe.flops(7) == 7 * 2 * sum(
        param[0].numel() * o.top_k if key in ("experts.up", "experts.down") else param.numel() for key, param in p.items() if "bias" not in key
    )

    dense = build_ffn(HIDDEN, replace(o, experts=0), LocalLayers(std=0.4, dtype=torch.float64))
    seed_parameters(dense, 0)
    jitter(dense)
    p = dict(dense.named_parameters())
    torch.testing.assert_close(dense(x, seq), linear(activation(o, o.limit, linear(x, "up")), "down"))
