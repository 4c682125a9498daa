from typing import Any

SMALL = {"heads": 4, "kv_heads": 2, "head_dim": 8, "compressed": 8, "stride": 4, "block_size": 8, "top_blocks": 3, "window": 6}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "nsa": ("nsa", SMALL),
    "nsa-apart-nope": ("nsa", {**SMALL, "stride": 8, "block_size": 16, "top_blocks": 4, "rope": None}),
}
