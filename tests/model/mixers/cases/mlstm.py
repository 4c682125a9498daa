from typing import Any

SMALL = {"heads": 4, "key_dim": 6, "value_dim": 8}
CASES: dict[str, tuple[str, dict[str, Any]]] = {"mlstm": ("mlstm", SMALL), "mlstm-biases": ("mlstm", {**SMALL, "bias": True, "gate_softcap": 3.0})}
