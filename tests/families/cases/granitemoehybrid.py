from tests.families.cases import SMALL, Cases
from tests.families.cases.bamba import MAMBA2

CASES = Cases(
    config="GraniteMoeHybridConfig",
    model="GraniteMoeHybridForCausalLM",
    base={
        **SMALL,
        **MAMBA2,
        "num_hidden_layers": 3,
        "layer_types": ["linear_attention", "full_attention", "linear_attention"],
        "intermediate_size": 20,
        "shared_intermediate_size": 24,
        "num_local_experts": 6,
        "embedding_multiplier": 3.0,
        "logits_scaling": 2.0,
        "residual_multiplier": 0.5,
        "attention_multiplier": 0.2,
        "router_aux_loss_coef": 0.0,
    },
    variants={"dense-rope-tied": {"num_local_experts": 0, "position_embedding_type": "rope", "tie_word_embeddings": True, "attention_bias": True}},
    gradients={"A_log": 2e-4, "dt_bias": 2e-4},  # sums of terms of all tokens that cancel
)
