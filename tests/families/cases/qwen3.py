from tests.families.cases import LONG, SMALL, YARN, Cases

CASES = Cases(
    config="Qwen3Config",
    model="Qwen3ForCausalLM",
    base={**SMALL, "head_dim": 16},
    variants={
        "tied-bias-yarn": {"tie_word_embeddings": True, "attention_bias": True, "num_key_value_heads": 1, "rope_parameters": YARN},
        "window": {"use_sliding_window": True, "sliding_window": 20, "max_window_layers": 1},
    },
    lengths={"tied-bias-yarn": LONG},
)
