import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import ltrain
from ltrain.checkpoint import Checkpoint, Entry, LocalCollectives, save
from ltrain.cli import main
from ltrain.config import Config, load, to_yaml
from ltrain.families.convert import Source, export_checkpoint, import_checkpoint, roundtrip, whole_model
from ltrain.model.layers import LocalLayers, pieces, seed_parameters
from ltrain.model.options import ModelConfig, MoEOptions, MTPOptions
from ltrain.model.sequence import Sequence
from ltrain.model.stack import Stack
from ltrain.schema import ConfigError

Make = Callable[..., tuple[Any, Path]]
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 8.0, "original_max_position_embeddings": 64}


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def edit(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({k: v for k, v in (config | changes).items() if v is not None}))


@pytest.mark.parametrize("model_type", ["llama", "qwen3_next"])
def test_bfloat16_goes_through_our_float32(make: Make, tmp_path: Path, model_type: str) -> None:
    theirs, folder = make(model_type)
    theirs.to(torch.bfloat16).save_pretrained(folder)
    imported = import_checkpoint(folder, tmp_path / "run")
    with Checkpoint(imported, verify=True) as checkpoint:
        assert {checkpoint.dtype(name, "param") for name in checkpoint.names("param")} == {torch.float32}
        assert checkpoint.kinds == (["param", "buffer"] if model_type == "qwen3_next" else ["param"])
    out = export_checkpoint(imported, tmp_path / "out", "bfloat16", shard_bytes=50_000)
    before, after = tensors(folder), tensors(out)
    assert before.keys() == after.keys()
    assert all(a.dtype == before[name].dtype and torch.equal(a, before[name]) for name, a in after.items())
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 1 and index["weight_map"].keys() == after.keys()


def test_a_model_trained_here_loads_there(transformers: Any, tmp_path: Path) -> None:
    """No import before it: a model of ours with YaRN, whose tokenizer and end of document go along."""
    from ltrain.data.tokenizer import END, Tokenizer, train_bpe

    rope = {"base": 5e4, "scaling": "yarn", "factor": 4.0, "original_length": 64, "beta_fast": 16.0}
    kind = {"mixer": "attention", "heads": 4, "kv_heads": 2, "head_dim": 8, "gate": "none", "qk_norm": "none", "rope": rope}
    ahead = MTPOptions(depth=1)  # which stays here
    model = ModelConfig(hidden=32, depth=2, pattern=["full"], layers={"full": kind}, ffn=MoEOptions(experts=0, inner=40), mtp=ahead)
    config = Config(model=model)
    config.data.sequence_length = 256  # in streams of several sequences
    stack = Stack(model, 384, LocalLayers(std=0.3, depth=2))
    seed_parameters(stack, 0)
    bpe = train_bpe(["some text of words and words of text"] * 4, 300)
    tokenizer = Tokenizer("bpe", bpe.token_to_id(END), bpe)
    tokenizer.save(tmp_path)
    files = {name: (tmp_path / name).read_bytes() for name in ("tokenizer.json", "ltrain_tokenizer.json")}
    entries = [
        Entry(piece.name, "param", piece.shape, piece.start, param.detach()[piece.index])
        for name, param in stack.named_parameters()
        for piece in pieces(name, param)
    ]
    save(tmp_path / "checkpoints", 7, entries, {}, LocalCollectives(), {**files, "config.yaml": to_yaml(config).encode()})
    said: list[str] = []
    out = export_checkpoint(tmp_path, tmp_path / "out", log=said.append)
    assert said == ["left out what predicts 1 more tokens (model.mtp), which transformers' models have not"]

    theirs, info = transformers.AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(info.values())
    assert theirs.config.rope_parameters == {
        "rope_type": "yarn", "rope_theta": 5e4, "factor": 4.0, "original_max_position_embeddings": 64, "beta_fast": 16.0,
    }  # fmt: skip
    assert theirs.config.max_position_embeddings == 256
    assert theirs.config.tie_word_embeddings and theirs.config.eos_token_id == tokenizer.eos
    tokens = torch.randint(0, 300, (250,), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours, other = stack.logits(stack(tokens, Sequence.of([250]))), theirs(tokens[None]).logits[0]
    assert float((ours - other).norm() / other.norm()) < 1e-5
    text = "some words of text"
    about = transformers.AutoTokenizer.from_pretrained(out)
    assert about(text, add_special_tokens=False)["input_ids"] == tokenizer.encode(text) and about.eos_token_id == tokenizer.eos


@pytest.mark.parametrize("scaling", [{"scaling": "ntk", "factor": 4.0}, {"scaling": "dynamic", "factor": 2.0, "original_length": 64, "length": 200}])
def test_a_static_stretch_is_exported_as_its_base(scaling: dict[str, Any]) -> None:
    from ltrain.families import family

    kind = {"mixer": "attention", "heads": 4, "kv_heads": 2, "head_dim": 8, "gate": "none", "qk_norm": "none", "rope": scaling}
    model = ModelConfig(hidden=32, depth=1, pattern=["full"], layers={"full": kind}, ffn=MoEOptions(experts=0, inner=40))
    written = family("llama").to_config(model, 96, 200)
    factor = 4.0 if scaling["scaling"] == "ntk" else 2 * 200 / 64 - 1
    assert written["rope_parameters"] == {"rope_type": "default", "rope_theta": pytest.approx(1e4 * factor ** (8 / 6), rel=1e-12)}
    assert written["max_position_embeddings"] == 200


def test_the_older_spelling_of_rope_and_what_old_files_hold(make: Make) -> None:
    theirs, folder = make("llama", rope_parameters=YARN)
    new = Source(folder).model
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(6)
    save_file(weights, folder / "model.safetensors")
    edit(folder, rope_parameters=None, rope_theta=1e4, rope_scaling={"type": "yarn", "factor": 8.0, "original_max_position_embeddings": 64})
    source = Source(folder)
    assert source.model == new and source.ignored == ["model.layers.0.self_attn.rotary_emb.inv_freq"]


def test_roundtrip_of_mixed_types_on_the_command_line(make: Make, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    _, folder = make("qwen3_next")
    weights = load_file(folder / "model.safetensors")
    save_file({n: t if "A_log" in n else t.bfloat16() for n, t in weights.items()}, folder / "model.safetensors")
    main(["convert", "roundtrip", str(folder), "--work", str(tmp_path)])
    assert capsys.readouterr().out.startswith(f"{len(weights)} tensors, ")
    main(["convert", "import", str(folder), str(tmp_path / "in")])
    main(["convert", "export", str(tmp_path / "in"), str(tmp_path / "out"), "--dtype", "bfloat16", "--family", "qwen3_next", "--length", "999"])
    assert json.loads((tmp_path / "out" / "config.json").read_text())["max_position_embeddings"] == 999
    assert {t.dtype for t in tensors(tmp_path / "out").values()} == {torch.bfloat16}
    with pytest.raises(SystemExit):
        main(["convert", "import", str(folder), str(tmp_path / "in")])
    assert "is not empty" in capsys.readouterr().err


@pytest.mark.parametrize("layout", ["as saved", "older"])
def test_the_text_of_a_model_of_more(transformers: Any, make: Make, tmp_path: Path, layout: str) -> None:
    """A model that also sees: its text model is imported, and told what was left out."""
    from tests.families.cases import cases

    vision = {"depth": 1, "hidden_size": 16, "num_heads": 2, "intermediate_size": 16, "out_hidden_size": 48, "num_position_embeddings": 4}
    rope = {"rope_type": "default", "rope_theta": 1e5, "mrope_section": [1, 1, 0], "partial_rotary_factor": 0.25}
    text = {**cases("qwen3_5_text").base, "rope_parameters": rope}
    config = transformers.Qwen3_5Config(text_config=text, vision_config=vision)
    theirs, folder = transformers.Qwen3_5ForConditionalGeneration(config).eval(), tmp_path / "whole"
    theirs.save_pretrained(folder)
    if layout == "older":
        moved = {"model.language_model.": "language_model.model.", "lm_head.": "language_model.lm_head.", "model.visual.": "visual."}
        weights = load_file(folder / "model.safetensors")
        rename = {name: next(new + name.removeprefix(old) for old, new in moved.items() if name.startswith(old)) for name in weights}
        save_file({rename[name]: tensor for name, tensor in weights.items()}, folder / "model.safetensors")
    said: list[str] = []
    model = ltrain.load_pretrained(import_checkpoint(folder, tmp_path / "in", log=said.append))
    assert any("visual.blocks.0" in line and "no part of the model" in line for line in said)
    tokens = torch.arange(20)[None]
    with torch.no_grad():
        torch.testing.assert_close(model(tokens), theirs(tokens).logits, rtol=1e-4, atol=1e-5)


def test_names_that_others_save(make: Make) -> None:
    _, folder = make("bloom")
    named = Source(folder)
    weights = load_file(folder / "model.safetensors")
    save_file({name.removeprefix("transformer."): tensor for name, tensor in weights.items()}, folder / "model.safetensors")
    for name in named.names("param"):
        assert torch.equal(Source(folder).read(name, "param"), named.read(name, "param"))


def test_a_wrong_table_is_seen(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    from ltrain.families.weights import Their

    right = Their.assemble
    monkeypatch.setattr(Their, "assemble", lambda self, read: right(self, read).flip(0))
    with pytest.raises(ConfigError, match="tensors differ after the round trip"):
        roundtrip(make("llama")[1])


def test_an_imported_checkpoint_is_a_runs(make: Make, tmp_path: Path) -> None:
    """Its config loads, load_pretrained takes it as it takes the folder it came from, and its tokenizer is where the config says."""
    from ltrain.data.tokenizer import END, Tokenizer, from_file, train_bpe

    _, folder = make("qwen3_next")
    train_bpe(["some text"] * 4, 257).save(str(folder / "tokenizer.json"))
    imported = import_checkpoint(folder, tmp_path / "run")
    config = load(imported / "config.yaml")
    assert config.model == Source(folder).model and Tokenizer.load(imported).encode("text")
    assert from_file(config.data.tokenizer.path).eos == Tokenizer.load(imported).eos
    assert END in (imported / "tokenizer.json").read_text()
    one, other = ltrain.load_pretrained(folder), ltrain.load_pretrained(tmp_path / "run")
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))
    half = ltrain.load_pretrained(folder, dtype=torch.bfloat16)
    assert half.embed is not None and half.embed.weight.dtype == torch.bfloat16


def test_one_tensor_at_a_time(tmp_path: Path) -> None:
    """48 tensors of 4 MB: neither an import nor an export ever holds more than a few of them."""
    from ltrain.families import family
    from ltrain.families.folder import stream

    kind = {"mixer": "attention", "heads": 8, "kv_heads": 8, "head_dim": 64, "gate": "none", "qk_norm": "none"}
    model = ModelConfig(hidden=512, depth=24, pattern=["full"], layers={"full": kind}, ffn=MoEOptions(experts=0, inner=1024))
    folder = tmp_path / "hf"
    folder.mkdir()
    table = family("llama")
    (folder / "config.json").write_text(json.dumps(table.to_config(model, 1024, 64)))
    names = [(name, torch.float32, t.shape) for name, t in table.table(whole_model(model, 1024, "meta")).theirs.items()]
    shapes = {name: shape for name, _, shape in names}
    stream(folder / "model.safetensors", names, lambda name: torch.full(shapes[name], 0.5))
    total = (folder / "model.safetensors").stat().st_size
    code = (
        "import sys; from ltrain.families.convert import import_checkpoint, export_checkpoint\n"
        "print('ready', flush=True); sys.stdin.readline()\n"
        "export_checkpoint(import_checkpoint(sys.argv[1], sys.argv[2]), sys.argv[3])"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(folder), str(tmp_path / "in"), str(tmp_path / "out")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdin is not None and process.stdout is not None
    process.stdout.readline()

    def held() -> int:
        """Bytes of the process's own memory: pages of mapped files are the system's."""
        try:
            lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
        except OSError:
            return 0
        return next((int(line.split()[1]) << 10 for line in lines if line.startswith("RssAnon")), 0)

    before, peak = held(), 0
    process.stdin.write("\n")
    process.stdin.flush()
    pause = threading.Event()
    while process.poll() is None:
        peak = max(peak, held())
        pause.wait(0.002)
    assert process.returncode == 0 and total > 200e6
    assert 0 < peak - before < 60e6, f"{(peak - before) / 1e6:.0f} MB"  # imports of modules included
    assert (tmp_path / "out" / "model.safetensors").stat().st_size == pytest.approx(total, rel=1e-3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "lama"}, "model_type 'lama' cannot be converted, did you mean llama?"),
        ({"model_type": None}, "config.json has no model_type"),
        ({"hidden_act": "gelu"}, "hidden_act in config.json is 'gelu', and only 'silu' is supported"),
        ({"vocab_size": None}, "config.json has no vocab_size"),
        ({"sliding_window": 512}, "has sliding_window, not known to ltrain"),
        ({"quantization_config": {"bits": 4}}, "weights of this config.json are quantised"),
        ({"rope_parameters": {"rope_type": "spiral"}}, "rope_type 'spiral' in config.json is not known"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 2.0, "beta_fast": 3}}, "rope_parameters in config.json hold beta_fast"),
        ({"partial_rotary_factor": 0.5}, "llama rotates whole heads"),
        ({"intermediate_size": 72}, "has shape"),
        ({"num_hidden_layers": 3}, "lacks model.layers.2.input_layernorm.weight"),
        ({"num_hidden_layers": 1}, "has, beyond its config, model.layers.1.input_layernorm.weight"),
        ({"tie_word_embeddings": True}, "lm_head.weight in .* is not the embedding"),
    ],
)
def test_a_model_that_is_not_ours_is_refused_in_a_sentence(make: Make, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    _, folder = make("llama")
    edit(folder, **changes)
    with pytest.raises(ConfigError, match=message.replace("?", r"\?")) as error:
        import_checkpoint(folder, tmp_path / "in")
    assert "\n" not in str(error.value)
    assert not any((tmp_path / "in").glob("*")) if (tmp_path / "in").exists() else True


def test_layers_of_an_unknown_type_and_pickles_are_refused(make: Make, tmp_path: Path) -> None:
    _, folder = make("qwen3_next")
    edit(folder, layer_types=["linear_attention", "sliding", "linear_attention", "full_attention"])
    with pytest.raises(ConfigError, match="the type 'sliding', not known for qwen3_next"):
        Source(folder)
    os.rename(folder / "model.safetensors", folder / "pytorch_model.bin")
    with pytest.raises(ConfigError, match=r"holds its weights as pickle \(pytorch_model.bin\)"):
        import_checkpoint(folder, tmp_path / "in")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"index_n_heads": 4}, "index_n_heads=4 in config.json is not num_key_value_heads=2"),
        ({"rotary_dim": 16}, "rotary_dim=16 in config.json is not partial_rotary_factor=0.5"),
    ],
)
def test_numbers_that_say_the_same_and_disagree_are_refused(changes: dict[str, Any], message: str) -> None:
    from ltrain.families import family
    from tests.families.cases import config

    with pytest.raises(ConfigError, match=message):
        family("minimax_m3_vl_text").to_model(config("minimax_m3_vl_text", **changes))


def test_models_that_no_family_has_are_refused(tmp_path: Path, make: Make) -> None:
    from ltrain.families import family

    kind = {"mixer": "attention", "heads": 4, "kv_heads": 2, "head_dim": 8, "gate": "none", "qk_norm": "none"}
    dense = MoEOptions(experts=0, inner=40)
    for changed, message in [
        ({**kind, "gate": "elementwise"}, "llama has no layer like model.layers.full"),
        ({**kind, "qkv_bias": True}, "one attention_bias for qkv_bias and out_bias"),
        ({**kind, "rope": {"fraction": 0.5}}, "llama rotates whole heads"),
        ({**kind, "rope": None}, "llama has no layer like model.layers.full"),
    ]:
        model = ModelConfig(hidden=32, depth=1, pattern=["full"], layers={"full": changed}, ffn=dense)
        with pytest.raises(ConfigError, match=message):
            family("llama").to_config(model, 96, 64)
    model = ModelConfig(hidden=32, depth=1, pattern=["full"], layers={"full": kind}, ffn=dense, norm="rms_zero_centred")
    with pytest.raises(ConfigError, match="no model with model.norm=rms_zero_centred"):
        family("llama").to_config(model, 96, 64)

    # of all families, only the one with the same mixers says what it lacks
    odd = Config(model=ModelConfig(hidden=32, depth=1, pattern=["full"], layers={"full": {**kind, "gate": "elementwise"}}, ffn=dense))
    embedding = Entry("embed.weight", "param", (128, 32), (0, 0), torch.zeros(128, 32))
    save(tmp_path / "odd", 1, [embedding], {}, LocalCollectives(), {"config.yaml": to_yaml(odd).encode()})
    with pytest.raises(ConfigError, match=r"not even llama, the nearest \(llama has no layer like model.layers.full") as refusal:
        export_checkpoint(tmp_path / "odd", tmp_path / "out")
    assert "qwen" not in str(refusal.value)

    imported = import_checkpoint(make("qwen3_next")[1], tmp_path / "in")
    with Checkpoint(imported) as saved:
        entries = [Entry(n, k, saved.shape(n, k), (0,) * len(saved.shape(n, k)), saved.read(n, k)) for k in saved.kinds for n in saved.names(k)]
        moved = [e if e.kind == "param" else Entry(e.name, e.kind, e.shape, e.start, e.tensor + 0.1) for e in entries]
    save(tmp_path / "biased", 1, moved, {}, LocalCollectives(), {"config.yaml": (imported / "config.yaml").read_bytes()})
    with pytest.raises(ConfigError, match="has no balancing bias of the router"):
        export_checkpoint(tmp_path / "biased", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_package_is_imported_without_torch() -> None:
    code = "import sys, ltrain; assert 'torch' not in sys.modules; assert callable(ltrain.load_pretrained); assert 'torch' in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_text_from_an_imported_checkpoint(make: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from ltrain.data.tokenizer import train_bpe

    _, folder = make("llama", vocab_size=257)
    train_bpe(["some text"] * 4, 257).save(str(folder / "tokenizer.json"))
    import_checkpoint(folder, tmp_path / "run")
    main(["generate", str(tmp_path / "run"), "--prompt", "some ", "--tokens", "5"])
    assert capsys.readouterr().out.startswith("some ")
