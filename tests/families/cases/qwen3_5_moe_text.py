from tests.families.cases import SMALL, Cases
from tests.families.cases.qwen3_5_text import LINEAR

CASES = Cases(
    config="Qwen3_5MoeTextConfig",
    model="Qwen3_5MoeForCausalLM",
    base={
        **{name: value for name, value in SMALL.items() if name != "intermediate_size"},
        **LINEAR,
        "num_experts": 6,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 20,
        "shared_expert_intermediate_size": 24,
        "router_aux_loss_coef": 0.0,
    },
    gradients={"A_log": 2e-4, "dt_bias": 2e-4},  # as those of qwen3_next
)
