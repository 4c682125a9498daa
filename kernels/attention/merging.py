"""Parts of attention over the same queries put together in place: on a GPU in one pass, which reads and writes only the rows that a part has."""

import torch
from torch import Tensor

from ltrain.kernels.attention.pairs import merge
from ltrain.kernels.segments import ceil_div, power_of_two, wants_triton

ROWS = {64: 32, 128: 16, 256: 8}  # of one head each, for a program, by the width of heads up to which they hold


def merge_into(out: Tensor, lse: Tensor, part: Tensor, part_lse: Tensor) -> None:
    """out [T, H, Dv] and lse [T, H], which is -inf where no key has been seen, become those over the keys of both sides, as `merge` has them.

    out is rounded to its type each time: 16 bits are enough for one part, as the sum is rounded to them in the end.
    part, part_lse: over other keys; -inf where a query sees none of these, and then the row of `part` may hold anything finite.
    """
    width = out.shape[2]
    if not wants_triton("auto", out) or lse.dtype != torch.float32 or width > max(ROWS):
        merged, merged_lse = merge(out, lse, part, part_lse)
        out.copy_(merged)
        lse.copy_(merged_lse)
    elif out.numel():
        launch(out, lse, part, part_lse)


def launch(out: Tensor, lse: Tensor, part: Tensor, part_lse: Tensor) -> None:
    """By the Triton program: lse float32."""
    from ltrain.kernels.attention.triton_kernels.merge import merge as program

    part = part if part.stride(2) == 1 else part.contiguous()
    width, rows = out.shape[2], out.shape[0] * out.shape[1]
    size = next(size for most, size in ROWS.items() if width <= most)
    steps = [x.stride(axis) for x in (out, lse, part, part_lse) for axis in (0, 1)]
    program[(ceil_div(rows, size),)](
        out, lse, part, part_lse, rows, *steps, H=out.shape[1], D=width, BD=max(16, power_of_two(width)), ROWS=size, num_warps=4
    )
