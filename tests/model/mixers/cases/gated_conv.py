from typing import Any

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "gated_conv": ("gated_conv", {"inner": 32}),
    "gated_conv-biases-wide": ("gated_conv", {"inner": 24, "conv_width": 5, "bias": True}),
}
