from tests.families.cases import SMALL, Cases

CASES = Cases(
    config="Lfm2MoeConfig",
    model="Lfm2MoeForCausalLM",
    base={
        **SMALL,
        "num_hidden_layers": 4,
        "layer_types": ["conv", "conv", "full_attention", "conv"],
        "num_dense_layers": 1,
        "num_experts": 6,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 20,
    },
    variants={
        "untied-unnormalised": {
            "tie_word_embeddings": False,
            "norm_topk_prob": False,
            "routed_scaling_factor": 1.5,
            "conv_bias": True,
            "num_dense_layers": 0,
        },
    },
)
