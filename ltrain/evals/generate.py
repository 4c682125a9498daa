"""Continue prompts with a trained model: one prefill of all of them as a packed stream, then token by token."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ltrain.checkpoint import Checkpoint, Collectives, LocalCollectives, last_stage, newest, newest_sized, newest_whole
from ltrain.checkpoint.collectives import first, gather
from ltrain.checkpoint.index import INDEX
from ltrain.checkpoint.parameters import fill
from ltrain.config import Config
from ltrain.config import load as load_config
from ltrain.model.layers import LocalLayers
from ltrain.model.sequence import Sequence
from ltrain.model.stack import Stack

if TYPE_CHECKING:
    from ltrain.data.tokenizer import Tokenizer


def generate(
    model: Stack, prompts: list[list[int]], tokens: int, temperature: float = 0.0, seed: int = 0, *, vocab: int | None = None, eos: int | None = None
) -> list[list[int]]:
    """Up to `tokens` new token ids for each prompt.

    Args:
        model: a whole model on one device.
        prompts: token ids, at least one each; the lengths may differ.
        tokens: how many to add.
        temperature: 0 takes the likeliest token, T samples from softmax(logits / T).
        seed: of the sampling; the same seed gives the same text on the same machine.
        vocab: ids from here on are padding of the vocabulary, never chosen; None: the model's.
        eos: where a prompt's continuation ends, this id not included; None: never before `tokens`.

    Raises:
        ValueError: a prompt is empty or holds an id outside the vocabulary.
    """
    size = model.vocab if vocab is None else vocab
    for i, prompt in enumerate(prompts):
        if not prompt:
            raise ValueError(f"prompt {i} is empty: give it at least one token")
        if not 0 <= min(prompt) <= max(prompt) < model.vocab:
            raise ValueError(
                f"prompt {i} holds a token id outside 0..{model.vocab - 1}: encode it with the tokenizer that the model was trained with"
            )
    if not prompts or tokens < 1:
        return [[] for _ in prompts]
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.tensor([len(p) for p in prompts], device=device)
    training = model.training
    model.eval()
    try:
        flat = torch.tensor([t for p in prompts for t in p], device=device)
        seq = Sequence.of([len(p) for p in prompts], device)
        seq.room = tokens
        logits, state = model.prefill(flat, seq)
        columns = [choose(logits[:, :size], temperature, generator)]  # each [N]
        ended = columns[0] == eos if eos is not None else torch.zeros(len(prompts), dtype=torch.bool)
        while len(columns) < tokens and not ended.all():
            seq = Sequence.step(lengths + len(columns) - 1)
            logits, state = model.decode(columns[-1].to(device), state, seq)
            columns.append(choose(logits[:, :size], temperature, generator))
            if eos is not None:
                ended |= columns[-1] == eos
    finally:
        model.train(training)
    rows = torch.stack(columns, dim=1).tolist()  # [N, new]
    return [row[: row.index(eos)] if eos in row else row for row in rows]


def choose(logits: Tensor, temperature: float, generator: torch.Generator) -> Tensor:
    """logits [N, vocab] -> token ids [N] on the host"""
    logits = logits.float().cpu()
    if temperature == 0:
        return logits.argmax(-1)
    return torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator).squeeze(-1)


def find(path: str | Path, collectives: Collectives | None = None) -> Path:
    """The checkpoint's folder: `path` itself, or the newest of the run at `path`, of its last stage where it has some.

    collectives: of the ranks, which share the reading of all files, so that a damaged newest one falls back to the one before, loudly; None:
    only the files' sizes are looked at, for a caller that plans. Raises CheckpointError where `path` itself is damaged, or all of the run's are.
    """
    place = first(collectives or LocalCollectives(), lambda: _locate(Path(path)))  # ranks may see files of a network at different times
    if (place / INDEX).is_file():
        if collectives:
            part, parts = collectives.rank, collectives.size
            gather(collectives, lambda: Checkpoint(place).verify(part, parts))
        return place
    if not collectives:
        return newest_sized(place) or place  # there is one: _locate saw it
    found, warnings = newest_whole(place, collectives)
    for warning in warnings if collectives.rank == 0 else ():
        print(f"warning: {warning}; taking {found.name if found else 'none'}", file=sys.stderr)
    return found or place


def _locate(path: Path) -> Path:
    """A checkpoint, or a folder that has some."""
    path = last_stage(path)
    if (path / INDEX).is_file():
        return path
    for place in (path / "checkpoints", path):
        if place.is_dir() and newest(place) is not None:
            return place
    raise ValueError(f"{path} is neither a checkpoint (a folder with index.json) nor a run with a finished checkpoint: name one of the two")


def load(path: str | Path, device: str = "") -> tuple[Stack, "Tokenizer", Config]:
    """The model of a checkpoint, or of the newest checkpoint of a run, on `device`, or on this machine's GPU where it has one.

    Weights are float32 as saved, or bfloat16 on a GPU where the run's precision is bf16.

    Raises:
        ValueError: the folder holds no complete checkpoint, or its files do not fit each other.
    """
    from ltrain.data.tokenizer import Tokenizer

    folder = find(path, LocalCollectives())
    config = load_config(folder / "config.yaml")
    place = torch.device(device or ("cuda" if torch.cuda.is_available() and config.device != "cpu" else "cpu"))
    dtype = torch.bfloat16 if place.type == "cuda" and config.precision == "bf16" else torch.float32
    with Checkpoint(folder) as checkpoint:
        vocab = checkpoint.shape("embed.weight", "param")[0]  # rounded up from the tokenizer's
        layers = LocalLayers.of(config.model, place, dtype)
        model = Stack(config.model, vocab, layers)
        for name, param in model.named_parameters():
            fill(name, param, "param", param, checkpoint)
        for name, router in model.routers().items():
            router.bias.copy_(checkpoint.read(f"{name}.bias", "buffer"))
    return model.eval(), Tokenizer.load(folder), config


def main(checkpoint: str, prompt: str, tokens: int, temperature: float, seed: int) -> None:
    """Print the prompt and its continuation up to the end of the document: the verb `ltrain generate`."""
    if not prompt:
        raise ValueError("--prompt is empty: give at least one character to continue")
    model, tokenizer, _ = load(checkpoint)
    ids = tokenizer.encode(prompt)
    (new,) = generate(model, [ids], tokens, temperature, seed, vocab=tokenizer.vocab_size, eos=tokenizer.eos)
    print(tokenizer.decode([*ids, *new]))
