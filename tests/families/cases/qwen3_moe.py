from tests.families.cases import SMALL, Cases

CASES = Cases(
    config="Qwen3MoeConfig",
    model="Qwen3MoeForCausalLM",
    base={
        **SMALL,
        "head_dim": 16,
        "num_experts": 6,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 20,
        "norm_topk_prob": True,
        "router_aux_loss_coef": 0.0,
    },
    variants={"dense-unnormalised": {"mlp_only_layers": [0], "norm_topk_prob": False, "num_hidden_layers": 3, "decoder_sparse_step": 2}},
)
