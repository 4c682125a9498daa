"""The norms of a model."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ltrain.kernels.norm import gated_rms_norm, rms_norm


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * w over the last axis, in float32 or wider (Zhang & Sennrich 2019); 1 + w where zero-centred."""

    def __init__(self, weight: nn.Parameter, eps: float, zero_centred: bool = False):
        super().__init__()
        self.weight, self.eps, self.zero_centred = weight, eps, zero_centred

    def forward(self, x: Tensor) -> Tensor:
        """x [..., width] -> [..., width]"""
        return rms_norm(x, self.weight, self.eps, float(self.zero_centred))

    def gated(self, x: Tensor, z: Tensor, gate: str) -> Tensor:
        """x, z [T, H, width] -> the norm of x times gate(z), in one pass on a GPU; not where it is zero-centred."""
        assert not self.zero_centred
        return gated_rms_norm(x, self.weight, z, self.eps, gate)


class GroupRMSNorm(nn.Module):
    """RMSNorm of each of some groups of a width on its own, with a weight for every number."""

    def __init__(self, weight: nn.Parameter, groups: int, eps: float):
        super().__init__()
        self.weight, self.groups, self.eps = weight, groups, eps

    def forward(self, x: Tensor) -> Tensor:
        """x [..., width] -> [..., width]"""
        wide = x.to(torch.promote_types(x.dtype, torch.float32)).unflatten(-1, (self.groups, -1))
        normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return (normed.flatten(-2) * self.weight).to(x.dtype)


class WeightlessNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) over the last axis, in float32 or wider."""

    def __init__(self, eps: float):
        super().__init__()
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """x [..., width] -> [..., width]"""
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)).to(x.dtype)


class LayerNorm(nn.Module):
    """(x - mean(x)) / sqrt(var(x) + eps) * w + b over the last axis (Ba et al. 2016)."""

    def __init__(self, weight: nn.Parameter, bias: nn.Parameter | None, eps: float):
        super().__init__()
        self.weight, self.bias, self.eps = weight, bias, eps

    def forward(self, x: Tensor) -> Tensor:
        """x [..., width] -> [..., width]"""
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.layer_norm(x, x.shape[-1:], self.weight.to(x.dtype), bias, self.eps)
