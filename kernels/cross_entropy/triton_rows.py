"""`reference.rows` on a GPU, in one pass over the products."""

from torch import Tensor

from ltrain.kernels.cross_entropy import triton_kernels as kernels
from ltrain.kernels.segments import plain_refusal, power_of_two

BLOCK = 16384  # logits of a token at a time: with 32 warps one token for each multiprocessor, so that their rows stay in the cache
PER_WARP = 512  # of these


def refusal(x: Tensor) -> str | None:
    """Why the kernel does not take these tensors, or None."""
    return plain_refusal(x)


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
    """See `reference.rows`; products, labels, lse and target are contiguous."""
    if not (reads or learns):
        return
    vocab = products.shape[1]
    block = min(BLOCK, power_of_two(vocab))
    kernels.rows[(len(products),)](
        products,
        labels,
        lse,
        target,
        vocab,
        first,
        total,
        z_loss,
        factor,
        scale,
        softcap,
        SOFTCAP=bool(softcap),
        READS=reads,
        LEARNS=learns,
        BLOCK=block,
        num_warps=max(1, min(32, block // PER_WARP)),
    )
