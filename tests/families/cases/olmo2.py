from tests.families.cases import SMALL, Cases

CASES = Cases(
    config="Olmo2Config",
    model="Olmo2ForCausalLM",
    base={**SMALL, "num_key_value_heads": 4},
    variants={"tied-bias-gqa": {"tie_word_embeddings": True, "attention_bias": True, "num_key_value_heads": 1}},
)
