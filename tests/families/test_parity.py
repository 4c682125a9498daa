"""Each family against transformers' own model in float32: logits and every gradient, decoding, and the files of both ways.

Of packed documents here and of one document at a time there. tests/families/cases says of which models.
"""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import ltrain
from ltrain.evals.generate import generate
from ltrain.families import family
from ltrain.families.convert import Source, export_checkpoint, import_checkpoint, whole_model
from ltrain.model.layers import pieces
from ltrain.model.sequence import Sequence
from ltrain.model.stack import Stack
from ltrain.schema import ConfigError
from tests.families.cases import ALL, EACH, LENGTHS, VOCAB, Cases, cases

Make = Callable[..., tuple[Any, Path]]
Variant = Callable[[str, str], tuple[Any, Path]]


def ids(case: tuple[str, str]) -> str:
    return "-".join(case)


def random_tokens(lengths: list[int], seed: int = 0) -> Tensor:
    return torch.randint(0, VOCAB, (sum(lengths),), generator=torch.Generator().manual_seed(seed))


def tensors(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def logical(stack: Stack, values: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    """values(parameter) of a one-device model by logical name."""
    found = {}
    for name, param in stack.named_parameters():
        for piece in pieces(name, param):
            found[piece.name] = values(param)[piece.index[0]] if isinstance(piece.index[0], int) else values(param)
    return found


def distance(a: Tensor, b: Tensor) -> float:
    return float(((a - b).norm() / b.norm()).detach())


def theirs_of(model: Any, tokens: Tensor, beyond: int | None) -> Tensor:
    """transformers' logits of one document; beyond: with one more token at that position."""
    if beyond is None:
        return model(tokens[None], use_cache=False).logits[0]
    positions = torch.cat((torch.arange(len(tokens)), torch.tensor([beyond])))
    return model(torch.cat((tokens, tokens[-1:]))[None], position_ids=positions[None], use_cache=False).logits[0, :-1]


def gradients_on_disk(model: Any, folder: Path) -> dict[str, Tensor]:
    """transformers' gradients under the names that their weights have on the disk: saved in the place of the weights."""
    weights = {name: param.data for name, param in model.named_parameters()}
    for param in model.parameters():
        param.data = torch.zeros_like(param) if param.grad is None else param.grad
    try:
        model.save_pretrained(folder)
    finally:
        for name, param in model.named_parameters():
            param.data = weights[name]
    return tensors(folder)


@pytest.mark.parametrize("case", ALL, ids=ids)
def test_logits_and_gradients_are_those_of_transformers(variant: Variant, tmp_path: Path, case: tuple[str, str]) -> None:
    model_type, name = case
    about: Cases = cases(model_type)
    lengths = about.lengths.get(name, LENGTHS)
    theirs, folder = variant(model_type, name)
    theirs.zero_grad()
    source, ours = Source(folder), ltrain.load_pretrained(folder)
    tokens = random_tokens(lengths)
    weights = torch.randn(len(tokens), VOCAB, generator=torch.Generator().manual_seed(1)) / len(tokens)

    logits = ours.logits(ours(tokens, Sequence.of(lengths)))
    (logits * weights).sum().backward()
    for part, weight, mine in zip(tokens.split(lengths), weights.split(lengths), logits.split(lengths), strict=True):
        other = theirs_of(theirs, part, about.beyond.get(name))
        assert distance(mine, other) < about.logits
        (other * weight).sum().backward()

    expected = gradients_on_disk(theirs, tmp_path)
    own = logical(ours, lambda param: torch.zeros_like(param) if param.grad is None else param.grad)
    trained = {n: their for n, their in source.table.theirs.items() if all(ours.kind == "param" for ours, _ in their.claims)}
    assert trained.keys() == {n for n in expected if n in trained or expected[n].any()} - {*source.family.computed(source.model)} - {
        n for n, their in source.table.theirs.items() if their.claims[0][0].kind == "buffer"
    }
    largest = max(gradient.norm() for gradient in expected.values())
    for n, their in trained.items():
        mine = their.assemble(lambda ours: own[ours.name])
        if n.endswith(about.dead) and about.dead:
            assert not mine.any() and not expected[n].any(), n
            continue
        if any(part in n for part in about.untrained):
            assert mine.any() and not expected[n].any(), n
            continue
        if not expected[n].any() and ".experts." in n:  # no token went there
            assert not mine.any(), n
            continue
        assert expected[n].norm() > 0, n
        if expected[n].norm() < 1e-6 * largest:  # nothing but rounding: keys' biases without positions, which no softmax sees
            assert mine.norm() < 1e-6 * largest, n
            continue
        bound = next((b for end, b in about.gradients.items() if n.endswith(end)), 3e-5)
        assert distance(mine, expected[n]) < bound, n


@pytest.mark.parametrize("case", ALL, ids=ids)
@torch.no_grad()
def test_decoding_is_the_full_forward(variant: Variant, case: tuple[str, str]) -> None:
    """With our caches and states, documents of unequal lengths."""
    _, folder = variant(*case)
    ours = ltrain.load_pretrained(folder)
    lengths, steps = [1, 40, 6], 5
    whole = [random_tokens([n + steps], n) for n in lengths]
    logits, state = ours.prefill(torch.cat([x[:n] for x, n in zip(whole, lengths, strict=True)]), Sequence.of(lengths))
    found = [logits]
    for step in range(steps):
        positions = torch.tensor(lengths) + step
        logits, state = ours.decode(torch.stack([x[n + step] for x, n in zip(whole, lengths, strict=True)]), state, Sequence.step(positions))
        found.append(logits)
    for i, (x, n) in enumerate(zip(whole, lengths, strict=True)):
        full = ours.logits(ours(x, Sequence.of([len(x)])))[n - 1 :]
        assert distance(torch.stack([step[i] for step in found]), full) < 1e-5


@pytest.mark.parametrize("case", [c for c in EACH if cases(c[0]).greedy], ids=ids)
def test_greedy_decoding_is_that_of_transformers(variant: Variant, case: tuple[str, str]) -> None:
    theirs, folder = variant(*case)
    prompts = [random_tokens([n], n) for n in (17, 1, 40)]
    ours = generate(ltrain.load_pretrained(folder), [p.tolist() for p in prompts], 12)
    for prompt, mine in zip(prompts, ours, strict=True):
        expected = theirs.generate(prompt[None], max_new_tokens=12, min_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0)
        assert mine == expected[0, len(prompt) :].tolist()


@pytest.mark.parametrize("case", ALL, ids=ids)
def test_export_gives_back_the_model(variant: Variant, tmp_path: Path, case: tuple[str, str]) -> None:
    """Through a checkpoint of ours: every tensor bit for bit, the config, and transformers loads it without a missing or unexpected key."""
    theirs, folder = variant(*case)
    out = export_checkpoint(import_checkpoint(folder, tmp_path / "run"), tmp_path / "out", model_type=case[0], shard_bytes=50_000)
    before, after = tensors(folder), tensors(out)
    assert before.keys() == after.keys()
    for name, tensor in after.items():
        assert tensor.dtype == before[name].dtype and torch.equal(tensor, before[name]), name
    again, info = type(theirs).from_pretrained(out, attn_implementation="eager", output_loading_info=True)
    assert not any(info.values()), info
    ours, kept = again.config.to_dict(), theirs.config.to_dict()
    for key in kept.keys() - {"transformers_version", "_name_or_path"}:
        assert ours[key] == kept[key], key
    tokens = random_tokens([40])[None]
    with torch.no_grad():
        assert torch.equal(again.eval()(tokens).logits, theirs(tokens).logits)


@pytest.mark.parametrize("case", EACH, ids=ids)
def test_a_key_that_nobody_knows_is_refused(variant: Variant, case: tuple[str, str]) -> None:
    config = json.loads((variant(*case)[1] / "config.json").read_text())
    with pytest.raises(ConfigError, match="has surprise, not known to ltrain"):
        family(case[0]).to_model({**config, "surprise": 3})
    assert family(case[0]).to_model({**config, "surprise": None}) == family(case[0]).to_model(config)


def test_dynamic_scaling_goes_by_the_configured_length(variant: Variant) -> None:
    """transformers takes the longest position of a batch: the same where our configured length is that."""
    theirs, folder = variant("llama", "dynamic")
    plain = ltrain.load_pretrained(folder)
    model = dataclasses.replace(plain.model, layers={k: {**v, "rope": {**v["rope"], "length": 300}} for k, v in plain.model.layers.items()})
    stretched = whole_model(model, VOCAB, "cpu")
    stretched.load_state_dict(plain.state_dict())
    tokens = random_tokens([300])
    with torch.no_grad():
        expected = theirs(tokens[None]).logits[0]
        assert distance(stretched.logits(stretched(tokens, Sequence.of([300]))), expected) < 1e-5
        assert distance(plain.logits(plain(tokens, Sequence.of([300]))), expected) > 1e-3
