from tests.families.cases import SMALL, Cases
from tests.families.cases.qwen3_5_text import LINEAR

CASES = Cases(
    config="OlmoHybridConfig",
    model="OlmoHybridForCausalLM",
    base={
        **SMALL,
        **{name: value for name, value in LINEAR.items() if name != "head_dim"},
        # transformers cuts the convolution into three equal parts when it saves, whatever the widths: these are equal
        "linear_num_value_heads": 2,
        "linear_value_head_dim": 8,
        "num_key_value_heads": 4,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
    },
    variants={"nope-positive": {"rope_parameters": None, "linear_allow_neg_eigval": False, "num_key_value_heads": 2, "tie_word_embeddings": True}},
    gradients={"A_log": 2e-4, "dt_bias": 2e-4},  # sums of terms of all tokens that cancel
)
