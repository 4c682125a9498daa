from tests.families.cases import SMALL, Cases

MAMBA2 = {"n_mamba_heads": 6, "mamba_ngroups": 2, "mamba_d_state": 8, "chunk_size": 16}
TYPES = ["linear_attention", "hybrid", "hybrid", "linear_attention", "hybrid"]
CASES = Cases(
    config="Zamba2Config",
    model="Zamba2ForCausalLM",
    base={
        **SMALL,
        **MAMBA2,
        "num_key_value_heads": 4,
        "num_hidden_layers": 5,
        "layers_block_type": TYPES,
        "num_mem_blocks": 2,
        "adapter_rank": 4,
        "use_mem_rope": True,
        "use_shared_attention_adapter": True,
    },
    variants={
        "one-block-without-positions": {
            "num_mem_blocks": 1,
            "use_mem_rope": False,
            "use_shared_attention_adapter": False,
            "num_key_value_heads": 2,
            "add_bias_linear": True,
        },
    },
    gradients={"A_log": 2e-4, "dt_bias": 2e-4},  # sums of terms of all tokens that cancel
)
