"""Loading, refusing and writing a config."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest

from ltrain.config import Config, ConfigError, find, flatten, load, resolve_layers, to_yaml, validate
from ltrain.model.options import AttentionOptions, LinearRecurrenceOptions, ModelConfig
from ltrain.schema import comments, keys
from ltrain.validation import CHOICES, LIMITS

QUICKSTART = "configs/quickstart.yaml"


def write(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def refused(path: str | Path, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load(path, list(overrides))
    text = str(caught.value)
    assert "\n" not in text
    return text


def test_layers_of_a_config_override_each_other_in_order(tmp_path: Path) -> None:
    write(tmp_path, "models/base.yaml", "model: {hidden: 64, depth: 2, layers: {attention: {heads: 8, rope: {base: 5000}}}}\ntrain: {lr: 1}")
    write(tmp_path, "mid.yaml", "extends: models/base.yaml\nmodel: {hidden: 128, layers: {attention: {kv_heads: 4}}}")
    top = write(tmp_path, "runs/top.yaml", "extends: ../mid.yaml\ntrain: {steps: 7, warmup_steps: 1}")
    config = load(top, ["train.lr=2e-3", "train.min_lr=0", "model.layers.attention.heads=16"])
    assert (config.model.hidden, config.model.depth, config.train.steps, config.train.lr) == (128, 2, 7, 2e-3)
    assert config.model.layers == {"attention": {"heads": 16, "kv_heads": 4, "rope": {"base": 5000}}}
    assert config.data == Config().data
    attention = resolve_layers(dataclasses.replace(config.model, depth=4))[3].options
    assert (attention.heads, attention.kv_heads, attention.rope.base, attention.rope.fraction) == (16, 4, 5000.0, 1.0)


def test_extends_takes_a_list_and_refuses_cycles_and_absent_files(tmp_path: Path) -> None:
    write(tmp_path, "a.yaml", "seed: 1\nmodel: {hidden: 32}")
    write(tmp_path, "b.yaml", "seed: 2")
    config = load(write(tmp_path, "c.yaml", "extends: [a.yaml, b.yaml, configs/quickstart.yaml]\nseed: 3"))
    assert (config.seed, config.run.dir) == (3, "runs/quickstart")
    write(tmp_path, "x.yaml", "extends: y.yaml")
    write(tmp_path, "y.yaml", "extends: x.yaml")
    assert "x.yaml -> y.yaml -> x.yaml" in refused(tmp_path / "x.yaml")
    assert "nowhere.yaml" in refused(write(tmp_path, "z.yaml", "extends: nowhere.yaml"))
    assert "expected the path" in refused(write(tmp_path, "z.yaml", "extends: 3"))


def test_a_config_is_found_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert find(QUICKSTART).is_file()
    assert "did you mean configs/quickstart.yaml?" in refused("configs/quikstart.yaml")
    assert "is a folder" in refused(tmp_path)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("train: [1, 2", "run.yaml line"),
        ("train: {steps: 1}\ntrain: {steps: 2}", "duplicate key"),
        ("- 1\n- 2", "not a mapping"),
        ("3", "run.yaml"),
        ("trian: {steps: 3}", "unknown key trian in"),
        ("train: {stps: 3}", "did you mean train.steps?"),
        ("pipeline: 2", "did you mean parallel.pipeline?"),
        ("train: {steps: many}", "is the text 'many', expected a whole number"),
        ("train: {steps: 2.5}", "is 2.5, expected a whole number"),
        ("train: {steps: true}", "is true, expected a whole number"),
        ("run: {name: 2024}", "write it in quotes"),
        ("model: {tie_embeddings: 1}", "expected true or false"),
        ("model: 5", "model in"),
        ("model: null", "expected a mapping"),
        ("model: {pattern: attention}", "expected a list of text"),
    ],
)
def test_a_file_that_does_not_fit_the_schema_is_refused_with_its_name(tmp_path: Path, text: str, words: str) -> None:
    said = refused(write(tmp_path, "run.yaml", text))
    assert words in said and "run.yaml" in said


PARALLEL, BRANCHES = "model.pattern=[parallel] model.layers.parallel", "model.layers.parallel.branches"


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ("train.stps=3", "unknown key train.stps on the command line, did you mean train.steps?"),
        ("tensor=2", "did you mean parallel.tensor?"),
        ("train.steps", "is not a setting: write it as key=value"),
        ("train.steps=many", "on the command line is the text 'many', expected a whole number"),
        ("train.lr=.nan", "train.lr"),
        ("train.lr=.inf", "train.lr"),
        ("train.steps=[1", "is not YAML"),
        ("train=1 train.steps=2", "under a key that was given a value"),
        ("train.steps=${model.dept}", "model.dept"),
        ("run.name=${oc.env:HOME}", "only other keys"),
        ("precision=bf61", "one of fp64, fp32, bf16 (did you mean bf16?)"),
        ("data.tokenizer.kind=byte", "did you mean bytes?"),
        ("seed=-1", "not negative"),
        ("train.weight_decay=-0.1", "not negative"),
        ("train.steps=0", "at least 1"),
        ("data.held_out=0", "between 0 and 1"),
        ("data.held_out=1", "between 0 and 1"),
        ("train.betas=[0.9]", "two numbers"),
        ("train.betas=[0.9,1.0]", "two numbers"),
        ("run.dir=", "expected the path of a folder"),
        ("run.dir=null", "run.dir on the command line is null, expected a text"),
        ("model.pattern=[]", "at least one layer kind"),
        ("model.pattern=[atention]", "unknown layer kind 'atention' in model.pattern, did you mean attention?"),
        ("model.layers.x.mixer=attention", "model.layers.x is in no entry of model.pattern"),
        ("model.layers.x.heads=4", "has no mixer"),
        ("model.layers.attention.mixer=gated_deltanet", "did you mean gated_delta_net?"),
        ("model.layers.attention.mixer=[a]", "unknown mixer"),
        ("model.layers.attention.head=4", "unknown key model.layers.attention.head on the command line, did you mean model.layers.attention.heads?"),
        ("model.layers.attention.heads=four", "expected a whole number"),
        ("model.layers.attention.rope.bse=4", "did you mean model.layers.attention.rope.base?"),
        ("model.layers.attention.ffn.topk=4", "did you mean model.layers.attention.ffn.top_k?"),
        ("model.layers.attention.ffn=null", "expected a mapping"),
        ("model.layers.attention.ffn.top_k=9", "model.layers.attention.ffn.top_k=9 is not from 1 to experts=8"),
        ("model.layers.gated_delta_net.decay=none", "fixed at head by the mixer gated_delta_net"),
        (f"{PARALLEL}.branches.attention.heads=4", "branches has 1 of the two or more mixers"),
        (f"{PARALLEL}.branches.attention.hea=4", "did you mean model.layers.parallel.branches.attention.heads?"),
        (f"{PARALLEL}.branches.attention=4", "branches.attention is 4, expected a mapping"),
        (f"{PARALLEL}.branches.near.heads=4", "model.layers.parallel.branches.near has no mixer"),
        (
            f"{PARALLEL}.branches.a.mixer=none {BRANCHES}.b.mixer=attention",
            "branches.a.mixer=none cannot be a branch",
        ),
        (
            f"{PARALLEL}.fuse=true {BRANCHES}.a.mixer=attention {BRANCHES}.b.mixer=mamba",
            "takes the mean",
        ),
        (
            f"{PARALLEL}.fuse=true {BRANCHES}.a.mixer=mamba {BRANCHES}.b.mixer=rg_lru",
            "has a bias",
        ),
        (
            f"{PARALLEL}.branches.a.mixer=attention {BRANCHES}.b.mixer=attention {BRANCHES}.a.kv=source {BRANCHES}.b.kv=source {BRANCHES}.b.window=9",
            "branches a and b both leave something to later layers",
        ),
        (f"{PARALLEL}.branches.attention.kv=shared", "parallel.branches.attention.kv=shared takes what an earlier layer with kv=source"),
        ("model.layers.gated_delta_net.norm_groups=2", "norm_groups=2 has no effect without norm: group"),
        (
            "model.layers.gated_delta_net.norm=group model.layers.gated_delta_net.norm_groups=3",
            "value_heads=4 is not a multiple of model.layers.gated_delta_net.norm_groups=3",
        ),
        ("model.layers.attention.differential=true model.layers.attention.kv_heads=1", "is not a multiple of the 2 of each pair"),
        ("model.layers.attention.differential=true model.layers.attention.sinks=true", "does not go with differential=true"),
        ("model.layers.attention.differential=true model.layers.attention.gate=head", "gate=head does not go with differential"),
        ("model.pattern=[mlstm] model.layers.mlstm.gate_softcap=61", "at most 60"),
        (
            "model.pattern=[rwkv7] model.layers.rwkv7.value_mix=mix",
            "value_mix=mix takes what an earlier layer with value_mix=source leaves, and layer 1",
        ),
        ("model.layers.attention.kv=shared", "kv=shared takes what an earlier layer with kv=source and kv_heads="),
        ("model.layers.attention.kv=source model.layers.attention.differential=true", "kv=source goes with plain attention"),
        ("model.layers.attention.causal=false model.layers.attention.block_size=64", "block_size=64 goes with a causal mask"),
        ("model.layers.attention.local_blocks=2", "local_blocks=2 has no effect without blocks"),
        ("model.layers.attention.block_score=index", "block_score=index has no effect without blocks"),
        ("model.layers.attention.block_size=64 model.layers.attention.local_blocks=9", "local_blocks=9 is above top_blocks=8"),
        ("model.layers.attention.block_size=64 model.layers.attention.local_blocks=0", "own block by the mean of later ones"),
        ("model.layers.attention.block_size=64 model.layers.attention.index_dim=32", "has no effect with block_score: mean"),
        (
            "model.layers.attention.block_size=64 model.layers.attention.block_score=index model.layers.attention.index_dim=8",
            "index_dim=8 is below the 64 numbers that turn",
        ),
        (
            "model.layers.attention.causal=false model.layers.attention.window=9 model.layers.attention.anchors=2",
            "anchors=2 goes with a causal mask",
        ),
        ("model.layers.attention.window=9 model.layers.attention.globals=2", "write model.layers.attention.anchors=2"),
        ("model.layers.attention.causal=false model.layers.attention.globals=2", "has no effect without a window"),
        (
            "model.depth=2 model.pattern=[source,shared] model.layers.attention=null model.layers.gated_delta_net=null "
            "model.layers.source.mixer=attention model.layers.source.kv=source "
            "model.layers.shared.mixer=attention model.layers.shared.kv=shared model.layers.shared.causal=false",
            "head_dim=64 and causal=false leaves, and layer 2 has none before it",
        ),
        ("model.layers.attention.relative_buckets=32", "relative_buckets goes with no other position"),
        ("model.layers.attention.relative_buckets=300 model.layers.attention.rope=null", "not from 4 to below 2 x relative_distance"),
        (
            "model.layers.attention.relative_buckets=300 model.layers.attention.relative_distance=64 model.layers.attention.rope=null "
            "model.layers.attention.causal=false",
            "is not from 8 to below 4 x relative_distance",
        ),
        (
            "model.layers.attention.relative_buckets=33 model.layers.attention.rope=null model.layers.attention.causal=false",
            "does not divide over the sides of causal=false: write 34",
        ),
        ("model.layers.attention.alibi=true model.layers.attention.rope=null model.layers.attention.window=9", "sees all tokens"),
        ("model.layers.attention.relative_distance=64", "has no effect without relative_buckets"),
        ("model.pattern=[mla] model.layers.mla.select=shared", "select=shared takes what an earlier layer with select=index leaves"),
        ("model.layers.attention.kv_heads=3", "is not a multiple of model.layers.attention.kv_heads=3"),
        ("model.layers.gated_delta_net.key_heads=3", "is not a multiple of model.layers.gated_delta_net.key_heads=3"),
        ("model.layers.attention.rope.factor=4", "has no effect with scaling: none"),
        ("model.layers.attention.rope.scaling=yarn", "has no effect with factor: 1"),
        ("model.layers.attention.rope.scaling=yran", "did you mean yarn?"),
        ("model.layers.attention.rope.beta_fast=16", "has no effect with scaling: none"),
        ("model.layers.attention.rope.fraction=0.3", "an even number"),
        ("model.layers.attention.rope.fraction=0", "above 0 and at most 1"),
        ("model.ffn.top_k=9", "model.ffn.top_k=9 is not from 1 to experts=8"),
        ("model.ffn.top_k=0", "is not from 1 to"),
        ("model.ffn.score=softmx", "did you mean softmax?"),
        ("model.ffn.experts=0 model.ffn.top_k=4", "model.ffn.top_k=4 has no effect with model.ffn.experts=0"),
        ("model.vocab=100", "below the tokenizer's"),
        ("data.files=[a.txt]", "has no effect with data.source=stdlib"),
        ("data.source=text", "needs data.files"),
        ("data.source=hub", "needs data.name"),
        ("data.tokenizer.kind=file", "needs data.tokenizer.path"),
        ("data.tokenizer.kind=bytes data.tokenizer.vocab=300", "has no effect with data.tokenizer.kind=bytes"),
        ("data.tokenizer.vocab=256", "at least 257"),
        ("train.min_lr=1", "is above train.lr"),
        ("train.warmup_steps=100000", "longer than train.steps"),
        ("train.steps=5 train.warmup_steps=6", "longer than train.steps"),
        ("precision=fp64 device=cuda", "device=cpu"),
        ("data.tokens=2048 train.tokens_per_step=3000", "write 4096"),
        ("eval.tokens=1000 data.tokens=2048", "less than one micro-batch"),
        ("parallel.tensor=8", "is not a multiple of parallel.tensor=8"),
        ("model.hidden=193 parallel.tensor=2", "model.hidden=193"),
        ("model.vocab=4097 parallel.tensor=2", "model.vocab=4097"),
        ("model.ffn.shared_inner=33 parallel.tensor=2", "model.ffn.shared_inner=33"),
        ("parallel.expert=3", "model.ffn.experts=8 is not a multiple of parallel.expert=3"),
        ("parallel.expert=2 model.ffn.experts=0", "no effect in a model without experts"),
        ("parallel.pipeline=5 model.depth=4", "write at most 4"),
        ("parallel.ulysses=2", "parallel.context=1 is not a multiple of parallel.ulysses=2"),
        ("parallel.context=4 parallel.ulysses=3", "parallel.context=4 is not a multiple of parallel.ulysses=3"),
        ("parallel.context=8 parallel.ulysses=8", "does not divide the 4 heads and 2 K/V heads that a rank has of model.layers.attention: write"),
        ("parallel.tensor=2 parallel.context=4 parallel.ulysses=4", "does not divide the 2 heads and 1 K/V heads that a rank has"),
        (
            "model.pattern=[gated_delta_net] parallel.context=2 parallel.ulysses=2",
            "no effect in a model without softmax attention: write parallel.ulysses=1",
        ),
    ],
)
def test_what_cannot_run_is_refused_in_one_sentence(tmp_path: Path, overrides: str, words: str) -> None:
    text = "model: {depth: 4, layers: {attention: {heads: 4, kv_heads: 2}, gated_delta_net: {key_heads: 4}}}"
    assert words in refused(write(tmp_path, "run.yaml", text), *overrides.split())


@pytest.mark.parametrize(
    ("overrides", "world", "words"),
    [
        ("parallel.tensor=2 parallel.context=2", 1, "needs a multiple of 4 ranks, but there are 1 rank"),
        ("parallel.tensor=2", 3, "3 ranks"),
        ("parallel.expert=4", 2, "does not divide the 2 ranks of a pipeline stage"),
        ("parallel.expert=4 parallel.pipeline=2", 4, "does not divide the 2 ranks"),
        ("data.shards=6", 4, "data.shards=6 does not divide over 4 data ranks"),
        ("data.tokens=2048 train.tokens_per_step=4096", 4, "write 8192"),
        ("model.layers.attention.causal=false", 1, "is not for training on next tokens, nor for its evaluation: each token would see the next one"),
        ("model.learned_positions=256", 1, "write a sequence_length from 2 to 256"),
        ("model.learned_positions=256 data.sequence_length=256 eval.positions=512", 1, "eval.positions asks for 512 tokens"),
    ],
)
def test_a_layout_that_does_not_fit_the_ranks_is_refused(overrides: str, world: int, words: str) -> None:
    config = load(QUICKSTART, overrides.split())
    with pytest.raises(ConfigError) as caught:
        validate(config, world)
    assert words in str(caught.value)


@pytest.mark.parametrize("tensor", [1, 2])
@pytest.mark.parametrize("context", [1, 2])
@pytest.mark.parametrize("pipeline", [1, 2])
@pytest.mark.parametrize("expert", [1, 2])
def test_the_quickstart_takes_every_layout_of_four_ranks(tensor: int, context: int, pipeline: int, expert: int) -> None:
    if tensor * context * pipeline <= 4:
        words = [f"parallel.tensor={tensor}", f"parallel.context={context}", f"parallel.pipeline={pipeline}", f"parallel.expert={expert}"]
        validate(load(QUICKSTART, words), 4)


def test_a_later_switch_takes_back_what_it_leaves_without_effect(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        "run.yaml",
        "model: {ffn: {experts: 4, top_k: 1}, layers: {attention: {heads: 4}}, pattern: [attention]}\n"
        "data: {tokenizer: {vocab: 512}}\ntrain: {warmup_steps: 30}",
    )
    config = load(path, ["data.tokenizer.kind=bytes", "model.ffn.experts=0", "model.pattern=[delta_net]", "train.steps=5"])
    assert config.data.tokenizer.vocab == Config().data.tokenizer.vocab
    assert config.model.ffn.top_k == Config().model.ffn.top_k
    assert config.model.layers == {}
    assert config.train.warmup_steps == 5
    assert load(write(tmp_path, "again.yaml", to_yaml(config))) == config


def test_null_takes_a_layer_kind_out(tmp_path: Path) -> None:
    path = write(tmp_path, "run.yaml", "model: {layers: {mine: {mixer: attention}, delta_net: {key_heads: 2}}, pattern: [mine, delta_net]}")
    assert list(load(path, ["model.layers.delta_net=null"]).model.layers) == ["mine"]


def test_command_line_values_keep_their_type() -> None:
    words = [
        "run.name=007",
        "train.steps=1e3",
        "train.lr=1",
        "train.min_lr=1e-5",
        "run.sample_prompt=a: b # c",
        "data.source=text",
        "data.files=*.txt",
    ]
    config = load(QUICKSTART, [*words, "model.layers.attention.rope=null", "data.tokens=${model.hidden}", "model.hidden=256"])
    assert (config.run.name, config.train.steps, config.train.lr, config.train.min_lr) == ("007", 1000, 1.0, 1e-5)
    assert (config.run.sample_prompt, config.data.files, config.data.tokens) == ("a: b # c", ["*.txt"], 256)
    assert isinstance(config.train.lr, float) and isinstance(config.train.steps, int)
    assert load(QUICKSTART, ["data.source=text", "data.files=[a.txt, b.txt]"]).data.files == ["a.txt", "b.txt"]


def test_written_yaml_reads_back_the_same(tmp_path: Path) -> None:
    config = load(QUICKSTART, ["train.lr=0.00123", "run.name=1e5", "model.layers.attention.rope.base=1e6", "run.sample_prompt= x: [y "])
    assert load(write(tmp_path, "again.yaml", to_yaml(config))) == config
    assert flatten(config)["model.layers.attention.rope.base"] == 1e6


def test_the_pattern_repeats_and_kinds_merge_their_options() -> None:
    model = ModelConfig(
        depth=5,
        pattern=["delta_net", "local", "local"],
        layers={"local": {"mixer": "attention", "heads": 4, "rope": None, "ffn": {"experts": 0, "inner": 99}}},
    )
    specs = resolve_layers(model)
    assert [s.kind for s in specs] == ["delta_net", "local", "local", "delta_net", "local"]
    assert [s.mixer for s in specs[:2]] == ["delta_net", "attention"]
    assert specs[0].options == LinearRecurrenceOptions(decay="none", update="delta")
    assert specs[1].options == AttentionOptions(heads=4, rope=None)
    assert (specs[1].ffn.experts, specs[1].ffn.inner, specs[1].ffn.top_k) == (0, 99, model.ffn.top_k)
    assert specs[0].ffn == model.ffn


def test_every_rule_names_a_field_and_every_default_passes() -> None:
    import ltrain.config as config_module
    import ltrain.model.options as options_module

    fields: set[str] = set()
    for module in (config_module, options_module):
        for cls in vars(module).values():
            if dataclasses.is_dataclass(cls):
                names = {f.name for f in dataclasses.fields(cls)}
                fields |= {f"{cls.__name__}.{name}" for name in names}
                assert not ({*getattr(cls, "CHOICES", ()), *getattr(cls, "LIMITS", ())}) - names
    assert not (set(CHOICES) | set(LIMITS)) - fields
    validate(Config(), 1)


def test_schema_reads_types_defaults_and_comments() -> None:
    found = {key.name: key for key in keys(Config)}
    assert (found["data.tokens"].type, found["data.tokens"].default) == ("whole number", 2048)
    assert found["data.tokens"].comment.startswith("tokens of one micro-batch")
    assert comments(AttentionOptions)["rope"].startswith("null: no position")
    assert found["data.field"].default == "text"


def test_loading_imports_no_torch() -> None:
    code = "import sys; from ltrain.config import load; load('configs/quickstart.yaml'); assert not {'torch', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
