from tests.families.cases import SMALL, Cases

CASES = Cases(
    config="Glm4MoeConfig",
    model="Glm4MoeForCausalLM",
    base={
        **SMALL,
        "num_hidden_layers": 3,
        "head_dim": 16,
        "n_routed_experts": 6,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 20,
        "n_shared_experts": 2,
        "routed_scaling_factor": 1.5,
        "attention_bias": True,
    },
    variants={
        "qk-norm-unnormalised": {"use_qk_norm": True, "norm_topk_prob": False, "attention_bias": False, "first_k_dense_replace": 2},
        "groups": {"n_routed_experts": 8, "n_group": 4, "topk_group": 2, "num_experts_per_tok": 3, "tie_word_embeddings": True},
    },
)
