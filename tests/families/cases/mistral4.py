from tests.families.cases import LONG, SMALL, YARN, Cases

ROPE = {**YARN, "original_max_position_embeddings": 32, "mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.1}
CASES = Cases(
    config="Mistral4Config",
    model="Mistral4ForCausalLM",
    base={
        **{name: value for name, value in SMALL.items() if name != "num_key_value_heads"},
        "num_key_value_heads": 4,
        "q_lora_rank": 20,
        "kv_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 12,
        "v_head_dim": 10,
        "n_routed_experts": 8,
        "num_experts_per_tok": 3,
        "n_group": 4,
        "topk_group": 2,
        "moe_intermediate_size": 20,
        "rope_parameters": ROPE,
    },
    variants={
        "plain-queries-bias": {
            "q_lora_rank": None,
            "attention_bias": True,
            "n_group": 1,
            "topk_group": 1,
            "norm_topk_prob": False,
            "first_k_dense_replace": 1,
            "rope_interleave": False,
            "tie_word_embeddings": True,
        }
    },
    lengths={"plain": LONG},
)
