from tests.families.cases import SMALL, YARN, Cases
from tests.families.cases.deepseek_v3 import LATENT

# eight heads: with fewer, relu often gives two tokens the score 0, of which either may be chosen
INDEX = {"index_topk": 12, "index_n_heads": 8, "index_head_dim": 10}
BASE = {
    **SMALL,
    **LATENT,
    **INDEX,
    "num_hidden_layers": 3,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 20,
    "mlp_layer_types": ["dense", "sparse", "sparse"],
    "routed_scaling_factor": 1.5,
}
CASES = Cases(
    config="DeepseekV32Config",
    model="DeepseekV32ForCausalLM",
    base={**BASE, "n_group": 4, "topk_group": 2},
    variants={
        "biases-yarn": {
            "attention_bias": True,
            "n_group": 1,
            "topk_group": 1,
            "rope_parameters": {**YARN, "mscale": 0.7, "mscale_all_dim": 1.0},
        }
    },
    untrained=("indexer.",),
)
