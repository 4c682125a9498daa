from tests.families.cases import SMALL, Cases

CASES = Cases(
    config="MistralConfig",
    model="MistralForCausalLM",
    base={**SMALL, "head_dim": 16, "sliding_window": None},
    variants={"window": {"sliding_window": 20, "num_key_value_heads": 4}},
)
