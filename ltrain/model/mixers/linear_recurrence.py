"""Linear recurrences with a matrix state: Gated DeltaNet, DeltaNet, gated and plain linear attention."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ltrain.kernels import linear_recurrence as kernels
from ltrain.kernels import short_conv
from ltrain.model.layers import LocalLayers
from ltrain.model.mixers.base import ExchangeNeed, Mixer
from ltrain.model.options import LinearRecurrenceOptions
from ltrain.model.sequence import Sequence


@dataclass
class RecurrentState:
    conv: Tensor  # [N, W - 1, C]: the convolution's last inputs
    recurrent: Tensor  # [N, H, K, V], float32 or wider


def log_uniform_decay(tensor: Tensor, generator: torch.Generator) -> None:
    """A_log: the logarithm of a rate drawn uniformly from 1..16 (Mamba-2, Dao & Gu 2024)."""
    tensor.uniform_(1, 16, generator=generator).log_()


def inverse_softplus_step(tensor: Tensor, generator: torch.Generator) -> None:
    """dt_bias: softplus of it is log-uniform in 0.001..0.1 (Mamba-2)."""
    tensor.uniform_(math.log(1e-3), math.log(0.1), generator=generator).exp_()
    tensor.add_((-torch.expm1(-tensor)).log_())


def l2_normalise(x: Tensor) -> Tensor:
    """x / sqrt(sum(x^2) + 1e-6) over the last axis, in float32 or wider."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return (wide * torch.rsqrt(wide.square().sum(-1, keepdim=True) + 1e-6)).to(x.dtype)


class LinearRecurrence(Mixer):
    """S_t = a_t S_{t-1} + update, y_t = S_t^T q_t, one K x V state per value head.

    The update is k v^T (add) or beta k (v - (a_t S_{t-1})^T k)^T (delta, Schlag et al. 2021; Yang et al. 2024); log a_t is
    -exp(A_log) softplus(a + dt_bias), or 0. q, k and v pass a short convolution with SiLU, q and k are L2-normalised per
    head, q is scaled by key_dim^-0.5, and the output passes an RMSNorm per head times SiLU(z), as in Gated DeltaNet.
    """

    options: LinearRecurrenceOptions

    def __init__(self, hidden: int, options: LinearRecurrenceOptions, layers: LocalLayers):
        super().__init__(hidden, options, layers)
        o = options
        if o.value_heads % o.key_heads:
            raise ValueError(
                f"value_heads={o.value_heads} is not a multiple of key_heads={o.key_heads}: each key head serves the same number of value heads"
            )
        self.key_heads, self.value_heads = (layers.heads(o.key_heads, "key_heads"), layers.heads(o.value_heads, "value_heads"))
        keys, values = o.key_heads * o.key_dim, o.value_heads * o.value_dim
        self.gated = o.decay == "head"
        self.delta = o.update == "delta"
        self.scale = o.key_dim**-0.5
        # q, k, v, the output gate z, and per value head the write strength beta and the decay's input a
        per_head = (o.value_heads,) * (int(self.delta) + int(self.gated))
        self.input = layers.column(hidden, (keys, keys, values, values, *per_head))
        self.conv = layers.conv((keys, keys, values), o.conv_width)
        if self.gated:
            self.A_log = layers.per_head(o.value_heads, log_uniform_decay)
            self.dt_bias = layers.per_head(o.value_heads, inverse_softplus_step)
        self.norm = layers.head_norm(o.value_dim)
        self.out = layers.row(values, hidden)

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """The convolution's input [T, C], z [T, H, V], log decay [T, H] in float32 or wider, and beta [T, H]."""
        q, k, v, z, *per_head = self.input(x)
        beta = per_head[0].sigmoid() if self.delta else None
        decay = None
        if self.gated:
            wide = torch.promote_types(x.dtype, torch.float32)
            decay = -self.A_log.to(wide).exp() * F.softplus(per_head[-1].to(wide) + self.dt_bias.to(wide))
        return (torch.cat((q, k, v), dim=-1), z.unflatten(-1, (self.value_heads, -1)), decay, beta)

    def _heads(self, mixed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[T, C] -> q and k [T, Hk, K] of unit length, v [T, H, V]"""
        keys = self.key_heads * self.options.key_dim
        q, k, v = mixed.split((keys, keys, self.value_heads * self.options.value_dim), dim=-1)
        q, k = (l2_normalise(q.unflatten(-1, (self.key_heads, -1))), l2_normalise(k.unflatten(-1, (self.key_heads, -1))))
        return q, k, v.unflatten(-1, (self.value_heads, -1))

    def _output(self, y: Tensor, z: Tensor) -> Tensor:
        """y and z [T, H, V] -> [T, hidden]"""
        return self.out((self.norm(y) * F.silu(z)).flatten(1))

    def forward(self, x: Tensor, seq: Sequence) -> Tensor:
        mixed, z, decay, beta = self._project(x)
        q, k, v = self._heads(seq.exchange.short_conv(mixed, self.conv, seq))
        y = seq.exchange.linear_recurrence(q, k, v, decay, beta, seq, scale=self.scale)
        return self._output(y, z)

    def prefill(self, x: Tensor, seq: Sequence) -> tuple[Tensor, RecurrentState]:
        mixed, z, decay, beta = self._project(x)
        mixed, conv = short_conv.short_conv(mixed, self.conv, seq.cu_seqlens)
        q, k, v = self._heads(mixed)
        result = kernels.linear_recurrence(q, k, v, decay, beta, seq.cu_seqlens, scale=self.scale, return_final_state=True)
        assert result.final_state is not None
        return self._output(result.output, z), RecurrentState(conv, result.final_state)

    def decode(self, x: Tensor, state: RecurrentState, seq: Sequence) -> tuple[Tensor, RecurrentState]:
        mixed, z, decay, beta = self._project(x)
        mixed, conv = short_conv.step(mixed, self.conv, state.conv)
        q, k, v = self._heads(mixed)
        y, recurrent = kernels.step(q, k, v, decay, beta, state.recurrent, scale=self.scale)
        return self._output(y, z), RecurrentState(conv, recurrent)

    @property
    def _channels(self) -> int:
        """Convolution channels of the whole mixer."""
        o = self.options
        return 2 * o.key_heads * o.key_dim + o.value_heads * o.value_dim

    @property
    def _state_values(self) -> int:
        o = self.options
        return o.value_heads * o.key_dim * o.value_dim

    def flops(self, tokens: int, context: int) -> float:
        """The recurrence token by token (2 K V each to read, to write and, for the delta rule, to look up); a chunked kernel spends more."""
        o = self.options
        values, per_head = (o.value_heads * o.value_dim, o.value_heads * (int(self.delta) + int(self.gated)))
        projections = 2 * self.hidden * (self._channels + 2 * values + per_head)
        return tokens * (projections + 2 * o.conv_width * self._channels + (6 if self.delta else 4) * self._state_values)

    def state_bytes(self, context: int, bytes_per_value: int = 2) -> int:
        """Independent of the context: the recurrent state in float32 and the convolution's last inputs."""
        return 4 * self._state_values + bytes_per_value * (self.options.conv_width - 1) * self._channels

    def exchanges(self, tokens: int, ranks: int, bytes_per_value: int = 2) -> list[ExchangeNeed]:
        """One halo, and the other ranks' segment maps (M, E) in float32; M is a number per head where updates only add."""
        if ranks == 1:
            return []
        o = self.options
        maps = self._state_values + (o.value_heads * o.key_dim**2 if self.delta else o.value_heads if self.gated else 0)
        return [ExchangeNeed("halo", bytes_per_value * (o.conv_width - 1) * self._channels), ExchangeNeed("scan", 4 * maps * (ranks - 1))]


MIXER = LinearRecurrence
