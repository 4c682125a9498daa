from tests.families.cases import SMALL, Cases

CASES = Cases(
    config="CohereConfig",
    model="CohereForCausalLM",
    base=SMALL,
    variants={"bias-mha": {"attention_bias": True, "num_key_value_heads": 4, "logit_scale": 0.5}},
)
