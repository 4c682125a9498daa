import dataclasses
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ltrain.kernels.attention import Mask
from ltrain.model.layers import LocalLayers, seed_parameters
from ltrain.model.mixers.base import Mixer, build_mixer
from ltrain.model.mixers.kv_cache import KVCache
from ltrain.model.options import AttentionOptions, LinearRecurrenceOptions, RopeOptions
from ltrain.model.position import rotary_tables
from ltrain.model.sequence import Sequence

HIDDEN = 24


def mixer(name: str, options: Any) -> Mixer:
    module = build_mixer(name, HIDDEN, options, LocalLayers(std=0.3, dtype=torch.float64))
    seed_parameters(module, 0)
    with torch.no_grad():  # ones would hide a norm without its weight
        for key, param in module.named_parameters():
            if "norm" in key:
                param.uniform_(0.5, 1.5, generator=torch.Generator().manual_seed(len(key)))
    return module


def inputs(count: int) -> torch.Tensor:
    return torch.randn(count, HIDDEN, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()


def gradients(y: torch.Tensor, x: torch.Tensor, module: nn.Module) -> dict[str, torch.Tensor]:
    module.zero_grad()
    x.grad = None
    weight = torch.randn(y.shape, dtype=y.dtype, generator=torch.Generator().manual_seed(2))
    (y * weight).sum().backward()
    leaves = {"x": x, **dict(module.named_parameters())}
    assert all(leaf.grad is not None for leaf in leaves.values())
    return {name: leaf.grad.clone() for name, leaf in leaves.items() if leaf.grad is not None}


@pytest.fixture
def qwen3_next() -> Iterator[Any]:
    """transformers' model file, kept to its plain torch path."""
    saved = {name: sys.modules.get(name) for name in ("fla", "causal_conv1d")}
    for name in saved:
        sys.modules[name] = None  # type: ignore[assignment]
    from transformers.models.qwen3_next import modeling_qwen3_next

    yield modeling_qwen3_next
    for name, module in saved.items():
        if module is None:
            del sys.modules[name]
        else:
            sys.modules[name] = module


@pytest.mark.parametrize(("key_heads", "value_heads"), [(2, 2), (2, 4)])
def test_gated_delta_net_is_that_of_qwen3_next(qwen3_next: Any, key_heads: int, value_heads: int) -> None:
    """Documents packed here, one at a time there: outputs and the gradients of every weight."""
    from transformers import Qwen3NextConfig

    options = LinearRecurrenceOptions(key_heads=key_heads, value_heads=value_heads, key_dim=8, value_dim=12, conv_width=4)
    ours = mixer("gated_delta_net", options)
    config = Qwen3NextConfig(
        hidden_size=HIDDEN, linear_num_key_heads=key_heads, linear_num_value_heads=value_heads, linear_key_head_dim=8, linear_value_head_dim=12,
        linear_conv_kernel_dim=4, rms_norm_eps=1e-6, num_hidden_layers=1, layer_types=["linear_attention"],
    )  # fmt: skip
    theirs = qwen3_next.Qwen3NextGatedDeltaNet(config, 0).double()
    widths = (key_heads * 8, key_heads * 8, value_heads * 12, value_heads * 12, value_heads, value_heads)

    def fused(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Their two projections hold q, k, v, z (b, a) of one key head after the other."""
        q, k, v, z, b, a = (part.unflatten(0, (key_heads, -1)) for part in weight.split(widths))
        return torch.cat((q, k, v, z), 1).flatten(0, 1), torch.cat((b, a), 1).flatten(0, 1)

    names = dict(ours.named_parameters())
    with torch.no_grad():
        qkvz, ba = fused(names["input.weight"])
        theirs.in_proj_qkvz.weight.copy_(qkvz)
        theirs.in_proj_ba.weight.copy_(ba)
        theirs.conv1d.weight.copy_(names["conv"].unsqueeze(1))
        theirs.dt_bias.copy_(names["dt_bias"])
        theirs.A_log.copy_(names["A_log"])
        theirs.norm.weight.copy_(names["norm.weight"])
        theirs.out_proj.weight.copy_(names["out.weight"])

    lengths, x = [70, 1, 3, 26], inputs(100)
    y = ours(x, Sequence.of(lengths))
    mine = gradients(y, x, ours)
    expected = torch.cat([theirs(part.unsqueeze(0)).squeeze(0) for part in x.split(lengths)])
    other = gradients(expected, x, theirs)
    # Their rule and norm compute in float32 whatever the type.
    close: dict[str, Any] = {"rtol": 2e-4, "atol": 2e-5}
    torch.testing.assert_close(y, expected, **close)
    qkvz, ba = fused(mine["input.weight"])
    for a, b in (
        (mine["x"], other["x"]),
        (qkvz, other["in_proj_qkvz.weight"]),
        (ba, other["in_proj_ba.weight"]),
        (mine["conv"], other["conv1d.weight"].squeeze(1)),
        (mine["dt_bias"], other["dt_bias"]),
        (mine["A_log"], other["A_log"]),
        (mine["norm.weight"], other["norm.weight"]),
        (mine["out.weight"], other["out_proj.weight"]),
    ):
        assert b.abs().max() > 1e-3
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5 * float(b.abs().max()) + 1e-6)


@pytest.mark.parametrize("decay", ["none", "head"])
@pytest.mark.parametrize("update", ["add", "delta"])
def test_every_recurrence_token_by_token(decay: str, update: str) -> None:
    options = LinearRecurrenceOptions(decay=decay, update=update, key_heads=1, value_heads=2, key_dim=4, value_dim=6, conv_width=3)
    module = mixer("linear_recurrence", options)
    names, x = dict(module.named_parameters()), inputs(12)
    assert ("A_log" in names) == (decay == "head")
    y = module(x, Sequence.of([5, 7]))

    def plain(x: torch.Tensor) -> torch.Tensor:
        q, k, v, z, *rest = (x @ names["input.weight"].T).split((4, 4, 12, 12, *(2,) * ((update == "delta") + (decay == "head"))), -1)
        mixed = torch.cat((q, k, v), -1)
        mixed = F.silu(F.conv1d(mixed.T.unsqueeze(0), names["conv"].unsqueeze(1), padding=2, groups=20)[0, :, : len(x)].T)
        q, k, v = mixed.split((4, 4, 12), -1)
        q, k = (t / (t.square().sum(-1, keepdim=True) + 1e-6).sqrt() for t in (q, k))
        rows = []
        for h in range(2):
            state = torch.zeros(4, 6, dtype=torch.float64)
            for t in range(len(x)):
                if decay == "head":
                    state = state * torch.exp(-names["A_log"][h].exp() * F.softplus(rest[-1][t, h] + names["dt_bias"][h]))
                value = v[t, h * 6 : h * 6 + 6]
                if update == "delta":
                    value = rest[0][t, h].sigmoid() * (value - state.T @ k[t])
                state = state + torch.outer(k[t], value)
                out = state.T @ q[t] / 2
                out = out / (out.square().mean() + 1e-6).sqrt() * names["norm.weight"]
                rows.append(out * F.silu(z[t, h * 6 : h * 6 + 6]))
        return torch.stack(rows).unflatten(0, (2, -1)).transpose(0, 1).flatten(1) @ names["out.weight"].T

    expected = torch.cat([plain(x[:5]), plain(x[5:])])
    torch.testing.assert_close(y, expected, rtol=1e-9, atol=1e-10)
    mine, other = gradients(y, x, module), gradients(expected, x, module)
    for name, grad in other.items():
        torch.testing.assert_close(mine[name], grad, rtol=1e-7, atol=1e-9, msg=f"{name}: {{}}".format)


@pytest.mark.parametrize(
    "rope", [None, RopeOptions(fraction=0.5), RopeOptions(scaling="yarn", factor=8.0, original_length=64), RopeOptions(pairs=True)]
)
@pytest.mark.parametrize("extras", [True, False])
def test_attention_is_its_formula(rope: RopeOptions | None, extras: bool) -> None:
    module = mixer(
        "attention",
        AttentionOptions(heads=4, kv_heads=2, head_dim=8, qk_norm="head" if extras else "none", gate="elementwise" if extras else "none", rope=rope),
    )
    names, x = dict(module.named_parameters()), inputs(12)
    y = module(x, Sequence.of([5, 7]))

    def turn(t: torch.Tensor) -> torch.Tensor:
        if rope is None:
            return t
        width = int(8 * rope.fraction)
        cos, sin = rotary_tables(torch.arange(len(t)), width, rope, torch.float64)
        if rope.pairs:
            turned = torch.view_as_complex(t.contiguous().unflatten(-1, (-1, 2))) * torch.complex(cos, sin)
            return torch.view_as_real(turned).flatten(-2)
        pairs = torch.complex(t[..., : width // 2], t[..., width // 2 : width]) * torch.complex(cos, sin)
        return torch.cat((pairs.real, pairs.imag, t[..., width:]), -1)

    def plain(x: torch.Tensor) -> torch.Tensor:
        q, k, v, *gate = (x @ names["qkv.weight"].T).split((32, 16, 16, *(32,) * extras), -1)
        q, k, v = (t.unflatten(-1, (-1, 8)) for t in (q, k, v))
        if extras:
            q, k = (t / (t.square().mean(-1, keepdim=True) + 1e-6).sqrt() * names[f"{n}_norm.weight"] for t, n in ((q, "q"), (k, "k")))
        q, k = turn(q), turn(k)
        rows = []
        for h in range(4):
            scores = (q[:, h] @ k[:, h // 2].T / 8**0.5).masked_fill(torch.ones(len(x), len(x)).triu(1).bool(), float("-inf"))
            rows.append(scores.softmax(-1) @ v[:, h // 2])
        out = torch.cat(rows, -1)
        return (out * gate[0].sigmoid() if extras else out) @ names["out.weight"].T

    expected = torch.cat([plain(x[:5]), plain(x[5:])])
    torch.testing.assert_close(y, expected, rtol=1e-9, atol=1e-10)
    mine, other = gradients(y, x, module), gradients(expected, x, module)
    for name, grad in other.items():
        torch.testing.assert_close(mine[name], grad, rtol=1e-7, atol=1e-9, msg=f"{name}: {{}}".format)


def appended(cache: KVCache, step: int, lengths: list[int]) -> None:
    seq = Sequence.step(torch.tensor(lengths) + step)
    cache.append(torch.full((len(lengths), 1, 1), 100.0 + step), torch.full((len(lengths), 1, 1), 200.0 + step), seq)


def test_cache_holds_each_document_and_grows_by_doubling() -> None:
    k, lengths = torch.arange(20.0).reshape(20, 1, 1), [1, 17, 2]
    cache = KVCache.of(k, -k, Sequence.of(lengths))
    assert cache.k.shape[1] == 17
    assert cache.k[0, :1].flatten().tolist() == [0] and cache.v[1, :17].flatten().tolist() == [-i for i in range(1, 18)]
    for step in range(20):
        appended(cache, step, lengths)
    assert cache.lengths.tolist() == [21, 37, 22] and cache.k.shape[1] == 68
    assert cache.k[2, :22].flatten().tolist() == [18, 19, *range(100, 120)]
    assert cache.v[0, 1:21].flatten().tolist() == list(range(200, 220))
    behind = cache.behind(torch.tensor([20, 36, 21]))
    assert behind[2, :22].tolist() == list(range(21, -1, -1)) and behind[2, 22:].eq(-1).all()


def test_cache_with_room_does_not_grow() -> None:
    k, lengths = torch.arange(20.0).reshape(20, 1, 1), [1, 17, 2]
    seq = Sequence.of(lengths)
    seq.room = 3
    cache = KVCache.of(k, -k, seq)
    place = cache.k.data_ptr()
    for step in range(3):
        appended(cache, step, lengths)
    assert cache.k.data_ptr() == place and cache.k.shape[1] == 20
    assert cache.k[1, :20].flatten().tolist() == [*range(1, 18), 100, 101, 102]


@pytest.mark.parametrize(("mask", "kept"), [(Mask(window=4), 4), (Mask(window=4, anchors=2), 6), (Mask(chunk=5), 5)])
def test_cache_keeps_what_a_mask_leaves(mask: Mask, kept: int) -> None:
    k, lengths = torch.arange(20.0).reshape(20, 1, 1), [1, 17, 2]
    cache = KVCache.of(k, -k, Sequence.of(lengths), mask)
    for step in range(20):
        appended(cache, step, lengths)
        assert cache.k.shape[1] <= kept
        for document, length in enumerate(lengths):
            now = length + step
            wanted = [p for p in range(now + 1) if (mask.chunk and p // 5 == now // 5) or (mask.window and (now - p < 4 or p < mask.anchors))]
            behind = cache.behind(torch.tensor(lengths) + step)[document]
            assert sorted(now - d for d in behind.tolist() if d >= 0) == wanted
            for slot, d in enumerate(behind.tolist()):
                if 0 <= d <= step:  # a decoded one
                    assert cache.k[document, slot] == 100 + step - d


def test_log_decays_start_as_in_mamba_2() -> None:
    module = mixer("gated_delta_net", LinearRecurrenceOptions(key_heads=64, value_heads=512, key_dim=2, value_dim=2))
    names = {name: param.detach() for name, param in module.named_parameters()}
    rate, step = names["A_log"].exp(), F.softplus(names["dt_bias"])
    assert 1 <= rate.min() < 1.2 and 15.8 < rate.max() <= 16.001 and abs(float(rate.mean()) - 8.5) < 0.6
    assert 0.999e-3 <= step.min() < 1.1e-3 and 0.09 < step.max() <= 0.1001
    assert abs(float(step.log().mean()) - float(torch.tensor([1e-3, 0.1]).log().mean())) < 0.2


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("attention", AttentionOptions(heads=6, kv_heads=4), "heads=6 is not a multiple of kv_heads=4"),
        ("gated_delta_net", LinearRecurrenceOptions(key_heads=3, value_heads=4), "value_heads=4 is not a multiple of key_heads=3"),
    ],
)
def test_heads_that_do_not_group_are_refused(name: str, options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        mixer(name, options)


def test_keys_and_values_of_another_layer() -> None:
    """kv: shared is plain softmax over what the last source that sees the same tokens made, whatever other sources came between."""
    options = AttentionOptions(heads=4, kv_heads=2, head_dim=8, gate="none")
    source, other = (mixer("attention", dataclasses.replace(options, kv="source", window=window)) for window in (0, 3))
    shared = mixer("attention", dataclasses.replace(options, kv="shared"))
    lengths = [5, 1, 9]
    seq, x = Sequence.of(lengths), inputs(sum(lengths))
    source(x, seq)
    k, v = (t.repeat_interleave(2, dim=1) for t in seq.shared[source._source])  # type: ignore[union-attr]
    other(x.flip(0), seq)
    y = x.roll(1, 0)
    q, _ = shared._queries(y, seq)  # type: ignore[operator]
    rows, start = [], 0
    for n in lengths:
        at = slice(start, start + n)
        scores = torch.einsum("qhd,khd->hqk", q[at], k[at]) * 8**-0.5
        scores = scores.masked_fill(torch.ones(n, n, dtype=torch.bool).triu(1), -torch.inf)
        rows.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), v[at]).flatten(1))
        start += n
    torch.testing.assert_close(shared(y, seq), torch.cat(rows) @ shared.out.weight.T, rtol=1e-9, atol=1e-9)  # type: ignore[union-attr, operator]
    assert shared.num_params() == source.num_params() - 2 * HIDDEN * 2 * 8 - 8  # no keys, values and norm of keys
