"""Several residual streams: manifold-constrained hyper-connections (Zhu et al. 2024; Xie et al. 2025).

The streams of a token lie beside each other, [T, n * hidden], between layers and across pipeline cuts.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ltrain.model.layers import Init, LocalLayers, ParamLayout, constant, normal
from ltrain.model.options import StreamOptions


def spread(x: Tensor, count: int) -> Tensor:
    """x [T, hidden] -> [T, count * hidden]: each stream begins with the same."""
    return x if count == 1 else x.repeat(1, count)


def join(x: Tensor, y: Tensor, give: Tensor, between: Tensor) -> Tensor:
    """Streams x [T, n * hidden] mixed by between [T, n, n] (from, to), and y [T, hidden] added to each by give [T, n]."""
    streams = x.unflatten(-1, (give.shape[-1], -1))  # [T, n, hidden]
    return (between.mT @ streams + give.unsqueeze(-1) * y.unsqueeze(-2)).flatten(-2)


class _Weights(nn.Module):
    """Of each token, out of all its streams: scale * (W norm(x)) + base, in float32 or wider."""

    def __init__(self, hidden: int, count: int, parts: tuple[int, ...], base: Init, layers: LocalLayers):
        super().__init__()
        self.count, self.parts, self.eps = count, parts, layers.eps
        width = sum(parts)
        self.weight = layers.parameter(ParamLayout((width, count * hidden), normal(layers.std), partial_gradient=True))
        self.base = layers.parameter(ParamLayout((width,), base, partial_gradient=True, decay=False))
        self.scale = layers.parameter(ParamLayout((len(parts),), constant(1.0), partial_gradient=True, decay=False))

    def forward(self, x: Tensor) -> list[Tensor]:
        """x [T, n * hidden] -> one tensor [T, part] per part"""
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        raw = F.linear(normed, self.weight.to(wide.dtype)).split(self.parts, dim=-1)
        base = self.base.to(wide.dtype).split(self.parts)
        return [r * s + b for r, s, b in zip(raw, self.scale.to(wide.dtype), base, strict=True)]


class Connection(nn.Module):
    """What one mixer or feed-forward reads of the streams, gives to each, and how they go on beside it."""

    def __init__(self, hidden: int, options: StreamOptions, layers: LocalLayers):
        super().__init__()
        self.options, n = options, options.count
        self.weights = _Weights(hidden, n, (n, n, n * n), constant(0.0), layers)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x [T, n * hidden] -> what is read [T, hidden], weights of what is given [T, n], and between streams (from, to) [T, n, n]"""
        n, eps = self.options.count, self.options.eps
        read, give, between = self.weights(x)
        matrix = between.unflatten(-1, (n, n)).softmax(-1) + eps
        matrix = matrix / (matrix.sum(-2, keepdim=True) + eps)
        for _ in range(self.options.iterations - 1):
            matrix = matrix / (matrix.sum(-1, keepdim=True) + eps)
            matrix = matrix / (matrix.sum(-2, keepdim=True) + eps)
        return _taken(x, read.sigmoid() + eps), (2 * give.sigmoid()).to(x.dtype), matrix.to(x.dtype)

    def flops(self, tokens: int) -> float:
        """Forward floating-point operations for `tokens` tokens."""
        n = self.options.count
        return 2 * tokens * (self.weights.weight.numel() + (n * n + 2 * n) * self.weights.weight.shape[1] // n)


class Gathered(nn.Module):
    """One stream out of several, which the final norm reads."""

    def __init__(self, hidden: int, options: StreamOptions, layers: LocalLayers):
        super().__init__()
        self.eps = options.eps
        self.weights = _Weights(hidden, options.count, (options.count,), constant(0.0), layers)

    def forward(self, x: Tensor) -> Tensor:
        """x [T, n * hidden] -> [T, hidden]"""
        return _taken(x, self.weights(x)[0].sigmoid() + self.eps)


def _taken(x: Tensor, weights: Tensor) -> Tensor:
    """The weighted sum of streams: x [T, n * hidden], weights [T, n] -> [T, hidden] in x's type."""
    streams = x.unflatten(-1, (weights.shape[-1], -1))
    return (weights.unsqueeze(-1) * streams).sum(-2).to(x.dtype)
