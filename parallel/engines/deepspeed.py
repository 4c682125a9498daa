"""The second engine: DeepSpeed's ZeRO, which shares optimizer states, gradients and weights out over data and context ranks.

DeepSpeed moves and keeps the tensors; the gradient norm, what tensor ranks hold in common and the checkpoints are ltrain's,
so that a run is the same under either engine. ZeRO: Rajbhandari et al. 2020 (stages 1 to 3), Ren et al. 2021 (offload).
"""

import logging
import math
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from ltrain.checkpoint import Checkpoint
from ltrain.config import Config
from ltrain.data.packing import MicroBatch
from ltrain.model.layers import layout_of
from ltrain.parallel.engines.apart import ApartParameters
from ltrain.parallel.engines.base import MOMENTS, SUMS, Engine
from ltrain.parallel.mesh import Mesh

os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed asks; a run without torchrun has one rank
# its autotuner, which ltrain does not use, imports all of MLflow where it finds it: seconds of every rank's start
hidden = sys.modules.setdefault("mlflow", None) is None  # type: ignore[arg-type]
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import deepspeed
    from deepspeed.runtime.config import DeepSpeedConfig
    from deepspeed.runtime.engine import DeepSpeedEngine as Runtime
    from deepspeed.runtime.zero import parameter_offload
    from deepspeed.runtime.zero.linear import zero3_linear_wrap
    from deepspeed.utils import groups, logger
if hidden:
    del sys.modules["mlflow"]
deepspeed.ops.__compatible_ops__.pop("deepspeed_shm_comm", None)  # or it compiles C++ for ranks that talk through gloo
logger.setLevel(logging.ERROR)

EXPERTS = "experts"  # DeepSpeed's name for the ranks over which expert parameters are summed


class Ranks:
    """The mesh in the words in which DeepSpeed asks for it (Megatron's `mpu`)."""

    def __init__(self, mesh: Mesh):
        self.mesh = mesh

    def get_data_parallel_group(self) -> dist.ProcessGroup:
        group: dist.ProcessGroup = self.mesh.groups.dp_cp  # context ranks see other tokens of the same weights, as data ranks do
        return group

    def get_data_parallel_world_size(self) -> int:
        return self.get_data_parallel_group().size()

    def get_data_parallel_rank(self) -> int:
        return self.get_data_parallel_group().rank()

    def get_model_parallel_group(self) -> dist.ProcessGroup:
        return self.mesh.tensor

    def get_model_parallel_world_size(self) -> int:
        return self.mesh.tensor.size()

    def get_model_parallel_rank(self) -> int:
        return self.mesh.tensor.rank()

    get_tensor_model_parallel_group = get_model_parallel_group
    get_tensor_model_parallel_world_size = get_model_parallel_world_size
    get_tensor_model_parallel_rank = get_model_parallel_rank


class _Runtime(Runtime):  # type: ignore[misc]
    """DeepSpeed's engine, told what it looks for in the types of its own layers."""

    def __init__(self, *, experts_apart: bool, **options: Any):
        self.__dict__["experts_apart"] = experts_apart
        super().__init__(args=None, **options)

    def _cast_module_mixed_precision(self, *_: Any, **__: Any) -> None:
        """The model was built in its types."""

    def _broadcast_model(self) -> None:
        """Every rank has seeded its own part."""

    def _do_optimizer_sanity_check(self, _: Any) -> str:
        """ZeRO's optimizer in every stage, where DeepSpeed would take another one for stage 1 in bfloat16."""
        return "zero_optimization"

    def _configure_distributed_model(self, model: nn.Module) -> None:
        super()._configure_distributed_model(model)
        self.has_moe_layers = self.experts_apart


class DeepSpeedEngine(Engine):
    """ZeRO over the data and context ranks; tensor, context and expert parallelism inside are the model's own."""

    def __init__(self, config: Config, vocab: int, mesh: Mesh):
        super().__init__(config, vocab, mesh)
        self.zero, self.offload = config.deepspeed.zero, config.deepspeed.offload == "cpu"
        self.numel = {param: self.shapes[name].numel() for name, param in self.params.items()}
        dense, expert = (sorted(dist.get_process_group_ranks(g)) for g in (mesh.groups.dp_cp, mesh.groups.expt_dp))
        experts = [p for _, p in self.params.items() if layout_of(p).experts]
        apart = bool(experts) and dense != expert
        for param in experts:
            param.allreduce, param.group_name = not apart, EXPERTS  # type: ignore[attr-defined]
        groups.mpu = ranks = Ranks(mesh)
        groups._EXPERT_PARALLEL_GROUP[EXPERTS] = mesh.expert
        groups._EXPERT_DATA_PARALLEL_GROUP[EXPERTS] = mesh.groups.expt_dp
        deepspeed.init_distributed(dist_backend=dist.get_backend(), verbose=False)
        settings = self._settings()
        self.apart = ApartParameters([p for p in self.params.values() if p.dtype != self.dtype], config.train, self.replicas)
        self._hide_apart()
        if self.zero == 3:
            self._partition_weights(settings)
        self.adam = self._build_adam(apart)
        self.runtime = _Runtime(
            experts_apart=apart and self.zero < 3,
            model=self.stage,
            optimizer=self.adam,
            mpu=ranks,
            config=settings,
            config_class=DeepSpeedConfig(settings, ranks),
            dont_change_device=True,
        )
        self.optimizer = self.runtime.optimizer
        self.norm = math.inf  # of the gradients that wait for a step
        self.waiting = False  # gradients for a step
        self.optimizer.scaled_global_norm = lambda *_, **__: torch.tensor(self.norm, device=self.optimizer.device)
        if self.zero == 3:
            self.optimizer._gradient_averaging_world_size = lambda *_: 1  # the loss is divided already: sum
            self.optimizer._get_norm_groups = lambda: [self.optimizer.scaled_global_norm()]
        for master in self._masters():
            self.adam.state[master] = {"step": torch.zeros((), device=master.device)} | {m: torch.zeros_like(master) for m in MOMENTS}
        if self.zero < 3:
            self.optimizer._lazy_init_hp_params_optimizer_state()

    def _settings(self) -> dict[str, Any]:
        cuda = self.mesh.device.type == "cuda"
        zero: dict[str, Any] = {
            "stage": self.zero,
            "overlap_comm": False,  # reductions keep their place among the exchanges of the mixers
            "contiguous_gradients": True,
            "reduce_scatter": True,
            "stage3_param_persistence_threshold": 0,  # every weight is shared out
            "memory_efficient_linear": False,  # would replace torch's linear for the whole process
        }
        if self.offload:
            zero["offload_optimizer"] = {"device": "cpu", "pin_memory": cuda}
        half = self.dtype == torch.bfloat16
        return {
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": 1,  # the boundary is told, not counted
            "zero_optimization": zero,
            "gradient_clipping": self.config.train.clip,
            # the loss is divided by the global number of labels before the backward; for ZeRO-3 see `__init__`
            "gradient_allreduce_op": "sum" if self.zero < 3 else "mean",
            "bf16": {"enabled": half, "check_grad_overflow": False},
            "data_types": {"grad_accum_dtype": "fp32"},
            "communication_data_type": "fp32",
            "zero_force_ds_cpu_optimizer": False,  # torch's AdamW has a fused kernel for CPUs too, and needs no compiler on the host
            "steps_per_print": None,
        }

    def _hide_apart(self) -> None:
        """From DeepSpeed, which takes every registered parameter: attributes of the same names, seen by the model alone."""
        for module in self.stage.modules():
            for name, param in list(module.named_parameters(recurse=False)):
                if param in self.apart:
                    del module._parameters[name]
                    module.__dict__[name] = param

    def _partition_weights(self, settings: dict[str, Any]) -> None:
        """ZeRO-3: each weight over the ranks that hold the same, experts' first, whose ranks are others."""
        for module in self.stage.modules():
            own = list(module.parameters(recurse=False))
            if own and all(layout_of(p).experts for p in own):
                self._init(module, self.mesh.groups.expt_dp, settings)
        self._init(self.stage, self.mesh.groups.dp_cp, settings)
        if self.stack.head is not None:
            # the head's loss is no module's forward, so that DeepSpeed would not see that it needs this weight
            weight = self.stack.embed.weight if self.config.model.tie_embeddings and self.stack.embed else self.stack.head.weight
            deepspeed.zero.register_external_parameter(self.stage, weight)

    def _init(self, module: nn.Module, group: dist.ProcessGroup, settings: dict[str, Any]) -> None:
        deepspeed.zero.Init(module=module, data_parallel_group=group, config_dict_or_path=settings, dtype=self.dtype, enabled=True)

    def _build_adam(self, apart: bool) -> torch.optim.AdamW:
        """AdamW over groups that DeepSpeed can flatten: one set of ranks, one weight decay."""
        train = self.config.train
        split: dict[tuple[bool, bool], list[nn.Parameter]] = {}
        for param in self.params.values():
            if param not in self.apart:
                split.setdefault((apart and layout_of(param).experts > 0, layout_of(param).decay), []).append(param)
        found: list[dict[str, Any]] = []
        for moe, decay in sorted(split):
            group = {"params": split[moe, decay], "weight_decay": train.weight_decay if decay else 0.0}
            found.append(group | ({"moe": True, "name": EXPERTS} if moe else {}))
        return torch.optim.AdamW(found, lr=train.lr, betas=(train.betas[0], train.betas[1]), eps=train.eps, fused=True)

    # Training

    def forward_backward(self, batches: list[MicroBatch], labels: int, micro_batches: int) -> dict[str, float]:
        self._drop_gradients()
        self.runtime.train()
        total = torch.zeros(len(SUMS), dtype=torch.float64, device=self.mesh.device)
        with self._linear():
            for i, batch in enumerate(batches, start=1):
                self.runtime.set_gradient_accumulation_boundary(i == len(batches))
                loss, sums = self.runtime(batch, labels, micro_batches)
                self.add_sums(total, sums)
                self.runtime.backward(loss)
        if self.offload and self.mesh.device.type == "cuda":
            torch.cuda.synchronize()  # gradients are on their way to host memory
        self._sum_over_tensor_ranks()
        self.apart.sum_gradients()
        self.waiting = True
        return self.means(total, labels)

    @contextmanager
    def _linear(self) -> Iterator[None]:
        """ZeRO-3: torch's linear keeps a view of its weight for the backward, and so all of the gathered weight; DeepSpeed's keeps
        the parameter, which is gathered again."""
        if self.zero < 3:
            yield
        else:
            with patch.object(F, "linear", zero3_linear_wrap):
                yield

    def _drop_gradients(self) -> None:
        """Of a backward that no step followed, as DeepSpeed does where a step overflows; it would add to them."""
        self.apart.zero_grad()
        if self.waiting:
            self.norm, self.optimizer.check_grad_overflow = math.inf, True
            self.optimizer.step()
            self.optimizer.check_grad_overflow = False
        self.waiting = False

    @torch.no_grad()
    def evaluate(self, batches: list[MicroBatch], labels: int, micro_batches: int) -> float:
        self.runtime.eval()
        total = torch.zeros(len(SUMS), dtype=torch.float64, device=self.mesh.device)
        for batch in batches:
            self.add_sums(total, self.stage(batch, labels, micro_batches)[1])
        return self.means(total, labels)["loss"]

    def _sum_over_tensor_ranks(self) -> None:
        """What tensor ranks hold in common, of which each has seen part of the gradient: ZeRO has cut it alike on all of them."""
        if self.mesh.tensor.size() == 1:
            return
        held = (self.part(p, "grad")[0] for _, p in self.params.items() if layout_of(p).partial_gradient)
        grads = [g for g in held if g is not None]
        if not grads:
            return
        flat = torch.cat([g.flatten() for g in grads]).to(self.mesh.device)
        dist.all_reduce(flat, group=self.mesh.tensor)
        for grad, part in zip(grads, flat.split([g.numel() for g in grads]), strict=True):
            grad.copy_(part)

    def _gradient_norm(self) -> float:
        """Over every parameter of the whole model, each counted once."""
        total = torch.zeros((), dtype=torch.float64, device=self.mesh.device)
        for name, param in self.params.items():
            grad, _ = self.part(param, "grad")
            if grad is not None and self.counts(name, param):
                total += grad.double().square().sum().to(total.device)
        dist.all_reduce(total)
        return math.sqrt(float(total)) if math.isfinite(float(total)) else float(total)

    def step(self, lr: float) -> float:
        for group in self.adam.param_groups:
            group["lr"] = lr
        self.norm = self._gradient_norm()
        if math.isfinite(self.norm):
            self.runtime.step()
            self.apart.step(lr, self.norm)
            self.waiting = False
            self.move_biases()
        return self.norm

    # State

    def _masters(self) -> list[Tensor]:
        """The flat master weights that this rank updates."""
        found: list[Tensor] = self.optimizer.fp32_partitioned_groups_flat if self.zero == 3 else self.optimizer.single_partition_of_fp32_groups
        return found

    def part(self, param: nn.Parameter, kind: str) -> tuple[Tensor | None, slice]:
        if param in self.apart:  # all of it on every rank: the first one's counts
            return (self.apart.part(param, kind), slice(None)) if self.replicas(param).rank() == 0 else (None, slice(0))
        if self.zero == 3:
            return self._part_of_weight(param, kind)
        cut = param._hp_mapping  # type: ignore[attr-defined]
        if cut is None:
            return None, slice(0)
        if kind == "grad":
            held = cut.get_lp_grad_fragment(param._index_in_param_group).view(-1)  # type: ignore[attr-defined]
        else:
            held = cut.get_hp_fragment(None if kind == "param" else kind)
        start = cut.lp_fragment_address.start
        return held.detach(), slice(start, start + cut.lp_fragment_address.numel)

    def _part_of_weight(self, param: nn.Parameter, kind: str) -> tuple[Tensor | None, slice]:
        """ZeRO-3 cuts each weight by itself, into parts of one length of which the last may reach beyond its end."""
        if kind == "grad":
            held, _ = self.optimizer._get_fp32_grad_state_partition(param, True)
        else:
            held, _ = self.optimizer._get_fp32_opt_state_partition(param, True, None if kind == "param" else kind)
        start = held.numel() * self.replicas(param).rank()
        size = min(held.numel(), self.numel[param] - start)
        return (held.detach()[:size], slice(start, start + size)) if size > 0 else (None, slice(0))

    def close(self) -> None:
        self.runtime.destroy()
        self.optimizer.__dict__.clear()
        self.adam.state.clear()
        for param in self.params.values() if self.zero == 3 else ():
            # ZeRO-3's hooks and the modules they are on stay, emptied: autograd's nodes hold them in a circle that Python cannot see
            for tensor in (param, getattr(param, "ds_tensor", None)):
                if tensor is not None:
                    tensor.data = tensor.data.new_empty(0)
        parameter_offload.FWD_MODULE_STACK.clear()
        groups.mpu = None
        groups._EXPERT_PARALLEL_GROUP.pop(EXPERTS, None)
        groups._EXPERT_DATA_PARALLEL_GROUP.pop(EXPERTS, None)

    def set_masters(self, checkpoint: Checkpoint, optimizer_step: int | None) -> None:
        for name, param in self.params.items():
            for kind in ("param", *MOMENTS) if optimizer_step is not None else ("param",):
                whole = self.read(name, param, kind, checkpoint)
                held, span = (self.apart.part(param, kind), slice(None)) if param in self.apart else self.part(param, kind)
                if held is not None:
                    held.copy_(whole.flatten()[span])
        if optimizer_step is not None:
            for master in self._masters():
                self.adam.state[master]["step"].fill_(optimizer_step)
            self.apart.set_step(optimizer_step)
        if self.zero < 3:
            self.optimizer.update_lp_params()
            return
        for i in range(len(self._masters())):
            self.optimizer._reassign_or_swap_out_partitioned_parameters(i)
