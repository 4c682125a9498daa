from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from ltrain.kernels import short_conv
from ltrain.model.head import Head
from ltrain.model.layers import LocalLayers
from ltrain.model.options import ModelConfig, MoEOptions
from ltrain.model.sequence import LocalExchange, Sequence
from ltrain.model.stack import Stack

Build = Callable[..., Stack]
LENGTHS = [9, 1, 70, 2, 1, 17]


def stream(lengths: list[int] = LENGTHS) -> tuple[torch.Tensor, torch.Tensor, list[slice]]:
    """Tokens and labels [T], and each document's slice."""
    generator = torch.Generator().manual_seed(7)
    tokens = torch.randint(0, 64, (sum(lengths),), generator=generator)
    labels = tokens.roll(-1)
    bounds = [0, *torch.tensor(lengths).cumsum(0).tolist()]
    labels[[b - 1 for b in bounds[1:]]] = -100
    return tokens, labels, [slice(a, b) for a, b in pairwise(bounds)]


def train(model: Stack, tokens: torch.Tensor, labels: torch.Tensor, seq: Sequence) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad()
    hidden = model(tokens, seq)
    model.loss(hidden, labels).objective.backward()
    return hidden.detach(), {name: p.grad for name, p in model.named_parameters()}  # type: ignore[misc]


def test_packed_documents_are_what_each_is_alone(build: Build) -> None:
    model = build(ffn=MoEOptions(experts=4, top_k=2, inner=16, shared_inner=16, aux_loss=0.0))
    tokens, labels, documents = stream()
    packed, packed_grads = train(model, tokens, labels, Sequence.of(LENGTHS))
    alone: list[torch.Tensor] = []
    sums: dict[str, torch.Tensor] = {}
    for document in documents:
        hidden, grads = train(model, tokens[document], labels[document], Sequence.of([document.stop - document.start]))
        alone.append(hidden)
        sums = {name: sums[name] + grad if name in sums else grad.clone() for name, grad in grads.items()}
    torch.testing.assert_close(packed, torch.cat(alone), rtol=1e-10, atol=1e-10)
    for name, grad in packed_grads.items():
        assert grad.abs().max() > 0, name
        torch.testing.assert_close(grad, sums[name], rtol=1e-8, atol=1e-10 * float(grad.abs().max()), msg=f"{name}: {{}}".format)


def test_changing_one_document_changes_nothing_elsewhere(build: Build) -> None:
    model = build()
    tokens, _, documents = stream()
    before = model(tokens, Sequence.of(LENGTHS)).detach()
    changed = tokens.clone()
    changed[documents[2]] = (changed[documents[2]] + 1) % 64
    after = model(changed, Sequence.of(LENGTHS)).detach()
    for i, document in enumerate(documents):  # not bit for bit: experts get other numbers of tokens, and products other shapes
        assert torch.allclose(before[document], after[document], rtol=1e-12, atol=1e-12) == (i != 2)


def test_a_cut_document_continues_its_positions(build: Build) -> None:
    """The rest of a document is a document of its own whose positions go on: RoPE scores inside it are as before."""
    model = build()
    tokens, _, _ = stream([20])
    seq = Sequence.of([20])
    shifted = Sequence(seq.cu_seqlens, seq.positions + 1000)
    torch.testing.assert_close(model(tokens, seq), model(tokens, shifted), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("tie", [True, False])
def test_stages_in_a_row_are_the_whole(build: Build, tie: bool) -> None:
    tokens, labels, _ = stream()
    whole = build(tie_embeddings=tie)
    seq = Sequence.of(LENGTHS)
    hidden, grads = train(whole, tokens, labels, seq)
    stages = [build(start=0, stop=2, tie_embeddings=tie), build(start=2, stop=3, tie_embeddings=tie), build(start=3, tie_embeddings=tie)]
    x, cut = tokens, Sequence.of(LENGTHS)
    for stage in stages:
        x = stage(x, cut)
    assert torch.equal(x.detach(), hidden)
    torch.testing.assert_close(cut.metrics["aux_loss"], seq.metrics["aux_loss"])
    stages[-1].loss(x, labels).objective.backward()
    total: dict[str, torch.Tensor] = {}
    for stage in stages:
        for name, p in stage.named_parameters():
            assert p.grad is not None
            total[name] = total[name] + p.grad if name in total else p.grad
    for name, grad in grads.items():
        torch.testing.assert_close(total[name], grad, msg=f"{name}: {{}}".format)


class CountingExchange(LocalExchange):
    """Counts what a run asks of other ranks; the convolution keeps its result as an exchange that must not be repeated would."""

    def __init__(self) -> None:
        self.sums = self.sent = 0

    def sum(self, x: torch.Tensor) -> torch.Tensor:
        self.sums += 1
        return x

    def short_conv(self, x: torch.Tensor, weight: torch.Tensor, seq: Sequence, activation: str | None = "silu") -> torch.Tensor:
        def send() -> torch.Tensor:
            self.sent += 1
            return torch.zeros(len(seq.cu_seqlens) - 1, weight.shape[1] - 1, x.shape[1], dtype=x.dtype)

        return short_conv.short_conv(x, weight, seq.cu_seqlens, initial_state=seq.tape.keep(send), activation=activation)[0]


def test_full_recomputation_changes_nothing(build: Build) -> None:
    tokens, labels, _ = stream()
    results: list[Any] = []
    for recompute in ("none", "full"):
        model = build(recompute=recompute)
        # Two micro-batches whose backwards come in the order of their forwards, as under a pipeline schedule.
        first, second = Sequence.of(LENGTHS, exchange=CountingExchange()), Sequence.of([len(tokens)], exchange=CountingExchange())
        losses = [model.loss(model(tokens, seq), labels).objective for seq in (first, second)]
        for loss in losses:
            loss.backward()
        loads = torch.stack([router.load for router in model.routers().values()])
        results.append((losses, {n: p.grad for n, p in model.named_parameters()}, loads, [s.metrics["aux_loss"] for s in (first, second)]))
        for seq in (first, second):
            assert isinstance(seq.exchange, CountingExchange)
            assert (seq.exchange.sums, seq.exchange.sent) == (3, 2)
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=0)


def test_recomputation_keeps_less(build: Build) -> None:
    tokens, _, _ = stream()

    def kept(recompute: str) -> int:
        model, sizes = build(recompute=recompute), 0

        def pack(x: torch.Tensor) -> torch.Tensor:
            nonlocal sizes
            sizes += x.numel()
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            model(tokens, Sequence.of(LENGTHS))
        return sizes

    assert kept("full") < kept("none") / 3


def test_loss_is_summed_over_labelled_tokens(build: Build) -> None:
    model = build()
    tokens, labels, _ = stream()
    seq = Sequence.of(LENGTHS)
    hidden = model(tokens, seq)
    objective, loss, z = model.loss(hidden, labels, factor=0.3)
    logits = hidden.detach() @ model.embed.weight.detach().T  # type: ignore[union-attr]
    torch.testing.assert_close(loss, F.cross_entropy(logits, labels, ignore_index=-100, reduction="sum"))
    torch.testing.assert_close(z, logits.logsumexp(-1)[labels >= 0].square().sum())
    torch.testing.assert_close(objective.detach(), 0.3 * (loss + model.model.z_loss * z))


def test_a_weight_with_a_main_gradient_has_the_heads_there() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(50, 8, dtype=torch.float64, generator=generator, requires_grad=True)
    head = Head(torch.nn.Parameter(torch.randn(30, 8, dtype=torch.float64, generator=generator)), scale=0.7, softcap=2.0)
    labels = torch.randint(0, 30, (50,), generator=generator)
    expected = torch.autograd.grad(head.loss(x, labels, 0.1, 0.5).objective, (x, head.weight))
    head.weight.main_grad = torch.zeros_like(head.weight)  # type: ignore[attr-defined]
    head.loss(x, labels, 0.1, 0.5).objective.backward()
    torch.testing.assert_close((x.grad, head.weight.main_grad), expected)
    assert head.weight.grad is None


def quickstart() -> ModelConfig:
    gated_delta_net = {"mixer": "gated_delta_net", "key_heads": 2, "value_heads": 4, "key_dim": 16, "value_dim": 32, "conv_width": 4}
    attention = {"mixer": "attention", "heads": 6, "kv_heads": 2, "head_dim": 16}
    return ModelConfig(
        hidden=48,
        depth=2,
        pattern=["g", "a"],
        layers={"g": gated_delta_net, "a": attention},
        ffn=MoEOptions(experts=8, top_k=2, inner=40, shared_inner=24),
    )


def test_parameter_counts_and_costs_follow_the_formulas() -> None:
    model = Stack(quickstart(), 100, LocalLayers(device="meta"))
    gated_delta_net = 48 * (32 + 32 + 128 + 128 + 4 + 4) + (32 + 32 + 128) * 4 + 4 + 4 + 32 + 128 * 48
    attention = 48 * (96 + 32 + 32 + 96) + 16 + 16 + 96 * 48
    expert, shared, router, norms = 3 * 48 * 40, 3 * 48 * 24, 8 * 48, 2 * 48
    total, active = model.num_params()
    assert total == 100 * 48 + 48 + gated_delta_net + attention + 2 * (8 * expert + shared + router + norms)
    assert active == total - 2 * 6 * expert
    assert model.layers["0"].mixer.num_params() == gated_delta_net  # type: ignore[operator, union-attr]
    assert model.layers["1"].mixer.num_params() == attention  # type: ignore[operator, union-attr]

    flops = model.flops(1000, 256)
    assert flops["head"] == 2 * 1000 * 48 * 100
    assert flops["ffn"] == 2 * 1000 * 2 * (2 * expert + shared + router)
    assert flops["a"] == 1000 * (2 * (attention - 32) + 4 * 96 * 257 / 2)
    assert flops["g"] == 1000 * (2 * (gated_delta_net - 4 - 4 - 32) + 6 * 4 * 16 * 32)
    assert model.state_bytes(256) == 2 * (2 * 2 * 16 * 256) + 4 * (4 * 16 * 32) + 2 * 3 * 192
    assert all(p.device.type == "meta" for p in model.parameters())


def test_exchanges_by_mixer() -> None:
    model = Stack(quickstart(), 100, LocalLayers(device="meta"))
    mixers = {name: block.mixer for name, block in model.blocks()}
    (ring,) = mixers["1"].exchanges(4096)
    assert (ring.kind, ring.width, ring.everything) == ("ring", 2 * 2 * 16, True)
    halo, scan = mixers["0"].exchanges(4096)
    assert (halo.kind, halo.width, halo.reach) == ("halo", 192, 3)
    assert (scan.kind, scan.width, scan.map) == ("scan", 4 * 16 * 32, 4 * 16 * 16)


def test_bfloat16_trains(build: Build) -> None:
    model = build(layers=LocalLayers(std=0.1, depth=4, dtype=torch.bfloat16))
    tokens, labels, _ = stream()
    hidden, grads = train(model, tokens, labels, Sequence.of(LENGTHS))
    exact = build(layers=LocalLayers(std=0.1, depth=4, dtype=torch.float64))
    assert hidden.dtype == torch.bfloat16
    assert all(g.isfinite().all() for g in grads.values())
    with torch.no_grad():
        close = exact(tokens, Sequence.of(LENGTHS))
    assert float((hidden - close).norm() / close.norm()) < 0.1


@pytest.mark.parametrize(("changes", "message"), [({"start": 3, "stop": 9}, "depth 4"), ({"recompute": "some"}, "none, selective or full")])
def test_impossible_stacks_are_refused(build: Build, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(**changes)


def test_learned_positions_are_those_of_the_documents(build: Build) -> None:
    """Each document begins at position 0, also where decoding goes on; a document of its own gives the same."""
    model = build(learned_positions=12).eval()
    tokens, lengths = torch.arange(20), [7, 1, 12]
    packed = model(tokens, Sequence.of(lengths))
    alone = torch.cat([model(part, Sequence.of([len(part)])) for part in tokens.split(lengths)])
    torch.testing.assert_close(packed, alone, rtol=1e-9, atol=1e-10)
    assert not torch.allclose(packed, build(learned_positions=0).eval()(tokens, Sequence.of(lengths)))
    _, state = model.prefill(tokens[:7], Sequence.of([7]))
    logits, _ = model.decode(tokens[7:8], state, Sequence.step(torch.tensor([7])))
    torch.testing.assert_close(logits, model.logits(model(tokens[:8], Sequence.of([8])))[-1:], rtol=1e-9, atol=1e-10)
