from tests.families.cases import SMALL, YARN, Cases

CASES = Cases(
    config="DiffLlamaConfig",
    model="DiffLlamaForCausalLM",
    base={**SMALL, "num_hidden_layers": 3},
    variants={
        "tied-biases-mha": {"tie_word_embeddings": True, "attention_bias": True, "num_key_value_heads": 4},
        "grouped-yarn": {"num_attention_heads": 8, "head_dim": 10, "num_key_value_heads": 2, "rope_parameters": YARN},
    },
    gradients=dict.fromkeys(("lambda_q1", "lambda_k1", "lambda_q2", "lambda_k2"), 2e-4),  # sums over all tokens and heads that cancel
)
