from tests.families.cases import SMALL, YARN, Cases

HALF = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
CASES = Cases(
    config="MiniMaxM3VLTextConfig",
    model="MiniMaxM3VLForCausalLM",
    base={
        **SMALL,
        "num_hidden_layers": 3,
        "head_dim": 16,
        "rotary_dim": 8,
        "rope_parameters": HALF,
        "layer_types": ["full_attention", "minimax_m3_sparse", "minimax_m3_sparse"],
        "mlp_layer_types": ["dense", "sparse", "sparse"],
        "intermediate_size": 20,
        "dense_intermediate_size": 64,
        "shared_intermediate_size": 24,
        "num_local_experts": 6,
        "num_experts_per_tok": 2,
        "router_aux_loss_coef": 0.0,
        "swiglu_limit": 0.5,
        "index_n_heads": 2,
        "index_head_dim": 12,
        "index_block_size": 8,
        "index_topk_blocks": 3,
    },
    variants={
        "tied-local-yarn": {
            "tie_word_embeddings": True,
            "rms_norm_eps": 1e-3,
            "routed_scaling_factor": 1.0,
            "index_block_size": 5,
            "index_topk_blocks": 4,
            "index_local_blocks": 2,
            "swiglu_alpha": 1.3,
            "rope_parameters": {**YARN, "partial_rotary_factor": 0.5},
        },
        "mqa-no-local": {"num_key_value_heads": 1, "index_n_heads": 1, "index_local_blocks": 0, "layer_types": ["minimax_m3_sparse"] * 3},
        "full": {"layer_types": ["full_attention"] * 3, "mlp_layer_types": ["sparse"] * 3},
    },
    untrained=("indexer.",),
)
