from tests.families.cases import LONG, SMALL, YARN, Cases
from tests.families.cases.deepseek_v3 import EXPERTS, LATENT

CASES = Cases(
    config="DeepseekV2Config",
    model="DeepseekV2ForCausalLM",
    base={**SMALL, **LATENT, **EXPERTS, "n_shared_experts": 2, "routed_scaling_factor": 1.5},
    variants={
        "groups": {"topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2, "tie_word_embeddings": True},
        "plain-queries-yarn": {"q_lora_rank": None, "rope_parameters": {**YARN, "mscale": 0.7, "mscale_all_dim": 0.7}},
    },
    lengths={"plain-queries-yarn": LONG},
)
