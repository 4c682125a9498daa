"""A model that is not whole is refused in one sentence that names what is wrong, and leaves nothing behind."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import ltrain
from ltrain.checkpoint import Checkpoint
from ltrain.cli import main
from ltrain.families.convert import export_checkpoint, import_checkpoint
from ltrain.families.gqa import pool_heads
from ltrain.schema import ConfigError

Make = Callable[..., tuple[Any, Path]]
DOWN = "model.layers.1.mlp.down_proj.weight"


def sharded(make: Make, tmp_path: Path) -> Path:
    return export_checkpoint(import_checkpoint(make("llama")[1], tmp_path / "whole"), tmp_path / "sharded", shard_bytes=30_000)


def edited(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Change the file that holds DOWN."""
    file = folder / json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"][DOWN]
    weights = load_file(file)
    change(weights)
    save_file(weights, file)


def truncated(folder: Path) -> None:
    file = sorted(folder.glob("model-*"))[2]
    os.truncate(file, file.stat().st_size - 100)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (truncated, "model-00003-of-.* cannot be read"),
        (lambda folder: sorted(folder.glob("model-*"))[1].unlink(), "model-00002-of-.* cannot be read"),
        (lambda folder: edited(folder, lambda w: w.pop(DOWN)), f"does not hold {DOWN}"),
        (lambda folder: edited(folder, lambda w: w.update({DOWN: w[DOWN][:, :-1].clone()})), rf"{DOWN} has shape \[48, 63\] .* makes it \[48, 64\]"),
    ],
    ids=["truncated shard", "missing shard", "missing tensor", "wrong shape"],
)
def test_damage_is_named_and_nothing_is_written(
    make: Make, tmp_path: Path, damage: Callable[[Path], object], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = sharded(make, tmp_path)
    damage(folder)
    for convert in (lambda: import_checkpoint(folder, tmp_path / "out"), lambda: pool_heads(folder, 1, tmp_path / "out")):
        with pytest.raises(ConfigError, match=message) as error:
            convert()
        assert "\n" not in str(error.value)
        assert not (tmp_path / "out").exists()
    capsys.readouterr()  # what transformers said
    with pytest.raises(SystemExit):
        main(["convert", "import", str(folder), str(tmp_path / "out")])
    assert capsys.readouterr().err.count("\n") == 1


def test_a_read_that_fails_midway_leaves_nothing(make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ltrain.families.folder import Folder

    folder, read, count = sharded(make, tmp_path), Folder.read, 0

    def failing(self: Folder, name: str, index: int | None = None) -> torch.Tensor:
        nonlocal count
        count += 1
        if count == 9:
            raise OSError("the disk is gone")
        return read(self, name, index)

    monkeypatch.setattr(Folder, "read", failing)
    with pytest.raises(OSError, match="the disk is gone"):
        import_checkpoint(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_kv_heads_are_pooled_by_their_mean(make: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """From 4 heads to 2: equal pairs lose nothing; others become their mean; the checkpoint trains and pools again."""
    _, folder = make("llama", num_key_value_heads=4, attention_bias=True)
    weights = load_file(folder / "model.safetensors")
    tokens = torch.randint(0, 96, (2, 20), generator=torch.Generator().manual_seed(0))
    capsys.readouterr()
    main(["convert", "gqa", str(folder), "--kv-heads", "2"])
    pooled = tmp_path / f"{folder.name}-kv2"
    assert capsys.readouterr().out.endswith(f"with 2 K/V heads as {pooled / 'step-00000000'}\n")
    with Checkpoint(pooled / "step-00000000", verify=True) as saved:
        query, key, _ = saved.read("layers.1.mixer.qkv.weight", "param").split((48, 24, 24))
        assert torch.equal(query, weights["model.layers.1.self_attn.q_proj.weight"])
        heads = weights["model.layers.1.self_attn.k_proj.weight"].unflatten(0, (4, 12))
        torch.testing.assert_close(key.unflatten(0, (2, 12)), torch.stack(((heads[0] + heads[1]) / 2, (heads[2] + heads[3]) / 2)))

    for name, tensor in weights.items():
        if "k_proj" in name or "v_proj" in name:
            weights[name] = tensor.unflatten(0, (2, 2, 12)).mean(1, keepdim=True).expand_as(tensor.unflatten(0, (2, 2, 12))).reshape(tensor.shape)
    save_file(weights, folder / "model.safetensors")
    before, after = ltrain.load_pretrained(folder), ltrain.load_pretrained(pooled)
    with torch.no_grad():
        torch.testing.assert_close(after(tokens), before(tokens), rtol=1e-5, atol=1e-5)
    one = pool_heads(pooled, 1)
    assert one == tmp_path / f"{folder.name}-kv2-kv1" / "step-00000000" and ltrain.load_pretrained(one).num_params().total < after.num_params().total
    with pytest.raises(ConfigError, match="--kv-heads 3 does not divide the 4 K/V heads of model.layers.attention"):
        pool_heads(folder, 3)
    with pytest.raises(ConfigError, match="no attention layer with more than 4 K/V heads"):
        pool_heads(folder, 4)


def test_a_loaded_model_is_called_on_tokens(make: Make) -> None:
    """[tokens] or [batch, tokens] -> logits of transformers, rows apart."""
    theirs, folder = make("qwen3_next")
    model = ltrain.load_pretrained(folder)
    tokens = torch.randint(0, 96, (3, 17), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(model(tokens), theirs(tokens).logits, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(model(tokens[1]), theirs(tokens).logits[1], rtol=1e-4, atol=1e-5)
