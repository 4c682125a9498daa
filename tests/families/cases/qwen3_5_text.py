from tests.families.cases import SMALL, Cases

LINEAR = {
    "num_hidden_layers": 3,
    "head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 12,
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
}
CASES = Cases(
    config="Qwen3_5TextConfig",
    model="Qwen3_5ForCausalLM",
    base={**SMALL, **LINEAR},
    variants={
        "tied-mrope": {
            "tie_word_embeddings": True,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e5, "mrope_section": [1, 1, 0]},
        }
    },
    gradients={"A_log": 2e-4, "dt_bias": 2e-4},  # as those of qwen3_next
)
