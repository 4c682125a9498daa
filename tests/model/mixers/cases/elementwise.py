from typing import Any

MAMBA = {"inner": 24, "states": 4, "step_rank": 3}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "mamba": ("mamba", MAMBA),
    "mamba-norms-biases": ("mamba", {**MAMBA, "inner_norm": "weighted", "bias": True, "conv_width": 3}),
    "mamba-weightless-norms": ("mamba", {**MAMBA, "inner_norm": "weightless", "inner_norm_eps": 1e-2, "conv_bias": False}),
    "rg_lru": ("rg_lru", {"inner": 24, "blocks": 4}),
}
