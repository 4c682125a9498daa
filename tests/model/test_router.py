from collections.abc import Callable

import pytest
import torch

from ltrain.model.ffn import MoE
from ltrain.model.layers import LocalLayers, seed_parameters
from ltrain.model.options import MoEOptions
from ltrain.model.router import Router, attach_loss, update_biases
from ltrain.model.sequence import LocalExchange, Sequence


def router(**options: object) -> Router:
    module = Router(16, MoEOptions(experts=6, **options), LocalLayers(std=0.5, dtype=torch.float64))  # type: ignore[arg-type]
    seed_parameters(module, 0)
    return module


def tokens(count: int = 40) -> torch.Tensor:
    return torch.randn(count, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize("renormalise", [True, False])
def test_weights_are_the_chosen_scores(score: str, renormalise: bool) -> None:
    module, x = router(score=score, renormalise=renormalise, scale=2.5, top_k=3), tokens()
    weights, indices = module(x, Sequence.of([40]))
    logits = (x @ module.weight.T).detach()
    scores = logits.softmax(-1) if score == "softmax" else logits.sigmoid()
    for t in range(40):
        best = sorted(range(6), key=lambda e, t=t: -float(scores[t, e]))[:3]  # type: ignore[misc]
        assert sorted(indices[t].tolist()) == sorted(best)
        chosen = scores[t, indices[t]]
        torch.testing.assert_close(weights[t], 2.5 * (chosen / chosen.sum() if renormalise else chosen))


def test_bias_moves_the_selection_and_not_the_weights() -> None:
    module, x, seq = router(top_k=2, renormalise=False), tokens(), Sequence.of([40])
    _, before = module(x, seq)
    module.bias[4] = 10.0
    weights, after = module(x, seq)
    assert not torch.equal(before, after)
    assert (after == 4).any(-1).all()
    torch.testing.assert_close(weights, (x @ module.weight.T).sigmoid().gather(-1, after))


def test_biases_pull_towards_the_mean_load() -> None:
    module = router(bias_rate=0.01)
    update_biases([module], torch.tensor([[10, 0, 5, 5, 5, 5]]))
    torch.testing.assert_close(module.bias, torch.tensor([-0.01, 0.01, 0, 0, 0, 0]))
    update_biases([module], torch.tensor([[10, 0, 6, 6, 4, 4]]))
    torch.testing.assert_close(module.bias, torch.tensor([-0.02, 0.02, -0.01, -0.01, 0.01, 0.01]))


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_auxiliary_loss_and_its_gradient(score: str) -> None:
    module, x = router(score=score, aux_loss=0.7, top_k=2), tokens().requires_grad_()
    seq = Sequence.of([40])
    seq.aux_weight = 0.25
    weights, indices = module(x, seq)
    (weights * 0).sum().backward()  # the loss on the activations is nothing: what remains is the auxiliary loss
    ours = module.weight.grad, x.grad
    module.weight.grad = x.grad = None

    logits = x @ module.weight.T
    p = logits.softmax(-1) if score == "softmax" else logits.sigmoid() / logits.sigmoid().sum(-1, keepdim=True)
    f = torch.stack([(indices == e).sum() for e in range(6)]) / indices.numel()
    loss = 0.7 * 6 * (f * p.mean(0)).sum()
    (0.25 * loss).backward()
    torch.testing.assert_close(ours[0], module.weight.grad)
    torch.testing.assert_close(ours[1], x.grad)
    torch.testing.assert_close(seq.metrics["aux_loss"], loss.detach())
    assert not seq.metrics["aux_loss"].requires_grad


class CommonCounts(LocalExchange):
    """Every rank gets the same counts of the whole stream."""

    def __init__(self, counts: torch.Tensor):
        self.counts = counts

    def sum(self, x: torch.Tensor) -> torch.Tensor:
        return self.counts


def test_auxiliary_loss_of_parts_sums_to_that_of_the_whole() -> None:
    """Two ranks with half of the tokens each, that exchange their counts."""
    module, x = router(aux_loss=1.0), tokens()
    whole = Sequence.of([40])
    halves = [Sequence(whole.cu_seqlens, whole.positions[:15]), Sequence(whole.cu_seqlens, whole.positions[15:])]
    _, indices = module(x, whole)
    counts = indices.flatten().bincount(minlength=6)
    for seq in halves:
        seq.exchange = CommonCounts(counts)
    module(x[:15], halves[0])
    module(x[15:], halves[1])
    torch.testing.assert_close(halves[0].metrics["aux_loss"] + halves[1].metrics["aux_loss"], whole.metrics["aux_loss"])


def test_auxiliary_loss_of_a_balanced_router_is_its_coefficient() -> None:
    module = router(aux_loss=0.5, top_k=6, score="softmax")
    seq = Sequence.of([40])
    module(tokens(), seq)
    torch.testing.assert_close(seq.metrics["aux_loss"], torch.tensor(0.5, dtype=torch.float64))


def test_load_counts_training_only() -> None:
    module, x, seq = router(top_k=2), tokens(), Sequence.of([40])
    _, indices = module(x, seq)
    counts = indices.flatten().bincount(minlength=6)
    assert torch.equal(module.load, counts)
    module(x, seq)
    assert torch.equal(module.load, 2 * counts)
    module.eval()
    module(x, seq)
    module.train()
    with torch.no_grad():
        module(x, seq)
    assert torch.equal(module.load, 2 * counts)
    assert "load" not in module.state_dict() and "bias" in module.state_dict()


def test_margin_is_the_smallest_gap_at_the_cut() -> None:
    module, x = router(top_k=2), tokens()
    module.bias.copy_(torch.linspace(0, 0.3, 6))
    ranked = ((x @ module.weight.T).sigmoid() + module.bias).sort(descending=True).values
    torch.testing.assert_close(module.margin(x), (ranked[:, 1] - ranked[:, 2]).min())
    assert router(top_k=6).margin(x) == float("inf")


def test_attached_loss_reaches_the_backward_once() -> None:
    x = torch.randn(3, dtype=torch.float64, requires_grad=True)
    y = attach_loss(x, (x**3).sum())
    torch.testing.assert_close(y, x)
    (2 * y).sum().backward()
    torch.testing.assert_close(x.grad, 2 + 3 * x.detach() ** 2)


@pytest.mark.parametrize("options", [{"top_k": 7}, {"score": "tanh"}])
def test_impossible_options_are_refused(options: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"ffn\."):
        router(**options)


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize("group_score", ["max", "top2"])
def test_groups_are_chosen_before_experts(score: str, group_score: str) -> None:
    """Token by token: the best groups by their experts' biased scores, the best experts in them, weights of the plain scores."""
    options = MoEOptions(experts=12, groups=4, top_groups=2, group_score=group_score, top_k=4, score=score, scale=2.5, router_bias=True)
    module = Router(16, options, LocalLayers(std=0.5, dtype=torch.float64))
    seed_parameters(module, 0)
    assert module.logit_bias is not None
    with torch.no_grad():
        module.logit_bias.copy_(torch.linspace(-0.5, 0.5, 12))
    module.bias.copy_(torch.linspace(0.1, -0.1, 12).roll(5))
    x = tokens()
    weights, indices = module(x, Sequence.of([40]))
    logits = (x @ module.weight.T + module.logit_bias).detach()
    scores = logits.softmax(-1) if score == "softmax" else logits.sigmoid()
    moved = 0
    for t in range(40):
        biased = (scores[t] + module.bias).tolist()

        def of_group(g: int, biased: list[float] = biased) -> float:
            best = sorted(biased[3 * g : 3 * g + 3], reverse=True)
            return best[0] if group_score == "max" else best[0] + best[1]

        groups = sorted(range(4), key=of_group)[2:]
        best = sorted((e for e in range(12) if e // 3 in groups), key=biased.__getitem__)[2:]
        moved += sorted(best) != sorted(sorted(range(12), key=biased.__getitem__)[8:])
        assert sorted(indices[t].tolist()) == sorted(best)
        chosen = scores[t, indices[t]]
        torch.testing.assert_close(weights[t], 2.5 * chosen / chosen.sum())
    assert moved > 5  # groups forbid what would else be chosen
    assert 0 < float(module.margin(x)) < 0.1


def test_the_softmax_of_the_chosen_logits_is_a_renormalised_softmax() -> None:
    module, x = router(score="softmax", top_k=3), tokens()
    weights, indices = module(x, Sequence.of([40]))
    torch.testing.assert_close(weights, (x @ module.weight.T).gather(-1, indices).softmax(-1))


def test_the_type_of_the_product_that_gives_the_logits() -> None:
    x, found = tokens().bfloat16(), {}
    for dtype in ("float32", "model"):
        module = Router(16, MoEOptions(experts=6, router_dtype=dtype), LocalLayers(std=0.5, dtype=torch.bfloat16))
        seed_parameters(module, 0)
        found[dtype] = module.scores(x)
        assert found[dtype].dtype == torch.float32
    torch.testing.assert_close(found["float32"], (x.float() @ module.weight.float().T).sigmoid())
    torch.testing.assert_close(found["model"], (x @ module.weight.T).float().sigmoid())
    assert not torch.equal(found["float32"], found["model"])


@pytest.mark.parametrize("count", [0, 1, 33])
def test_moe_is_the_weighted_sum_of_its_experts(count: int) -> None:
    moe = MoE(16, MoEOptions(experts=5, top_k=2, inner=8, shared_inner=12), LocalLayers(std=0.4, dtype=torch.float64))
    seed_parameters(moe, 0)
    x, seq = tokens(count).requires_grad_(), Sequence.of([count])
    names = dict(moe.named_parameters())

    def swiglu(x: torch.Tensor, up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
        gate, value = (x @ up.T).chunk(2, -1)
        return (torch.nn.functional.silu(gate) * value) @ down.T

    def plain() -> torch.Tensor:
        weights, indices = moe.router(x, seq)
        every = torch.stack([swiglu(x, names["experts.up"][e], names["experts.down"][e]) for e in range(5)], 1)  # [T, E, hidden]
        routed = (every.gather(1, indices.unsqueeze(-1).expand(-1, -1, 16)) * weights.unsqueeze(-1)).sum(1)
        return routed + swiglu(x, names["shared.up.weight"], names["shared.down.weight"])

    def run(f: Callable[[], torch.Tensor]) -> list[torch.Tensor]:
        moe.zero_grad()
        x.grad = None
        y = f()
        (y * torch.arange(16)).square().sum().backward()
        return [y.detach(), x.grad, *(p.grad for p in moe.parameters())]  # type: ignore[list-item]

    for a, b in zip(run(lambda: moe(x, seq)), run(plain), strict=True):
        torch.testing.assert_close(a, b)
