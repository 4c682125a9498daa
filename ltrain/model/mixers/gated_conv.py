"""A convolution between two gates."""

from torch import Tensor

from ltrain.kernels import short_conv
from ltrain.model.layers import LocalLayers
from ltrain.model.mixers.base import ExchangeNeed, Mixer
from ltrain.model.options import GatedConvOptions
from ltrain.model.recompute import cheap
from ltrain.model.sequence import Sequence


class GatedConv(Mixer):
    """W (C * conv(B * x)) with B, C and x projections of the input (LFM2, Liquid AI 2025). Its state is the convolution's last inputs."""

    options: GatedConvOptions
    entry = "input"

    def __init__(self, hidden: int, options: GatedConvOptions, layers: LocalLayers):
        super().__init__(hidden, options, layers)
        o = options
        self.input = layers.column(hidden, (o.inner, o.inner, o.inner), bias=o.bias)
        self.conv = layers.conv((o.inner,), o.conv_width)
        self.conv_bias = layers.column_bias((o.inner,)) if o.bias else None
        self.out = layers.output(o.inner, hidden, bias=o.bias)

    def _mix(self, b: Tensor, c: Tensor, x: Tensor, seq: Sequence) -> Tensor:
        return self._gated(seq.exchange.short_conv(b * x, self.conv, seq, None), c)

    def _gated(self, y: Tensor, c: Tensor) -> Tensor:
        return c * (y if self.conv_bias is None else y + self.conv_bias.to(y.dtype))

    def forward(self, x: Tensor, seq: Sequence) -> Tensor:
        y: Tensor = self.out(cheap(self._mix, *self.input(x), seq))
        return y

    def prefill(self, x: Tensor, seq: Sequence) -> tuple[Tensor, Tensor]:
        b, c, x = self.input(x)
        return self.out(self._mix(b, c, x, seq)), seq.exchange.last(b * x, seq, self.options.conv_width - 1)

    def decode(self, x: Tensor, state: Tensor, seq: Sequence) -> tuple[Tensor, Tensor]:
        b, c, x = self.input(x)
        y, state = short_conv.step(b * x, self.conv, state, activation=None)
        return self.out(self._gated(y, c)), state

    def flops(self, tokens: int, context: int) -> float:
        o = self.options
        return tokens * o.inner * (2 * 4 * self.hidden + 2 * o.conv_width + 2)

    def state_bytes(self, context: int, bytes_per_value: int = 2) -> int:
        return bytes_per_value * (self.options.conv_width - 1) * self.options.inner

    def exchanges(self, context: int) -> list[ExchangeNeed]:
        return [ExchangeNeed("halo", self.options.inner, reach=self.options.conv_width - 1)]


MIXER = GatedConv
