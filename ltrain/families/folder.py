"""The folder of a Hugging Face model on the disk: config.json and safetensors files, one or many with an index."""

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ltrain.checkpoint.index import DTYPES, FileRecord, Shape
from ltrain.checkpoint.shard import header, write_file
from ltrain.schema import ConfigError

CONFIG, INDEX, SINGLE = "config.json", "model.safetensors.index.json", "model.safetensors"
# What stands beside the weights and is handed on as it is.
_TOKENIZER = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
)
_CARRIED = (*_TOKENIZER, "chat_template.jinja", "chat_template.json", "generation_config.json", "ltrain_tokenizer.json")
_DTYPES = {name: dtype for dtype, name in DTYPES.items()}


def is_model(path: Path) -> bool:
    """Whether a folder looks like a Hugging Face model."""
    return (path / CONFIG).is_file()


def carried_files(path: Path) -> dict[str, bytes]:
    """The files of tokenizer and generation beside weights."""
    return {name: (path / name).read_bytes() for name in _CARRIED if (path / name).is_file()}


# What names of a text model start with inside a model of more than text, and what they start with alone.
_INSIDE = {
    "language_model.": "",
    "model.language_model.": "model.",
    "lm_head.": "lm_head.",
    **{name: name for name in ("model.embed_tokens.", "model.layers.", "model.norm.")},  # as alone, beside the rest (Step 3.7)
}


def _alone(name: str) -> str:
    """The name that a tensor of a model of more than text has in the text model; '' for one of the rest."""
    return next((end + name.removeprefix(start) for start, end in _INSIDE.items() if name.startswith(start)), "")


class Folder:
    """A Hugging Face model on the disk. Nothing is read before it is asked for, and nothing but JSON and safetensors ever is.

    Of a model of more than text (its config.json has a text_config) it is the text model; `others` are the tensors of the rest.
    Errors: ConfigError where config.json or the weights are missing, damaged, or only there as pickle.
    """

    def __init__(self, path: Path | str):
        self.path = Path(path)
        self.config = read_json(self.path / CONFIG)
        self._open: dict[str, Any] = {}
        self._files = self._find()
        self._saved_as = {name: name for name in self._files}
        self.others: list[str] = []
        text = self.config.get("text_config")
        if isinstance(text, dict):
            self.config = text | {name: self.config[name] for name in ("tie_word_embeddings", "quantization_config") if name in self.config}
            found = {name: _alone(name) for name in self._files}
            self._saved_as = {name: saved for saved, name in found.items() if name}
            self.others = sorted(saved for saved, name in found.items() if not name)

    def _find(self) -> dict[str, str]:
        """Tensor -> the file that holds it."""
        if (self.path / INDEX).is_file():
            index = read_json(self.path / INDEX).get("weight_map")
            if not isinstance(index, dict) or not all(isinstance(f, str) and f == os.path.basename(f) for f in index.values()):
                raise ConfigError(f"{self.path / INDEX} has no weight_map from names to files beside it: fetch it again")
            return index
        if (self.path / SINGLE).is_file():
            return dict.fromkeys(self._file(SINGLE).keys(), SINGLE)
        pickled = sorted(p.name for pattern in ("*.bin", "*.pt", "*.pth") for p in self.path.glob(pattern))
        if pickled:
            raise ConfigError(
                f"{self.path} holds its weights as pickle ({pickled[0]}), which can run code and is never read: convert it to safetensors"
            )
        raise ConfigError(f"{self.path} holds neither {SINGLE} nor {INDEX}: name the folder of a model with its weights")

    def _file(self, name: str) -> Any:
        if name not in self._open:
            try:
                self._open[name] = safe_open(self.path / name, framework="pt")
            except (SafetensorError, OSError) as error:
                raise ConfigError(f"{self.path / name} cannot be read ({error}): fetch it again") from error
        return self._open[name]

    @property
    def names(self) -> set[str]:
        return set(self._saved_as)

    def rename(self, expected: set[str], renames: tuple[tuple[str, str], ...]) -> None:
        """Tensors that are expected under another name get it: where a name holds the first of a pair, and the second is expected."""
        for name in sorted(self.names - expected):
            for old, new in renames:
                other = name.replace(old, new, 1)
                if old in name and other in expected and other not in self._saved_as:
                    self._saved_as[other] = self._saved_as.pop(name)
                    break

    def dtype(self, name: str) -> torch.dtype:
        return _DTYPES[self._slice(name).get_dtype()]

    def shape(self, name: str) -> Shape:
        return tuple(self._slice(name).get_shape())

    def read(self, name: str, index: int | None = None) -> Tensor:
        """A whole tensor on the CPU, or only what is at an index of its first axis."""
        found, saved = self._slice(name), self._saved_as[name]
        tensor: Tensor = self._file(self._files[saved]).get_tensor(saved) if index is None else found[index]
        return tensor

    def _slice(self, name: str) -> Any:
        saved = self._saved_as[name]
        try:
            return self._file(self._files[saved]).get_slice(saved)
        except SafetensorError as error:
            raise ConfigError(f"{self.path / self._files[saved]} does not hold {saved} ({error}): fetch it again") from error


def read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read ({error}): name the folder of a Hugging Face model") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path} is not a JSON object: name the folder of a Hugging Face model")
    return content


Tensor_ = tuple[str, torch.dtype, Shape]  # key, dtype and shape of what will be written


def size(tensor: Tensor_) -> int:
    """Bytes."""
    return torch.Size(tensor[2]).numel() * tensor[1].itemsize


def shards(tensors: list[Tensor_], limit: int) -> list[list[Tensor_]]:
    """The tensors in files of at most `limit` bytes each, where no single tensor is larger."""
    files: list[list[Tensor_]] = [[]]
    room = limit
    for tensor in tensors:
        if files[-1] and size(tensor) > room:
            files.append([])
            room = limit
        files[-1].append(tensor)
        room -= size(tensor)
    return files


def stream(path: Path, tensors: list[Tensor_], read: Callable[[str], Tensor], metadata: dict[str, str] | None = None) -> FileRecord:
    """Write a safetensors file of which one tensor at a time is in memory: read(key) is asked for each and converted to its dtype."""
    tensors = sorted(tensors, key=lambda tensor: -tensor[1].itemsize)  # every tensor is aligned to its element

    def parts() -> Iterator[bytes | memoryview]:
        yield header([(key, dtype, shape, size((key, dtype, shape))) for key, dtype, shape in tensors], metadata)
        for key, dtype, shape in tensors:
            tensor = read(key)
            assert tensor.shape == shape, key
            yield memoryview(tensor.to(dtype).contiguous().reshape(-1).view(torch.uint8).numpy())
            del tensor

    return write_file(path, parts())
