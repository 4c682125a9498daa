from tests.families.cases import LONG, SMALL, YARN, Cases

LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
LONGROPE = {"rope_type": "longrope", "factor": 4.0, "original_max_position_embeddings": 64, "short_factor": [1.0, 1.1, 1.2, 1.3, 1.5, 2.0]}
CASES = Cases(
    config="LlamaConfig",
    model="LlamaForCausalLM",
    base=SMALL,
    variants={
        "tied-biases-mha": {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True, "num_key_value_heads": 4},
        "mqa-wide-heads-linear": {
            "num_key_value_heads": 1,
            "head_dim": 20,
            "rms_norm_eps": 1e-2,
            "rope_parameters": {"rope_type": "linear", "rope_theta": 5e4, "factor": 4.0},
        },
        "llama3": {"rope_parameters": {**LLAMA3, "rope_theta": 5e5}},
        "llama3-step": {"rope_parameters": {**LLAMA3, "high_freq_factor": 1.0, "rope_theta": 5e5}},
        "yarn": {"rope_parameters": {**YARN, "mscale": 1.0, "mscale_all_dim": 0.5, "truncate": False}},
        "yarn-step": {"rope_parameters": {**YARN, "beta_fast": 1.0}},
        "longrope": {"rope_parameters": {**LONGROPE, "rope_theta": 1e4, "long_factor": [1.0, 1.5, 2.0, 3.0, 5.0, 8.0]}},
        "dynamic": {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
    },
    lengths={"llama3": LONG, "llama3-step": LONG, "yarn": LONG, "yarn-step": LONG, "longrope": LONG},
    beyond={"longrope": 400},
)
