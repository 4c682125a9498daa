from tests.families.cases import SMALL, Cases

MAMBA2 = {"mamba_n_heads": 6, "mamba_d_head": 16, "mamba_n_groups": 2, "mamba_d_state": 8, "mamba_chunk_size": 16}
CASES = Cases(
    config="BambaConfig",
    model="BambaForCausalLM",
    base={**SMALL, **MAMBA2, "num_hidden_layers": 3, "attn_layer_indices": [1]},
    variants={
        "tied-biases": {
            "tie_word_embeddings": True,
            "attention_bias": True,
            "mlp_bias": True,
            "mamba_proj_bias": True,
            "mamba_conv_bias": False,
            "mamba_n_groups": 1,
        }
    },
    gradients={"A_log": 2e-4, "dt_bias": 2e-4},  # sums of terms of all tokens that cancel
)
