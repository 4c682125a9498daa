from tests.families.cases import VOCAB, Cases

CASES = Cases(
    config="Mamba2Config",
    model="Mamba2ForCausalLM",
    base={
        "vocab_size": VOCAB,
        "hidden_size": 24,
        "num_hidden_layers": 2,
        "num_heads": 4,
        "head_dim": 12,
        "n_groups": 2,
        "state_size": 8,
        "chunk_size": 16,
        "pad_token_id": None,
    },
    variants={"limited-biased": {"time_step_limit": (0.01, 0.05), "use_bias": True, "use_conv_bias": False, "n_groups": 1}},
    gradients={"A_log": 2e-4, "dt_bias": 2e-4},  # sums of terms of all tokens that cancel
)
