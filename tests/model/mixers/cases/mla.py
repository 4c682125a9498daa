from typing import Any

SMALL = {"heads": 4, "kv_rank": 12, "nope_dim": 8, "rope_dim": 4, "value_dim": 6}
YARN = {"pairs": True, "scaling": "yarn", "factor": 4.0, "original_length": 16, "mscale": 0.7, "mscale_all_dim": 1.0}
# few heads would often give two tokens the score 0, of which either may be chosen
SELECTED = {**SMALL, "q_rank": 10, "top_k": 9}
DSA = ("mla", {**SELECTED, "select": "index", "index_heads": 8, "index_dim": 6})
CASES: dict[str, Any] = {
    "mla": ("mla", SMALL),
    "mla-compressed-queries-biases-yarn": ("mla", {**SMALL, "q_rank": 10, "bias": True, "rope": YARN}),
    "mla-dsa": DSA,
    "mla-dsa-shared": [DSA, ("mla", {**SELECTED, "select": "shared"})],
    "mla-dsa-fp8": ("mla", {**SELECTED, "select": "index", "index_heads": 8, "index_dim": 6, "index_fp8": True}),
    "mla-dsa-warm-up": ("mla", {**SMALL, "select": "index", "index_heads": 2, "index_dim": 6, "index_pairs": True, "index_loss": "dense"}),
    "mla-nope-head-gate-temperature": ("mla", {**SMALL, "rope": None, "gate": "head", "temperature": 0.3, "temperature_length": 20}),
}
