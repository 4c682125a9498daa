from tests.families.cases import LONG, SMALL, YARN, Cases

CASES = Cases(
    config="GptOssConfig",
    model="GptOssForCausalLM",
    base={
        **SMALL,
        "head_dim": 16,
        "num_local_experts": 6,
        "num_experts_per_tok": 3,
        "sliding_window": 20,
        "swiglu_limit": 0.5,
        "router_aux_loss_coef": 0.0,
        "rope_parameters": {**YARN, "truncate": False},
    },
    variants={"tied-plain": {"tie_word_embeddings": True, "attention_bias": False, "layer_types": ["full_attention", "sliding_attention"]}},
    lengths={"plain": LONG},
)
