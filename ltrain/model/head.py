"""The output head: logits and their cross entropy."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ltrain.kernels import cross_entropy

# Above so many logits they are made and dropped in chunks of tokens; below, keeping them saves a second product in the backward.
WHOLE_LOGITS = 2**24


def bounded(logits: Tensor, scale: float, softcap: float) -> Tensor:
    """Of a matrix product: what the model calls its logits."""
    logits = logits if scale == 1 else logits * scale
    return logits if not softcap else (logits / softcap).tanh() * softcap


class Head(nn.Module):
    """Logits and their cross entropy over a vocabulary that may be sharded.

    scale: times the logits; softcap: they become softcap x tanh(logits / softcap), not where it is 0.
    """

    def __init__(self, weight: nn.Parameter, scale: float = 1.0, softcap: float = 0.0):
        super().__init__()
        self.weight, self.scale, self.softcap = weight, scale, softcap

    def logits(self, x: Tensor) -> Tensor:
        """x [T, hidden] -> [T, vocab]"""
        return bounded(F.linear(x, self.weight), self.scale, self.softcap)

    def loss(self, x: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """x [T, hidden], labels [T] (-100: none) -> cross entropy [T] and logsumexp [T], float32 or wider; 0 without a label."""
        labelled = labels >= 0
        if len(x) * len(self.weight) > WHOLE_LOGITS:
            loss, lse = cross_entropy.linear_cross_entropy(x, self.weight, labels, scale=self.scale, softcap=self.softcap)
            return loss, lse.where(labelled, 0.0)
        logits = F.linear(x, self.weight)
        logits = bounded(logits.to(torch.promote_types(logits.dtype, torch.float32)), self.scale, self.softcap)
        lse = logits.logsumexp(-1)
        target = logits.gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
        return (lse - target).where(labelled, 0.0), lse.where(labelled, 0.0)
