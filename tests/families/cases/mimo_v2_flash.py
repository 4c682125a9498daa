from tests.families.cases import SMALL, Cases

ROPE = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.334}
CASES = Cases(
    config="MiMoV2FlashConfig",
    model="MiMoV2FlashForCausalLM",
    base={
        **SMALL,
        "num_hidden_layers": 3,
        "num_key_value_heads": 1,
        "head_dim": 24,
        "v_head_dim": 16,
        "sliding_window": 20,
        "layer_types": ["full_attention", "sliding_attention", "sliding_attention"],
        "n_routed_experts": 6,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 20,
        "rope_parameters": {"full_attention": {**ROPE, "rope_theta": 5e6}, "sliding_attention": ROPE},
    },
    variants={
        "groups-bias": {
            "attention_bias": True,
            "v_head_dim": 24,
            "attention_value_scale": None,
            "n_routed_experts": 8,
            "n_group": 4,
            "topk_group": 2,
            "num_experts_per_tok": 3,
            "norm_topk_prob": False,
            "mlp_layer_types": ["dense", "sparse", "dense"],
        }
    },
)
