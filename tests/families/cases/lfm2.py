from tests.families.cases import SMALL, YARN, Cases

CASES = Cases(
    config="Lfm2Config",
    model="Lfm2ForCausalLM",
    base={**SMALL, "num_hidden_layers": 4, "layer_types": ["conv", "conv", "full_attention", "conv"], "block_multiple_of": 16},
    variants={
        "untied-biases-wide": {
            "tie_word_embeddings": False,
            "conv_bias": True,
            "conv_L_cache": 4,
            "block_auto_adjust_ff_dim": False,
            "num_key_value_heads": 4,
            "rope_parameters": YARN,
        },
        "wider-feed-forward": {"block_ffn_dim_multiplier": 1.3},
    },
)
