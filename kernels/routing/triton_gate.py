"""`gate.route` on a GPU. Logits and indices alone are kept for the backward; sums over tokens are made in the same order every time."""

from typing import Any

import torch
from torch import Tensor

from ltrain.kernels.routing import triton_kernels_gate as kernels
from ltrain.kernels.routing.gate import TINY, Gate
from ltrain.kernels.segments import ceil_div, device_refusal, power_of_two

SCORES = 4096  # of a program


def refusal(logits: Tensor) -> str | None:
    """Why the kernels do not take this tensor, or None."""
    if why := device_refusal(logits):
        return why
    return None if logits.dtype == torch.float32 else f"takes logits in float32, not {logits.dtype}"


def _options(logits: Tensor, gate: Gate) -> dict[str, Any]:
    block = power_of_two(logits.shape[1])
    return {
        "K": gate.k,
        "SIGMOID": gate.score == "sigmoid",
        "RENORMALISE": gate.renormalise,
        "ROWS": max(1, SCORES // block),
        "BE": block,
        "BK": power_of_two(gate.k),
        "num_warps": 4,
    }


def forward(logits: Tensor, bias: Tensor, indices: Tensor | None, gate: Gate) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """-> weights [T, k], indices [T, k], loads [E], shares [E]"""
    logits, (tokens, experts), options = logits.contiguous(), logits.shape, _options(logits, gate)
    blocks = ceil_div(tokens, options["ROWS"])
    weights = logits.new_empty(tokens, gate.k)
    chosen = torch.empty(tokens, gate.k, dtype=torch.int64, device=logits.device)
    loads = torch.empty(blocks, experts, dtype=torch.int32, device=logits.device)
    shares = logits.new_empty(blocks, experts)
    given = None if indices is None else indices.contiguous()
    kernels.route[(blocks,)](logits, bias.float(), given, weights, chosen, loads, shares, tokens, experts, gate.scale, TINY, **options)
    return weights, chosen, loads.sum(0), shares.sum(0)


def backward(logits: Tensor, indices: Tensor, dweights: Tensor | None, dshares: Tensor | None, gate: Gate) -> Tensor:
    """-> dlogits [T, E]"""
    logits, (tokens, experts), options = logits.contiguous(), logits.shape, _options(logits, gate)
    dlogits = torch.empty_like(logits)
    of_weights, of_shares = (None if x is None else x.contiguous() for x in (dweights, dshares))
    grid = (ceil_div(tokens, options["ROWS"]),)
    kernels.logit_gradients[grid](logits, indices, of_weights, of_shares, dlogits, tokens, experts, gate.scale, TINY, **options)
    return dlogits
