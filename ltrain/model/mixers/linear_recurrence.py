"""Linear recurrences with a matrix state: from plain linear attention to Kimi Delta Attention and Mamba-2."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ltrain.kernels import linear_recurrence as kernels
from ltrain.kernels import short_conv
from ltrain.kernels.gates import scaled
from ltrain.kernels.norm import l2_norm, l2_normed_parts
from ltrain.kernels.recurrence import Linear
from ltrain.kernels.rope import rotate
from ltrain.model.layers import LocalLayers, constant, joined
from ltrain.model.mixers.base import ExchangeNeed, Mixer
from ltrain.model.mixers.decay import constant_rates, inverse_softplus_step, log_decay, log_uniform_decay
from ltrain.model.norm import RMSNorm
from ltrain.model.options import LinearRecurrenceOptions
from ltrain.model.options.linear_recurrence import DATA_DECAYS
from ltrain.model.position import rotary_width, shared_rotary_tables
from ltrain.model.recompute import cheap, selecting
from ltrain.model.sequence import Sequence


@dataclass
class RecurrentState:
    conv: Tensor | None  # [N, W - 1, C]: the convolution's last inputs
    recurrent: Tensor  # [N, H, K, V], float32 or wider


class LinearRecurrence(Mixer):
    """S_t = a_t S_{t-1} + k_t u_t^T and y_t = S_t^T q_t, for each value head; a_t is a number, or one for each row of S (channel).

    u_t is v_t (add, Katharopoulos et al. 2020) or beta_t (v_t - (a_t S_{t-1})^T k_t) (delta, Schlag et al. 2021; Yang et al. 2024). Around
    it: a short convolution with SiLU or a feature map, q and k of unit length, a normaliser, v itself (skip), a norm and a gate of the output.
    """

    options: LinearRecurrenceOptions
    entry: str | None = "input"

    def __init__(self, hidden: int, options: LinearRecurrenceOptions, layers: LocalLayers):
        super().__init__(hidden, options, layers)
        o = options
        if o.value_heads % o.key_heads:
            raise ValueError(
                f"value_heads={o.value_heads} is not a multiple of key_heads={o.key_heads}: each key head serves the same number of value heads"
            )
        self.key_heads, self.value_heads = (layers.heads(o.key_heads, "key_heads"), layers.heads(o.value_heads, "value_heads"))
        keys, values = o.key_heads * o.key_dim, o.value_heads * o.value_dim
        self.scale = o.key_dim**-0.5 if o.scale is None else o.scale
        self.rotary = rotary_width(o.key_dim, o.rope) if o.rope else 0
        self.input = joined(layers.column(hidden, tuple(o.part_widths.values()), bias=o.bias), 3)  # q, k and v as the convolution takes them
        if o.conv_width:
            self.conv = layers.conv((keys, keys, values), o.conv_width)
        self.conv_bias = layers.column_bias((keys, keys, values)) if o.conv_bias else None
        if o.gate_rank:
            self.gate_down, self.gate_up = layers.whole(hidden, o.gate_rank), layers.column(o.gate_rank, (values,))
        decays = o.value_heads * (o.key_dim if o.decay == "channel" else 1)
        if o.decay_rank:
            self.decay_down, self.decay_up = layers.whole(hidden, o.decay_rank), layers.column(o.decay_rank, (decays,))
        self.A_log = layers.per_head(o.value_heads, log_uniform_decay) if o.decay in DATA_DECAYS and o.decay_gate != "sigmoid" else None
        if o.decay in DATA_DECAYS:
            self.dt_bias = layers.per_head(decays, inverse_softplus_step if o.has_step else constant(0.0))
        elif o.decay != "none":
            self.rates = layers.of_heads(constant_rates(o, layers.layer, layers.depth))
        self.D = layers.per_head(o.value_heads, constant(1.0)) if o.skip else None
        self.q_norm, self.k_norm = (layers.head_norm(o.key_dim) if o.qk_norm == "head" else None for _ in range(2))
        if o.norm == "head":
            self.norm = layers.output_norm(o.value_dim, o.norm_eps)
        elif o.norm != "none":
            self.norm = layers.full_output_norm(values, (o.norm_groups or o.key_heads) if o.norm == "group" else 1, o.norm_eps)
        self.out = layers.output(values, hidden, bias=o.bias)
        if o.gate_rank or o.decay_rank:
            self.entry = None

    @property
    def _widths(self) -> tuple[int, int, int]:
        """Of q, k and v on this rank."""
        keys = self.key_heads * self.options.key_dim
        return keys, keys, self.value_heads * self.options.value_dim

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor | None, list[Tensor]]:
        """q, k and v side by side [T, C], z [T, H * V], and what `_rates` takes."""
        o = self.options
        qkv, *more = self.input(x)
        if o.part_scales:
            parts = (*qkv.split(self._widths, dim=-1), *more)
            q, k, v, *more = [part * scale for part, scale in zip(parts, o.part_scales, strict=True)]
            qkv = torch.cat((q, k, v), dim=-1)
        z = None
        if o.gate_rank:
            (z,) = self.gate_up(self.gate_down(x))
        elif o.gate != "none":
            z = more.pop(0)
        return qkv, z, [*more, *(self.decay_up(self.decay_down(x)) if o.decay_rank else ())]

    def _rates(self, v: Tensor, *rates: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Log decay [T, H] or [T, H, K] in float32 or wider, beta [T, H], and the step [T, H], of v [T, H, V] and the projections."""
        o = self.options
        beta = rates[0].sigmoid() if o.update == "delta" else None
        beta = beta * o.beta_scale if beta is not None and o.beta_scale != 1 else beta
        if o.decay == "none":
            return None, beta, None
        if o.decay not in DATA_DECAYS:
            wide = torch.promote_types(v.dtype, torch.float32)
            return (-self.rates.to(wide)).expand(len(v), -1), beta, None  # one row: kernels see by it that all tokens have the same
        decay, step = log_decay(rates[-1], self.A_log, self.dt_bias, o)
        return decay, beta, step

    @property
    def _constant(self) -> Tensor | None:
        """The log decay of every token [H], where it is no matter of data."""
        return None if self.options.decay in (*DATA_DECAYS, "none") else -self.rates

    def _inputs(self, mixed: Tensor, seq: Sequence, *rates: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
        """What lies behind the convolution [T, C] -> q and k [T, Hk, K], what is written [T, H, V], log decay, beta, and v for the skip."""
        o = self.options
        at_once = o.qk_norm == "l2" and o.feature_map == "none"
        if at_once:
            q, k, v = l2_normed_parts(mixed, self.key_heads, o.key_dim)
        else:
            q, k, v = mixed.split(self._widths, dim=-1)
            q, k = q.unflatten(-1, (self.key_heads, -1)), k.unflatten(-1, (self.key_heads, -1))
        v = v.unflatten(-1, (self.value_heads, -1))
        if o.feature_map != "none":
            q, k = (F.elu(q) + 1, F.elu(k) + 1) if o.feature_map == "elu" else (F.relu(q), F.relu(k))
        if o.qk_norm == "l2" and not at_once:
            q, k = l2_norm(q), l2_norm(k)
        elif self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if o.rope:
            cos, sin = shared_rotary_tables(seq, self.rotary, o.rope, torch.promote_types(q.dtype, torch.float32))
            q, k = rotate(q, cos, sin, o.rope.pairs), rotate(k, cos, sin, o.rope.pairs)
        decay, beta, step = self._rates(v, *rates)
        skip = v if o.skip else None
        if o.step and step is not None:
            v = scaled(v, step)
        if o.normaliser:
            v = torch.cat((v, torch.ones_like(v[..., :1])), dim=-1)
        return q, k, v, decay, beta, skip

    def _activated(self, mixed: Tensor) -> Tensor:
        """What the convolution without SiLU gave, or what took its place."""
        mixed = mixed if self.conv_bias is None else mixed + self.conv_bias.to(mixed.dtype)
        return F.silu(mixed) if self.options.activation == "silu" else mixed

    def _mix(self, mixed: Tensor, seq: Sequence, *rates: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
        """From the projections to what the recurrence takes."""
        if self.options.conv_width:
            mixed = seq.exchange.short_conv(mixed, self.conv, seq, "silu" if self.conv_bias is None else None)
        if not self.options.conv_width or self.conv_bias is not None:
            mixed = self._activated(mixed)
        return self._inputs(mixed, seq, *rates)

    def _output(self, y: Tensor, z: Tensor | None, skip: Tensor | None) -> Tensor:
        """y [T, H, V], z [T, H * V], skip [T, H, V] -> [T, hidden]"""
        # a norm over all heads may ask other ranks, and is thus not made again
        return self.out(self._finish(y, z, skip) if self.options.norm == "all" else cheap(self._finish, y, z, skip))

    def _finish(self, y: Tensor, z: Tensor | None, skip: Tensor | None) -> Tensor:
        """-> [T, H * V]"""
        o = self.options
        if o.normaliser:
            y = y[..., :-1] / (y[..., -1:] + 1e-6)
        if skip is not None and self.D is not None:
            y = y + (self.D.unsqueeze(-1) * skip).to(y.dtype)
        if z is not None and not o.gate_first and o.norm == "head" and isinstance(self.norm, RMSNorm):
            return self.norm.gated(y, z.view(y.shape), o.gate).flatten(1)
        if z is not None:
            z = (F.silu(z) if o.gate == "silu" else z.sigmoid()).view(y.shape)
        if z is not None and o.gate_first:
            y = y * z
        if o.norm == "head":
            y = self.norm(y)
        elif o.norm != "none":
            y = self.norm(y.flatten(1)).view(y.shape)
        if z is not None and not o.gate_first:
            y = y * z
        return y.flatten(1)

    def forward(self, x: Tensor, seq: Sequence) -> Tensor:
        qkv, z, rates = self._project(x)
        q, k, v, decay, beta, skip = cheap(self._mix, qkv, seq, *rates)
        return self._output(seq.exchange.recurrence(Linear(q, k, v, decay, beta, self.scale, self._constant, selecting()), seq), z, skip)

    def prefill(self, x: Tensor, seq: Sequence) -> tuple[Tensor, RecurrentState]:
        qkv, z, rates = self._project(x)
        conv = seq.exchange.last(qkv, seq, self.options.conv_width - 1) if self.options.conv_width else None
        q, k, v, decay, beta, skip = self._mix(qkv, seq, *rates)
        y, recurrent = seq.exchange.final_recurrence(Linear(q, k, v, decay, beta, self.scale, self._constant), seq)
        return self._output(y, z, skip), RecurrentState(conv, recurrent)

    def decode(self, x: Tensor, state: RecurrentState, seq: Sequence) -> tuple[Tensor, RecurrentState]:
        mixed, z, rates = self._project(x)
        conv = None
        if state.conv is not None:
            mixed, conv = short_conv.step(mixed, self.conv, state.conv, activation=None)
        q, k, v, decay, beta, skip = self._inputs(self._activated(mixed), seq, *rates)
        y, recurrent = kernels.step(q, k, v, decay, beta, state.recurrent, scale=self.scale)
        return self._output(y, z, skip), RecurrentState(conv, recurrent)

    @property
    def _channels(self) -> int:
        """What q, k and v hold of one token, in the whole mixer."""
        o = self.options
        return 2 * o.key_heads * o.key_dim + o.value_heads * o.value_dim

    @property
    def _state_values(self) -> int:
        o = self.options
        return o.value_heads * o.key_dim * (o.value_dim + o.normaliser)

    def flops(self, tokens: int, context: int) -> float:
        """The recurrence token by token (2 K V each to read, to write and, for the delta rule, to look up); a chunked kernel spends more."""
        o = self.options
        values, decays = o.value_heads * o.value_dim, o.value_heads * (o.key_dim if o.decay == "channel" else 1)
        ranks = o.gate_rank * (self.hidden + values) + o.decay_rank * (self.hidden + decays)
        projections = 2 * (self.hidden * (sum(o.part_widths.values()) + values) + ranks)
        return tokens * (projections + 2 * o.conv_width * self._channels + (6 if o.update == "delta" else 4) * self._state_values)

    def state_bytes(self, context: int, bytes_per_value: int = 2) -> int:
        """Independent of the context: the recurrent state in float32 and the convolution's last inputs."""
        return 4 * self._state_values + bytes_per_value * max(self.options.conv_width - 1, 0) * self._channels

    def exchanges(self, context: int) -> list[ExchangeNeed]:
        """One halo, and the maps of spans; M is a number for each decay where updates only add, and known to all where decays are constant."""
        o = self.options
        decays = {"head": o.value_heads, "channel": o.value_heads * o.key_dim}.get(o.decay, 0)
        maps = o.value_heads * o.key_dim**2 if o.update == "delta" else decays
        halo = [ExchangeNeed("halo", self._channels, reach=o.conv_width - 1)] if o.conv_width > 1 else []
        return [*halo, ExchangeNeed("scan", self._state_values, map=maps)]


MIXER = LinearRecurrence
