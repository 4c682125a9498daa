"""Every mixer in the forms that the contract is checked in: one module of cases for each module of ltrain.model.mixers.

A module's CASES maps the name of a case to a mixer of MIXERS and its options as in a config. Heads and widths are chosen such that
two tensor ranks divide them.
"""

import pkgutil
from importlib import import_module
from typing import Any

from ltrain.config import Config
from ltrain.model.options import ModelConfig, MoEOptions
from ltrain.pattern import LayerSpec, resolve_layers

HIDDEN = 32

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    name: case for module in pkgutil.iter_modules(__path__) for name, case in import_module(f"{__name__}.{module.name}").CASES.items()
}


def config_of(name: str) -> Config:
    """One layer of the case."""
    mixer, options = CASES[name]
    model = ModelConfig(hidden=HIDDEN, depth=1, pattern=["layer"], layers={"layer": {"mixer": mixer, **options}}, init_std=0.3)
    model.ffn = MoEOptions(experts=0, inner=32)
    return Config(model=model, precision="fp64")


def spec_of(name: str) -> LayerSpec:
    return resolve_layers(config_of(name).model)[0]
