"""Log decays per channel from what a layer projects, as linear recurrences take them, and values times a step per head (Mamba-2).

Kinds of decays: softplus: -e^A_log softplus(a + bias) (Mamba-2, Kimi Delta Attention); bounded: -bound sigmoid(e^A_log (a + bias)) (Kimi's safe
gate); sigmoid: ln sigmoid(a + bias) / 16 (GLA, Yang et al. 2023). Backends: `reference` (torch) and `triton` (on a GPU: one pass each way); `auto`
takes triton wherever it runs.
"""

import torch.nn.functional as F
from torch import Tensor

from ltrain.kernels.segments import choose, permitted, wants_triton

__all__ = ["KINDS", "channel_decay", "scaled"]

KINDS = ("softplus", "bounded", "sigmoid")
SIGMOID_SHARE = 1 / 16


def channel_decay(a: Tensor, A_log: Tensor | None, bias: Tensor, heads: int, kind: str, *, bound: float = 0.0, backend: str = "auto") -> Tensor:
    """Differentiable in a, A_log and bias.

    Args:
        a: [T, H * K].
        A_log: [H]; None with sigmoid.
        bias: [H * K], in float32 or wider, which the result has.
        heads: H.
        kind: of KINDS.
        bound: of bounded.

    Returns:
        [T, H, K], all at most 0.

    Raises:
        ValueError: shapes, kind or backend do not fit.
    """
    if a.ndim != 2 or bias.shape != a.shape[1:] or a.shape[1] % heads or (A_log is not None and A_log.shape != (heads,)):
        given = ", ".join("none" if t is None else str(list(t.shape)) for t in (a, bias, A_log))
        raise ValueError(f"a is [T, H K], bias [H K] and A_log [H] with H={heads}, but have shapes {given}")
    if kind not in KINDS or (A_log is None) != (kind == "sigmoid"):
        raise ValueError(f"kind={kind!r} is none of {', '.join(KINDS)}, of which all but sigmoid take A_log")
    if kind == "bounded" and not bound > 0:
        raise ValueError(f"bound={bound:g} leaves no decay: kind='bounded' takes one above 0")
    choose(backend, ("reference", "triton"))
    if a.numel() and wants_triton(backend, a):
        from ltrain.kernels.gates import triton_gates

        if permitted(triton_gates.refusal(a, bias), backend, "reference or auto"):
            return triton_gates.channel_decay(a, A_log, bias, heads, kind, bound)
    a = (a.to(bias.dtype) + bias).unflatten(-1, (heads, -1))
    if A_log is None:
        return F.logsigmoid(a) * SIGMOID_SHARE
    rate = A_log.to(bias.dtype).exp().unsqueeze(-1)
    return -bound * (rate * a).sigmoid() if kind == "bounded" else -rate * F.softplus(a)


def scaled(x: Tensor, factors: Tensor, *, backend: str = "auto") -> Tensor:
    """x [T, H, D] times factors [T, H], which may be wider; in x's type. Differentiable in both.

    Raises:
        ValueError: shapes or backend do not fit.
    """
    if x.ndim != 3 or factors.shape != x.shape[:2]:
        raise ValueError(f"x is [T, H, D] and factors [T, H], but have shapes {list(x.shape)} and {list(factors.shape)}")
    choose(backend, ("reference", "triton"))
    if x.numel() and wants_triton(backend, x):
        from ltrain.kernels.gates import triton_gates

        if permitted(triton_gates.scaled_refusal(x, factors), backend, "reference or auto"):
            return triton_gates.scaled(x, factors)
    return (x * factors.unsqueeze(-1)).to(x.dtype)
