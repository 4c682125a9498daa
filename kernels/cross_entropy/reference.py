"""Cross entropy of a linear head from the logits of all tokens at once, and what becomes of the logits of some, in plain torch."""

import torch
from torch import Tensor

from ltrain.kernels.segments import accumulator


def bounded(products: Tensor, scale: float, softcap: float) -> Tensor:
    """Of products x W^T: what the model calls its logits."""
    logits = products if scale == 1 else products * scale
    return logits if not softcap else (logits / softcap).tanh() * softcap


def linear_cross_entropy(x: Tensor, weight: Tensor, labels: Tensor, scale: float, softcap: float) -> tuple[Tensor, Tensor]:
    """x [T, hidden], weight [V, hidden], labels [T] -> cross entropy [T] and logsumexp [T], both 0 without a label."""
    products = x @ weight.T
    logits = bounded(products.to(accumulator(products.dtype)), scale, softcap)  # [T, V]
    labelled, lse = labels >= 0, logits.logsumexp(-1)
    target = logits.gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    return (lse - target).where(labelled, 0.0), lse.where(labelled, 0.0)


def rows(
    products: Tensor,
    labels: Tensor,
    lse: Tensor,
    target: Tensor,
    *,
    reads: bool,
    learns: bool,
    z_loss: float,
    factor: float,
    scale: float,
    softcap: float,
    first: int,
    total: int,
) -> None:
    """What becomes of some tokens' products with the rows of a weight, which may be part of the vocabulary's.

    Args:
        products: [n, V] x W^T, of the rows `first` to first + V of the vocabulary's `total`.
        labels: [n] in [0, total), negative for a token without a label.
        lse, target: [n] in the accumulator's type: logsumexp of these logits and the logit of the label, 0 where it is not among them; both
            0 without a label.
        reads: lse and target are written.
        learns: products are overwritten by the gradient, with respect to them, of factor x sum(lse - target + z_loss lse^2). Without
            `reads` lse is that of the whole vocabulary.
        z_loss, factor, scale, softcap: as in `linear_cross_entropy_sum`.
    """
    logits = bounded(products.to(lse.dtype), scale, softcap)
    labelled, local = labels >= 0, labels - first
    here = labelled & (local >= 0) & (local < products.shape[1])
    index = local.clamp(0, products.shape[1] - 1).unsqueeze(-1)
    if reads:
        lse.copy_(logits.logsumexp(-1).where(labelled, 0.0))
        target.copy_(logits.gather(-1, index).squeeze(-1).where(here, 0.0).masked_fill(labels >= total, torch.nan))
    if learns:
        # d lse / d logits = p, d target / d logits = onehot(label)
        grad = (logits - lse.unsqueeze(-1)).exp_().mul_((1 + 2 * z_loss * lse).unsqueeze(-1))
        grad.scatter_add_(-1, index, -here.to(grad.dtype).unsqueeze(-1))
        if softcap:
            grad.mul_(1 - (logits / softcap).square_())  # d c tanh(z / c) / d z
        products.copy_(grad.mul_(factor * scale).masked_fill_(~labelled.unsqueeze(-1), 0.0))
