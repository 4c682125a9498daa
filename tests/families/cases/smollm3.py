from tests.families.cases import SMALL, Cases

CASES = Cases(
    config="SmolLM3Config",
    model="SmolLM3ForCausalLM",
    base={**SMALL, "num_hidden_layers": 4},
    variants={"untied-biases": {"no_rope_layers": [0, 1, 1, 0], "tie_word_embeddings": False, "attention_bias": True, "mlp_bias": True}},
    # without positions the terms of queries and keys cancel: float32, ours and theirs, keeps less than five digits of float64's
    gradients=dict.fromkeys(("q_proj.weight", "k_proj.weight", "q_proj.bias"), 1e-4),
)
