from tests.families.cases import SMALL, Cases

CASES = Cases(
    config="MixtralConfig",
    model="MixtralForCausalLM",
    base={**SMALL, "num_local_experts": 4, "router_aux_loss_coef": 0.0},
    variants={"window": {"sliding_window": 20}},
)
