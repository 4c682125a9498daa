from tests.families.cases import SMALL, Cases
from tests.families.cases.deepseek_v3 import LATENT

CASES = Cases(
    config="KimiLinearConfig",
    model="KimiLinearForCausalLM",
    base={
        **SMALL,
        **LATENT,
        "q_lora_rank": None,
        "num_hidden_layers": 4,
        "num_local_experts": 6,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 20,
        "linear_head_dim": 8,
        "linear_num_heads": 3,
        "layer_types": ["linear_attention"] * 3 + ["full_attention"],
        "mlp_layer_types": ["dense"] + ["sparse"] * 3,
        "bos_token_id": None,
        "eos_token_id": None,
    },
    variants={
        "groups": {
            "num_local_experts": 8,
            "n_group": 4,
            "topk_group": 2,
            "n_shared_experts": 2,
            "rms_norm_eps": 1e-3,
        }
    },
    gradients={"A_log": 2e-4, "dt_bias": 2e-4},  # sums of terms of all tokens that cancel
)
