from tests.families.cases import SMALL, Cases

CASES = Cases(
    config="RecurrentGemmaConfig",
    model="RecurrentGemmaForCausalLM",
    base={
        **{name: value for name, value in SMALL.items() if name != "max_position_embeddings"},
        "num_hidden_layers": 3,
        "block_types": ["recurrent", "recurrent", "attention"],
        "lru_width": 48,
        "attention_window_size": 20,
    },
    variants={"wide-lru": {"lru_width": 64, "conv1d_width": 3, "num_key_value_heads": 1, "block_types": ["attention", "recurrent"]}},
)
