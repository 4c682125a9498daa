"""Mamba, the first."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ltrain.kernels import elementwise_recurrence as kernels
from ltrain.kernels import short_conv
from ltrain.kernels.recurrence import Selective
from ltrain.model.layers import LocalLayers, ParamLayout, constant
from ltrain.model.mixers.base import ExchangeNeed, Mixer
from ltrain.model.mixers.decay import inverse_softplus_step
from ltrain.model.options import MambaOptions
from ltrain.model.recompute import cheap
from ltrain.model.sequence import Sequence


@dataclass
class MambaState:
    conv: Tensor  # [N, W - 1, C]: the convolution's last inputs
    recurrent: Tensor  # [N, C, S], float32 or wider


def s4d_real(tensor: Tensor, generator: torch.Generator) -> None:
    """A_log [C, S]: the logarithms of 1..S (S4D-Real, Gu et al. 2022)."""
    tensor.copy_(torch.arange(1, tensor.shape[1] + 1).log().expand_as(tensor))


class Mamba(Mixer):
    """y = (scan(x) + D x) SiLU(z), x behind a convolution with SiLU; step, B and C of the scan are projected from x (Gu & Dao 2023).

    Channels are sharded over tensor ranks; what step, B and C are made of sums over all of them.
    """

    options: MambaOptions
    entry = "input"
    gather: Callable[[Tensor], Tensor]

    def __init__(self, hidden: int, options: MambaOptions, layers: LocalLayers):
        super().__init__(hidden, options, layers)
        o = options
        self.gather = layers.gather
        self.input = layers.column(hidden, (o.inner, o.inner), bias=o.bias)
        self.conv = layers.conv((o.inner,), o.conv_width)
        self.conv_bias = layers.column_bias((o.inner,)) if o.conv_bias else None
        self.select = layers.row(o.inner, o.step_rank + 2 * o.states)
        self.step = layers.column(o.step_rank, (o.inner,))
        self.dt_bias = layers.per_head(o.inner, inverse_softplus_step)
        wide = torch.promote_types(layers.dtype or torch.float32, torch.float32)
        self.A_log = layers.parameter(ParamLayout((o.inner, o.states), s4d_real, axis=0, decay=False), wide)
        self.D = layers.per_head(o.inner, constant(1.0))

        def norm(width: int) -> nn.Module | None:
            if o.inner_norm == "none":
                return None
            eps = o.inner_norm_eps or layers.eps
            return layers.weightless_norm(eps) if o.inner_norm == "weightless" else layers.latent_norm(width, eps)

        self.step_norm, self.B_norm, self.C_norm = norm(o.step_rank), norm(o.states), norm(o.states)
        self.out = layers.output(o.inner, hidden, bias=o.bias)

    def _activated(self, x: Tensor) -> Tensor:
        return F.silu(x if self.conv_bias is None else x + self.conv_bias.to(x.dtype))

    def _select(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """x [T, C] -> the step [T, C] in float32 or wider, the rate [C, S], B and C [T, S]"""
        o = self.options
        parts = self.select(x).split((o.step_rank, o.states, o.states), dim=-1)  # [T / tensor, ...]
        step, B, C = (part if norm is None else norm(part) for part, norm in zip(parts, (self.step_norm, self.B_norm, self.C_norm), strict=True))
        (step,) = self.step(step)
        return F.softplus(step.to(self.dt_bias.dtype) + self.dt_bias), self.A_log.exp(), self.gather(B), self.gather(C)

    def _output(self, y: Tensor, x: Tensor, z: Tensor) -> Tensor:
        """y, x and z [T, C] -> [T, hidden]"""
        return self.out(cheap(self._gated, y, x, z))

    def _gated(self, y: Tensor, x: Tensor, z: Tensor) -> Tensor:
        return (y + (self.D * x).to(y.dtype)) * F.silu(z)

    def _conv(self, x: Tensor, seq: Sequence) -> Tensor:
        return self._activated(seq.exchange.short_conv(x, self.conv, seq, None))

    def forward(self, x: Tensor, seq: Sequence) -> Tensor:
        x, z = self.input(x)
        x = cheap(self._conv, x, seq)
        return self._output(seq.exchange.recurrence(Selective(x, *self._select(x)), seq), x, z)

    def prefill(self, x: Tensor, seq: Sequence) -> tuple[Tensor, MambaState]:
        x, z = self.input(x)
        conv = seq.exchange.last(x, seq, self.options.conv_width - 1)
        x = self._conv(x, seq)
        y, recurrent = seq.exchange.final_recurrence(Selective(x, *self._select(x)), seq)
        return self._output(y, x, z), MambaState(conv, recurrent)

    def decode(self, x: Tensor, state: MambaState, seq: Sequence) -> tuple[Tensor, MambaState]:
        x, z = self.input(x)
        x, conv = short_conv.step(x, self.conv, state.conv, activation=None)
        x = self._activated(x)
        y, recurrent = kernels.step(x, *self._select(x), state.recurrent)
        return self._output(y, x, z), MambaState(conv, recurrent)

    def flops(self, tokens: int, context: int) -> float:
        """The scan's step takes 7 for each number of the state: two products for its decay and its write each, and the reading."""
        o = self.options
        projections = self.hidden * 3 * o.inner + o.inner * (o.step_rank + 2 * o.states) + o.step_rank * o.inner
        return tokens * (2 * projections + 2 * o.conv_width * o.inner + 7 * o.inner * o.states)

    def state_bytes(self, context: int, bytes_per_value: int = 2) -> int:
        """Independent of the context: the state in float32 and the convolution's last inputs."""
        o = self.options
        return 4 * o.inner * o.states + bytes_per_value * (o.conv_width - 1) * o.inner

    def exchanges(self, context: int) -> list[ExchangeNeed]:
        """One halo, and the maps of spans: two numbers for each of the state."""
        o = self.options
        size = o.inner * o.states
        return [ExchangeNeed("halo", o.inner, reach=o.conv_width - 1), ExchangeNeed("scan", size, map=size)]


MIXER = Mamba
