from tests.families.cases import VOCAB, Cases

CASES = Cases(
    config="NemotronHConfig",
    model="NemotronHForCausalLM",
    base={
        "vocab_size": VOCAB,
        "hidden_size": 48,
        "layers_block_type": ["mamba", "moe", "attention", "mlp", "mamba"],
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "intermediate_size": 40,
        "mamba_num_heads": 4,
        "mamba_head_dim": 12,
        "n_groups": 2,
        "ssm_state_size": 8,
        "n_routed_experts": 6,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 20,
        "moe_shared_expert_intermediate_size": 24,
        "routed_scaling_factor": 1.5,
        "pad_token_id": None,
    },
    variants={
        "latent-groups-biases": {
            "moe_latent_size": 16,
            "n_routed_experts": 8,
            "n_group": 4,
            "topk_group": 2,
            "num_experts_per_tok": 3,
            "use_bias": True,
            "time_step_min": 0.2,
            "n_groups": 1,
        }
    },
    gradients={"A_log": 2e-4, "dt_bias": 2e-4},  # sums of terms of all tokens that cancel
)
