"""Cross entropy of a linear head with three matrix products: the gradient is made in the forward, where the logits of a chunk of tokens
still exist, and takes their memory.

That a chunk's gradient is not made from logits made again is as in Liger Kernel (Hsu et al. 2024). Only the sum over tokens can be
differentiated so: the weight's gradient is a sum over tokens, which no later weight of a token could enter.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ltrain.kernels.cross_entropy import reference
from ltrain.kernels.segments import accumulator

CHUNK = 2**30  # bytes of the logits held at a time by the Triton kernel; few chunks: each reads and writes the whole weight's gradient
CHUNK_BESIDE_SUM = 2**29  # where the sum of the weight's gradient takes twice the weight's memory besides
CHUNK_REFERENCE = 2**26  # of plain torch, which makes wide copies of them
# Tokens of which a chunk is a multiple where it can be. The gradient of x has few tiles, of 128 x 256 numbers: so many tokens have 128 at a width
# of 4096, about one for each of an H100's or H200's 132 multiprocessors. Below, no product's tile is partly empty.
UNITS = 1024, 128
NARROWED = 2**24  # numbers of the weight's gradient rounded at a time


class Shards(Protocol):
    """What the ranks that share the vocabulary out say to each other. Every rank holds as many rows of the weight, from `first` on."""

    first: int
    count: int  # of ranks

    def gather(self, x: Tensor) -> Tensor:
        """x [...] of every rank -> [count, ...]"""


class Task(NamedTuple):
    """All about an objective but its tensors; see `linear_cross_entropy_sum`."""

    z_loss: float
    scale: float
    softcap: float
    factor: float
    shards: Shards | None
    rows: Callable[..., None]  # `reference.rows` or one that does the same
    learns: bool  # whether the caller keeps gradients: none are kept inside an autograd function


def chunk_rows(tokens: int, row: int, most: int) -> int:
    """How many tokens at a time: about the same in each chunk, and no more than `most` bytes of logits, of `row` bytes a token."""
    limit = max(1, most // row)
    unit = next((unit for unit in UNITS if unit <= limit), 1)
    limit -= limit % unit
    chunks = max(1, -(-tokens // limit))
    return max(1, -(-tokens // (chunks * unit)) * unit)


class _WeightGradient:
    """The sum over chunks of grad_logits^T x [V, hidden], in float32 or wider."""

    def __init__(self, weight: Tensor, into: Tensor | None):
        self.sum = torch.empty_like(weight, dtype=accumulator(weight.dtype), memory_format=torch.contiguous_format) if into is None else into
        self.started = into is not None

    def add(self, grad_logits: Tensor, x: Tensor) -> None:
        left, wide = grad_logits.T, self.sum.dtype
        if x.dtype == wide:
            self.sum.addmm_(left, x, beta=int(self.started))  # beta 0: what the memory held is not read
        elif not x.is_cuda:  # no product of half precision there adds to float32
            product = left @ x
            self.sum.add_(product) if self.started else self.sum.copy_(product)
        elif self.started:
            torch.addmm(self.sum, left, x, out_dtype=wide, out=self.sum)
        else:
            torch.mm(left, x, out_dtype=wide, out=self.sum)
        self.started = True


def _narrowed(wide: Tensor, dtype: torch.dtype, factor: Tensor) -> Tensor:
    """wide x factor in `dtype`, in the front part of the memory of `wide`, which is lost."""
    if wide.dtype == dtype:
        return wide.mul_(factor)
    flat = wide.view(-1)
    result = flat.view(dtype)[: len(flat)]
    part = result.new_empty(min(NARROWED, len(flat)))
    for begin in range(0, len(flat), NARROWED):
        now = flat[begin : begin + NARROWED]
        torch.mul(now, factor, out=part[: len(now)])
        # narrower numbers end where these wide ones do, or before: none that is still to be read is overwritten
        result[begin : begin + len(now)] = part[: len(now)]
    return result.view(wide.shape)


class _LinearCrossEntropySum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, labels: Tensor, into: Tensor | None, task: Task) -> tuple[Tensor, Tensor, Tensor]:
        of_x, of_weight = (task.learns and needed for needed in ctx.needs_input_grad[:2])
        vocab, shards, options = len(weight), task.shards, task._asdict()
        first, total = (0, vocab) if shards is None else (shards.first, shards.count * vocab)
        options = {name: options[name] for name in ("z_loss", "factor", "scale", "softcap")} | {"first": first, "total": total}
        learns = of_x or of_weight
        most = CHUNK_REFERENCE
        if task.rows is not reference.rows:
            most = CHUNK_BESIDE_SUM if of_weight and into is None else CHUNK
        rows = chunk_rows(len(x), vocab * x.element_size(), most)

        lse = x.new_zeros(len(x), dtype=accumulator(x.dtype))
        target = torch.zeros_like(lse)
        grad_x = torch.empty_like(x) if of_x else None
        grad_weight = _WeightGradient(weight, into) if of_weight else None
        memory = x.new_empty(min(rows, len(x)), vocab)
        for begin in range(0, len(x), rows):
            now = slice(begin, begin + rows)
            part, label = x[now], labels[now]
            products = memory[: len(part)]
            torch.mm(part, weight.T, out=products)
            task.rows(products, label, lse[now], target[now], reads=True, learns=learns and shards is None, **options)
            if shards is not None:
                both = shards.gather(torch.stack((lse[now], target[now])))  # [ranks, 2, n]
                lse[now] = both[:, 0].logsumexp(0).where(label >= 0, 0.0)
                target[now] = both[:, 1].sum(0)
                if learns:
                    task.rows(products, label, lse[now], target[now], reads=False, learns=True, **options)
            if grad_x is not None:
                torch.mm(products, weight, out=grad_x[now])
            if grad_weight is not None:
                grad_weight.add(products, part)
        del memory
        if grad_weight is not None and not grad_weight.started:  # no tokens
            grad_weight.sum.zero_()

        ctx.dtype, ctx.exactly_one, ctx.differentiated = weight.dtype, of_weight and into is not None, False
        ctx.save_for_backward(grad_x, None if grad_weight is None or into is not None else grad_weight.sum)
        loss, squares = (lse - target).sum(), lse.square().sum()
        ctx.mark_non_differentiable(loss, squares)
        return (loss + task.z_loss * squares) * task.factor, loss, squares

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        if ctx.differentiated:  # the weight's gradient was added, or its memory rounded into, once
            raise RuntimeError("the gradients of this objective are made once, in its forward: call that again to differentiate it again")
        ctx.differentiated = True
        grad_x, grad_weight = ctx.saved_tensors
        if ctx.exactly_one:  # seen on the device: a GPU is not waited for
            torch._assert_async(grads[0] == 1, "weight_grad already has the gradient of the objective itself: differentiate no multiple of it")
        elif grad_x is not None:
            grad_x.mul_(grads[0])
        return grad_x, None if grad_weight is None else _narrowed(grad_weight, ctx.dtype, grads[0]), None, None, None


def linear_cross_entropy_sum(x: Tensor, weight: Tensor, labels: Tensor, into: Tensor | None, task: Task) -> tuple[Tensor, Tensor, Tensor]:
    """x [T, hidden], weight [V, hidden], labels [T] -> the objective, the sum of the cross entropies and that of the squared logsumexps."""
    objective, loss, squares = _LinearCrossEntropySum.apply(x, weight, labels, into, task)
    return objective, loss, squares
