"""RWKV-7's time mixing."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from ltrain.kernels.linear_recurrence.generalised import step
from ltrain.kernels.recurrence import GeneralisedDelta
from ltrain.model.layers import Init, LocalLayers, ParamLayout, constant, uniform
from ltrain.model.mixers.base import ExchangeNeed, Mixer
from ltrain.model.options import RWKV7Options
from ltrain.model.sequence import Sequence

Inputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]  # what the recurrence takes: r, w, k, v, a * kappa, kappa
VALUES = "values"  # in Sequence.shared: the last source's [T, H, V]
FASTEST = math.exp(-0.5)  # minus the log of the strongest decay


@dataclass
class RWKV7State:
    last: Tensor  # [N / tensor, hidden]: the input of each document's last token
    recurrent: Tensor  # [N, H, K, V], float32 or wider


class RWKV7(Mixer):
    """S_t = (diag(w_t) - (a_t * kappa_t) kappa_t^T) S_{t-1} + k_t v_t^T, y_t = S_t^T r_t (Peng et al. 2025, arXiv 2503.14456, section 4).

    Everything is projected from mixtures of a token's input and the one before it. w_t = exp(-e^-0.5 sigmoid(.)), the decay of each channel;
    a_t, the in-context learning rate; kappa_t, the key that is removed, of unit length.
    """

    options: RWKV7Options
    shift: Callable[[Tensor, Sequence], Tensor]

    def __init__(self, hidden: int, options: RWKV7Options, layers: LocalLayers):
        super().__init__(hidden, options, layers)
        o = options
        self.heads, self.shift = layers.heads(o.heads, "heads"), layers.shift
        width = o.heads * o.head_dim

        def of_channels(init: Init) -> nn.Parameter:
            return layers.per_head(width, init)

        mixtures = 6  # of receptance, decay, key, value, learning rate and gate
        self.mu = layers.parameter(ParamLayout((mixtures, hidden), uniform(0.0, 1.0), partial_gradient=True, decay=False))
        self.receptance, self.key, self.value = (layers.column(hidden, (width,)) for _ in range(3))
        self.decay_down, self.decay_up = layers.whole(hidden, o.decay_rank), layers.column(o.decay_rank, (width,))
        self.rate_down, self.rate_up = layers.whole(hidden, o.rate_rank), layers.column(o.rate_rank, (width,))
        self.gate_down, self.gate_up = layers.whole(hidden, o.gate_rank), layers.column(o.gate_rank, (width,))
        self.decay_bias, self.rate_bias = of_channels(uniform(-6.0, 1.0)), of_channels(constant(0.0))
        if o.value_mix == "mix":
            self.value_down, self.value_up = layers.whole(hidden, o.value_rank), layers.column(o.value_rank, (width,))
            self.value_bias = of_channels(constant(1.0))
        self.removal, self.replacement, self.bonus = of_channels(constant(0.85)), of_channels(constant(1.0)), of_channels(constant(0.0))
        self.norm_weight, self.norm_bias = of_channels(constant(1.0)), of_channels(constant(0.0))
        self.out = layers.output(width, hidden)

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1))

    def _project(self, x: Tensor, before: Tensor, seq: Sequence) -> tuple[Inputs, Tensor]:
        """x and the inputs before [T / tensor, hidden] -> what the recurrence takes, each [T, H, K] or [T, H, V], and the gate [T, H * V]"""
        o = self.options
        xr, xw, xk, xv, xa, xg = (x + (before - x) * mu for mu in self.mu.to(x.dtype))
        (r,), (k,), (v,) = self.receptance(xr), self.key(xk), self.value(xv)
        (w,), (a,) = self.decay_up(self.decay_down(xw).tanh()), self.rate_up(self.rate_down(xa))
        (gate,) = self.gate_up(self.gate_down(xg).sigmoid())
        wide = self.decay_bias.dtype
        w = -FASTEST * (w.to(wide) + self.decay_bias).sigmoid()
        a = (a.to(wide) + self.rate_bias).sigmoid()
        k = k.to(wide)
        kappa = F.normalize(self._heads(k * self.removal), dim=-1)
        k = k * (1 + (a - 1) * self.replacement)
        v = self._heads(v)
        if o.value_mix == "source":
            seq.shared[VALUES] = v
        elif o.value_mix == "mix":
            (share,) = self.value_up(self.value_down(xv))
            share = self._heads((share.to(wide) + self.value_bias).sigmoid())
            source = seq.tape.keep(lambda: seq.shared[VALUES])  # a later layer's will stand there when this one is made again
            v = (v + (source - v) * share).to(v.dtype)
        return (self._heads(r), self._heads(w), self._heads(k), v, self._heads(a) * kappa, kappa), gate

    def _output(self, y: Tensor, inputs: Inputs, gate: Tensor) -> Tensor:
        """y [T, H, V] -> [T, hidden]: a LayerNorm inside each head, each token's own value by how its receptance meets its key, the gate"""
        r, _, k, v, _, _ = inputs
        normed = F.layer_norm(y.to(self.norm_weight.dtype), y.shape[-1:], eps=self.options.norm_eps).flatten(1) * self.norm_weight + self.norm_bias
        own = (r * k * self._heads(self.bonus)).sum(-1, keepdim=True) * v
        return self.out(((normed + own.flatten(1)).to(gate.dtype)) * gate)

    def forward(self, x: Tensor, seq: Sequence) -> Tensor:
        inputs, gate = self._project(x, self.shift(x, seq), seq)
        return self._output(seq.exchange.recurrence(GeneralisedDelta(*inputs), seq), inputs, gate)

    def prefill(self, x: Tensor, seq: Sequence) -> tuple[Tensor, RWKV7State]:
        inputs, gate = self._project(x, self.shift(x, seq), seq)
        y, recurrent = seq.exchange.final_recurrence(GeneralisedDelta(*inputs), seq)
        return self._output(y, inputs, gate), RWKV7State(seq.exchange.last_hidden(x, seq), recurrent)

    def decode(self, x: Tensor, state: RWKV7State, seq: Sequence) -> tuple[Tensor, RWKV7State]:
        inputs, gate = self._project(x, state.last, seq)
        y, recurrent = step(*inputs, state.recurrent)
        return self._output(y, inputs, gate), RWKV7State(x, recurrent)

    def flops(self, tokens: int, context: int) -> float:
        """The recurrence token by token: 2 K V each to look up, to remove, to write and to read."""
        o = self.options
        width = o.heads * o.head_dim
        ranks = o.decay_rank + o.rate_rank + o.gate_rank + (o.value_rank if o.value_mix == "mix" else 0)
        return tokens * (2 * (4 * self.hidden * width + ranks * (self.hidden + width)) + 8 * width * o.head_dim)

    def state_bytes(self, context: int, bytes_per_value: int = 2) -> int:
        """Independent of the context: the recurrent state in float32 and the last input."""
        return 4 * self.options.heads * self.options.head_dim**2 + bytes_per_value * self.hidden

    def exchanges(self, context: int) -> list[ExchangeNeed]:
        """The input of the token before, and the maps of spans."""
        size = self.options.heads * self.options.head_dim**2
        return [ExchangeNeed("halo", self.hidden, reach=1), ExchangeNeed("scan", size, map=size)]


MIXER = RWKV7
