"""`ltrain extend`: stages planned by hand-checked rules, written as a config that loads and trains."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ltrain.config import Config, ConfigError, load, stage_configs, to_yaml
from ltrain.model.options import RopeOptions
from ltrain.train.extend import lengths, mixture, plan, rope_of
from tests.train.runs import metrics, small
from tests.train.test_stages import finish, states


def test_lengths_of_the_stages() -> None:
    assert lengths(4096, 131072) == [32768, 131072]
    assert lengths(4096, 1 << 20) == [16384, 65536, 262144, 1 << 20]
    assert lengths(4096, 8192) == [8192]
    assert lengths(256, 256 * 9) == [576 // 128 * 128, 256 * 9]


def test_rope_of_a_stage() -> None:
    plain, longer = RopeOptions(base=5e5), RopeOptions(scaling="yarn", factor=4, original_length=4096)
    assert rope_of(plain, 4096, 32768, "yarn") == {"scaling": "yarn", "factor": 8.0, "original_length": 4096}
    assert rope_of(longer, 16384, 131072, "yarn") == {"scaling": "yarn", "factor": 32.0, "original_length": 4096}
    assert rope_of(RopeOptions(scaling="linear", factor=2), 8192, 32768, "linear") == {"scaling": "linear", "factor": 8.0}
    assert rope_of(plain, 8192, 65536, "base") == {"base": 8000000}  # as ProLong has it, and for 512K:
    assert rope_of(plain, 8192, 524288, "base") == {"base": 128000000}
    with pytest.raises(ConfigError, match="does not go with"):
        rope_of(longer, 16384, 131072, "base")


def test_the_mixture_follows_from_the_data(tmp_path: Path) -> None:
    config = small(tmp_path)
    files = config.data.files
    assert mixture(config, 4096) == {
        "long": {"source": "text", "files": files, "min_tokens": 4096, "weight": 0.5},
        "short": {"source": "text", "files": files, "max_tokens": 4096, "weight": 0.4},
        "recall": {"source": "synthetic", "weight": 0.1},
    }
    assert mixture(Config(), 4096)["long"] == {"source": "packages", "weight": 0.5}
    path = tmp_path / "mixed.yaml"
    path.write_text("data: {mixture: {a: {weight: 3}, b: {source: packages, weight: 6}}}")
    assert mixture(load(path), 4096) == {"recall": {"source": "synthetic", "weight": 1.0}}  # a tenth of ten
    path.write_text("data: {mixture: {a: {weight: 3}, b: {source: synthetic, weight: 6}}}")
    assert mixture(load(path), 4096) == {}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run at 256 tokens, on short and long documents, with a layer that has no RoPE."""
    tmp = tmp_path_factory.mktemp("trained")
    config = small(tmp, steps=2, data__tokens=256, train__tokens_per_step=512)
    config.model.pattern, config.model.depth = ["linear", "full", "unplaced"], 3
    config.model.layers["unplaced"] = {"mixer": "attention", "heads": 2, "kv_heads": 2, "head_dim": 8, "rope": None}
    for i in range(10):
        (tmp / "texts" / f"long-{i}.txt").write_text("\n".join(f"line {j} of {i}: {i * j % 13} apples and {j % 7} pears" for j in range(40 + i)))
    finish(config, tmp / "log")
    return tmp / "run"


def test_the_written_config_trains(tmp_path: Path, trained: Path) -> None:
    out, run = tmp_path / "longer.yaml", tmp_path / "longer"
    words = ["--to", "512", "--budget-tokens", "2e3", "--out", str(out), "--run", f"run.dir={run}", "data.shards=2", "tracking.enabled=false"]
    done = subprocess.run([sys.executable, "-m", "ltrain", "extend", str(trained), *words], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert out.read_text() in done.stdout and f"uv run ltrain train {out}" in done.stdout
    assert f"from the weights and moments of {trained}/checkpoints/step-00000002" in done.stderr
    ((name, stage),) = stage_configs(load(out))
    assert (name, stage.data.tokens, stage.data.sequence_length, stage.train.steps) == ("extend-512", 512, 512, 4)
    assert stage.model.layers["full"]["rope"] == {"scaling": "yarn", "factor": 2.0, "original_length": 256}
    assert stage.model.layers["unplaced"]["rope"] is None and "rope" not in stage.model.layers["linear"]
    assert (stage.train.lr, stage.eval.short_length, stage.seed) == (3e-4, 256, 1)
    assert list(stage.data.mixture) == ["long", "short", "recall"]
    rows = [row for row in metrics(run / "01-extend-512") if "train/loss" in row]
    assert len(rows) == 4 and states(run / "01-extend-512")[0]["optimizer_step"] == 6
    assert len(out.read_text().splitlines()) < 60 < len(to_yaml(load(out)).splitlines())


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ({"target": 256}, "--to 256 is not above the 256 tokens"),
        ({"overrides": ["train.lrr=3"]}, "did you mean train.lr?"),
        ({"checkpoint": "nowhere"}, "nowhere is neither a checkpoint"),
    ],
)
def test_what_cannot_be_extended(tmp_path: Path, trained: Path, words: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match="(?s)" + sentence.replace("?", r"\?")):
        plan(**{"checkpoint": str(trained), "target": 512, "budget": 2000, "out": str(tmp_path / "x.yaml")} | words)
    assert not (tmp_path / "x.yaml").exists()
    (tmp_path / "x.yaml").write_text("mine")
    with pytest.raises(ConfigError, match="is there already"):
        plan(str(trained), 512, 2000, out=str(tmp_path / "x.yaml"))


def test_a_hugging_face_model_is_imported_and_extended(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    import torch

    from ltrain.config import TokenizerConfig
    from ltrain.data.tokenizer import build_tokenizer

    config = small(tmp_path)
    texts = [path.read_text() for path in sorted((tmp_path / "texts").glob("*.txt"))]
    base = tmp_path / "base"
    base.mkdir()
    build_tokenizer(TokenizerConfig(vocab=260, cache=str(tmp_path / "cache")), iter(texts), "texts").save(base)
    torch.manual_seed(0)
    llama = transformers.LlamaConfig(
        vocab_size=384, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=128, bos_token_id=3
    )
    transformers.LlamaForCausalLM(llama).save_pretrained(base)
    beside = {"chat_template.jinja": "{{ messages }}", "generation_config.json": '{"temperature": 0.5, "do_sample": true}'}
    for name, content in beside.items():
        (base / name).write_text(content)
    run = f"run.dir={tmp_path / 'longer'}"
    words = [run, *(f"data.mixture.{name}=null" for name in ("long", "short", "recall")), "data.source=text", "data.held_out=0.5"]
    words += [f"data.files={config.data.files}", "data.shards=4", "data.workers=0", "data.tokens=256", "train.tokens_per_step=512"]
    words += ["eval.tokens=512", "run.sample_tokens=0", "tracking.enabled=false"]
    found = plan(str(base), 256, 2000, "linear", str(tmp_path / "longer.yaml"), words)
    ((_, stage),) = stage_configs(found.config)
    assert (stage.data.sequence_length, stage.train.lr, stage.run.init_optimizer, stage.data.tokenizer.kind) == (256, 2e-5, "reset", "file")
    finish(found.config, tmp_path / "log")
    assert "from the weights of" in (tmp_path / "log").read_text()
    rows = [row["train/loss"] for row in metrics(tmp_path / "longer/01-extend-256") if "train/loss" in row]
    assert len(rows) == stage.train.steps

    # what it has become goes back, with what stood beside it
    from ltrain.families.convert import export_checkpoint

    export_checkpoint(tmp_path / "longer/01-extend-256", tmp_path / "back")
    assert all((tmp_path / "back" / name).read_text() == content for name, content in beside.items())
    back, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "back", output_loading_info=True)
    assert not any(info.values()) and back.config.max_position_embeddings == 256 and back.config.bos_token_id == 3
    assert back.config.rope_parameters == {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}

    # a config of one's own may name the Hugging Face folder itself
    stage.run.init, stage.run.dir, stage.tracking.parent = str(base), str(tmp_path / "direct"), ""
    finish(stage, tmp_path / "log2")
    assert [row["train/loss"] for row in metrics(tmp_path / "direct") if "train/loss" in row] == rows
