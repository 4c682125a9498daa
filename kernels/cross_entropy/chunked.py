"""Cross entropy of a linear head chunk by chunk, once forwards and, from logits that are made again, backwards: any gradient of each
token's loss, for a fourth matrix product."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ltrain.kernels.segments import accumulator

LOGITS = 2**24  # logits held at a time: 64 MiB of float32


def _logits(x: Tensor, weight: Tensor, scale: float, softcap: float) -> Tensor:
    """[n, hidden], [V, hidden] -> [n, V] in the accumulator's type"""
    logits = (x @ weight.T).to(accumulator(x.dtype))
    if scale != 1:
        logits = logits.mul_(scale)
    return logits.div_(softcap).tanh_().mul_(softcap) if softcap else logits


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, labels: Tensor, scale: float, softcap: float) -> tuple[Tensor, Tensor]:
        rows = max(1, LOGITS // len(weight))
        loss = x.new_zeros(len(x), dtype=accumulator(x.dtype))
        lse = torch.zeros_like(loss)
        for begin in range(0, len(x), rows):
            now = slice(begin, begin + rows)
            logits, label = _logits(x[now], weight, scale, softcap), labels[now]
            labelled = label >= 0
            lse[now] = logits.logsumexp(-1) * labelled
            loss[now] = lse[now] - logits.gather(-1, label.clamp(min=0).unsqueeze(-1)).squeeze(-1) * labelled
        ctx.save_for_backward(x, weight, labels, lse)
        ctx.rows, ctx.scale, ctx.softcap = rows, scale, softcap
        return loss, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        x, weight, labels, lse = ctx.saved_tensors
        labelled = labels >= 0
        of_loss, of_lse = grads[0] * labelled, grads[1] * labelled
        grad_x = torch.empty_like(x)
        grad_weight = torch.zeros_like(weight, dtype=accumulator(weight.dtype))
        for begin in range(0, len(x), ctx.rows):
            now = slice(begin, begin + ctx.rows)
            # d lse / d logits = p and d loss / d logits = p - onehot(label)
            logits = _logits(x[now], weight, ctx.scale, ctx.softcap)
            p = (logits - lse[now].unsqueeze(-1)).exp_() if ctx.softcap else logits.sub_(lse[now].unsqueeze(-1)).exp_()
            p.mul_((of_loss[now] + of_lse[now]).unsqueeze(-1))
            p.scatter_add_(-1, labels[now].clamp(min=0).unsqueeze(-1), -of_loss[now].unsqueeze(-1))
            if ctx.softcap:
                p.mul_(logits.div_(ctx.softcap).square_().neg_().add_(1))  # d c tanh(z / c) / d z
            if ctx.scale != 1:
                p.mul_(ctx.scale)
            grad_logits = p.to(x.dtype)  # [n, V]
            grad_x[now] = grad_logits @ weight
            grad_weight += grad_logits.T @ x[now]
        return grad_x, grad_weight.to(weight.dtype), None, None, None


def linear_cross_entropy(x: Tensor, weight: Tensor, labels: Tensor, scale: float, softcap: float) -> tuple[Tensor, Tensor]:
    """x [T, hidden], weight [V, hidden], labels [T] -> cross entropy [T] and logsumexp [T], both 0 without a label."""
    loss, lse = _LinearCrossEntropy.apply(x, weight, labels, scale, softcap)
    return loss, lse
