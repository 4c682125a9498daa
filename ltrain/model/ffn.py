"""Feed-forward layers: a dense SwiGLU, and routed experts beside a shared one."""

from torch import Tensor, nn
from torch.nn import functional as F

from ltrain.model.layers import LocalLayers
from ltrain.model.options import MoEOptions
from ltrain.model.router import Router
from ltrain.model.sequence import Sequence


class SwiGLU(nn.Module):
    """W_down (SiLU(W_gate x) * W_up x) (Shazeer 2020)."""

    def __init__(self, hidden: int, inner: int, layers: LocalLayers):
        super().__init__()
        self.hidden, self.inner = hidden, inner
        self.up = layers.column(hidden, (inner, inner))
        self.down = layers.row(inner, hidden)

    def forward(self, x: Tensor, seq: Sequence) -> Tensor:
        """x [T, hidden] -> [T, hidden]"""
        gate, up = self.up(x)
        return self.down(F.silu(gate) * up)

    def flops(self, tokens: int) -> float:
        """Forward floating-point operations for `tokens` tokens."""
        return tokens * 6 * self.hidden * self.inner


class MoE(nn.Module):
    """Each token's top_k experts, weighted, plus a shared expert that sees every token (Dai et al. 2024)."""

    def __init__(self, hidden: int, options: MoEOptions, layers: LocalLayers):
        super().__init__()
        self.hidden, self.options = hidden, options
        self.router = Router(hidden, options, layers)
        self.experts = layers.experts(options.experts, hidden, options.inner, options.top_k)
        self.shared = SwiGLU(hidden, options.shared_inner, layers) if options.shared_inner else None

    def forward(self, x: Tensor, seq: Sequence) -> Tensor:
        """x [T, hidden] -> [T, hidden]"""
        weights, indices = self.router(x, seq)
        y = self.experts(x, weights, indices)
        return y if self.shared is None else y + self.shared(x, seq)

    def flops(self, tokens: int) -> float:
        """Forward floating-point operations for `tokens` tokens, of the experts they reach."""
        o = self.options
        return tokens * self.hidden * (2 * o.experts + 6 * (o.top_k * o.inner + o.shared_inner))


def build_ffn(hidden: int, options: MoEOptions, layers: LocalLayers) -> SwiGLU | MoE:
    return MoE(hidden, options, layers) if options.experts else SwiGLU(hidden, options.inner, layers)
