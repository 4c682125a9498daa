"""The output head: logits and their cross entropy."""

import torch.nn.functional as F
from torch import Tensor, nn

from ltrain.kernels.cross_entropy import Losses, linear_cross_entropy_sum
from ltrain.kernels.cross_entropy.reference import bounded


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

    def loss(self, x: Tensor, labels: Tensor, z_loss: float = 0.0, factor: float = 1.0) -> Losses:
        """x [T, hidden], labels [T] (-100: none) -> sums over the labelled tokens, the objective times `factor`.

        Where the engine keeps the weight's gradient in a buffer, the weight's `main_grad`, it is added there in the forward, and the
        gradient of the objective must be exactly 1.
        """
        return linear_cross_entropy_sum(
            x, self.weight, labels, z_loss=z_loss, scale=self.scale, softcap=self.softcap, factor=factor, weight_grad=main_grad(self.weight)
        )


def main_grad(weight: nn.Parameter) -> Tensor | None:
    """The buffer in which an engine adds up a parameter's gradients, under the name that megatron-core gives it."""
    return getattr(weight, "main_grad", None)
