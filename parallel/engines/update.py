"""An update of the weights in a few operators over all parameters: megatron-core's own has several for each, and without Transformer Engine waits
for the device once for each of their norms."""

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor, nn


def main_grad(param: nn.Parameter) -> Tensor:
    """The gradient of `param` in megatron's buffer, which data parallelism reduces."""
    grad: Tensor = param.main_grad  # type: ignore[attr-defined]
    return grad


def chained(optimizer: Any) -> list[DistributedOptimizer]:
    """megatron has one optimizer for the parameters that all data ranks share, and another one for experts."""
    return list(getattr(optimizer, "chained_optimizers", [optimizer]))


def masters(optimizer: DistributedOptimizer) -> Iterator[tuple[nn.Parameter, Tensor]]:
    """Each parameter of which this rank holds a part, and the part's master weight, flat."""
    if optimizer.is_stub_optimizer:
        return
    wide = zip(optimizer.model_fp32_groups, optimizer.shard_fp32_groups, strict=True)
    half = zip(optimizer.model_float16_groups, optimizer.shard_fp32_from_float16_groups, strict=True)
    for params, held in (*wide, *half):
        yield from zip(params, held, strict=True)


class Update:
    """The gradient norm, clipping and the step of megatron's distributed optimizers.

    A master weight's gradient is its part of the gradient buffer, which stays where it is: it is set here, once.
    """

    def __init__(self, optimizer: Any, device: torch.device):
        self.optimizers, self.device = chained(optimizer), device
        self._grads: list[Tensor] = []
        # of each optimizer: parts of parameters, and the master weights they are rounded from
        self._copies: list[tuple[list[Tensor], list[Tensor]]] = []
        for one in self.optimizers:
            parts, wide = [], []
            for param, master in masters(one):
                ranges = one._get_model_param_range_map(param)
                here, there = ranges["param"], ranges["gbuf_world_in_bucket"]
                master.grad = main_grad(param).view(-1)[here.start : here.end]
                self._grads.append(master.grad)
                buffer, _, bucket = one.model_param_gbuf_map[param]
                part = one.buffers[buffer].buckets[bucket].param_data.view(-1)[there.start : there.end]
                if part.data_ptr() != master.data_ptr():  # a float32 parameter is its own master weight
                    parts.append(part)
                    wide.append(master.detach())
            self._copies.append((parts, wide))
            if isinstance(one.optimizer, torch.optim.AdamW):
                for group in one.optimizer.param_groups:
                    group["fused"] = True
        # A parameter that several ranks hold alike counts on one of them. These are the same tensors at every step.
        self._counted = [[] if one.is_stub_optimizer else one.get_grads_for_grad_norm() for one in self.optimizers]

    @torch.no_grad()
    def norm(self) -> float:
        """Of the gradient over all ranks, L2. The one time that a step waits for the device."""
        counted: dict[dist.ProcessGroup, list[Tensor]] = {}
        for one, grads in zip(self.optimizers, self._counted, strict=True):
            counted.setdefault(one.get_grad_stats_parallel_group(), []).extend(grads)
        squares = []
        for group, grads in counted.items():
            total = torch.stack(torch._foreach_norm(grads)).square().sum() if grads else torch.zeros((), device=self.device)
            dist.all_reduce(total, group=group)
            squares.append(total)
        return float(torch.stack(squares).sum().sqrt())

    @torch.no_grad()
    def clip(self, limit: float, norm: float) -> None:
        """Scale gradients whose norm is this one down to the limit."""
        scale = limit / (norm + 1e-6)
        if scale < 1:
            torch._foreach_mul_(self._grads, scale)

    @torch.no_grad()
    def step(self, lr: float, weight_decay: float) -> None:
        """AdamW on the master weights, the parameters rounded from them and gathered from the ranks that hold their parts."""
        for one, (parts, wide) in zip(self.optimizers, self._copies, strict=True):
            if not one.is_stub_optimizer:
                for group in one.optimizer.param_groups:
                    group["lr"] = lr
                    group["weight_decay"] = weight_decay * group["wd_mult"]  # megatron leaves this to its own scheduler
                one.optimizer.step()
            if parts:
                torch._foreach_copy_(parts, wide)
            one.start_param_sync_for_bucket_group_subset()
