from tests.families.cases import LONG, SMALL, YARN, Cases

ROPE = {**YARN, "original_max_position_embeddings": 32, "mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.1}
CASES = Cases(
    config="Ministral3Config",
    model="Ministral3ForCausalLM",
    base={**SMALL, "head_dim": 16, "rope_parameters": ROPE},
    variants={"tied-window": {"tie_word_embeddings": True, "sliding_window": 20, "rope_parameters": {**ROPE, "llama_4_scaling_beta": 0.5}}},
    lengths={"plain": LONG, "tied-window": LONG},
)
