from tests.families.cases import SMALL, Cases
from tests.families.cases.deepseek_v3 import LATENT

CASES = Cases(
    config="BailingHybridConfig",
    model="BailingHybridForCausalLM",
    base={
        **SMALL,
        **{name: value for name, value in LATENT.items() if name not in ("q_lora_rank", "n_routed_experts")},
        "num_hidden_layers": 3,
        "num_key_value_heads": 4,
        "head_dim": 8,
        "num_local_experts": 8,
        "num_experts_per_tok": 3,
        "n_group": 4,
        "topk_group": 2,
        "moe_intermediate_size": 20,
        "first_k_dense_replace": 1,
        "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    },
    variants={"free-decay": {"kda_safe_gate": False, "attention_bias": True, "n_group": 1, "topk_group": 1}},
    gradients={"A_log": 2e-4, "dt_bias": 2e-4},  # sums of terms of all tokens that cancel
)
