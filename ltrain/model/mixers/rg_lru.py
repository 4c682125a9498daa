"""Griffin's recurrent block."""

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ltrain.kernels import short_conv
from ltrain.kernels.recurrence import Elementwise
from ltrain.model.layers import LocalLayers, ParamLayout, constant, normal
from ltrain.model.mixers.base import ExchangeNeed, Mixer
from ltrain.model.options import RGLRUOptions
from ltrain.model.recompute import cheap
from ltrain.model.sequence import Sequence

SHARPNESS = 8.0  # the paper's c


@dataclass
class RGLRUState:
    conv: Tensor  # [N, W - 1, C]: the convolution's last inputs
    recurrent: Tensor  # [N, C], float32 or wider


def slow_decays(tensor: Tensor, generator: torch.Generator) -> None:
    """Lambda [C]: a^c with the gate open is uniform in 0.9..0.999 (De et al. 2024, section 2.4)."""
    tensor.uniform_(0.9, 0.999, generator=generator)
    tensor.copy_(torch.expm1(-tensor.log() / SHARPNESS).log())


class _BoundedRoot(torch.autograd.Function):
    """sqrt(x), whose derivative is kept below 1000: near a decay of 1 it has no bound."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.sqrt()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return grads[0] / (4 * x).clamp(min=1e-6).sqrt()


class RGLRU(Mixer):
    """out(GELU(y) * rglru(conv(x))), x and y projected from the input (Griffin, De et al. 2024).

    h_t = a_t h_{t-1} + sqrt(1 - a_t^2) i_t x_t with a_t = exp(-8 softplus(Lambda) r_t); the gates r_t and i_t are sigmoids of products
    inside blocks of channels. At a document's first token a_t is 0.
    """

    options: RGLRUOptions
    entry = "input"

    def __init__(self, hidden: int, options: RGLRUOptions, layers: LocalLayers):
        super().__init__(hidden, options, layers)
        o = options
        width = o.inner // o.blocks
        self.blocks = layers.heads(o.blocks, "blocks")
        self.input = layers.column(hidden, (o.inner, o.inner), bias=True)
        self.conv = layers.conv((o.inner,), o.conv_width)
        self.conv_bias = layers.column_bias((o.inner,))

        def gate() -> tuple[Any, Any]:
            weight = ParamLayout((o.blocks, width, width), normal(1 / math.sqrt(width)), axis=0)
            return layers.parameter(weight), layers.parameter(ParamLayout((o.blocks, width), constant(0.0), axis=0, decay=False))

        self.input_gate, self.input_gate_bias = gate()  # used as x @ W
        self.decay_gate, self.decay_gate_bias = gate()
        self.decay = layers.per_head(o.inner, slow_decays)  # Lambda
        self.out = layers.output(o.inner, hidden, bias=True)

    def _gates(self, x: Tensor, first: Tensor) -> tuple[Tensor, Tensor]:
        """x [T, C] behind the convolution, first [T] -> a and what is added [T, C], in float32 or wider."""
        blocks = x.unflatten(-1, (self.blocks, -1))  # [T, blocks, width]

        def gate(weight: Tensor, bias: Tensor) -> Tensor:
            return (torch.einsum("tbi,bij->tbj", blocks, weight) + bias).flatten(1).sigmoid()

        log_a = -SHARPNESS * gate(self.decay_gate, self.decay_gate_bias).to(self.decay.dtype) * F.softplus(self.decay)
        root: Tensor = _BoundedRoot.apply(-torch.expm1(2 * log_a))
        added = (x * gate(self.input_gate, self.input_gate_bias)).to(log_a.dtype) * torch.where(first.unsqueeze(-1), 1.0, root)
        return log_a.exp().masked_fill(first.unsqueeze(-1), 0.0), added

    def _conv(self, x: Tensor, seq: Sequence) -> Tensor:
        return seq.exchange.short_conv(x, self.conv, seq, None) + self.conv_bias.to(x.dtype)

    def _output(self, h: Tensor, y: Tensor) -> Tensor:
        """h and y [T, C] -> [T, hidden]"""
        return self.out(cheap(self._gated, h, y))

    def _gated(self, h: Tensor, y: Tensor) -> Tensor:
        return h.to(y.dtype) * F.gelu(y, approximate="tanh")

    def _recurrence(self, x: Tensor, seq: Sequence) -> Elementwise:
        return Elementwise(*cheap(self._gates, x, seq.positions == 0))

    def forward(self, x: Tensor, seq: Sequence) -> Tensor:
        x, y = self.input(x)
        return self._output(seq.exchange.recurrence(self._recurrence(cheap(self._conv, x, seq), seq), seq), y)

    def prefill(self, x: Tensor, seq: Sequence) -> tuple[Tensor, RGLRUState]:
        x, y = self.input(x)
        conv = seq.exchange.last(x, seq, self.options.conv_width - 1)
        h, recurrent = seq.exchange.final_recurrence(self._recurrence(self._conv(x, seq), seq), seq)
        return self._output(h, y), RGLRUState(conv, recurrent)

    def decode(self, x: Tensor, state: RGLRUState, seq: Sequence) -> tuple[Tensor, RGLRUState]:
        x, y = self.input(x)
        x, conv = short_conv.step(x, self.conv, state.conv, activation=None)
        a, added = self._gates(x + self.conv_bias.to(x.dtype), seq.positions == 0)
        h = a * state.recurrent + added
        return self._output(h, y), RGLRUState(conv, h)

    def flops(self, tokens: int, context: int) -> float:
        o = self.options
        projections = 3 * self.hidden * o.inner + 2 * o.inner * (o.inner // o.blocks)
        return tokens * (2 * projections + (2 * o.conv_width + 2) * o.inner)

    def state_bytes(self, context: int, bytes_per_value: int = 2) -> int:
        """Independent of the context: the state in float32 and the convolution's last inputs."""
        return 4 * self.options.inner + bytes_per_value * (self.options.conv_width - 1) * self.options.inner

    def exchanges(self, context: int) -> list[ExchangeNeed]:
        """One halo, and the maps of spans: two numbers for each channel."""
        inner = self.options.inner
        return [ExchangeNeed("halo", inner, reach=self.options.conv_width - 1), ExchangeNeed("scan", inner, map=inner)]


MIXER = RGLRU
