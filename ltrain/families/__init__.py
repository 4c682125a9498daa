"""Hugging Face models in and out: one file per model_type in `models`, each a table of its config's keys and of its weights' names.

`family.py` says what a table holds and how to add one; `rope.py` and `weights.py` read it, `tables.py` has rows that many share,
`convert.py` moves whole models.
"""

import pkgutil
from importlib import import_module
from pathlib import Path

from ltrain import schema
from ltrain.families.family import Family

# Every model_type. An export takes the first of equally near ones.
FAMILIES = sorted((m.name for m in pkgutil.iter_modules([str(Path(__file__).parent / "models")])), key=lambda name: (name != "llama", name))


def family(model_type: str) -> Family:
    """The table of a model_type. Errors: ConfigError for one that is not known."""
    if model_type not in FAMILIES:
        raise schema.ConfigError(f"model_type {model_type!r} cannot be converted{schema.suggestion(model_type, FAMILIES)}")
    found: Family = import_module(f"ltrain.families.models.{model_type}").FAMILY
    return found


def family_of(config_json: dict[str, object]) -> Family:
    """The table for a config.json."""
    model_type = config_json.get("model_type")
    if not isinstance(model_type, str):
        raise schema.ConfigError(f"config.json has no model_type: write one of {', '.join(FAMILIES)}")
    return family(model_type)
