"""What a model is made of: the `model:` part of a config. No torch here, so that a config can be read and refused quickly.

Each dataclass says which values its fields take (CHOICES, LIMITS) and, in `check`, which do not go together.
"""

from typing import Any

from ltrain.model.options.attention import AttentionOptions
from ltrain.model.options.base import NoMixerOptions
from ltrain.model.options.block import BlockOptions
from ltrain.model.options.cross_attention import CrossAttentionOptions
from ltrain.model.options.elementwise import MambaOptions, RGLRUOptions
from ltrain.model.options.ffn import FeedForwardOptions, MoEOptions
from ltrain.model.options.gated_conv import GatedConvOptions
from ltrain.model.options.linear_recurrence import LinearRecurrenceOptions
from ltrain.model.options.mla import MLAOptions
from ltrain.model.options.mlstm import MLSTMOptions
from ltrain.model.options.model import ModelConfig
from ltrain.model.options.mtp import MTPOptions
from ltrain.model.options.nsa import NSAOptions
from ltrain.model.options.parallel import Branch, ParallelOptions
from ltrain.model.options.rope import RopeOptions
from ltrain.model.options.rwkv7 import RWKV7Options
from ltrain.model.options.shared import SharedOptions
from ltrain.model.options.streams import StreamOptions

__all__ = [
    "MIXERS",
    "NO_MIXER",
    "AttentionOptions",
    "BlockOptions",
    "Branch",
    "CrossAttentionOptions",
    "FeedForwardOptions",
    "GatedConvOptions",
    "LinearRecurrenceOptions",
    "MTPOptions",
    "MLAOptions",
    "MLSTMOptions",
    "MoEOptions",
    "MambaOptions",
    "ModelConfig",
    "NSAOptions",
    "ParallelOptions",
    "RGLRUOptions",
    "RWKV7Options",
    "RopeOptions",
    "SharedOptions",
    "StreamOptions",
]

NO_MIXER = "none"  # in a config: the layer is only a feed-forward

_BARE = {"qk_norm": "none", "conv_width": 0, "activation": "none"}
# Published linear recurrences: what each fixes among the options.
RECURRENCES: dict[str, dict[str, Any]] = {
    "linear_attention": {
        **_BARE,
        "decay": "none",
        "update": "add",
        "feature_map": "elu",
        "normaliser": True,
        "scale": 1.0,
        "gate": "none",
        "norm": "none",
    },
    "lightning": {**_BARE, "activation": "silu", "decay": "lightning", "update": "add", "scale": 1.0, "gate": "sigmoid", "norm": "all"},
    "retention": {**_BARE, "decay": "retention", "update": "add", "gate": "silu", "norm": "head"},
    "gla": {**_BARE, "decay": "channel", "decay_gate": "sigmoid", "update": "add", "gate": "silu", "norm": "head"},
    "delta_net": {"decay": "none", "update": "delta"},
    "gated_delta_net": {"decay": "head", "decay_gate": "softplus", "update": "delta"},
    "kda": {"decay": "channel", "update": "delta", "gate": "sigmoid", "norm": "head"},
    "mamba2": {
        "decay": "head",
        "decay_gate": "softplus",
        "update": "add",
        "step": True,
        "skip": True,
        "qk_norm": "none",
        "scale": 1.0,
        "gate": "silu",
        "gate_first": True,
    },
}

# Mixer name in a config -> (module under ltrain.model.mixers, options, what the name fixes among the options).
MIXERS: dict[str, tuple[str, type, dict[str, Any]]] = {
    NO_MIXER: ("none", NoMixerOptions, {}),
    "attention": ("attention", AttentionOptions, {}),
    "mla": ("mla", MLAOptions, {}),
    "nsa": ("nsa", NSAOptions, {}),
    "cross_attention": ("cross_attention", CrossAttentionOptions, {}),
    "linear_recurrence": ("linear_recurrence", LinearRecurrenceOptions, {}),
    **{name: ("linear_recurrence", LinearRecurrenceOptions, fixed) for name, fixed in RECURRENCES.items()},
    "mamba": ("mamba", MambaOptions, {}),
    "rg_lru": ("rg_lru", RGLRUOptions, {}),
    "rwkv7": ("rwkv7", RWKV7Options, {}),
    "mlstm": ("mlstm", MLSTMOptions, {}),
    "gated_conv": ("gated_conv", GatedConvOptions, {}),
    "parallel": ("parallel", ParallelOptions, {}),
}
