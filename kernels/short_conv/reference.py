"""The short convolution token by token."""

from itertools import pairwise

import torch
from torch import Tensor

from ltrain.kernels.segments import accumulator


def short_conv(x: Tensor, weight: Tensor, bounds: list[int], initial_state: Tensor) -> tuple[Tensor, Tensor]:
    """-> the convolution [T, C] before its activation, in the accumulator's type, and the last W - 1 inputs of each segment [N, W - 1, C]"""
    wide, width = accumulator(x.dtype), weight.shape[1]
    outputs, states = [x[:0].to(wide)], [initial_state[:0]]
    for n, (begin, end) in enumerate(pairwise(bounds)):
        inputs = torch.cat([initial_state[n], x[begin:end]])  # [W - 1 + tokens, C]
        for t in range(end - begin):
            outputs.append((inputs[t : t + width].to(wide) * weight.T.to(wide)).sum(0, keepdim=True))
        states.append(inputs[end - begin :].unsqueeze(0))
    return torch.cat(outputs), torch.cat(states)
