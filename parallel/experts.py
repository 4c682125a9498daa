"""Experts sharded over expert ranks: each token travels to the ranks that hold its experts and back (all-to-all)."""

import torch
from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from ltrain.model.layers import Experts
from ltrain.model.options import MoEOptions
from ltrain.parallel.mesh import Mesh


class ExpertParallelExperts(Experts):
    """`Experts` whose tokens come through megatron-core's dropless all-to-all dispatcher."""

    def __init__(self, local: Experts, options: MoEOptions, mesh: Mesh):
        super().__init__(local.up, local.down, local.activation, local.up_bias, local.down_bias, local.scale_input)
        self.experts, self.local = options.experts, local.up.shape[0]
        config = TransformerConfig(
            num_layers=1,
            hidden_size=local.up.shape[-1],
            num_attention_heads=1,
            num_moe_experts=options.experts,
            moe_ffn_hidden_size=options.inner,
            moe_router_topk=options.top_k,
            moe_token_dispatcher_type="alltoall",
            expert_model_parallel_size=mesh.shard.expert_size,
            expert_tensor_parallel_size=1,
            add_bias_linear=False,
        )
        first = mesh.shard.expert_rank * self.local
        self.dispatcher = MoEAlltoAllTokenDispatcher(self.local, list(range(first, first + self.local)), config, pg_collection=mesh.groups)

    def forward(self, x: Tensor, weights: Tensor, indices: Tensor) -> Tensor:
        """x [T, hidden], weights and indices [T, k] (global expert ids) -> [T, hidden]"""
        shape = (x.shape[0], self.experts)
        probs = torch.zeros(shape, dtype=weights.dtype, device=x.device).scatter(1, indices, weights)  # [T, E]
        chosen = torch.zeros(shape, dtype=torch.bool, device=x.device).scatter(1, indices, True)
        d = self.dispatcher
        sent, sent_probs = d.dispatch_preprocess(x.unsqueeze(1), chosen, probs)
        arrived, arrived_probs = d.token_dispatch(sent, sent_probs)
        y, counts, y_probs = d.dispatch_postprocess(arrived, arrived_probs)  # sorted by local expert
        y = self.weighted(y, y_probs, counts)
        back = d.token_combine(d.combine_preprocess(y))
        return d.combine_postprocess(back).squeeze(1)
