"""The command line: one function per verb. Nothing heavy is imported before a verb needs it."""

import argparse
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ltrain.config import Config

CONFIG = "a YAML file, for example configs/quickstart.yaml"
OVERRIDES = "settings that override the file's, for example train.steps=100 parallel.tensor=2"


def main(words: Sequence[str] | None = None) -> None:
    """The entry point. A refusal is one sentence on stderr and exit code 2; LTRAIN_DEBUG=1 shows where it arose."""
    args = parser().parse_args(words)
    debug = os.environ.get("LTRAIN_DEBUG") == "1"
    try:
        args.verb(args)
    except KeyboardInterrupt:
        if debug:
            raise
        sys.exit(130)
    except BrokenPipeError:  # `ltrain config schema | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except Exception as error:
        if debug or not _for_people(error):
            raise
        if os.environ.get("LOCAL_RANK", "0") == "0":  # what concerns all ranks is raised on all: the first of this machine says it
            print(f"ltrain: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, ValueError) else 1)


def _for_people(error: Exception) -> bool:
    """Whether ltrain raised the error in words for its user: a class of its own, or a ValueError from its code.

    Anything else, another library's ValueError included, is a defect and keeps its traceback.
    """
    if type(error).__module__.partition(".")[0] == "ltrain":
        return True
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    raised_in = trace.tb_frame.f_globals.get("__name__", "") if trace else ""
    return isinstance(error, ValueError) and raised_in.partition(".")[0] == "ltrain"


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="ltrain", description="Train hybrid mixture-of-experts language models on long contexts.")
    verbs = top.add_subparsers(metavar="VERB", required=True)

    sub = verbs.add_parser("train", help="train a model, or go on training it with run.resume=true")
    _add_config(sub)
    sub.set_defaults(verb=train)

    config = verbs.add_parser("config", help="show a config or every key there is").add_subparsers(metavar="WHAT", required=True)
    sub = config.add_parser("show", help="a config with every key resolved, as YAML")
    _add_config(sub)
    sub.set_defaults(verb=config_show)
    sub = config.add_parser("schema", help="every key with its type, default and meaning")
    sub.set_defaults(verb=config_schema)

    sub = verbs.add_parser("generate", help="continue a text with a trained model")
    sub.add_argument("checkpoint", metavar="CHECKPOINT", help="a checkpoint's folder, or a run's for its newest")
    sub.add_argument("--prompt", required=True, help="the text to continue")
    sub.add_argument("--tokens", type=_count, default=128, help="how many tokens to add (default 128)")
    sub.add_argument("--temperature", type=_temperature, default=0.0, help="0 takes the likeliest token (default), 1 samples as the model says")
    sub.add_argument("--seed", type=int, default=0, help="of the sampling (default 0)")
    sub.set_defaults(verb=generate)

    bench = verbs.add_parser("bench", help="measure").add_subparsers(metavar="WHAT", required=True)
    sub = bench.add_parser("step", help="speed, memory and FLOPs utilisation of training steps")
    _add_config(sub)
    sub.set_defaults(verb=bench_step)
    return top


def _add_config(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("config", metavar="CONFIG", help=CONFIG)
    sub.add_argument("overrides", metavar="key=value", nargs="*", help=OVERRIDES)


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a number of at least 1")
    return value


def _temperature(text: str) -> float:
    value = float(text)
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a number of at least 0")
    return value


def _load(args: argparse.Namespace) -> "Config":
    """The config, checked for the ranks that torchrun started (WORLD_SIZE), or for one."""
    from ltrain.config import load, validate

    config = load(args.config, args.overrides)
    validate(config, int(os.environ.get("WORLD_SIZE", "1")))
    return config


def train(args: argparse.Namespace) -> None:
    config = _load(args)
    from ltrain.train.loop import train

    train(config)


def config_show(args: argparse.Namespace) -> None:
    from ltrain.config import load, to_yaml

    print(to_yaml(load(args.config, args.overrides)), end="")


def config_schema(args: argparse.Namespace) -> None:
    from ltrain.config import Config
    from ltrain.model.options import MIXERS
    from ltrain.schema import Key, keys

    def rows(found: list[Key], fixed: dict[str, object] | None = None) -> list[Key]:
        return [key for key in found if key.name.rsplit(".", 1)[-1] not in (fixed or {})]

    sections = [("", rows(keys(Config)))]
    for mixer, (_, options, fixed) in MIXERS.items():
        sections.append((f"\n# Options of a layer kind under model.layers with `mixer: {mixer}`\n", rows(keys(options, "model.layers.KIND"), fixed)))
    for heading, section in sections:
        width = max(len(key.name) for key in section)
        print(heading, end="")
        for key in section:
            print(f"{key.name:<{width}}  {key.type:<22}  {_yaml(key.default):<14}  {key.comment}".rstrip())


def _yaml(value: object) -> str:
    """A default as it is written in YAML on one line."""
    if isinstance(value, list):
        return f"[{', '.join(map(_yaml, value))}]"
    if isinstance(value, str):
        return value if value and value == value.strip() else f'"{value}"'
    return {None: "null", True: "true", False: "false"}[value] if value is None or isinstance(value, bool) else str(value)


def generate(args: argparse.Namespace) -> None:
    from ltrain.evals.generate import main

    main(args.checkpoint, args.prompt, args.tokens, args.temperature, args.seed)


def bench_step(args: argparse.Namespace) -> None:
    config = _load(args)
    from ltrain.plan.bench import step

    step(config)


if __name__ == "__main__":
    main()
