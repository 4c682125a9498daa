from typing import Any

SMALL = {"heads": 4, "kv_heads": 2, "head_dim": 8}
PLAIN = {**SMALL, "qk_norm": "none", "gate": "none"}
CASES: dict[str, Any] = {
    "attention": ("attention", {**SMALL, "qkv_bias": True, "out_bias": True}),
    "attention-mha-plain": ("attention", {**PLAIN, "kv_heads": 4, "rope": None}),
    "attention-rope-pairs-partial": ("attention", {**SMALL, "rope": {"fraction": 0.5, "pairs": True}}),
    "attention-window-sinks-head-gate": ("attention", {**SMALL, "window": 9, "sinks": True, "gate": "head", "value_dim": 6, "value_scale": 0.7}),
    "attention-window-anchors-softcap": ("attention", {**SMALL, "window": 5, "anchors": 3, "softcap": 3.0, "qk_norm": "full", "scale": 0.5}),
    "attention-chunk-l2-temperature": (
        "attention",
        {
            **PLAIN,
            "chunk": 16,
            "qk_norm": "weightless",
            "qk_norm_after_rope": True,
            "temperature": 0.3,
            "temperature_length": 20,
            "temperature_offset": 1,
        },
    ),
    "attention-moba": ("attention", {**SMALL, "block_size": 8, "top_blocks": 3}),
    "attention-moba-local": ("attention", {**SMALL, "block_size": 4, "top_blocks": 4, "local_blocks": 2}),
    "attention-msa": (
        "attention",
        {**SMALL, "block_size": 4, "top_blocks": 4, "local_blocks": 2, "block_score": "index", "index_dim": 10, "rope": {"fraction": 0.5}},
    ),
    "attention-msa-warm-up": (
        "attention",
        {**PLAIN, "block_size": 8, "block_score": "index", "index_dim": 8, "index_loss": "dense", "value_dim": 6, "rope": None},
    ),
    "attention-differential": ("attention", {**SMALL, "heads": 8, "kv_heads": 4, "differential": True, "qkv_bias": True}),
    "attention-differential-window": ("attention", {**PLAIN, "heads": 4, "kv_heads": 4, "differential": True, "window": 9, "value_scale": 0.7}),
    "attention-shared-kv": [
        ("attention", {**SMALL, "kv": "source"}),
        ("attention", {**SMALL, "kv": "source", "window": 9, "qk_norm": "full"}),
        ("attention", {**SMALL, "kv": "shared", "gate": "none"}),
        ("attention", {**SMALL, "kv": "source"}),
        ("attention", {**SMALL, "kv": "shared", "window": 9, "qk_norm": "full", "gate": "head"}),
        ("attention", {**SMALL, "kv": "shared", "qk_norm": "none"}),
    ],
    "attention-both-ways": ("attention", {**SMALL, "causal": False}),
    "attention-both-ways-window": ("attention", {**SMALL, "causal": False, "window": 4, "sinks": True, "softcap": 4.0}),
    "attention-both-ways-alibi": ("attention", {**PLAIN, "causal": False, "kv_heads": 4, "rope": None, "alibi": True}),
    "attention-both-ways-globals": ("attention", {**SMALL, "causal": False, "window": 4, "globals": 3}),
    "attention-both-ways-globals-t5-bias": (
        "attention",
        {**SMALL, "causal": False, "window": 7, "globals": 2, "rope": None, "relative_buckets": 16, "relative_distance": 20, "gate": "none"},
    ),
    "attention-both-ways-chunk": ("attention", {**PLAIN, "causal": False, "chunk": 16}),
    "attention-both-ways-differential": ("attention", {**SMALL, "causal": False, "heads": 8, "kv_heads": 4, "differential": True}),
    "attention-both-ways-shared-kv": [
        ("attention", {**SMALL, "kv": "source", "causal": False}),
        ("attention", {**SMALL, "kv": "source", "causal": False, "window": 4}),
        ("attention", {**SMALL, "kv": "shared", "causal": False}),
    ],
    "attention-t5-bias": ("attention", {**SMALL, "rope": None, "softcap": 4.0, "relative_buckets": 8, "relative_distance": 20, "scale": 1.0}),
    "attention-t5-bias-both-ways": ("attention", {**SMALL, "causal": False, "rope": None, "relative_buckets": 16, "relative_distance": 20}),
    "attention-t5-bias-both-ways-window": ("attention", {**PLAIN, "causal": False, "rope": None, "relative_buckets": 8, "window": 9}),
    "attention-alibi": ("attention", {**PLAIN, "kv_heads": 4, "alibi": True, "rope": None}),
}
