from typing import Any

SMALL = {"key_heads": 2, "value_heads": 4, "key_dim": 8, "value_dim": 6}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "gated_delta_net": ("gated_delta_net", SMALL),
    "gated_delta_net-beta-2-bias-eps": ("gated_delta_net", {**SMALL, "beta_scale": 2.0, "bias": True, "norm_eps": 1e-2}),
    "delta_net": ("delta_net", {**SMALL, "value_heads": 2, "conv_width": 3}),
    "linear_recurrence-add": ("linear_recurrence", {**SMALL, "update": "add"}),
    "linear_recurrence-add-none": ("linear_recurrence", {**SMALL, "update": "add", "decay": "none"}),
    "linear_attention": ("linear_attention", SMALL),
    "lightning": ("lightning", {**SMALL, "value_heads": 2}),
    "lightning-rope": ("lightning", {**SMALL, "rope": {"fraction": 0.5}}),
    "linear_recurrence-ling": (
        "linear_recurrence",
        {
            **SMALL,
            "key_heads": 4,
            "decay": "lightning",
            "update": "add",
            "conv_width": 0,
            "activation": "none",
            "qk_norm": "head",
            "gate": "sigmoid",
            "norm": "group",
            "norm_groups": 2,
            "rope": {"fraction": 0.5},
        },
    ),
    "retention": ("retention", {**SMALL, "rope": {}}),
    "gla": ("gla", {**SMALL, "decay_rank": 4}),
    "kda": ("kda", {**SMALL, "value_heads": 2, "decay_rank": 4, "gate_rank": 4}),
    "kda-bounded-full-rank": ("kda", {**SMALL, "decay_gate": "bounded", "decay_bound": 2.0}),
    "mamba2": ("mamba2", {**SMALL, "norm": "group", "conv_bias": True, "step_limits": [0.1, 0.8]}),
    "mamba2-norm-over-all": ("mamba2", {**SMALL, "norm": "all", "bias": True}),
}
