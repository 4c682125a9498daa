"""Mixers side by side: scaled and added (Falcon-H1), fused behind their norms (Hymba), and of another kind."""

ATTENTION = {"heads": 4, "kv_heads": 2, "head_dim": 8, "gate": "none"}
MAMBA2 = {"key_heads": 2, "value_heads": 4, "key_dim": 8, "value_dim": 8, "norm": "group"}
SCALED = {"in_scale": 0.7, "out_scale": 1.3}
CASES = {
    "falcon_h1": ("parallel", {"branches": {"attention": {**ATTENTION, **SCALED}, "mamba2": {**MAMBA2, "part_scales": [0.5, 1.5, 0.8, 1.2, 0.6]}}}),
    "hymba": ("parallel", {"branches": {"attention": {**ATTENTION, "window": 20, "anchors": 3}, "mamba2": MAMBA2}, "fuse": True}),
    "hymba_mamba1": (
        "parallel",
        {"branches": {"attention": ATTENTION, "ssm": {"mixer": "mamba", "inner": 32, "states": 4, "step_rank": 4}}, "fuse": True},
    ),
    "hymba_shared_kv": [
        (
            "parallel",
            {
                "branches": {"attention": {**ATTENTION, **near, "kv": kv}, "ssm": {"mixer": "mamba", "inner": 32, "states": 4, "step_rank": 4}},
                "fuse": True,
            },
        )
        for kv, near in (("source", {"window": 5, "anchors": 3}), ("own", {}), ("shared", {"window": 5, "anchors": 3}))
    ],
    "two_windows": (
        "parallel",
        {"branches": {"near": {"mixer": "attention", **ATTENTION, "window": 4}, "far": {"mixer": "attention", **ATTENTION, "rope": None}}},
    ),
}
