"""Step 3.5 Flash as its own checkpoints have it: another spelling of the config, and layers of multi-token prediction behind the last."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import ltrain
from ltrain.families import family
from ltrain.families.convert import Source, export_checkpoint, import_checkpoint
from ltrain.schema import ConfigError
from tests.families.cases import cases
from tests.families.test_parity import distance, random_tokens

LLAMA3 = {"rope_type": "llama3", "factor": 2.0, "original_max_position_embeddings": 128, "low_freq_factor": 1.0, "high_freq_factor": 32.0}
WORDS = {
    "num_attention_groups": "num_key_value_heads",
    "moe_num_experts": "n_routed_experts",
    "moe_top_k": "num_experts_per_tok",
    "share_expert_dims": "share_expert_dim",
}


def of_a_checkpoint() -> dict[str, Any]:
    """The config.json of the case, four layers, as the checkpoints write theirs, with three layers more."""
    base = cases("step3p5").base
    shared = {name: value for name, value in base.items() if name not in WORDS.values()} | {theirs: base[ours] for theirs, ours in WORDS.items()}
    for name in ("rope_parameters", "mlp_layer_types", "num_sliding_attention_heads"):
        shared.pop(name)
    return {
        **shared,
        "model_type": "step3p5",
        "layer_types": base["layer_types"] + ["sliding_attention"] * 3,
        "rope_theta": [5e6, 1e4, 1e4, 5e6, 1e4, 1e4, 1e4],
        "partial_rotary_factors": [0.5, 1.0, 1.0, 0.5, 1.0, 1.0, 1.0],
        "rope_scaling": LLAMA3,
        "yarn_only_types": ["full_attention"],
        "attention_other_setting": {"attention_type": "sliding_attention", "num_attention_heads": 6, "num_attention_groups": 2, "head_dim": 12},
        "moe_layers_enum": "1,2,3",
        "swiglu_limits": [0.0, 0.0, 0.05, 0.0, 0.0, 0.0, 0.0],
        "swiglu_limits_shared": [0.1, 0.0, 0.0, 0.2, 0.0, 0.0, 0.0],
        "num_nextn_predict_layers": 3,
        "need_fp32_gate": True,
        "use_moe": True,
        "moe_every_n_layer": 1,
        "use_moe_router_bias": True,
        "use_rope_layers": [],
        "sink": False,
    }


def test_a_checkpoint_reads_as_transformers_reads_it(transformers: Any) -> None:
    table, older = family("step3p5"), of_a_checkpoint()
    before = json.dumps(older)
    model = table.to_model(older)
    assert json.dumps(older) == before
    for name in ("none of them", "moe_layers_enum", "yarn_only_types", "partial_rotary_factors", "rope_scaling", "attention_other_setting"):
        left = {key: value for key, value in json.loads(before).items() if key != name}
        theirs = json.loads(transformers.Step3p7TextConfig(**left).to_json_string())
        assert table.to_model(left) == table.to_model(theirs), name
    full, sliding = (next(kind for name, kind in model.layers.items() if name.startswith(start)) for start in ("full", "sliding"))
    assert (full["heads"], sliding["heads"], model.ffn.router_dtype) == (4, 6, "float32")
    assert full["rope"]["fraction"] == 0.5 and full["rope"]["scaling"] == "llama3" and "scaling" not in sliding.get("rope", {})
    everywhere = table.to_model({**older, "yarn_only_types": ["full_attention", "sliding_attention"]})
    assert next(kind for name, kind in everywhere.layers.items() if name.startswith("sliding"))["rope"]["scaling"] == "llama3"
    with pytest.raises(ConfigError, match="swiglu_limits in config.json has 6 values for 4 layers"):
        table.to_model({**older, "swiglu_limits": [0.0] * 6})


def test_layers_behind_the_last_are_left_out(variant: Callable[[str, str], tuple[Any, Path]], tmp_path: Path) -> None:
    """Three of them; a config.json that still describes the model goes out as it came."""
    _, folder = variant("step3p5", "plain")
    weights = load_file(folder / "model.safetensors")
    extra = {f"model.layers.{layer}.{name}.weight": torch.ones(3) for layer in (4, 5, 6) for name in ("eh_proj", "self_attn.q_proj")}
    save_file(weights | extra, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(of_a_checkpoint()))
    source = Source(tmp_path)
    assert sorted(source.ignored) == sorted(extra)
    out = export_checkpoint(import_checkpoint(tmp_path, tmp_path / "run"), tmp_path / "out")
    written, after = json.loads((out / "config.json").read_text()), load_file(out / "model.safetensors")
    assert after.keys() == weights.keys() and all(torch.equal(after[name], weights[name]) for name in after)
    assert {name: written[name] for name in of_a_checkpoint()} == of_a_checkpoint()
    save_file(weights | {"model.layers.3.eh_proj.weight": torch.ones(3)}, tmp_path / "model.safetensors")
    with pytest.raises(ConfigError, match="model.layers.3.eh_proj.weight"):
        Source(tmp_path)


def test_the_text_of_a_model_with_images(transformers: Any, tmp_path: Path) -> None:
    """Transformers' own class, as it saves it: under the names that the text model has alone."""
    text = {name: value for name, value in cases("step3p5").base.items() if name != "tie_word_embeddings"}
    vision = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28, "mlp_ratio": 2.0}
    config = transformers.Step3p7Config(text_config=text, vision_config=vision)
    torch.manual_seed(0)
    theirs = transformers.Step3p7ForConditionalGeneration._from_config(config, attn_implementation="eager").eval()
    theirs.save_pretrained(tmp_path)
    source = Source(tmp_path)
    assert source.family.model_type == "step3p5" and {name.split(".")[0] for name in source.ignored} == {"vision_model", "vit_large_projector"}
    tokens = random_tokens([60])
    with torch.no_grad():
        expected = theirs(tokens[None]).logits[0]
        assert distance(ltrain.load_pretrained(tmp_path)(tokens), expected) < 1e-5
