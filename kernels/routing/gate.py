"""From a router's logits to which experts each token visits and with which weights, and what balances their load.

Backends: `reference` (torch) and `triton` (on a GPU: one pass each way, where torch takes some forty operators); `auto` takes triton wherever
it runs.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ltrain.kernels.routing import BACKENDS, best
from ltrain.kernels.segments import choose, permitted, wants_triton

__all__ = ["Gate", "Routed", "route", "scored"]

TINY = 1e-20  # added to what is divided by


class Gate(NamedTuple):
    """How logits become weights."""

    k: int  # experts of a token
    score: str = "sigmoid"  # or softmax
    renormalise: bool = True  # whether a token's weights add up to `scale`
    scale: float = 1.0


class Routed(NamedTuple):
    """indices and loads are without gradients."""

    weights: Tensor  # [T, k] in the logits' type
    indices: Tensor  # [T, k] int64
    loads: Tensor  # [E] int64: tokens that visit each expert
    shares: Tensor  # [E] in the logits' type: the sum over tokens of each expert's probability, its share in the token's scores


def scored(logits: Tensor, score: str) -> Tensor:
    """logits [T, E] -> [T, E], each in 0..1"""
    return logits.softmax(-1) if score == "softmax" else logits.sigmoid()


class _Route(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, bias: Tensor, indices: Tensor | None, gate: Gate) -> tuple[Tensor, ...]:
        from ltrain.kernels.routing import triton_gate

        found = triton_gate.forward(logits, bias, indices, gate)
        ctx.save_for_backward(logits, found[1])
        ctx.gate = gate
        ctx.mark_non_differentiable(found[1], found[2])
        ctx.set_materialize_grads(False)
        return found

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        from ltrain.kernels.routing import triton_gate

        logits, indices = ctx.saved_tensors
        dweights, _, _, dshares = grads
        if dweights is None and dshares is None:
            return None, None, None, None
        return triton_gate.backward(logits, indices, dweights, dshares, ctx.gate), None, None, None


def route(logits: Tensor, bias: Tensor, gate: Gate, indices: Tensor | None = None, *, backend: str = "auto") -> Routed:
    """Weights are scores of the chosen experts; `bias` counts in the choice alone. Differentiable in logits, through weights and shares.

    Args:
        logits: [T, E] in float32 or wider.
        bias: [E].
        gate: how logits become weights.
        indices: [T, k] int64, where the choice is made already.

    Raises:
        ValueError: shapes, score or backend do not fit.
    """
    if logits.ndim != 2 or bias.shape != logits.shape[1:] or not 0 < gate.k <= logits.shape[1] or gate.score not in ("softmax", "sigmoid"):
        raise ValueError(
            f"logits are [T, E], bias [E], k from 1 to E and score softmax or sigmoid, but are {list(logits.shape)}, {list(bias.shape)}, "
            f"{gate.k} and {gate.score}"
        )
    if indices is not None and indices.shape != (len(logits), gate.k):
        raise ValueError(f"indices are of {len(logits)} tokens with {gate.k} experts each, but have shape {list(indices.shape)}")
    choose(backend, BACKENDS)
    if logits.numel() and wants_triton(backend, logits):
        from ltrain.kernels.routing import triton_gate

        if permitted(triton_gate.refusal(logits), backend, "reference or auto"):
            return Routed(*_Route.apply(logits, bias, indices, gate))
    scores = scored(logits, gate.score)
    if indices is None:
        indices = best(scores.detach() + bias, gate.k)
    # bincount would wait for the device
    loads = torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, indices, True).sum(0)
    probabilities = scores if gate.score == "softmax" else scores / (scores.sum(-1, keepdim=True) + TINY)
    weights = scores.gather(-1, indices)
    if gate.renormalise:
        weights = weights / (weights.sum(-1, keepdim=True) + TINY)
    return Routed(weights if gate.scale == 1 else weights * gate.scale, indices, loads, probabilities.sum(0))
