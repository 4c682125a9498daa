from tests.families.cases import SMALL, Cases

CASES = Cases(
    config="Llama4TextConfig",
    model="Llama4ForCausalLM",
    base={
        **SMALL,
        "num_hidden_layers": 4,
        "head_dim": 16,
        "intermediate_size": 20,
        "intermediate_size_mlp": 40,
        "num_local_experts": 4,
        "interleave_moe_layer_step": 2,
        "attention_chunk_size": 16,
        "floor_scale": 8,
        "attn_scale": 0.3,
        "router_aux_loss_coef": 0.0,
    },
    variants={
        "no-norm-no-tuning": {
            "use_qk_norm": False,
            "attn_temperature_tuning": False,
            "num_experts_per_tok": 2,
            "interleave_moe_layer_step": 1,
            "tie_word_embeddings": True,
            "attention_bias": True,
        }
    },
)
