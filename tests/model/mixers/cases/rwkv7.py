from typing import Any

SMALL = {"heads": 4, "head_dim": 8, "decay_rank": 5, "rate_rank": 4, "gate_rank": 6}
SOURCE, MIX = ("rwkv7", {**SMALL, "value_mix": "source"}), ("rwkv7", {**SMALL, "value_mix": "mix", "value_rank": 3})
CASES: dict[str, Any] = {"rwkv7": ("rwkv7", SMALL), "rwkv7-mixed-values": [SOURCE, MIX, SOURCE, MIX]}
