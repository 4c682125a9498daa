"""Which experts each token goes to, with which weights, and how their load is balanced."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ltrain.kernels import routing
from ltrain.kernels.routing.gate import Gate, Routed, route, scored
from ltrain.model.layers import LocalLayers
from ltrain.model.options import MoEOptions
from ltrain.model.recompute import cheap
from ltrain.model.sequence import Sequence


class _AttachLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, loss: Tensor, weight: float) -> Tensor:
        ctx.loss = (loss.shape, weight, loss.dtype, loss.device)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, Tensor, None]:
        shape, weight, dtype, device = ctx.loss
        return grads[0], torch.full(shape, weight, dtype=dtype, device=device), None


def attach_loss(x: Tensor, loss: Tensor, weight: float = 1.0) -> Tensor:
    """x unchanged; a backward through it adds weight x d loss to whatever is differentiated.

    A block can so carry a loss of its own without returning it, through checkpointing and across pipeline cuts.
    """
    return _AttachLoss.apply(x, loss, weight)


class Router(nn.Module):
    """Top-k routing in float32 or wider, balanced by an auxiliary loss, a selection bias, or both.

    `bias` [E] is added to the scores for the selection only (Wang et al. 2024); `load` [E] counts the tokens that this rank sent
    to each expert since it was last zeroed: not in evaluation, and once where a block is recomputed.
    """

    bias: Tensor
    load: Tensor

    def __init__(self, hidden: int, options: MoEOptions, layers: LocalLayers):
        super().__init__()
        if not 0 < options.top_k <= options.experts:
            raise ValueError(f"ffn.top_k={options.top_k} must be from 1 to ffn.experts={options.experts}")
        if options.score not in ("softmax", "sigmoid"):
            raise ValueError(f"ffn.score={options.score!r} is not known: write softmax or sigmoid")
        size = options.experts // options.groups
        if options.experts % options.groups or options.top_k > size * options.top_groups:
            raise ValueError(f"ffn.top_k={options.top_k} is more than ffn.top_groups={options.top_groups} of ffn.groups={options.groups} hold")
        self.options = options
        self.weight = layers.router(hidden, options.experts)
        self.logit_bias = layers.row_bias(options.experts) if options.router_bias else None
        self.register_buffer("bias", torch.zeros(options.experts, dtype=torch.float32, device=layers.device))
        self.register_buffer("load", torch.zeros(options.experts, dtype=torch.int64, device=layers.device), persistent=False)

    def _logits(self, x: Tensor) -> Tensor:
        """x [T, hidden] -> [T, E] in float32 or wider"""
        wide = torch.promote_types(x.dtype, torch.float32)
        product = wide if self.options.router_dtype == "float32" else x.dtype
        bias = None if self.logit_bias is None else self.logit_bias.to(product)
        return F.linear(cheap(Tensor.to, x, product), self.weight.to(product), bias).to(wide)

    def scores(self, x: Tensor) -> Tensor:
        """x [T, hidden] -> [T, E], each in 0..1"""
        return scored(self._logits(x), self.options.score)

    def forward(self, x: Tensor, seq: Sequence) -> tuple[Tensor, Tensor]:
        """x [T, hidden] -> weights [T, k] (float32 or wider) and expert indices [T, k]."""
        logits, made = self._logits(x), list[tuple[Tensor, Tensor | None]]()

        def decide() -> tuple[Tensor, Tensor | None]:
            """What must happen once per forward: the selection [T, k], the counting, and the balance [E] that the auxiliary loss needs."""
            routed = self._routed(logits)
            coefficients = self._balance(routed, seq)
            loss = None if coefficients is None else torch.dot(routed.shares, coefficients)
            if loss is not None:
                seq.note("aux_loss", loss)
            made.append((routed.weights, loss))
            return routed.indices, coefficients

        indices, coefficients = seq.tape.keep(decide)
        if not made:
            routed = self._routed(logits, indices)
            made.append((routed.weights, None if coefficients is None else torch.dot(routed.shares, coefficients)))
        weights, loss = made[0]
        return weights if loss is None else attach_loss(weights, loss, seq.aux_weight), indices

    def _routed(self, logits: Tensor, indices: Tensor | None = None) -> Routed:
        """indices: where the choice is made already."""
        o = self.options
        if indices is None and o.groups > 1:
            indices = routing.best(self._choices(scored(logits.detach(), o.score)), o.top_k)
        return route(logits, self.bias, Gate(o.top_k, o.score, o.renormalise, o.scale), indices)

    def _balance(self, routed: Routed, seq: Sequence) -> Tensor | None:
        """Count the tokens of each expert -> coefficients [E], with which its shares cost the auxiliary loss; None: there is none.

        It is coefficient * E * sum_e f_e P_e (Fedus et al. 2021): f_e the fraction of slots, P_e the mean probability. Each rank's shares give its
        own term, by fractions over all tokens.
        """
        o = self.options
        if not torch.is_grad_enabled():
            return None
        if self.training:
            self.load += routed.loads
        if o.aux_loss == 0:
            return None
        return seq.exchange.sum(routed.loads).to(routed.shares.dtype) * (o.aux_loss * o.experts / (o.top_k * seq.tokens**2))

    def _choices(self, scores: Tensor) -> Tensor:
        """What is chosen by [T, E]: scores with the bias, and -inf in groups that are not among a token's best."""
        o, biased = self.options, scores + self.bias
        if o.groups == 1:
            return biased
        grouped = biased.unflatten(-1, (o.groups, -1))  # [T, groups, E / groups]
        best = self._group_scores(grouped).topk(o.top_groups, dim=-1).indices
        refused = torch.ones(grouped.shape[:2], dtype=torch.bool, device=scores.device).scatter_(-1, best, False)
        return grouped.masked_fill(refused.unsqueeze(-1), -torch.inf).flatten(-2)

    def _group_scores(self, grouped: Tensor) -> Tensor:
        """[T, groups, E / groups] -> [T, groups]"""
        return grouped.amax(-1) if self.options.group_score == "max" else grouped.topk(2, dim=-1).values.sum(-1)

    @torch.no_grad()
    def margin(self, x: Tensor) -> Tensor:
        """The smallest gap between the last chosen and the first refused selection score, of experts or of groups, over x [T, hidden]:
        what rounding must not cross."""
        o = self.options
        if not len(x):
            return torch.tensor(float("inf"))
        scores = self.scores(x)
        gaps = [_gap(self._choices(scores), o.top_k)]
        if o.groups > 1:
            gaps.append(_gap(self._group_scores((scores + self.bias).unflatten(-1, (o.groups, -1))), o.top_groups))
        return torch.stack(gaps).min()


@torch.no_grad()
def update_biases(routers: list[Router], loads: Tensor) -> None:
    """Once per global batch, loads [routers, E] summed over all ranks: experts with less than the mean load become easier to choose."""
    loads = loads.to(routers[0].bias.dtype)
    rates = torch.tensor([[router.options.bias_rate] for router in routers], dtype=loads.dtype).to(loads.device, non_blocking=True)
    moved = rates * torch.sign(loads.mean(1, keepdim=True) - loads)
    torch._foreach_add_([router.bias for router in routers], list(moved.unbind()))


def _gap(scores: Tensor, chosen: int) -> Tensor:
    """The smallest difference of the last chosen and the first refused of scores [T, n] in a row."""
    if chosen == scores.shape[-1]:
        return scores.new_tensor(float("inf"))
    best = scores.topk(chosen + 1, dim=-1).values
    return (best[:, -2] - best[:, -1]).min()
