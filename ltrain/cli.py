"""The command line: one function per verb. Nothing heavy is imported before a verb needs it."""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ltrain.config import Config

CONFIG = "a YAML file, for example configs/quickstart.yaml"
OVERRIDES = "settings that override the file's, for example train.steps=100 parallel.tensor=2"


def main(words: Sequence[str] | None = None) -> None:
    """The entry point. A refusal is one sentence on stderr and exit code 2; LTRAIN_DEBUG=1 shows where it arose."""
    top = parser()
    args, rest = top.parse_known_args(words)
    if rest and (not hasattr(args, "overrides") or any(word.startswith("-") for word in rest)):
        top.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:  # argparse sees no settings that stand behind an option
        args.overrides += rest
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
        # what concerns all ranks is raised on all: the first of this machine says it
        if os.environ.get("LOCAL_RANK", "0") == "0" or getattr(error, "of_this_rank", False):
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
    sub.add_argument("--stage", metavar="NAME", help="one of its stages, as a config of its own")
    _add_config(sub)
    sub.set_defaults(verb=config_show)
    sub = config.add_parser("schema", help="every key with its type, default and meaning")
    sub.set_defaults(verb=config_schema)

    data = verbs.add_parser("data", help="texts before they are trained on").add_subparsers(metavar="WHAT", required=True)
    sub = data.add_parser("prepare", help="train the tokenizer and tokenise all documents of a config into the cache")
    sub.add_argument("--processes", type=_count, default=os.cpu_count() or 1, help="how many tokenise (default one for each core)")
    _add_config(sub)
    sub.set_defaults(verb=data_prepare)

    sub = verbs.add_parser("generate", help="continue a text with a trained model")
    sub.add_argument("checkpoint", metavar="CHECKPOINT", help="a checkpoint's folder, or a run's for its newest")
    sub.add_argument("--prompt", required=True, help="the text to continue")
    sub.add_argument("--tokens", type=_count, default=128, help="how many tokens to add (default 128)")
    sub.add_argument("--temperature", type=_temperature, default=0.0, help="0 takes the likeliest token (default), 1 samples as the model says")
    sub.add_argument("--seed", type=int, default=0, help="of the sampling (default 0)")
    sub.set_defaults(verb=generate)

    sub = verbs.add_parser("extend", help="plan the stages that take a trained model to a longer context")
    sub.add_argument("checkpoint", metavar="CHECKPOINT", help="a checkpoint's or run's folder, or a Hugging Face model's")
    sub.add_argument("--to", type=_count, required=True, metavar="TOKENS", help="length of the last stage's sequences, for example 131072")
    sub.add_argument("--budget-tokens", type=_count, required=True, metavar="TOKENS", help="to train with, over all stages")
    sub.add_argument("--rope", choices=("yarn", "ntk", "linear", "base"), default="", help="how positions are stretched (default yarn)")
    sub.add_argument("--out", default="", metavar="FILE", help="where the config goes (default: run.dir with .yaml)")
    sub.add_argument("--run", action="store_true", help="train it as well")
    sub.add_argument("overrides", metavar="key=value", nargs="*", help="settings to write into the config, for example train.lr=1e-4")
    sub.set_defaults(verb=extend)

    convert = verbs.add_parser("convert", help="Hugging Face models in and out").add_subparsers(metavar="WHAT", required=True)
    dtypes = ("float32", "bfloat16", "keep")
    sub = convert.add_parser("import", help="a Hugging Face folder to a checkpoint")
    sub.add_argument("source", metavar="HF_DIR", help="a folder with config.json and safetensors")
    sub.add_argument("out", metavar="OUT", help="a new folder, for OUT/step-00000000")
    sub.add_argument("--dtype", choices=dtypes, default="float32", help="of the weights (default float32); keep: each tensor's own")
    sub.set_defaults(verb=convert_import)
    sub = convert.add_parser("export", help="a checkpoint to a Hugging Face folder")
    sub.add_argument("checkpoint", metavar="CHECKPOINT", help="a checkpoint's folder, or a run's for its newest")
    sub.add_argument("out", metavar="HF_DIR", help="a new folder")
    sub.add_argument("--dtype", choices=dtypes, default="keep", help="of the weights (default keep: as they are saved)")
    sub.add_argument("--family", default="", help="the model_type to write (default: the first that has this very model)")
    sub.add_argument("--length", type=_count, default=0, help="max_position_embeddings (default: what the positions and the run's data say)")
    sub.set_defaults(verb=convert_export)
    sub = convert.add_parser("roundtrip", help="import, export, and compare every tensor bit for bit")
    sub.add_argument("source", metavar="HF_DIR", help="a folder with config.json and safetensors")
    sub.add_argument("--work", default=None, help="a folder with room for the model twice (default: the system's temporary one)")
    sub.set_defaults(verb=convert_roundtrip)

    sub = convert.add_parser("gqa", help="fewer K/V heads: the mean of each group, to be trained on")
    sub.add_argument("checkpoint", metavar="CHECKPOINT", help="a checkpoint's or run's folder, or a Hugging Face model's")
    sub.add_argument("--kv-heads", type=_count, required=True, metavar="N", help="K/V heads of each attention layer afterwards")
    sub.add_argument("--out", default="", help="a new folder, for OUT/step-00000000 (default: CHECKPOINT-kvN)")
    sub.set_defaults(verb=convert_gqa)

    sub = verbs.add_parser("models", help="the mixers and the Hugging Face families there are, and what each works with")
    sub.add_argument("--markdown", action="store_true", help="as in the README")
    sub.add_argument("--into", default="", metavar="FILE", help="put the Markdown between the marks of a file, as README.md has them")
    sub.set_defaults(verb=models)

    sub = verbs.add_parser("eval", help="recall over length and depth, and loss by position, of a trained model")
    sub.add_argument("checkpoint", metavar="CHECKPOINT", help="a checkpoint's folder, or a run's for its newest")
    tests = "needle tests (default passkey,single_key,multi_key); an empty text: none"
    sub.add_argument("--tasks", type=_names, default=["passkey", "single_key", "multi_key"], help=tests)
    sub.add_argument("--lengths", type=_lengths, default=[4096], help="tokens of the prompts, for example 4096,32768,131072 (default 4096)")
    sub.add_argument("--samples", type=_count, default=50, help="of each task and length (default 50)")
    sub.add_argument("--depths", type=_count, default=10, help="how many depths of the needle, which share the samples (default 10)")
    sub.add_argument("--out", default="", help="folder for the results (default: eval/step-N in the run's)")
    over = "settings over the checkpoint's, for example parallel.context=2 eval.positions=0"
    sub.add_argument("overrides", metavar="key=value", nargs="*", help=over)
    sub.set_defaults(verb=evaluate)

    bench = verbs.add_parser("bench", help="measure").add_subparsers(metavar="WHAT", required=True)
    sub = bench.add_parser("step", help="speed, memory and FLOPs utilisation of training steps")
    sub.add_argument("--steps", type=_count, default=10, help="steps that are timed, after at most 3 others (default 10)")
    sub.add_argument("--profile", action="store_true", help="one more step under torch's profiler: where its time goes, and a trace for each rank")
    _add_config(sub)
    sub.set_defaults(verb=bench_step)
    sub = bench.add_parser("fp8", help="the same training in bf16 and in each FP8 recipe: losses, time and memory")
    sub.add_argument("--steps", type=_count, default=300, help="steps of each run (default 300)")
    sub.add_argument("--recipes", default="none,delayed,current,blockwise", help="with commas; none is bf16 (default %(default)s)")
    sub.add_argument("--seeds", type=_count, default=1, help="runs of each recipe, with as many seeds: their means are compared (default 1)")
    _add_config(sub)
    sub.set_defaults(verb=bench_fp8)
    sub = bench.add_parser("context-parallel", help="each kind of mixing over the ranks that torchrun started, beside one rank: time and bytes")
    every = "attention,window,mla,dsa,moba,linear_attention,lightning,mamba2,gla,delta_net,gated_delta_net,kda,rwkv7,mamba,rg_lru,short_conv"
    every += ",delta_net_layer,gated_delta_net_layer,kda_layer"
    hybrid = "with --simulate one for each layer of a hybrid, default kda,kda,kda,attention"
    sub.add_argument("--operators", type=_names, help=f"with commas (default {every}; {hybrid})")
    sub.add_argument("--tokens", type=_lengths, help="of the streams, with commas (default 32768; with --simulate 1048576)")
    sub.add_argument("--documents", type=_names, default=["one"], help="of a stream: one, long (ten), short (of 256 to 8192 tokens) (default one)")
    sub.add_argument("--layout", choices=("zigzag", "contiguous", "balanced"), default="zigzag")
    sub.add_argument("--ulysses", type=_count, default=1, help="neighbouring ranks that divide the heads of attention (default 1)")
    _add_sizes(sub)
    sub.add_argument("--steps", type=_count, default=5, help="runs of each that are timed (default 5)")
    sub.add_argument("--out", default="runs/bench-context-parallel", help="folder for the results (default %(default)s)")
    simulated = sub.add_argument_group("efficiency on ranks that are not there, from times measured here and a network of this speed")
    simulated.add_argument("--simulate", action="store_true")
    simulated.add_argument("--config", metavar="CONFIG", help="the blocks of this model in place of --operators: " + CONFIG)
    simulated.add_argument("--ranks", type=_lengths, default=[8, 64, 512], help="with commas (default 8,64,512)")
    simulated.add_argument("--inner-ring", type=_count, default=1, help="neighbours of a ring on one node, for a double ring (default 1: one ring)")
    simulated.add_argument("--inside", type=_rate, default=300.0, help="GB/s of a device each way, inside a node (default %(default)g)")
    simulated.add_argument("--across", type=_rate, default=50.0, help="GB/s of a device each way, to other nodes (default %(default)g)")
    simulated.add_argument("--per-node", type=_count, default=8, help="devices of a node (default 8)")
    simulated.add_argument("--latency", type=_rate, default=30.0, help="microseconds of a batch of messages (default %(default)g)")
    simulated.add_argument("--longest", type=_count, default=131072, help="tokens of the longest stream that one rank is timed on (default 131072)")
    alone = ("config", "ranks", "inner_ring", "inside", "across", "per_node", "latency", "longest")
    sub.set_defaults(verb=bench_context_parallel, every=every.split(","), simulated={name: sub.get_default(name) for name in alone})
    sub = bench.add_parser(
        "kernels", help="our kernels beside every other one that is installed: time, memory, distance from the floor and the truth"
    )
    families = "linear_recurrence, elementwise_recurrence, short_conv, attention, sparse_attention, cross_entropy, norm, gates, rope, glu, experts"
    what = f"{families}, or operators of them (default: all)"
    sub.add_argument("families", metavar="FAMILY", nargs="*", help=what)
    sub.add_argument("--tokens", type=_lengths, default=[2048, 8192, 32768], help="of the streams, with commas (default 2048,8192,32768)")
    _add_sizes(sub)
    sub.add_argument(
        "--selected", type=_count, default=2048, help="keys that DSA gives each query, from which the blocks of NSA and MoBA follow (default 2048)"
    )
    sub.add_argument("--hidden", type=_count, default=4096, help="width of the cross entropy's, the norm's and the experts' inputs (default 4096)")
    sub.add_argument("--vocab", type=_count, default=131072)
    sub.add_argument("--steps", type=_count, default=10, help="runs of each that are timed, fewer where they are long (default 10)")
    sub.add_argument("--out", default="runs/bench-kernels", help="folder for the results (default %(default)s)")
    sub.set_defaults(verb=bench_kernels)

    start = verbs.add_parser("launch", help="train on many ranks").add_subparsers(metavar="WHERE", required=True)
    sub = start.add_parser("local", help="on this machine")
    ranks = sub.add_mutually_exclusive_group(required=True)
    ranks.add_argument("--gpus", type=_count, help="this many ranks, one GPU each")
    ranks.add_argument("--ranks", type=_count, help="this many ranks on the CPU")
    sub.add_argument("--max-restarts", type=_natural, default=0, help="how often a run that fails is taken up from its newest checkpoint (default 0)")
    _add_config(sub)
    sub.set_defaults(verb=launch_local)
    sub = start.add_parser("slurm", help="as a Slurm job, which goes on by itself after its time limit")
    sub.add_argument("--nodes", type=_count, required=True)
    sub.add_argument("--gpus-per-node", type=_natural, required=True, help="one rank for each; 0: ranks on the CPU")
    sub.add_argument("--ranks-per-node", type=_count, help="with --gpus-per-node 0")
    sub.add_argument("--time", default="", help="the job's time limit, for example 24:00:00")
    sub.add_argument("--partition", default="")
    sub.add_argument("--account", default="")
    sub.add_argument("--cpus-per-task", type=_count, default=0, help="cores of a node, for all its ranks (default: whole nodes)")
    sub.add_argument("--signal-before", type=_count, default=120, help="seconds before the time limit at which the run saves (default 120)")
    sub.add_argument("--sbatch", action="append", default=[], metavar="OPTION", help="another option of sbatch, as in qos=high; may be repeated")
    sub.add_argument("--dry-run", action="store_true", help="write everything, submit nothing")
    _add_config(sub)
    sub.set_defaults(verb=launch_slurm)

    sub = verbs.add_parser("doctor", help="what this machine has for training, and what each missing thing costs")
    sub.add_argument("--dir", default=".", help="where runs would be written (default: here)")
    sub.add_argument("--json", action="store_true", help="the same as JSON")
    sub.set_defaults(verb=doctor)
    return top


def _add_sizes(sub: argparse.ArgumentParser) -> None:
    """Of the operators that a bench runs."""
    sub.add_argument("--dtype", choices=("bf16", "fp32"), default="bf16")
    sub.add_argument("--heads", type=_count, default=16)
    sub.add_argument("--kv-heads", type=_count, default=4)
    sub.add_argument("--head-dim", type=_count, default=128)
    sub.add_argument("--window", type=_count, default=4096)


def _add_config(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("config", metavar="CONFIG", help=CONFIG)
    sub.add_argument("overrides", metavar="key=value", nargs="*", help=OVERRIDES)


def _count(text: str) -> int:
    """A whole number of at least 1; 30e6 is one too."""
    value = _number(text)
    if not (value.is_integer() and value >= 1):
        raise argparse.ArgumentTypeError(f"{text} is not a whole number of at least 1: write it out, for example 131072 or 30e6")
    return int(value)


def _number(text: str) -> float:
    """NaN for what is none, which every comparison refuses."""
    try:
        return float(text)
    except ValueError:
        return float("nan")


def _natural(text: str) -> int:
    value = _number(text)
    if not (value.is_integer() and value >= 0):
        raise argparse.ArgumentTypeError(f"{text} is not a whole number of at least 0: write 0, 1, 2, for example")
    return int(value)


def _lengths(text: str) -> list[int]:
    return [_count(part) for part in text.split(",")]


def _names(text: str) -> list[str]:
    return [name for name in text.split(",") if name]


def _rate(text: str) -> float:
    value = _number(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a number above 0: write 50 or 0.5, for example")
    return value


def _temperature(text: str) -> float:
    value = _number(text)
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a number of at least 0: write 0 or 0.8, for example")
    return value


def _load(args: argparse.Namespace) -> "Config":
    """The config, checked for the ranks that torchrun started (WORLD_SIZE), or for one."""
    from ltrain.config import load, validate

    config = load(args.config, args.overrides)
    validate(config, int(os.environ.get("WORLD_SIZE", "1")))
    return config


def train(args: argparse.Namespace) -> None:
    config = _load(args)
    from ltrain.launch.ranks import STOPPED
    from ltrain.train.loop import train

    if train(config).stopped:
        sys.exit(STOPPED)


def config_show(args: argparse.Namespace) -> None:
    from ltrain.config import ConfigError, load, stage_configs, to_yaml
    from ltrain.schema import suggestion

    config = load(args.config, args.overrides)
    if args.stage is not None:
        stages = dict(stage_configs(config))
        if args.stage not in stages:
            raise ConfigError(f"--stage {args.stage} is no stage of {args.config}{suggestion(args.stage, stages) if stages else ', which has none'}")
        config = stages[args.stage]
    print(to_yaml(config), end="")


def config_schema(args: argparse.Namespace) -> None:
    from ltrain.config import Config, Stage
    from ltrain.model.options import MIXERS
    from ltrain.schema import Key, keys
    from ltrain.stages import OWN

    def rows(found: list[Key], fixed: dict[str, object] | None = None) -> list[Key]:
        return [key for key in found if key.name.rsplit(".", 1)[-1] not in (fixed or {})]

    own = [key for key in keys(Stage, "stages.NAME") if key.name.split(".")[2] in OWN]
    sections = [("", rows(keys(Config))), ("\n# Keys of a stage, beside any of the above that is laid over the config in it\n", own)]
    for mixer, (_, options, fixed) in MIXERS.items():
        sections.append((f"\n# Options of a layer kind under model.layers with `mixer: {mixer}`\n", rows(keys(options, "model.layers.KIND"), fixed)))
    for heading, section in (s for s in sections if s[1]):
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


def extend(args: argparse.Namespace) -> None:
    from ltrain.train.extend import main

    main(args.checkpoint, args.to, args.budget_tokens, args.rope, args.out, args.run, args.overrides)


def convert_import(args: argparse.Namespace) -> None:
    from ltrain.families.convert import import_checkpoint

    path = import_checkpoint(args.source, args.out, args.dtype, log=lambda line: print(line, file=sys.stderr))
    print(f"imported {args.source} as {path}")


def convert_export(args: argparse.Namespace) -> None:
    from ltrain.families.convert import export_checkpoint

    path = export_checkpoint(args.checkpoint, args.out, args.dtype, args.family, length=args.length, log=lambda line: print(line, file=sys.stderr))
    print(f"exported {args.checkpoint} as {path}")


def convert_roundtrip(args: argparse.Namespace) -> None:
    from ltrain.families.convert import roundtrip

    tensors, size = roundtrip(args.source, args.work)
    print(f"{tensors} tensors, {size / 1e6:,.1f} MB: equal bit for bit after import and export")


def convert_gqa(args: argparse.Namespace) -> None:
    from ltrain.families.gqa import pool_heads

    print(f"wrote {args.checkpoint} with {args.kv_heads} K/V heads as {pool_heads(args.checkpoint, args.kv_heads, args.out)}")


def models(args: argparse.Namespace) -> None:
    from ltrain import catalogue

    if args.into:
        file = Path(args.into)
        file.write_text(catalogue.placed(file.read_text()))
    else:
        print(catalogue.markdown() if args.markdown else catalogue.text())


def data_prepare(args: argparse.Namespace) -> None:
    from ltrain.config import load
    from ltrain.data.prepare import prepare

    prepare(load(args.config, args.overrides), args.processes)


def evaluate(args: argparse.Namespace) -> None:
    from ltrain.evals.command import Request, main

    main(Request(args.checkpoint, args.overrides, args.tasks, args.lengths, args.samples, args.depths, args.out))


def bench_step(args: argparse.Namespace) -> None:
    config = _load(args)
    from ltrain.plan.bench import step

    step(config, args.steps, args.profile)


def bench_fp8(args: argparse.Namespace) -> None:
    recipes = args.recipes.split(",")
    # settings of FP8 go with a recipe: each run then has its own
    some = "delayed" if "delayed" in recipes else next((recipe for recipe in recipes if recipe != "none"), "none")
    args.overrides = [f"fp8.recipe={some}", *args.overrides]
    config = _load(args)
    from ltrain.plan.fp8 import compare

    compare(config, recipes, args.steps, args.seeds)


def bench_context_parallel(args: argparse.Namespace) -> None:
    import torch

    from ltrain.config import ParallelConfig
    from ltrain.parallel import mesh as ranks
    from ltrain.plan.context_parallel import Sizes, bench
    from ltrain.schema import ConfigError, check_multiple

    for name, default in args.simulated.items():
        if not args.simulate and getattr(args, name) != default:
            raise ConfigError(f"--{name.replace('_', '-')} has no effect without --simulate: add that, or take it out")
    if args.config and args.operators:
        raise ConfigError("--operators and --config both name the layers that are simulated: write one of them")
    size = int(os.environ.get("WORLD_SIZE", 1))
    ulysses, inner_ring = args.ulysses, args.inner_ring if args.simulate else 1
    if args.simulate and size % (ulysses * inner_ring):  # groups of the ranks that are not there: those that are only trace
        ulysses = inner_ring = 1
    check_multiple("the number of ranks", size, "--ulysses", ulysses)
    device, dtype = ranks.start(), {"bf16": torch.bfloat16, "fp32": torch.float32}[args.dtype]
    try:
        mesh = ranks.Mesh(ParallelConfig(context=size, ulysses=ulysses, inner_ring=inner_ring), device)
        sizes = Sizes(args.heads, args.kv_heads, args.head_dim, args.window)
        if args.simulate:
            from ltrain.plan.simulate import main

            main(args, sizes, dtype, mesh)
        else:
            chosen = args.operators or args.every, args.documents, args.tokens or [32768], args.layout
            bench(*chosen, dtype, args.steps, sizes, mesh, Path(args.out))
        mesh.close()
    finally:
        ranks.stop()


def bench_kernels(args: argparse.Namespace) -> None:
    import torch

    from ltrain.plan.kernels import main
    from ltrain.plan.operators import Sizes

    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[args.dtype]
    sizes = Sizes(args.heads, args.kv_heads, args.head_dim, args.window, args.selected, args.hidden, args.vocab)
    main(args.families, args.tokens, dtype, args.steps, sizes, Path(args.out))


def launch_local(args: argparse.Namespace) -> None:
    from ltrain.launch.local import launch

    sys.exit(launch(args.config, args.overrides, args.gpus or args.ranks, bool(args.gpus), args.max_restarts))


def launch_slurm(args: argparse.Namespace) -> None:
    from ltrain.launch.slurm import Job, launch
    from ltrain.schema import ConfigError

    if (args.gpus_per_node == 0) == (args.ranks_per_node is None):
        raise ConfigError("write --gpus-per-node G for G ranks on each node, or --gpus-per-node 0 --ranks-per-node R for R ranks on the CPU")
    job = Job(
        nodes=args.nodes,
        ranks_per_node=args.gpus_per_node or args.ranks_per_node,
        gpus=args.gpus_per_node > 0,
        time=args.time,
        partition=args.partition,
        account=args.account,
        cpus_per_task=args.cpus_per_task,
        signal_before=args.signal_before,
        options=args.sbatch,
    )
    launch(args.config, args.overrides, job, args.dry_run)


def doctor(args: argparse.Namespace) -> None:
    from ltrain.doctor import main

    sys.exit(main(args.dir, args.json))


if __name__ == "__main__":
    main()
