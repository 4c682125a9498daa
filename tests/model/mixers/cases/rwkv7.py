from typing import Any

SMALL = {"heads": 4, "head_dim": 8, "decay_rank": 5, "rate_rank": 4, "gate_rank": 6}
CASES: dict[str, tuple[str, dict[str, Any]]] = {"rwkv7": ("rwkv7", SMALL), "rwkv7-source": ("rwkv7", {**SMALL, "heads": 2, "value_mix": "source"})}
