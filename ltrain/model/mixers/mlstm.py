"""The matrix LSTM."""

from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from ltrain.kernels import linear_recurrence as kernels
from ltrain.kernels.recurrence import Linear, Recurrence
from ltrain.model.layers import LocalLayers, constant
from ltrain.model.mixers.base import ExchangeNeed, Mixer
from ltrain.model.options import MLSTMOptions
from ltrain.model.recompute import selecting
from ltrain.model.sequence import Sequence

EPS = 1e-6  # of the quotient, in units of the largest input gate so far


@dataclass
class MLSTMState:
    recurrent: Tensor  # [N, H, K, V + 1], float32 or wider: the memory and, in the last column, the normaliser
    largest: Tensor  # [N, H], the running maximum m


@dataclass(frozen=True)
class Largest(Recurrence):
    """m_t = max(m_{t-1} + decay_t, gate_t) from 0, both [T, H], without gradient: a recurrence in which sums are maxima and products are sums."""

    decay: Tensor
    gate: Tensor

    @property
    def values(self) -> Tensor:
        return self.gate

    @property
    def state_shape(self) -> tuple[int, ...]:
        return tuple(self.gate.shape[1:])

    def run(self, cu_seqlens: Tensor, initial: Tensor | None = None, *, final: bool = False) -> tuple[Tensor, Tensor | None]:
        start = self.gate.new_zeros(len(cu_seqlens) - 1, *self.state_shape, dtype=self.wide) if initial is None else initial
        rows, states = [self.gate[:0]], []
        for state, (a, b) in zip(start, pairwise(cu_seqlens.tolist()), strict=True):
            if b > a:
                faded = self.decay[a:b].double().cumsum(0)
                rows.append((faded + torch.maximum((self.gate[a:b] - faded).cummax(0).values, state)).to(self.gate.dtype))
            states.append(rows[-1][-1] if b > a else state)
        return torch.cat(rows), torch.stack(states).to(self.wide) if final else None

    def ends(self, begun: bool) -> tuple[Tensor | None, Tensor]:
        start = self.gate.new_full((1, *self.state_shape), -torch.inf if begun else 0.0, dtype=self.wide)
        final = self.run(self.alone, start, final=True)[1]
        assert final is not None
        return self.product() if begun else None, final[0]

    def product(self) -> Tensor:
        return self.decay.sum(0, dtype=self.wide)

    def join(self, m: Tensor, state: Tensor, e: Tensor, *, transpose: bool = False) -> Tensor:
        return torch.maximum(state + m, e)

    def compose(self, after: Tensor, before: Tensor, *, transpose: bool = False) -> Tensor:
        return after + before


class MLSTM(Mixer):
    """C_t = f_t C_{t-1} + i_t k_t v_t^T and n_t = f_t n_{t-1} + i_t k_t; h_t = C_t^T q_t / max(|n_t^T q_t|, 1), with i_t = exp and f_t = sigmoid
    of soft-capped gates (xLSTM, Beck et al. 2024, section 2.3; xLSTM 7B, Beck et al. 2025).

    It is a linear recurrence with a decay for each head that writes i_t (v_t, 1). The papers divide memory and normaliser by exp(m_t), m_t
    the largest of what the input gates left; soft caps bound that (by e^15 there), so that float32 holds it all, and m_t serves the quotient's eps.
    """

    options: MLSTMOptions

    def __init__(self, hidden: int, options: MLSTMOptions, layers: LocalLayers):
        super().__init__(hidden, options, layers)
        o = options
        self.heads, self.scale = layers.heads(o.heads, "heads"), o.key_dim**-0.5
        keys, values = o.heads * o.key_dim, o.heads * o.value_dim
        self.qkv = layers.column(hidden, (keys, keys, values, values), bias=o.bias)
        self.gates = layers.column(hidden, (o.heads, o.heads), bias=True)
        self.norm_weight = layers.per_head(values, constant(1.0))
        self.norm_bias = layers.per_head(values, constant(0.0)) if o.bias else None
        self.out = layers.output(values, hidden, bias=o.bias)

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        """q, k [T, H, K], what is written [T, H, V + 1], the log decay and the input gate [T, H], and the output gate [T, H * V]"""
        cap = self.options.gate_softcap
        q, k, v, out = self.qkv(x)
        wide = torch.promote_types(x.dtype, torch.float32)
        i, f = (cap * (gate.to(wide) / cap).tanh() for gate in self.gates(x))
        q, k, v = (t.unflatten(-1, (self.heads, -1)).to(wide) for t in (q, k, v))
        written = i.exp().unsqueeze(-1) * torch.cat((v, torch.ones_like(v[..., :1])), dim=-1)
        return q, k, written, F.logsigmoid(f), i, out

    def _output(self, y: Tensor, largest: Tensor, out: Tensor) -> Tensor:
        """y [T, H, V + 1], largest [T, H], out [T, H * V] -> [T, hidden]"""
        h = y[..., :-1] / (y[..., -1:].abs().clamp(min=1.0) + EPS * largest.exp().unsqueeze(-1))
        h = F.layer_norm(h, h.shape[-1:], eps=self.options.norm_eps).flatten(1) * self.norm_weight
        h = h if self.norm_bias is None else h + self.norm_bias
        return self.out(h.to(out.dtype) * out.sigmoid())

    def forward(self, x: Tensor, seq: Sequence) -> Tensor:
        q, k, written, decay, i, out = self._project(x)
        y = seq.exchange.recurrence(Linear(q, k, written, decay, None, self.scale, recompute=selecting()), seq)
        return self._output(y, seq.exchange.recurrence(Largest(decay.detach(), i.detach()), seq), out)

    def prefill(self, x: Tensor, seq: Sequence) -> tuple[Tensor, MLSTMState]:
        q, k, written, decay, i, out = self._project(x)
        y, recurrent = seq.exchange.final_recurrence(Linear(q, k, written, decay, None, self.scale), seq)
        largest, last = seq.exchange.final_recurrence(Largest(decay.detach(), i.detach()), seq)
        return self._output(y, largest, out), MLSTMState(recurrent, last)

    def decode(self, x: Tensor, state: MLSTMState, seq: Sequence) -> tuple[Tensor, MLSTMState]:
        q, k, written, decay, i, out = self._project(x)
        y, recurrent = kernels.step(q, k, written, decay, None, state.recurrent, scale=self.scale)
        largest = torch.maximum(state.largest + decay, i)
        return self._output(y, largest, out), MLSTMState(recurrent, largest)

    def flops(self, tokens: int, context: int) -> float:
        o = self.options
        projections = self.hidden * o.heads * (2 * o.key_dim + 3 * o.value_dim + 2)
        return tokens * (2 * projections + 4 * o.heads * o.key_dim * (o.value_dim + 1))

    def state_bytes(self, context: int, bytes_per_value: int = 2) -> int:
        """Independent of the context, all in float32."""
        o = self.options
        return 4 * o.heads * (o.key_dim * (o.value_dim + 1) + 1)

    def exchanges(self, context: int) -> list[ExchangeNeed]:
        """The maps of spans: of the state, and of the largest gate; what fades either is a number for each head."""
        o = self.options
        return [ExchangeNeed("scan", o.heads * o.key_dim * (o.value_dim + 1), map=o.heads), ExchangeNeed("scan", o.heads, map=o.heads)]


MIXER = MLSTM
