"""Published recurrences that transformers has not, or not alone, token by token in float64 from their papers' equations."""

import dataclasses
import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ltrain.model.layers import LocalLayers, seed_parameters
from ltrain.model.mixers.base import Mixer
from ltrain.model.mixers.mlstm import MLSTM
from ltrain.model.mixers.rwkv7 import RWKV7
from ltrain.model.sequence import Sequence
from tests.model.mixers.cases import HIDDEN, spec_of
from tests.model.mixers.test_contract import built, inputs, jitter

K, V = 8, 6
LENGTHS = [1, 2, 66, 13]
Weights = dict[str, Tensor]


def parts(x: Tensor, w: Weights, widths: list[int]) -> list[Tensor]:
    return list((x @ w["input.weight"].T).split(widths, -1))


def heads(x: Tensor, width: int) -> Tensor:
    """[T, H * width] -> [H, T, width]"""
    return x.unflatten(-1, (-1, width)).transpose(0, 1)


def rms(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight


def silu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(x)


def linear_attention(x: Tensor, w: Weights) -> Tensor:
    """Katharopoulos et al. 2020, equations 8 and 9: phi(q_t)^T sum_i phi(k_i) v_i^T / phi(q_t)^T sum_i phi(k_i)."""
    q, k, v = (heads(part, width) for part, width in zip(parts(x, w, [2 * K, 2 * K, 4 * V]), (K, K, V), strict=True))
    q, k = F.elu(q) + 1, F.elu(k) + 1
    rows = []
    for h in range(4):
        weights = (q[h // 2] @ k[h // 2].T).tril()
        rows.append(weights @ v[h] / weights.sum(-1, keepdim=True))
    return torch.cat(rows, -1) @ w["out.weight"].T


def lightning(x: Tensor, w: Weights) -> Tensor:
    """TransNormerLLM (Qin et al. 2024) as in MiniMax-01: o_t = q_t sum_s exp(-rate (t - s)) k_s^T v_s; SiLU before, norm and gate behind."""
    q, k, v, z = parts(x, w, [2 * K, 2 * K, 2 * V, 2 * V])
    q, k, v = (heads(silu(part), width) for part, width in ((q, K), (k, K), (v, V)))
    behind = (torch.arange(len(x))[:, None] - torch.arange(len(x))).double()
    # the only layer of one: its factor is 1 - 0 + 1e-5
    rows = [((q[h] @ k[h].T) * torch.exp(-(2.0 ** (-4 * (h + 1))) * (1 + 1e-5) * behind)).tril() @ v[h] for h in range(2)]
    return (rms(torch.cat(rows, -1), w["norm.weight"]) * torch.sigmoid(z)) @ w["out.weight"].T


def ling(x: Tensor, w: Weights) -> Tensor:
    """Ling 2.5 (BailingMoeV2_5LinearAttention of inclusionAI/Ling-V2.5): RMSNorm of q and k, half of each turned, no SiLU; norm of two groups."""
    q, k, v, z = parts(x, w, [4 * K, 4 * K, 4 * V, 4 * V])
    q, k = rms(heads(q, K), w["q_norm.weight"]), rms(heads(k, K), w["k_norm.weight"])
    angles = torch.arange(len(x)).double()[:, None] * 10000.0 ** (-2 * torch.arange(K // 4).double() / (K // 2))
    turn = torch.polar(torch.ones_like(angles), angles)

    def turned(t: Tensor) -> Tensor:
        pairs = torch.complex(t[..., : K // 4], t[..., K // 4 : K // 2]) * turn
        return torch.cat((pairs.real, pairs.imag, t[..., K // 2 :]), -1)

    q, k = turned(q) * K**-0.5, turned(k)
    behind = (torch.arange(len(x))[:, None] - torch.arange(len(x))).double()
    decays = [torch.exp(-(2.0 ** (-2 * (h + 1))) * (1 + 1e-5) * behind) for h in range(4)]
    y = torch.cat([((q[h] @ k[h].T) * decays[h]).tril() @ heads(v, V)[h] for h in range(4)], -1)
    normed = torch.cat([rms(half, weight) for half, weight in zip(y.chunk(2, -1), w["norm.weight"].chunk(2), strict=True)], -1)
    return (normed * torch.sigmoid(z)) @ w["out.weight"].T


def retention(x: Tensor, w: Weights) -> Tensor:
    """RetNet (Sun et al. 2023), equation 5, with the rotation of q and k: (Q K^T * D) V, D_nm = gamma^(n - m); norm of each head, swish gate."""
    q, k, v, z = parts(x, w, [2 * K, 2 * K, 4 * V, 4 * V])
    angles = torch.arange(len(x)).double()[:, None] * 10000.0 ** (-2 * torch.arange(K // 2).double() / K)
    turn = torch.polar(torch.ones_like(angles), angles)

    def turned(t: Tensor) -> Tensor:
        t = heads(t, K)
        return torch.complex(t[..., : K // 2], t[..., K // 2 :]) * turn

    q, k = turned(q), turned(k)
    behind = (torch.arange(len(x))[:, None] - torch.arange(len(x))).double()
    rows = []
    for h in range(4):
        scores = (q[h // 2] @ k[h // 2].conj().T).real * K**-0.5
        rows.append(rms((scores * (1 - 2.0 ** (-5 - h)) ** behind).tril() @ heads(v, V)[h], w["norm.weight"]))
    return (torch.cat(rows, -1) * silu(z)) @ w["out.weight"].T


def gla(x: Tensor, w: Weights) -> Tensor:
    """Yang et al. 2024, equations 3 and 4.4: S_t = Diag(alpha_t) S_{t-1} + k_t^T v_t, alpha_t = sigmoid(low rank)^(1/16)."""
    q, k, v, z = parts(x, w, [2 * K, 2 * K, 4 * V, 4 * V])
    alpha = torch.sigmoid(x @ w["decay_down.weight"].T @ w["decay_up.weight"].T + w["dt_bias"]) ** (1 / 16)
    rows = []
    for h in range(4):
        state, outputs = torch.zeros(K, V, dtype=torch.float64), []
        for t in range(len(x)):
            state = alpha[t, h * K : h * K + K, None] * state + torch.outer(heads(k, K)[h // 2, t], heads(v, V)[h, t])
            outputs.append(state.T @ heads(q, K)[h // 2, t] * K**-0.5)
        rows.append(rms(torch.stack(outputs), w["norm.weight"]))
    return (torch.cat(rows, -1) * silu(z)) @ w["out.weight"].T


def kda(x: Tensor, w: Weights) -> Tensor:
    """Kimi Linear (Kimi team 2025), equation 1: S_t = (I - beta k k^T) Diag(alpha_t) S_{t-1} + beta k v^T; L2 norms, convolution, sigmoid gate."""
    q, k, v, beta = parts(x, w, [2 * K, 2 * K, 2 * V, 2])
    mixed = torch.cat((q, k, v), -1)
    mixed = silu(F.conv1d(mixed.T.unsqueeze(0), w["conv"].unsqueeze(1), padding=3, groups=mixed.shape[1])[0, :, : len(x)].T)
    q, k, v = (heads(part, width) for part, width in zip(mixed.split([2 * K, 2 * K, 2 * V], -1), (K, K, V), strict=True))
    q, k = (t / (t.square().sum(-1, keepdim=True) + 1e-6).sqrt() for t in (q, k))
    fast = F.softplus(x @ w["decay_down.weight"].T @ w["decay_up.weight"].T + w["dt_bias"])
    gate = torch.sigmoid(x @ w["gate_down.weight"].T @ w["gate_up.weight"].T)
    rows = []
    for h in range(2):
        state, outputs = torch.zeros(K, V, dtype=torch.float64), []
        for t in range(len(x)):
            key, strength = k[h, t], torch.sigmoid(beta[t, h])
            state = torch.exp(-w["A_log"][h].exp() * fast[t, h * K : h * K + K])[:, None] * state
            state = state - strength * torch.outer(key, key @ state) + strength * torch.outer(key, v[h, t])
            outputs.append(state.T @ q[h, t] * K**-0.5)
        rows.append(rms(torch.stack(outputs), w["norm.weight"]))
    return (torch.cat(rows, -1) * gate) @ w["out.weight"].T


def rwkv7(x: Tensor, w: Weights, first: Tensor | None = None) -> Tensor:
    """RWKV-7 (Peng et al. 2025, arXiv 2503.14456), section 4; first: the first layer's values, which later ones mix in."""
    shifted = torch.cat((torch.zeros_like(x[:1]), x[:-1]))
    xr, xw, xk, xv, xa, xg = (x + (shifted - x) * mu for mu in w["mu"])

    def low_rank(name: str, of: Tensor) -> Tensor:
        return of @ w[f"{name}_down.weight"].T

    r, k, v = xr @ w["receptance.weight"].T, xk @ w["key.weight"].T, xv @ w["value.weight"].T
    if first is not None:
        v = torch.lerp(v, first, torch.sigmoid(w["value_bias"] + low_rank("value", xv) @ w["value_up.weight"].T))
    decay = torch.exp(-(math.e**-0.5) * torch.sigmoid(w["decay_bias"] + torch.tanh(low_rank("decay", xw)) @ w["decay_up.weight"].T))
    a = torch.sigmoid(w["rate_bias"] + low_rank("rate", xa) @ w["rate_up.weight"].T)
    gate = torch.sigmoid(low_rank("gate", xg)) @ w["gate_up.weight"].T
    rows = []
    for h in range(4):
        at = slice(h * 8, h * 8 + 8)
        state, outputs = torch.zeros(8, 8, dtype=torch.float64), []  # values x keys, as in the paper
        for t in range(len(x)):
            kappa = (k[t] * w["removal"])[at]
            kappa = kappa / kappa.norm()
            key = k[t, at] * (1 + (a[t, at] - 1) * w["replacement"][at])
            state = state @ (torch.diag(decay[t, at]) - torch.outer(kappa, a[t, at] * kappa)) + torch.outer(v[t, at], key)
            y = state @ r[t, at]
            y = (y - y.mean()) / (y.var(unbiased=False) + 64e-5).sqrt() * w["norm_weight"][at] + w["norm_bias"][at]
            outputs.append(y + (r[t, at] * key * w["bonus"][at]).sum() * v[t, at])
        rows.append(torch.stack(outputs))
    return (torch.cat(rows, -1) * gate) @ w["out.weight"].T


PAPERS: dict[str, Callable[[Tensor, Weights], Tensor]] = {
    "linear_attention": linear_attention,
    "lightning": lightning,
    "linear_recurrence-ling": ling,
    "retention": retention,
    "gla": gla,
    "kda": kda,
    "rwkv7": rwkv7,
}


def gradients(y: Tensor, x: Tensor, module: Mixer) -> list[Tensor]:
    weight = torch.randn(y.shape, dtype=y.dtype, generator=torch.Generator().manual_seed(2))
    return list(torch.autograd.grad((y * weight).sum(), [x, *module.parameters()]))


@pytest.mark.parametrize("name", PAPERS)
def test_the_equations_of_the_paper(name: str) -> None:
    module, x = built(name), inputs(sum(LENGTHS)).requires_grad_()
    assert name.startswith(spec_of(name).mixer) and x.shape[1] == HIDDEN
    weights = dict(module.named_parameters())
    expected = torch.cat([PAPERS[name](part, weights) for part in x.split(LENGTHS)])
    y = module(x, Sequence.of(LENGTHS))
    torch.testing.assert_close(y, expected, rtol=1e-5 if name == "linear_attention" else 1e-9, atol=1e-6 if name == "linear_attention" else 1e-9)
    for key, mine, other in zip(["x", *weights], gradients(y, x, module), gradients(expected, x, module), strict=True):
        error = float((mine - other).norm() / other.norm())
        assert error < (1e-5 if name == "linear_attention" else 1e-8), f"{key} is off by {error:.1e}"  # its quotient has 1e-6 below


def test_values_of_the_first_layer_are_mixed_in() -> None:
    """RWKV-7's value residual: outputs and gradients by the paper, packed documents, decoding."""
    options = spec_of("rwkv7").options
    made = []
    for mix in ("source", "mix"):
        made.append(RWKV7(HIDDEN, dataclasses.replace(options, value_mix=mix, value_rank=3), LocalLayers(std=0.3, dtype=torch.float64)))
        seed_parameters(made[-1], len(made))
        jitter(made[-1])
    (one, two), x = made, inputs(sum(LENGTHS)).requires_grad_()
    a, b = dict(one.named_parameters()), dict(two.named_parameters())

    def by_the_paper(part: Tensor) -> Tensor:
        shifted = torch.cat((torch.zeros_like(part[:1]), part[:-1]))
        first = (part + (shifted - part) * a["mu"][3]) @ a["value.weight"].T
        return rwkv7(rwkv7(part, a), b, first)

    seq = Sequence.of(LENGTHS)
    y, expected = two(one(x, seq), seq), torch.cat([by_the_paper(part) for part in x.split(LENGTHS)])
    torch.testing.assert_close(y, expected, rtol=1e-9, atol=1e-9)
    weight, wanted = inputs(sum(LENGTHS)).flip(0), [x, *a.values(), *b.values()]
    for mine, other in zip(*(torch.autograd.grad((z * weight).sum(), wanted) for z in (y, expected)), strict=True):
        assert (mine - other).norm() < 1e-8 * other.norm()
    with torch.no_grad():
        whole, n = x.detach()[: LENGTHS[-1]], LENGTHS[-1] - 3
        seq = Sequence.of([n])
        y, first_state = one.prefill(whole[:n], seq)
        y, second_state = two.prefill(y, seq)
        rows = [*y]
        for t in range(n, len(whole)):
            seq = Sequence.step(torch.tensor([t]))
            y, first_state = one.decode(whole[t : t + 1], first_state, seq)
            y, second_state = two.decode(y, second_state, seq)
            rows += [*y]
        torch.testing.assert_close(torch.stack(rows), by_the_paper(whole), rtol=1e-9, atol=1e-9)


def test_mlstm_holds_its_largest_gates_in_float32() -> None:
    """At the highest soft cap that its options take, with every gate open: nothing is infinite, and float32 is near float64."""
    options = dataclasses.replace(spec_of("mlstm").options, gate_softcap=60.0)
    found = []
    for dtype in (torch.float32, torch.float64):
        module = MLSTM(HIDDEN, options, LocalLayers(std=0.3, dtype=dtype))
        seed_parameters(module, 0)
        with torch.no_grad():
            module.gates.bias.fill_(1e3)  # type: ignore[union-attr, operator]
        x = inputs(700, dtype).requires_grad_()
        y = module(x, Sequence.of([700]))
        found.append([y, *torch.autograd.grad((y * inputs(700, dtype).flip(0)).sum(), [x, *module.parameters()])])
    for key, half, wide in zip(["y", "x", *dict(module.named_parameters())], *found, strict=True):
        assert half.isfinite().all(), key
        if not key.startswith("gates"):  # tanh is flat here
            assert (half.double() - wide).norm() < 1e-3 * wide.norm(), key
