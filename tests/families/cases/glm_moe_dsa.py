from tests.families.cases import Cases
from tests.families.cases.deepseek_v32 import BASE

CASES = Cases(
    config="GlmMoeDsaConfig",
    model="GlmMoeDsaForCausalLM",
    base={**BASE, "n_group": 1, "topk_group": 1, "indexer_types": ["full", "shared", "full"], "rms_norm_eps": 1e-4},
    variants={"tied-all-full": {"tie_word_embeddings": True, "indexer_types": ["full"] * 3, "n_shared_experts": 2}},
    untrained=("indexer.",),
)
