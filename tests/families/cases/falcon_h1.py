from tests.families.cases import SMALL, YARN, Cases

MAMBA2 = {"mamba_d_ssm": 96, "mamba_n_heads": 6, "mamba_d_head": 16, "mamba_n_groups": 2, "mamba_d_state": 8, "mamba_chunk_size": 16}
SCALES = {
    "embedding_multiplier": 2.5,
    "lm_head_multiplier": 0.3,
    "key_multiplier": 0.4,
    "attention_in_multiplier": 1.25,
    "attention_out_multiplier": 0.9,
    "ssm_in_multiplier": 1.2,
    "ssm_out_multiplier": 0.8,
    "ssm_multipliers": [0.7, 0.5, 1.3, 0.9, 0.6],
    "mlp_multipliers": [0.8, 0.6],
}
CASES = Cases(
    config="FalconH1Config",
    model="FalconH1ForCausalLM",
    base={**SMALL, **MAMBA2, **SCALES},
    variants={
        "normed": {"mamba_rms_norm": True, "rope_parameters": YARN},
        "gated-first": {"mamba_rms_norm": True, "mamba_norm_before_gate": False, "mamba_n_groups": 1},
        "tied-biases-unscaled": {
            **dict.fromkeys(("embedding_multiplier", "lm_head_multiplier", "key_multiplier"), 1.0),
            "ssm_multipliers": None,
            "mlp_multipliers": None,
            "tie_word_embeddings": True,
            "attention_bias": True,
            "mlp_bias": True,
            "mamba_proj_bias": True,
            "projectors_bias": True,
            "mamba_conv_bias": False,
        },
    },
    gradients={"A_log": 2e-4, "dt_bias": 2e-4},  # sums of terms of all tokens that cancel
)
