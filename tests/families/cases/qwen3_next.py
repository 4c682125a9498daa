from tests.families.cases import LONG, SMALL, YARN, Cases

CASES = Cases(
    config="Qwen3NextConfig",
    model="Qwen3NextForCausalLM",
    base={
        **SMALL,
        "num_hidden_layers": 4,
        "head_dim": 16,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 12,
        "num_experts": 6,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 20,
        "shared_expert_intermediate_size": 24,
        "router_aux_loss_coef": 0.0,
        "layer_types": ["linear_attention"] * 3 + ["full_attention"],
    },
    variants={
        "dense-layers-biases-yarn": {
            "tie_word_embeddings": True,
            "attention_bias": True,
            "num_key_value_heads": 1,
            "head_dim": 24,
            "norm_topk_prob": False,
            "mlp_only_layers": [1],
            "rope_parameters": {**YARN, "partial_rotary_factor": 0.5, "beta_fast": 16.0, "attention_factor": 1.3},
        },
        "sparse-step": {
            "decoder_sparse_step": 2,
            "layer_types": ["full_attention", "linear_attention", "linear_attention", "full_attention"],
            "linear_num_value_heads": 2,
            "linear_conv_kernel_dim": 3,
            "rms_norm_eps": 1e-3,
        },
    },
    lengths={"dense-layers-biases-yarn": LONG},
    # a head's decay sums terms of all tokens that cancel: transformers' float32 keeps four digits (ours in float64 shows whose they are)
    gradients={"A_log": 2e-4, "dt_bias": 2e-4},
)
