"""The output head: logits and their cross entropy."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ltrain.kernels import cross_entropy

# Above so many logits they are made and dropped in chunks of tokens; below, keeping them saves a second product in the backward.
WHOLE_LOGITS = 2**24


class Head(nn.Module):
    """Logits and their cross entropy over a vocabulary that may be sharded."""

    def __init__(self, weight: nn.Parameter):
        super().__init__()
        self.weight = weight

    def logits(self, x: Tensor) -> Tensor:
        """x [T, hidden] -> [T, vocab]"""
        return F.linear(x, self.weight)

    def loss(self, x: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """x [T, hidden], labels [T] (-100: none) -> cross entropy [T] and logsumexp [T], float32 or wider; 0 without a label."""
        labelled = labels >= 0
        if len(x) * len(self.weight) > WHOLE_LOGITS:
            loss, lse = cross_entropy.linear_cross_entropy(x, self.weight, labels)
            return loss, lse.where(labelled, 0.0)
        logits = self.logits(x)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        lse = logits.logsumexp(-1)
        target = logits.gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
        return (lse - target).where(labelled, 0.0), lse.where(labelled, 0.0)
