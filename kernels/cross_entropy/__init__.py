"""Cross entropy of a linear head without the logits of the whole stream.

`linear_cross_entropy` gives each token's loss. `linear_cross_entropy_sum` gives a training objective, with three matrix products instead
of four where its backend makes the gradient in the forward.

Backends of the sum: `reference` (all logits at once), `chunked` (chunks of tokens, whose logits are made again in the backward), `fused`
(chunks of tokens, the gradient in the forward) and `triton` (the same with one pass over a chunk's logits on a GPU); `auto` takes triton
wherever it runs, fused elsewhere.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ltrain.kernels.cross_entropy import chunked, fused, reference
from ltrain.kernels.cross_entropy.fused import Shards
from ltrain.kernels.segments import accumulator, choose, permitted, wants_triton

__all__ = ["Losses", "Shards", "linear_cross_entropy", "linear_cross_entropy_sum"]


def _check(x: Tensor, weight: Tensor, labels: Tensor, shards: int) -> None:
    if x.ndim != 2 or weight.ndim != 2 or x.shape[1] != weight.shape[1] or x.dtype != weight.dtype or not len(weight):
        raise ValueError(
            f"x is [T, hidden] and weight [V, hidden] of one type, but are {list(x.shape)} of {x.dtype} and {list(weight.shape)} of {weight.dtype}"
        )
    if labels.shape != x.shape[:1] or labels.dtype != torch.int64:
        raise ValueError(f"labels must be {len(x)} int64 numbers, one per token, but is {labels.dtype} of shape {list(labels.shape)}")
    vocab = len(weight) * shards
    if labels.device.type == "cpu" and len(labels):
        if ((labels < 0) & (labels != -100)).any() or labels.max() >= vocab:
            raise ValueError(f"labels must lie in [0, {vocab}) or be -100, but range from {labels.min()} to {labels.max()}")


def linear_cross_entropy(x: Tensor, weight: Tensor, labels: Tensor, scale: float = 1.0, softcap: float = 0.0) -> tuple[Tensor, Tensor]:
    """Cross entropy of softmax(x W^T) against labels, and the logsumexp of its logits (for a z-loss). Differentiable in x and weight.

    Args:
        x: [T, hidden].
        weight: [V, hidden] in x's type.
        labels: [T] int64 in [0, V), or -100 for a token without a label.
        scale: times the logits.
        softcap: the scaled logits z become softcap x tanh(z / softcap); 0: they do not.

    Returns:
        loss [T] and logsumexp [T] in nats, float32 or wider; both 0 without a label.

    Raises:
        ValueError: shapes or types do not fit, or (seen on a CPU) a label is outside the vocabulary.
    """
    _check(x, weight, labels, 1)
    return chunked.linear_cross_entropy(x, weight, labels, scale, softcap)


class Losses(NamedTuple):
    """Numbers in float32 or wider, in nats or their squares."""

    objective: Tensor  # differentiable: factor x (loss + z_loss x squares)
    loss: Tensor  # the sum of the cross entropies, without a gradient
    squares: Tensor  # the sum of the squared logsumexps of labelled tokens, without a gradient


def linear_cross_entropy_sum(
    x: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    z_loss: float = 0.0,
    scale: float = 1.0,
    softcap: float = 0.0,
    factor: float = 1.0,
    weight_grad: Tensor | None = None,
    shards: Shards | None = None,
    backend: str = "auto",
) -> Losses:
    """Summed cross entropy of softmax(x W^T) against labels with a z-loss (Chowdhery et al. 2022). Differentiable, once, in x and weight.

    The gradients of fused and triton are made in the forward, those of the weight summed over tokens in float32 or wider (of half precision on a
    CPU: over chunks of tokens).

    Args:
        x: [T, hidden].
        weight: [V, hidden] in x's type.
        labels: [T] int64 in [0, V), or -100 for a token without a label. With shards all labels of the vocabulary, [0, count x V).
        z_loss: times the squared logsumexp of each labelled token's logits.
        scale: times the logits.
        softcap: the scaled logits z become softcap x tanh(z / softcap); 0: they do not.
        factor: times the objective. Known here, it costs nothing, and gradients in bfloat16 are rounded once; in float16 those of the logits,
            times a small factor, may vanish.
        weight_grad: [V, hidden] in float32 or wider, to which fused and triton add the weight's gradient in the forward; the backward gives
            the weight none. The objective's own gradient must then be exactly 1: the backward raises otherwise (on a GPU by a
            device-side assertion). A forward without a backward, or done twice, leaves it wrong. Elsewhere, or where the weight needs no gradient,
            it is left alone, and the weight has its gradient by autograd.
        shards: the ranks that share the vocabulary out, where this weight is one's part (fused and triton only). The results are the same on all;
            x's gradient is this part's, to be summed over the ranks.
        backend: auto | reference | chunked | fused | triton.

    Raises:
        ValueError: shapes, types or the backend do not fit, or (seen on a CPU) a label is outside the vocabulary.
        RuntimeError: in the backward of fused and triton: a second one, or with weight_grad a gradient of the objective that is not 1.
    """
    _check(x, weight, labels, 1 if shards is None else shards.count)
    choose(backend, ("reference", "chunked", "fused", "triton"))
    if backend in ("reference", "chunked"):
        if shards is not None:
            raise ValueError(f"backend={backend!r} has the whole vocabulary on each rank: choose fused, triton or auto with shards")
        plain = reference.linear_cross_entropy if backend == "reference" else chunked.linear_cross_entropy
        loss, lse = plain(x, weight, labels, scale, softcap)
        total, squares = loss.sum(), lse.square().sum()
        return Losses((total + z_loss * squares) * factor, total.detach(), squares.detach())
    if weight_grad is not None and (
        weight_grad.shape != weight.shape or weight_grad.dtype != accumulator(weight.dtype) or not weight_grad.is_contiguous()
    ):
        raise ValueError(
            f"weight_grad must be contiguous, {list(weight.shape)} of {accumulator(weight.dtype)}, but is {list(weight_grad.shape)} "
            f"of {weight_grad.dtype}"
        )
    rows = reference.rows
    if len(x) and wants_triton(backend, x):
        from ltrain.kernels.cross_entropy import triton_rows

        if permitted(triton_rows.refusal(x), backend, "fused or auto"):
            rows = triton_rows.rows
    task = fused.Task(z_loss, scale, softcap, factor, shards, rows, torch.is_grad_enabled())
    return Losses(*fused.linear_cross_entropy_sum(x.contiguous(), weight, labels.contiguous(), weight_grad, task))
