from tests.families.cases import SMALL, Cases

CASES = Cases(
    config="Cohere2Config",
    model="Cohere2ForCausalLM",
    base={**SMALL, "sliding_window": 20, "layer_types": ["sliding_attention", "full_attention"]},
)
