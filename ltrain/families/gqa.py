"""Fewer K/V heads in a trained model, as the start of uptraining."""

import dataclasses
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ltrain.checkpoint import Checkpoint, LocalCollectives, folder
from ltrain.config import Config, resolve_layers, to_yaml, validate
from ltrain.config import load as load_config
from ltrain.families import folder as hugging_face
from ltrain.families.source import Source, whole_model
from ltrain.families.weights import logical
from ltrain.families.write import Names, refuse_full, write_checkpoint
from ltrain.model.options import ModelConfig
from ltrain.schema import ConfigError


def pool_heads(path: Path | str, kv_heads: int, out: Path | str = "") -> Path:
    """A checkpoint, a run for its newest, or a Hugging Face folder -> OUT/step-00000000, a checkpoint without moments with that many
    K/V heads in each attention layer: the mean of each group of heads that becomes one (Ainslie et al. 2023, GQA, section 2.1).

    out: default PATH-kvN. Errors: ConfigError where the heads do not divide.
    """
    from ltrain.evals.generate import find

    with ExitStack() as open_files:
        if hugging_face.is_model(Path(path)):
            source: Source | Checkpoint = Source(path)
            config = Config(model=source.model)  # type: ignore[union-attr]
            vocab = config.model.vocab
            config.data.tokenizer.kind = "file"
        else:
            source = open_files.enter_context(Checkpoint(find(path, LocalCollectives())))
            config = load_config(source.path / "config.yaml")
            vocab = source.shape("embed.weight", "param")[0]
        out = Path(out) if out else Path(path).with_name(f"{Path(path).name}-kv{kv_heads}")
        refuse_full(out)
        model = config.model
        config.model = _with_heads(model, kv_heads, str(path))
        files = hugging_face.carried_files(source.path)
        if config.data.tokenizer.kind == "file" and ("tokenizer.json" in files or not config.data.tokenizer.path):
            config.data.tokenizer.path = str((out / folder.step_name(0) / "tokenizer.json").resolve())
        validate(config)
        files["config.yaml"] = to_yaml(config).encode()
        before, after = (logical(whole_model(m, vocab, "meta")) for m in (model, config.model))
        names: Names = {("param", name): (source.dtype(name, "param"), after[name].shape) for name in source.names("param")}
        names |= {("buffer", name): (source.dtype(name, "buffer"), source.shape(name, "buffer")) for name in source.names("buffer")}

        def read(kind: str, name: str) -> Tensor:
            tensor = source.read(name, kind)
            if kind == "buffer" or before[name].shape == after[name].shape:
                return tensor
            parts = zip(tensor.split(before[name].widths), after[name].widths, strict=True)
            return torch.cat([part if len(part) == width else _pooled(part, width, kv_heads) for part, width in parts])

        meta: dict[str, Any] = {"step": 0, "optimizer_step": 0, "tokens": 0, "vocab": vocab}
        return write_checkpoint(out, meta, names, read, files)


def _with_heads(model: ModelConfig, kv_heads: int, where: str) -> ModelConfig:
    layers, pooled = {k: dict(v) for k, v in model.layers.items()}, False
    for spec in resolve_layers(model):
        heads = getattr(spec.options, "kv_heads", None)
        if heads is None or heads == kv_heads:
            continue
        if getattr(spec.options, "differential", False):
            raise ConfigError(f"model.layers.{spec.kind} has differential attention, whose K/V heads are pairs: they are not pooled")
        if heads % kv_heads:
            raise ConfigError(f"--kv-heads {kv_heads} does not divide the {heads} K/V heads of model.layers.{spec.kind}: write a divisor of {heads}")
        layers.setdefault(spec.kind, {})["kv_heads"] = kv_heads
        pooled = True
    if not pooled:
        raise ConfigError(f"{where} has no attention layer with more than {kv_heads} K/V heads: there is nothing to pool")
    return dataclasses.replace(model, layers=layers)


def _pooled(part: Tensor, width: int, kv_heads: int) -> Tensor:
    """[rows, ...] of all heads -> [width, ...]: group after group of heads, their mean."""
    wide = part.to(torch.promote_types(part.dtype, torch.float32)).unflatten(0, (kv_heads, -1, width // kv_heads))  # [heads left, group, D, ...]
    return wide.mean(1).flatten(0, 1).to(part.dtype)
