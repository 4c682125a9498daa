"""Rows in FP8 for the way between ranks: e4m3 numbers with a float32 scale for each 128 of them (DeepSeek-V3's blocks, DeepSeek-AI 2024).

What a rank has itself stays as it is, gradients travel as they are and pass the rounding unchanged.
"""

import torch
from torch import Tensor

BLOCK = 128
LARGEST = torch.finfo(torch.float8_e4m3fn).max


def width(channels: int) -> int:
    """Bytes of a packed row of so many numbers."""
    return channels + 4 * -(-channels // BLOCK)


def pack(x: Tensor) -> Tensor:
    """x [n, C] -> [n, width(C)] uint8"""
    rows, channels = x.shape
    blocks = torch.nn.functional.pad(x.float(), (0, -channels % BLOCK)).view(rows, -(-channels // BLOCK), BLOCK)
    scales = blocks.abs().amax(-1).clamp_(min=torch.finfo(torch.float32).tiny * LARGEST) / LARGEST
    numbers = (blocks / scales.unsqueeze(-1)).flatten(1)[:, :channels].to(torch.float8_e4m3fn)
    return torch.cat((numbers.view(torch.uint8), scales.reshape(-1).view(torch.uint8).view(rows, 4 * scales.shape[1])), dim=1)


def unpack(packed: Tensor, channels: int, dtype: torch.dtype) -> Tensor:
    """[n, width(C)] uint8 -> [n, C] in `dtype`"""
    numbers, scales = packed.split([channels, packed.shape[1] - channels], dim=1)
    # a copy: the bytes of one row alone need not lie where a float32 may
    of_blocks = scales.flatten().clone().view(torch.float32).view(len(packed), scales.shape[1] // 4, 1)
    whole = torch.nn.functional.pad(numbers.contiguous().view(torch.float8_e4m3fn).float(), (0, -channels % BLOCK))
    return (whole.view(len(packed), -(-channels // BLOCK), BLOCK) * of_blocks).flatten(1)[:, :channels].to(dtype)
