from tests.families.cases import LONG, SMALL, YARN, Cases

LATENT = {"num_key_value_heads": 4, "q_lora_rank": 20, "kv_lora_rank": 12, "qk_nope_head_dim": 8, "qk_rope_head_dim": 6, "v_head_dim": 10}
EXPERTS = {"n_routed_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 20, "first_k_dense_replace": 1}
CASES = Cases(
    config="DeepseekV3Config",
    model="DeepseekV3ForCausalLM",
    base={**SMALL, **LATENT, **EXPERTS, "n_group": 4, "topk_group": 2, "n_shared_experts": 2, "routed_scaling_factor": 1.5},
    variants={
        "plain-queries-half-rope-yarn": {
            "q_lora_rank": None,
            "rope_interleave": False,
            "tie_word_embeddings": True,
            "rope_parameters": {**YARN, "mscale": 0.7, "mscale_all_dim": 1.0},
        },
        "odd-heads-biases": {"num_attention_heads": 3, "num_key_value_heads": 3, "attention_bias": True, "n_group": 1, "topk_group": 1},
    },
    lengths={"plain-queries-half-rope-yarn": LONG},
)
