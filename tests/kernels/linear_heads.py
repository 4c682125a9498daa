"""A small linear head and its objective by the plain formula, for tests of linear cross entropy."""

import torch
import torch.nn.functional as F
from torch import Tensor

VOCAB = 50
FORMS = [{}, {"z_loss": 0.1, "factor": 1 / 7}, {"z_loss": 0.01, "scale": 0.7, "softcap": 2.0, "factor": 3.0}]


def inputs(tokens: int, dtype: torch.dtype = torch.float64, vocab: int = VOCAB, device: str = "cpu") -> tuple[Tensor, Tensor, Tensor]:
    """x [tokens, 16], weight [vocab, 16], labels [tokens], a third of them -100; weights so large that a softcap bends."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(tokens, 16, generator=g, dtype=torch.float64).to(device, dtype).requires_grad_()
    weight = torch.randn(vocab, 16, generator=g, dtype=torch.float64).to(device, dtype).requires_grad_()
    labels = torch.randint(vocab, (tokens,), generator=g)
    labels[::3] = -100
    return x, weight, labels.to(device)


def objective(
    x: Tensor, weight: Tensor, labels: Tensor, z_loss: float = 0.0, scale: float = 1.0, softcap: float = 0.0, factor: float = 1.0
) -> tuple[Tensor, Tensor, Tensor]:
    """What `linear_cross_entropy_sum` gives."""
    logits = x @ weight.T * scale
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    loss = F.cross_entropy(logits, labels, reduction="sum")
    squares = logits[labels >= 0].logsumexp(-1).square().sum()
    return factor * (loss + z_loss * squares), loss.detach(), squares.detach()
