from tests.families.cases import SMALL, Cases

CASES = Cases(
    config="MiniMaxConfig",
    model="MiniMaxForCausalLM",
    base={
        **SMALL,
        "head_dim": 12,
        "num_hidden_layers": 3,
        "num_local_experts": 4,
        "router_aux_loss_coef": 0.0,
        "layer_types": ["linear_attention", "full_attention", "linear_attention"],
        "full_attn_alpha_factor": 1.3,
        "full_attn_beta_factor": 0.8,
        "linear_attn_alpha_factor": 1.2,
        "linear_attn_beta_factor": 0.7,
        "mlp_alpha_factor": 1.1,
        "mlp_beta_factor": 0.9,
    },
    variants={"tied-odd-heads": {"tie_word_embeddings": True, "num_attention_heads": 3, "num_key_value_heads": 3}},
)
