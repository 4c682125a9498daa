from tests.families.cases import LONG, SMALL, Cases

ROPE = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
}
CASES = Cases(
    config="Gemma3TextConfig",
    model="Gemma3ForCausalLM",
    base={
        **SMALL,
        "num_hidden_layers": 3,
        "head_dim": 16,
        "sliding_window": 20,
        "query_pre_attn_scalar": 12,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "rope_parameters": ROPE,
    },
    lengths={"plain": LONG},
)
