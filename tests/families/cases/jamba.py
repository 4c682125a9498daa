from tests.families.cases import SMALL, Cases

CASES = Cases(
    config="JambaConfig",
    model="JambaForCausalLM",
    base={
        **SMALL,
        "num_hidden_layers": 4,
        "num_experts": 4,
        "attn_layer_period": 4,
        "attn_layer_offset": 2,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
        "mamba_d_state": 4,
        "use_mamba_kernels": False,
        "router_aux_loss_coef": 0.0,
    },
    variants={"tied-dense": {"tie_word_embeddings": True, "num_experts": 1, "mamba_proj_bias": True, "mamba_dt_rank": 5, "num_key_value_heads": 1}},
)
