"""Every family against transformers: one module of cases for each of ltrain.families.models, which sets CASES.

A case is a config of transformers, tiny, with every part of the family; its variants are where the options branch.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from importlib import import_module
from typing import Any

from ltrain.families import FAMILIES

VOCAB = 96
LENGTHS = [70, 1, 29]
LONG = [300, 12]  # past max_position_embeddings and every original length

# Keys of most configs.
SMALL: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": None,  # whose embedding gets no gradient in transformers
}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 8.0, "original_max_position_embeddings": 64}


@dataclass(frozen=True)
class Cases:
    """What is compared, and how near. Wherever a bound is wider than usual, say whose rounding it is."""

    config: str  # class of transformers
    model: str | Callable[[], type]  # class of transformers, or what makes one of its parts
    base: dict[str, Any]
    variants: dict[str, dict[str, Any]] = field(default_factory=dict)  # changes of the base; "plain" has none
    lengths: dict[str, list[int]] = field(default_factory=dict)  # documents of a variant, where not LENGTHS
    beyond: dict[str, int] = field(default_factory=dict)  # variant -> a position past every document's: transformers goes by the longest of a batch
    logits: float = 1e-5  # relative distance
    gradients: dict[str, float] = field(default_factory=dict)  # end of a name on the disk -> relative distance, where not 3e-5
    dead: tuple[str, ...] = ()  # ends of names that get no gradient
    untrained: tuple[str, ...] = ()  # parts of names that only a loss of ours trains, and transformers has none
    greedy: bool = True  # greedy decoding is compared too


@cache
def cases(model_type: str) -> Cases:
    found: Cases = import_module(f"{__name__}.{model_type}").CASES
    return found


def config(model_type: str, **changes: Any) -> dict[str, Any]:
    """The base as a config.json."""
    return {"model_type": model_type, **cases(model_type).base, **changes}


# (model_type, variant)
ALL = [(model_type, variant) for model_type in FAMILIES for variant in ("plain", *cases(model_type).variants)]
EACH = [(model_type, "plain") for model_type in FAMILIES]
