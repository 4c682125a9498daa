from tests.families.cases import SMALL, Cases

CASES = Cases(
    config="AfmoeConfig",
    model="AfmoeForCausalLM",
    base={
        **SMALL,
        "num_hidden_layers": 3,
        "head_dim": 16,
        "sliding_window": 20,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "num_experts": 6,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 20,
        "route_scale": 1.5,
        "mup_enabled": True,
    },
    variants={"tied-dense": {"tie_word_embeddings": True, "mup_enabled": False, "num_dense_layers": 2, "num_shared_experts": 1}},
)
