from tests.families.cases import SMALL, Cases

CASES = Cases(
    config="Gemma2Config",
    model="Gemma2ForCausalLM",
    base={**SMALL, "head_dim": 16, "sliding_window": 20, "query_pre_attn_scalar": 12, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 1.5},
    variants={"no-caps-untied": {"attn_logit_softcapping": None, "final_logit_softcapping": None, "tie_word_embeddings": False}},
)
