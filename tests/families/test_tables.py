"""What a family's table can say, on families that do not exist."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import ltrain
from ltrain import families
from ltrain.families import tables
from ltrain.families.convert import export_checkpoint, import_checkpoint
from ltrain.families.family import Family, Role, key
from ltrain.families.models.llama import FAMILY as LLAMA
from ltrain.families.models.mixtral import FAMILY as MIXTRAL
from ltrain.families.rope import Rope
from ltrain.families.weights import Theirs, Weight
from ltrain.model.options import AttentionOptions
from ltrain.schema import ConfigError

CONFIG: dict[str, Any] = {
    "model_type": "other",
    "vocab_size": 40,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 6,
    "max_position_embeddings": 64,
}
EXPERTS = {"num_local_experts": 3}
FIXED = {"gate": "none", "qk_norm": "none"}


def known(monkeypatch: pytest.MonkeyPatch, table: Family) -> None:
    """As if the table stood in ltrain/families/models."""
    monkeypatch.setattr(families, "FAMILIES", [table.model_type])
    for module in ("ltrain.families.source", "ltrain.families.convert", "ltrain.families"):
        for name in ("family", "family_of"):
            monkeypatch.setattr(f"{module}.{name}", lambda _: table, raising=False)


def other(**changes: Any) -> Family:
    return dataclasses.replace(MIXTRAL, model_type="other", **changes)


def attention(*weights: Weight, **changes: Any) -> dict[str, Role]:
    return {"attention": dataclasses.replace(MIXTRAL.mixers["attention"], weights=weights, **changes)}


def ways_there(table: Family, theirs: dict[str, Tensor], tmp_path: Path, **changes: Any) -> dict[str, Tensor]:
    """Their tensors, imported; what comes out again is bit for bit what went in. Returns ours, by name."""
    folder = tmp_path / "hf"
    folder.mkdir()
    save_file({name: tensor.contiguous() for name, tensor in theirs.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({**CONFIG, **EXPERTS, **changes}))
    out = export_checkpoint(import_checkpoint(folder, tmp_path / "in", "keep"), tmp_path / "out")
    after = load_file(out / "model.safetensors")
    assert after.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert after[name].dtype == tensor.dtype and torch.equal(after[name], tensor), name
    model = ltrain.load_pretrained(folder, dtype=torch.float64)
    return dict(model.named_parameters()) | dict(model.named_buffers())


def plain(table: Family, config: dict[str, Any]) -> dict[str, Tensor]:
    """Random tensors of the names and shapes that the table gives them."""
    from ltrain.families.source import whole_model

    model = table.to_model(config)
    generator = torch.Generator().manual_seed(0)
    found = table.table(whole_model(model, model.vocab, "meta")).theirs
    return {name: torch.randn(their.shape, generator=generator) for name, their in found.items()}


def test_experts_stacked_transposed_and_interleaved(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As gpt_oss has them: (E, H, 2 I) used as x @ W, gate and up in turn; and as llama4: gate, then up."""
    rows = (
        *tables.router(),
        Weight("experts.{expert}.up", (Theirs("mlp.experts.gate_up_proj", (0, 1), groups="inner", transposed=True),), parts=2),
        Weight.same("experts.{expert}.down", "mlp.experts.down_proj", transposed=True),
    )
    table = other(ffns={"moe": dataclasses.replace(MIXTRAL.ffns["moe"], weights=rows)})
    known(monkeypatch, table)
    theirs = plain(table, CONFIG | EXPERTS)
    assert theirs["model.layers.0.mlp.experts.gate_up_proj"].shape == (3, 16, 12) and theirs["model.layers.0.mlp.experts.down_proj"].shape == (
        3,
        6,
        16,
    )
    ours = ways_there(table, theirs, tmp_path)
    for layer in range(2):
        w = theirs[f"model.layers.{layer}.mlp.experts.gate_up_proj"].double()
        expected = torch.cat((w[..., ::2], w[..., 1::2]), dim=-1).mT  # gate above up
        assert torch.equal(ours[f"layers.{layer}.ffn.experts.up"], expected)
        assert torch.equal(ours[f"layers.{layer}.ffn.experts.down"], theirs[f"model.layers.{layer}.mlp.experts.down_proj"].double().mT)


def test_one_tensor_of_several_of_ours(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Queries, keys and values by K/V head (Falcon), with the output below them, and a matrix that is transposed (GPT-2)."""
    table = other(
        mixers=attention(
            Weight("qkv.weight", (Theirs("all.weight", (0, 1, 2), groups="kv_heads"),)),
            Weight.same("out.weight", "out.weight", transposed=True, unit_axes=(0, 2)),
        ),
        layer_weights=(Weight.same("mixer_norm.weight", "norms", at=1), Weight.same("ffn_norm.weight", "norms", at=0)),
    )
    known(monkeypatch, table)
    theirs = plain(table, CONFIG | EXPERTS)
    assert theirs["model.layers.1.norms"].shape == (32,) and theirs["model.layers.1.out.weight"].shape == (1, 16, 1, 16)
    ours = ways_there(table, theirs, tmp_path)
    q, k, v = theirs["model.layers.1.all.weight"].unflatten(0, (2, 16)).split((8, 4, 4), dim=1)
    assert torch.equal(ours["layers.1.mixer.qkv.weight"], torch.cat([x.flatten(0, 1) for x in (q, k, v)]).double())
    assert torch.equal(ours["layers.1.mixer.out.weight"], theirs["model.layers.1.out.weight"].double().reshape(16, 16).T)
    below, above = ours["layers.1.mixer_norm.weight"], ours["layers.1.ffn_norm.weight"]
    assert torch.equal(torch.cat((above, below)), theirs["model.layers.1.norms"].double())


def test_buffers_and_tensors_of_options(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A balancing bias goes both ways; slopes are written as the options make them, and refused where they are others."""

    def slopes(options: Any, layer: int, depth: int) -> Tensor:
        return torch.arange(1.0, options.heads + 1) / (layer + 1)

    table = other(
        mixers=attention(*tables.attention(), computed={"self_attn.slopes": slopes}),
        ffns={"moe": dataclasses.replace(MIXTRAL.ffns["moe"], weights=(*tables.router(bias="mlp.balance"), *tables.experts()))},
    )
    known(monkeypatch, table)
    theirs = plain(table, CONFIG | EXPERTS)
    theirs |= {f"model.layers.{layer}.self_attn.slopes": slopes(AttentionOptions(heads=4), layer, 2) for layer in range(2)}
    ours = ways_there(table, theirs, tmp_path)
    assert torch.equal(ours["layers.1.ffn.router.bias"], theirs["model.layers.1.mlp.balance"])
    theirs["model.layers.1.self_attn.slopes"] += 1
    save_file(theirs, tmp_path / "hf" / "model.safetensors")
    with pytest.raises(ConfigError, match="model.layers.1.self_attn.slopes .* is not what its config.json makes it"):
        import_checkpoint(tmp_path / "hf", tmp_path / "refused")


def test_layers_that_differ_in_numbers_rope_and_norms() -> None:
    """Heads listed per layer, values in mappings and computed, null as a value, a rope for each type of layer, and layers without."""
    rotating = Role(mixer="attention", rope=Rope(layer_type="near", pairs=True), fixed=FIXED, weights=tables.attention())
    elsewhere = Rope(layer_type="far", base=5e5, theta="far_theta", scaled=False, fraction=0.5)
    far = dataclasses.replace(rotating, rope=elsewhere, fixed={**FIXED, "qk_norm": "head"})
    turned = key("interleaved", "far.rope.pairs", default=False)
    free = dataclasses.replace(rotating, rope=None, fixed={**FIXED, "rope": None})
    table = dataclasses.replace(
        LLAMA,
        model_type="other",
        mixers={"free": free, "near": rotating, "far": far},
        keys=(
            *tables.without(LLAMA.keys, "num_attention_heads", "num_key_value_heads", "head_dim", "attention_bias", "rms_norm_eps"),
            key("heads", "*.heads", per_layer=True),
            key("attention.groups", "*.kv_heads", read=lambda g, c: g * 2, write=lambda h, c: h // 2),
            key("attention.width", "*.head_dim", default=8),
            key("bias", "near.qkv_bias", "far.qkv_bias", default=True, nullable=True, read=lambda v, c: bool(v), write=lambda v, c: v or None),
            key("eps", "norm_eps", default=lambda c: 1 / c["hidden_size"]),
            turned,
            key("", "near.out_bias", read=lambda _, c: c["hidden_size"] > 8),
        ),
        roles=lambda config: [(kind, "dense") for kind in config["layer_types"]],
        role_keys=lambda roles: {"layer_types": [mixer for mixer, _ in roles]},
        role_names=("layer_types",),
    )
    config = {
        **{k: v for k, v in CONFIG.items() if k not in ("num_attention_heads", "num_key_value_heads")},
        "num_hidden_layers": 5,
        "layer_types": ["near", "far", "free", "near", "near"],
        "heads": [4, 4, 2, 6, 4],
        "attention": {"groups": 1},
        "bias": None,
        "interleaved": True,
        "rope_parameters": {
            "near": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0},
            "far": {"rope_type": "default", "rope_theta": 7e5, "partial_rotary_factor": 0.25},
        },
    }
    model = table.to_model(config)
    assert model.pattern == ["near", "far", "free", "near_dense_2"] and model.norm_eps == 1 / 16
    assert [layer["heads"] for layer in (model.layers[kind] for kind in model.pattern)] == config["heads"][:4]
    near, far_, free_ = (model.layers[kind] for kind in ("near", "far", "free"))
    assert near["rope"] == {"scaling": "linear", "factor": 4.0, "pairs": True}
    assert far_["rope"] == {"base": 7e5, "fraction": 0.25, "pairs": True} and free_["rope"] is None
    assert near["kv_heads"] == 2 and near["head_dim"] == 8 and near["out_bias"] and not near["qkv_bias"] and "out_bias" not in far_
    written = table.to_config(model, 40, 64)
    for name in ("layer_types", "heads", "attention", "bias", "interleaved", "rope_parameters"):
        expected = {**config[name], "width": 8} if name == "attention" else config[name]
        assert written[name] == expected, name
    older = {k: v for k, v in config.items() if k != "rope_parameters"}
    older |= {"rope_theta": 1e4, "far_theta": 7e5, "partial_rotary_factor": 0.25, "rope_scaling": {"rope_type": "linear", "factor": 4.0}}
    with pytest.raises(ConfigError, match="rotates whole heads"):
        table.to_model(older)
    older["partial_rotary_factor"] = None
    assert table.to_model(older).layers["far"]["rope"] == {"base": 7e5, "fraction": 0.5, "pairs": True}
    with pytest.raises(ConfigError, match="heads in config.json has 1 values for 5 layers"):
        table.to_model({**config, "heads": [4]})
