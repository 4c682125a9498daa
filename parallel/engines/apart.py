"""Parameters that DeepSpeed cannot hold among a model's others: the float32 ones of a bfloat16 model, a few numbers per head.

Every rank holds them whole, with moments of their own; gradients are summed over the ranks that hold the same.
"""

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ltrain.config import TrainConfig
from ltrain.model.layers import layout_of


class ApartParameters:
    """`params` under AdamW, float32 throughout."""

    def __init__(self, params: list[nn.Parameter], train: TrainConfig, replicas: Callable[[nn.Parameter], dist.ProcessGroup]):
        self.params, self.train, self.replicas = params, train, replicas
        self._known = set(params)
        assert all(p.dtype == torch.float32 and layout_of(p).axis == 0 and not layout_of(p).decay for p in params)
        self.adam = (
            torch.optim.AdamW(params, lr=train.lr, betas=(train.betas[0], train.betas[1]), eps=train.eps, weight_decay=0.0) if params else None
        )
        self.set_step(0)

    def __contains__(self, param: nn.Parameter) -> bool:
        return param in self._known

    def set_step(self, step: int) -> None:
        """Updates behind the moments, for Adam's bias correction."""
        for p in self.params:
            assert self.adam is not None
            state = self.adam.state[p]
            state["step"] = torch.tensor(float(step))
            for moment in ("exp_avg", "exp_avg_sq"):
                state.setdefault(moment, torch.zeros_like(p))

    def part(self, param: nn.Parameter, kind: str) -> Tensor:
        """All of it, flat, to be read or written."""
        if kind == "param":
            return param.detach().view(-1)
        if kind == "grad":
            assert param.grad is not None
            return param.grad.view(-1)
        assert self.adam is not None
        value: Tensor = self.adam.state[param][kind]
        return value.view(-1)

    def zero_grad(self) -> None:
        for p in self.params:
            p.grad = None

    def sum_gradients(self) -> None:
        if self.params:
            grads = [self.part(p, "grad") for p in self.params]
            flat = torch.cat(grads)
            dist.all_reduce(flat, group=self.replicas(self.params[0]))
            for grad, total in zip(grads, flat.split([g.numel() for g in grads]), strict=True):
                grad.copy_(total)

    def step(self, lr: float, norm: float) -> None:
        """Clip by the norm over the whole model's gradients, and update."""
        if self.adam is None:
            return
        clip = self.train.clip
        for group in self.adam.param_groups:
            group["lr"] = lr
        for p in self.params:
            if clip and norm + 1e-6 > clip:
                self.part(p, "grad").mul_(clip / (norm + 1e-6))
        self.adam.step()
