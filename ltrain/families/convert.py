"""Whole models between Hugging Face folders and ltrain checkpoints, one tensor at a time."""

import dataclasses
import json
import os
import secrets
import shutil
import tempfile
from collections.abc import Callable
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ltrain import stages
from ltrain.checkpoint import Checkpoint, LocalCollectives, folder
from ltrain.checkpoint.parameters import fill
from ltrain.checkpoint.shard import sync_folder, write_file
from ltrain.config import Config, resolve_layers, to_yaml, validate
from ltrain.config import load as load_config
from ltrain.families import FAMILIES, family, family_of, rope
from ltrain.families import folder as hugging_face
from ltrain.families.family import Family
from ltrain.families.source import Source, some, whole_model
from ltrain.families.weights import Claim, Ours
from ltrain.families.write import SHARD, Names, refuse_full, write_checkpoint
from ltrain.model.options import MIXERS, ModelConfig, MTPOptions
from ltrain.model.stack import Stack
from ltrain.schema import ConfigError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
KEEP = "keep"  # each tensor's own type

# Of a source's config.json: what an export gives back also where it describes another model.
_CARRIED = ("bos_token_id", "eos_token_id", "pad_token_id", "initializer_range", "use_cache", "output_router_logits")


def import_checkpoint(hf_dir: Path | str, out_dir: Path | str, dtype: str = "float32", log: Callable[[str], None] = lambda line: None) -> Path:
    """A Hugging Face folder -> OUT_DIR/step-00000000, an ltrain checkpoint without moments, whose path is returned.

    Tensor by tensor: the memory it takes is a few times the largest. dtype: float32, bfloat16, or keep for each tensor's own.
    log: told in a sentence each what was left out. Errors: ConfigError for a model, a folder or a tokenizer that cannot be used.
    """
    if dtype not in (*DTYPES, KEEP):
        raise ConfigError(f"--dtype {dtype} is not known: write float32, bfloat16 or {KEEP}")
    source, out = Source(hf_dir), Path(out_dir)
    final = out / folder.step_name(0)
    refuse_full(out)
    config = _run_config(source.model, final)
    validate(config)
    meta = {"step": 0, "optimizer_step": 0, "tokens": 0, "vocab": source.model.vocab, "source": source.folder.config}
    files = _tokenizer_files(source.path, log)
    files["config.yaml"] = to_yaml(config).encode()
    if source.ignored:
        log(f"left out {some(source.ignored)}: no part of the model")
    names: Names = {}
    for kind in ("param", "buffer"):
        for name in source.names(kind):
            kept = source.dtype(name, kind) if dtype == KEEP else torch.float32 if kind == "buffer" else DTYPES[dtype]
            names[kind, name] = kept, source.shape(name, kind)
    return write_checkpoint(out, meta, names, lambda kind, name: source.read(name, kind), files)


def _run_config(model: ModelConfig, final: Path) -> Config:
    """What a run that starts from the checkpoint uses as it is: the model and its tokenizer."""
    config = Config(model=model)
    config.data.tokenizer = dataclasses.replace(config.data.tokenizer, kind="file", path=str((final / "tokenizer.json").resolve()))
    return config


def _tokenizer_files(path: Path, log: Callable[[str], None]) -> dict[str, bytes]:
    from ltrain.data.tokenizer import from_file

    files = hugging_face.carried_files(path)
    if "tokenizer.json" not in files:
        log(f"{path} has no tokenizer.json: put one into the checkpoint's folder before training or generating text from it")
        return files
    try:
        tokenizer = from_file(str(path / "tokenizer.json"))
    except ValueError as error:
        log(f"the tokenizer is kept, but ltrain cannot use it for text: {error}")
        return files
    files["ltrain_tokenizer.json"] = json.dumps({"kind": tokenizer.kind, "eos": tokenizer.eos}).encode()
    return files


def export_checkpoint(
    checkpoint: Path | str,
    hf_dir: Path | str,
    dtype: str = KEEP,
    model_type: str = "",
    shard_bytes: int = SHARD,
    length: int = 0,
    log: Callable[[str], None] = lambda line: None,
) -> Path:
    """An ltrain checkpoint (or a run's newest) -> a Hugging Face folder that transformers loads.

    dtype: float32, bfloat16 or keep; model_type: the family to write, '' for the first that has this very model; shard_bytes: of a
    file; length: max_position_embeddings, 0 for what the model's positions and its run's data say; log: told what was left out.
    Errors: ConfigError where no family has the model, or the folder is not empty.
    """
    from ltrain.evals.generate import find

    if dtype not in (*DTYPES, KEEP):
        raise ConfigError(f"--dtype {dtype} is not known: write float32, bfloat16 or {KEEP}")
    out = Path(hf_dir)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out} is not empty: name a new folder for the model")
    path = find(checkpoint, LocalCollectives())
    config = load_config(path / "config.yaml")
    if config.model.mtp.depth:
        log(f"left out what predicts {config.model.mtp.depth} more tokens (model.mtp), which transformers' models have not")
        config.model.mtp = MTPOptions()
    with Checkpoint(path) as saved:
        vocab = saved.shape("embed.weight", "param")[0]
        before = saved.meta.get("source") or saved.meta.get("origin") or {}  # the config.json that the weights once came with
        longest = length or _longest(before, dataclasses.replace(config.model, vocab=vocab)) or max(stages.length(config.data), *_reach(config.model))
        table, written = _fitting(config.model, vocab, longest, model_type, before.get("model_type", ""))
        if length and written.get(table.length) != length:
            raise ConfigError(f"--length {length} has no effect on this rope, whose length is {written.get(table.length)}: take it out")
        tensors = table.table(whole_model(config.model, vocab, "meta"))
        computed = table.computed(config.model)
        _refuse_unnamed(saved, table, tensors.unnamed)

        def kept(claims: tuple[tuple[Ours, Claim], ...]) -> torch.dtype:
            ours = claims[0][0]
            if dtype == KEEP or ours.kind == "buffer":
                return reduce(torch.promote_types, [saved.dtype(o.name, o.kind) for o, _ in claims])
            return DTYPES[dtype]

        names = [(name, kept(their.claims), their.shape) for name, their in tensors.theirs.items()]
        names += [(name, (value := make()).dtype, tuple(value.shape)) for name, make in computed.items()]
        dtypes = [kept for _, kept, _ in names]
        written["dtype"] = str(max(dtypes, key=dtypes.count)).removeprefix("torch.")
        written = _carried(written, before, table, dataclasses.replace(config.model, vocab=vocab))

        def read(name: str) -> Tensor:
            if name in computed:
                return computed[name]()
            return tensors.theirs[name].assemble(lambda ours: saved.read(ours.name, ours.kind))

        out.parent.mkdir(parents=True, exist_ok=True)
        temporary = out.parent / f".tmp-{out.name}-{secrets.token_hex(4)}"
        temporary.mkdir()
        try:
            _write_weights(temporary, hugging_face.shards(names, shard_bytes), read)
            for name, content in _tokenizer(path, written).items():
                write_file(temporary / name, [content])
            write_file(temporary / hugging_face.CONFIG, [(json.dumps(written, indent=2) + "\n").encode()])
            sync_folder(temporary)
            if out.exists():
                out.rmdir()
            os.rename(temporary, out)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
    return out


def _longest(before: dict[str, Any], model: ModelConfig) -> int:
    """The longest sequence of the config.json that a model came with, if it is still that model; else 0."""
    if not before or family_of(before).difference(model, before):
        return 0
    return family_of(before).longest(before)


def _reach(model: ModelConfig) -> list[int]:
    ropes = [getattr(spec.options, "rope", None) for spec in resolve_layers(model)]
    return [rope.reach(options) if options else 0 for options in ropes]


def _fitting(model: ModelConfig, vocab: int, length: int, model_type: str, before: str) -> tuple[Family, dict[str, Any]]:
    """The family that has this very model, and its config.json: `model_type`, or the one it came as, or the plainest."""
    refusals: dict[str, str] = {}
    fitting: list[tuple[Family, dict[str, Any]]] = []
    for name in [model_type] if model_type else FAMILIES:
        try:
            fitting.append((family(name), family(name).to_config(model, vocab, length)))
        except ConfigError as error:
            refusals[name] = str(error)
    if fitting:  # the one with the fewest kinds of layers that this model has not
        return min(fitting, key=lambda f: (f[0].model_type != before, len(f[0].mixers) + len(f[0].ffns)))
    if model_type:
        raise ConfigError(refusals[model_type])
    nearest = min(refusals, key=lambda name: _distance(family(name), model))
    raise ConfigError(
        f"no Hugging Face family has this model, not even {nearest}, the nearest ({refusals[nearest]}): change the model, or write --family and a "
        "model_type of `ltrain models` to learn what another one lacks"
    )


def _distance(table: Family, model: ModelConfig) -> int:
    """How many mixers only one of the two has."""
    ours = {MIXERS[spec.mixer][0] for spec in resolve_layers(model)}
    return len(ours ^ {MIXERS[role.mixer][0] for role in table.mixers.values()})


def _refuse_unnamed(saved: Checkpoint, table: Family, unnamed: tuple[str, ...]) -> None:
    for name in unnamed:
        if saved.read(name, "buffer").any():
            raise ConfigError(f"{table.model_type} has no balancing bias of the router, and {name} is not zero: train with ffn.bias_rate=0")


def _carried(written: dict[str, Any], before: dict[str, Any], table: Family, model: ModelConfig) -> dict[str, Any]:
    """An import's own config.json where it still describes the model, or does with the positions of the export's; else the export's."""
    if before.get("model_type") == table.model_type:
        ropes = table.rope_keys()
        moved = {k: v for k, v in before.items() if k not in ropes} | {k: v for k, v in written.items() if k in ropes}
        for candidate in (before, moved):
            if table.longest(candidate) == table.longest(written) and not table.difference(model, candidate):
                return {k: v for k, v in candidate.items() if k != "torch_dtype"} | {"dtype": written["dtype"]}
    return written | {name: before[name] for name in _CARRIED if name in before}


def _write_weights(path: Path, files: list[list[hugging_face.Tensor_]], read: Callable[[str], Tensor]) -> None:
    weight_map, total = {}, 0
    for number, tensors in enumerate(files, start=1):
        name = hugging_face.SINGLE if len(files) == 1 else f"model-{number:05d}-of-{len(files):05d}.safetensors"
        hugging_face.stream(path / name, tensors, read, {"format": "pt"})
        weight_map.update({key: name for key, _, _ in tensors})
        total += sum(map(hugging_face.size, tensors))
    if len(files) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        write_file(path / hugging_face.INDEX, [(json.dumps(index, indent=2) + "\n").encode()])


def _tokenizer(path: Path, config: dict[str, Any]) -> dict[str, bytes]:
    """The tokenizer's files beside a checkpoint; the end of a document is written into `config` and tokenizer_config.json where it is not yet."""
    files = hugging_face.carried_files(path)
    if files.pop("ltrain_tokenizer.json", None) and "tokenizer.json" in files:
        from ltrain.data.tokenizer import Tokenizer

        tokenizer = Tokenizer.load(path)
        config.setdefault("eos_token_id", tokenizer.eos)
        content = json.loads(files["tokenizer.json"])
        end = next((t["content"] for t in content.get("added_tokens", []) if t["id"] == tokenizer.eos), None)
        about = {"tokenizer_class": "PreTrainedTokenizerFast", **({"eos_token": end} if end else {})}
        files.setdefault("tokenizer_config.json", (json.dumps(about, indent=2) + "\n").encode())
    return files


def roundtrip(hf_dir: Path | str, work: Path | str | None = None) -> tuple[int, int]:
    """Import, export, and compare every tensor bit for bit and the models that the two configs make.

    work: a folder with room for the model twice, the system's temporary one without. Returns how many tensors and bytes were compared.
    Errors: ConfigError naming what differs.
    """
    with tempfile.TemporaryDirectory(prefix="roundtrip", dir=work) as between:
        imported = import_checkpoint(hf_dir, Path(between, "imported"), KEEP)
        exported = export_checkpoint(imported, Path(between, "exported"), KEEP, str(hugging_face.Folder(hf_dir).config["model_type"]))
        before, after = Source(hf_dir), Source(exported)
        if before.model != after.model:
            raise ConfigError(f"config.json of {hf_dir} makes another model after the round trip: {before.model} became {after.model}")
        different, compared = [], 0
        names = sorted([*before.table.theirs, *before.family.computed(before.model)])
        for name in names:
            a, b = before.folder.read(name), after.folder.read(name)
            compared += a.numel() * a.element_size()
            if a.dtype != b.dtype or a.shape != b.shape or not torch.equal(_bits(a), _bits(b)):
                different.append(name)
        if different:
            raise ConfigError(f"{len(different)} of {len(names)} tensors differ after the round trip, {some(different)}: the family's table is wrong")
        return len(names), compared


def _bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


@torch.no_grad()
def load_pretrained(path: Path | str, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> Stack:
    """A model ready for forward, prefill and decode, in evaluation mode: called on tokens [T] or [batch, T], it gives logits.

    path: a Hugging Face folder, an ltrain checkpoint, or a run for its newest. Errors: ConfigError (a ValueError) for anything else.
    """
    path = Path(path)
    if hugging_face.is_model(path):
        source = Source(path)
        stack = whole_model(source.model, source.model.vocab, device, dtype)
        for name, param in stack.named_parameters():
            fill(name, param, "param", param, source)  # type: ignore[arg-type]
        for name in source.names("buffer"):
            stack.get_buffer(name).copy_(source.read(name, "buffer"))
        return stack.eval()
    from ltrain.evals.generate import find

    path = find(path, LocalCollectives())
    with Checkpoint(path) as saved:
        stack = whole_model(load_config(path / "config.yaml").model, saved.shape("embed.weight", "param")[0], device, dtype)
        for name, param in stack.named_parameters():
            fill(name, param, "param", param, saved)
        for name in saved.names("buffer"):
            stack.get_buffer(name).copy_(saved.read(name, "buffer"))
    return stack.eval()
