"""Stages as configs: what an overlay may say, and the whole config that it makes."""

from pathlib import Path

import pytest

from ltrain.config import ConfigError, load, resolve_layers, stage_configs, to_yaml, validate
from ltrain.pattern import ropes

RUN = """
model:
  depth: 4
  pattern: [linear, rotary, unplaced, attention]
  layers:
    linear: {mixer: gated_delta_net}
    rotary: {mixer: attention, rope: {base: 5e5, fraction: 0.5}}
    unplaced: {mixer: attention, rope: null}
data: {tokens: 512}
train: {steps: 50, tokens_per_step: 2048, lr: 1e-3, min_lr: 0, warmup_steps: 5}
run: {dir: runs/mine}
stages:
  short:
    train: {schedule: wsd, decay_fraction: 0.3}
  long:
    data: {tokens: 2048}
    rope: {scaling: yarn, factor: 4, original_length: 512}
    train: {tokens: 10000, warmup_steps: 1}
  longest:
    data: {tokens: 8192}
    batch: sequences
    rope: {scaling: yarn, factor: 16, original_length: 512}
    parallel: {context: 2}
    train: {steps: 3, schedule: constant, warmup_steps: 0}
    optimizer: reset
"""


def write(folder: Path, text: str = RUN, name: str = "run.yaml") -> Path:
    path = folder / name
    path.write_text(text)
    return path


def test_each_stage_is_a_run_that_begins_from_the_one_before(tmp_path: Path) -> None:
    config = load(write(tmp_path))
    stages = dict(stage_configs(config))
    assert list(stages) == ["short", "long", "longest"]
    short, long, longest = stages.values()
    assert [s.run.dir for s in stages.values()] == ["runs/mine/01-short", "runs/mine/02-long", "runs/mine/03-longest"]
    assert [(s.run.init, s.run.init_optimizer) for s in stages.values()] == [
        ("", "reset"),
        ("runs/mine/01-short", "keep"),
        ("runs/mine/02-long", "reset"),
    ]
    assert {s.tracking.parent for s in stages.values()} == {"runs/mine"} and not any(s.stages for s in stages.values())
    assert [s.seed for s in stages.values()] == [0, 1, 2]
    assert (short.train.steps, short.train.schedule, short.train.decay_fraction) == (50, "wsd", 0.3)
    assert (long.train.steps, long.train.tokens, long.train.schedule) == (5, 10000, "cosine")
    assert (long.train.tokens_per_step, longest.train.tokens_per_step) == (2048, 8192)  # as many tokens; as many sequences
    assert (short.parallel.context, longest.parallel.context) == (1, 2)
    for stage in stages.values():  # a stage's config is a file of its own
        assert load(write(tmp_path, to_yaml(stage), "stage.yaml")) == stage
    assert load(write(tmp_path, to_yaml(config), "again.yaml")) == config


def test_rope_reaches_the_layers_that_have_it(tmp_path: Path) -> None:
    _, long, longest = (stage for _, stage in stage_configs(load(write(tmp_path))))
    for stage, factor in ((long, 4.0), (longest, 16.0)):
        options = {spec.kind: spec.options for spec in resolve_layers(stage.model)}
        assert options["unplaced"].rope is None and options["linear"].rope is None
        for kind, base, fraction in (("rotary", 5e5, 0.5), ("attention", 10000.0, 1.0)):
            rope = options[kind].rope
            assert (rope.scaling, rope.factor, rope.original_length, rope.base, rope.fraction) == ("yarn", factor, 512, base, fraction)


def test_rope_reaches_mixers_side_by_side(tmp_path: Path) -> None:
    text = RUN.replace(
        "mixer: attention, rope: {base: 5e5, fraction: 0.5}", "mixer: parallel, branches: {attention: {rope: {base: 5e5}}, mamba2: {}}"
    )
    assert text != RUN
    _, long, _ = (stage for _, stage in stage_configs(load(write(tmp_path, text))))
    spec = next(spec for spec in resolve_layers(long.model) if spec.kind == "rotary")
    ((place, rope),) = ropes(spec).items()
    assert place == ("branches", "attention", "rope")
    assert (rope.scaling, rope.factor, rope.base) == ("yarn", 4.0, 5e5)


def test_another_scaling_starts_from_the_base_alone(tmp_path: Path) -> None:
    text = RUN.replace("fraction: 0.5", "fraction: 0.5, scaling: yarn, factor: 2, original_length: 256, beta_fast: 16")
    text = text.replace("scaling: yarn, factor: 4, original_length: 512", "scaling: linear, factor: 4")
    stages = dict(stage_configs(load(write(tmp_path, text))))
    rope = {kind: spec.options.rope for kind, spec in ((s.kind, s) for s in resolve_layers(stages["long"].model)) if kind == "rotary"}["rotary"]
    assert (rope.scaling, rope.factor, rope.base, rope.fraction, rope.beta_fast) == ("linear", 4.0, 5e5, 0.5, 32.0)


def test_settings_of_a_stage_on_the_command_line_and_in_extended_files(tmp_path: Path) -> None:
    write(tmp_path)
    top = write(tmp_path, "extends: run.yaml\nstages: {long: {train: {lr: 5e-4}}, longest: null, last: {train: {steps: 7}}}", "top.yaml")
    config = load(top, ["stages.long.train.min_lr=1e-5", "stages.long.train.steps=9", "stages.short.train.schedule=cosine"])
    stages = dict(stage_configs(config))
    assert list(stages) == ["short", "long", "last"]
    long = stages["long"].train
    assert (long.lr, long.min_lr, long.steps, long.tokens) == (5e-4, 1e-5, 9, 0)  # steps take the file's budget of tokens back
    assert (stages["short"].train.schedule, stages["short"].train.decay_fraction) == ("cosine", 0.2)
    assert load(write(tmp_path, to_yaml(config), "again.yaml")) == config
    assert dict(stage_configs(load(top, ["stages.long.train.tokens=4e4"])))["long"].train.steps == 20


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("stages.long.train.lrr=1", "unknown key stages.long.train.lrr on the command line, did you mean stages.long.train.lr?"),
        ("stages.long.trian.lr=1", "did you mean stages.long.train?"),
        ("stages.long.train.lr=high", "stages.long.train.lr on the command line is the text 'high', expected a number"),
        ("stages.long.model.hidden=8", "stages.long.model on the command line cannot differ between stages"),
        ("stages.long.seed=8", "cannot differ between stages"),
        ("stages.long.data.tokenizer.vocab=512", "cannot differ between stages (the model was trained with one)"),
        ("stages.l/ng.train.lr=1", "has the name 'l/ng'"),
        ("stages.long.rope.bse=4", "did you mean stages.long.rope.base?"),
        ("stages.long.rope.scaling=yran", "in stage long, rope.scaling is 'yran'"),
        ("stages.long.optimizer=kep", "in stage long, optimizer is 'kep', expected one of keep, reset (did you mean keep?)"),
        ("stages.short.optimizer=keep", "no stage comes before it"),
        ("stages.short.batch=sequences", "its sequences have 512 tokens as before"),
        ("stages.longest.train.tokens_per_step=8192", "batch=sequences has no effect beside train.tokens_per_step"),
        ("stages.long.parallel.tensor=3", "in stage long, "),
        ("stages.longest.train.min_lr=1e-5", "train.min_lr=1e-05 has no effect with train.schedule=constant"),
        ("stages.long.train.decay_steps=3", "train.decay_steps=3 has no effect with train.schedule=cosine"),
        ("stages.longest.train={schedule: wsd, decay_steps: 1, decay_fraction: 0.3}", "decay_fraction=0.3 has no effect with train.decay_steps=1"),
        ("run.init_optimizer=keep", "run.init_optimizer='keep' has no effect with run.init="),
    ],
)
def test_what_a_stage_cannot_be_is_refused_in_one_sentence(tmp_path: Path, setting: str, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(write(tmp_path), [setting])
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_the_last_stage_is_checked_for_the_ranks_before_the_first_starts(tmp_path: Path) -> None:
    config = load(write(tmp_path), [f"stages.{name}.parallel.context=2" for name in ("long", "longest")])
    validate(config, 2)
    config = load(write(tmp_path))
    with pytest.raises(ConfigError, match="in stage longest, .* needs a multiple of 2 ranks"):
        validate(config, 1)


def test_a_budget_of_tokens_instead_of_steps(tmp_path: Path) -> None:
    path = write(tmp_path, "train: {tokens: 1e6, tokens_per_step: 4096}")
    config = load(path)
    assert config.train.steps == 245  # 244.14
    assert load(write(tmp_path, to_yaml(config), "again.yaml")) == config
    assert load(path, ["train.tokens_per_step=8192"]).train.steps == 123
    again = load(path, ["train.steps=30"]).train
    assert (again.steps, again.tokens) == (30, 0)
    with pytest.raises(ConfigError, match="are both given"):
        load(path, ["train.tokens=50000", "train.steps=30"])
