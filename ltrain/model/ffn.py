"""Feed-forward layers: a dense one, and routed experts beside a shared one."""

from typing import ClassVar

from torch import Tensor, nn
from torch.nn import functional as F

from ltrain.model.activation import Activation
from ltrain.model.layers import LocalLayers, joined
from ltrain.model.options import MoEOptions
from ltrain.model.recompute import cheap
from ltrain.model.router import Router
from ltrain.model.sequence import Sequence


class MLP(nn.Module):
    """W_down activation(W_up x), where the activation is gated W_down (activation(W_gate x) * W_up x), with a bias each where asked."""

    entry: ClassVar[str | None] = "up"  # the linear layer that alone reads x: a norm before it may be fused into it

    def __init__(self, hidden: int, inner: int, activation: Activation, layers: LocalLayers, bias: bool = False):
        super().__init__()
        self.hidden, self.inner, self.activation = hidden, inner, activation
        self.up = joined(layers.column(hidden, (inner,) * activation.parts, bias=bias), activation.parts)  # the gate above up
        self.down = layers.row(inner, hidden, bias=bias)

    def forward(self, x: Tensor, seq: Sequence) -> Tensor:
        """x [T, hidden] -> [T, hidden]"""
        return self.down(cheap(self.activation.fused, *self.up(x)))

    def flops(self, tokens: int) -> float:
        """Forward floating-point operations for `tokens` tokens."""
        return tokens * 2 * (self.activation.parts + 1) * self.hidden * self.inner


class MoE(nn.Module):
    """Each token's top_k experts, weighted, plus a shared expert that sees every token (Dai et al. 2024), times sigmoid(w x) with `shared_gate`.

    With `latent`, routed experts work between a projection down and one up; router and shared expert read x itself.
    """

    entry: ClassVar[str | None] = None  # router, experts and shared expert all read x

    def __init__(self, hidden: int, options: MoEOptions, layers: LocalLayers):
        super().__init__()
        self.hidden, self.options, o = hidden, options, options
        self.router = Router(hidden, o, layers)
        self.latent_down = layers.whole(hidden, o.latent, o.bias) if o.latent else None
        self.experts = layers.experts(o.latent or hidden, o)
        self.latent_up = layers.whole(o.latent, hidden, o.bias, to_residual=True) if o.latent else None
        shared = Activation.of(o, o.shared_limit)
        self.shared = MLP(hidden, o.shared_inner, shared, layers, o.bias) if o.shared_inner else None
        self.shared_gate = layers.router(hidden, 1) if o.shared_gate else None  # [1, hidden]

    def forward(self, x: Tensor, seq: Sequence) -> Tensor:
        """x [T, hidden] -> [T, hidden]"""
        tokens = x if seq.counted is None else x[: seq.counted.rows]  # a tail is sent to no expert
        weights, indices = self.router(tokens, seq)
        y = tokens if self.latent_down is None else self.latent_down(tokens)
        y = self.experts(y, weights, indices)
        y = y if self.latent_up is None else self.latent_up(y)
        y = y if seq.counted is None else F.pad(y, (0, 0, 0, len(x) - len(y)))
        if self.shared is None:
            return y
        shared = self.shared(x, seq)
        return y + (shared if self.shared_gate is None else shared * F.linear(x, self.shared_gate).sigmoid())

    def flops(self, tokens: int) -> float:
        """Forward floating-point operations for `tokens` tokens, of the experts they reach."""
        o, width = self.options, self.options.latent or self.hidden
        products = 2 * (Activation.of(o, o.limit).parts + 1)
        routed = products * o.top_k * o.inner * width + 4 * o.latent * self.hidden
        return tokens * (self.hidden * (2 * o.experts + products * o.shared_inner + 2 * o.shared_gate) + routed)


def build_ffn(hidden: int, options: MoEOptions, layers: LocalLayers) -> MLP | MoE:
    if options.experts:
        return MoE(hidden, options, layers)
    return MLP(hidden, options.inner, Activation.of(options, options.limit), layers, options.bias)
