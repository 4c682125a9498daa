from tests.families.cases import SMALL, Cases

CASES = Cases(
    config="MiniMaxM2Config",
    model="MiniMaxM2ForCausalLM",
    base={**SMALL, "head_dim": 16, "rotary_dim": 8, "num_local_experts": 6, "num_experts_per_tok": 2, "router_aux_loss_coef": 0.0},
    variants={"tied-mqa": {"tie_word_embeddings": True, "num_key_value_heads": 1, "rms_norm_eps": 1e-3}},
)
