"""How fast the states of linear recurrences fade."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ltrain.kernels.gates import channel_decay
from ltrain.model.options import LinearRecurrenceOptions


def log_uniform_decay(tensor: Tensor, generator: torch.Generator) -> None:
    """A_log: the logarithm of a rate drawn uniformly from 1..16 (Mamba-2, Dao & Gu 2024)."""
    tensor.uniform_(1, 16, generator=generator).log_()


def inverse_softplus_step(tensor: Tensor, generator: torch.Generator) -> None:
    """dt_bias: softplus of it is log-uniform in 0.001..0.1 (Mamba-2)."""
    tensor.uniform_(math.log(1e-3), math.log(0.1), generator=generator).exp_()
    tensor.add_((-torch.expm1(-tensor)).log_())


def constant_rates(options: LinearRecurrenceOptions, layer: int, depth: int) -> Tensor:
    """Minus the log decay of each head [H], float64, in layer `layer` of `depth`.

    lightning: 2^(-8h/H) (1 - layer / (depth - 1)) for h in 1..H (TransNormerLLM, Qin et al. 2024; MiniMax-01 2025, with its 1e-5).
    retention: -ln(1 - 2^(-5 - h)) for h in 0..H-1 (RetNet, Sun et al. 2023).
    """
    heads = torch.arange(options.value_heads, dtype=torch.float64)
    if options.decay == "lightning":
        return 2 ** (-8 * (heads + 1) / options.value_heads) * (1 - layer / (depth - 1 + 1e-5) + 1e-5)
    return -torch.log1p(-(2 ** (-5 - heads)))


def log_decay(a: Tensor, A_log: Tensor | None, dt_bias: Tensor, options: LinearRecurrenceOptions) -> tuple[Tensor, Tensor | None]:
    """a [T, H] or [T, H * K], what the input gives -> the log decay [T, H] or [T, H, K], and where it has one the step, of a's shape."""
    channels, gate = options.decay == "channel", options.decay_gate
    if not options.step and not options.step_limits:
        decay = channel_decay(a, A_log, dt_bias, a.shape[1] // (options.key_dim if channels else 1), gate, bound=options.decay_bound)
        return (decay if channels else decay.squeeze(-1)), None
    assert A_log is not None and gate == "softplus", "only what is behind a softplus has a step"
    a, rate = a.to(dt_bias.dtype) + dt_bias, A_log.to(dt_bias.dtype).exp()  # rate [H]
    if channels:
        a, rate = a.unflatten(-1, (-1, options.key_dim)), rate.unsqueeze(-1)
    step = F.softplus(a)
    step = step.clamp(*options.step_limits) if options.step_limits else step
    return -rate * step, step
