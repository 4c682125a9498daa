"""`ltrain bench fp8`: the same training run in each FP8 recipe and in bf16: losses, time of a step, memory.

As a module, `python -m ltrain.plan.fp8 CONFIG OUT`, it is one of those runs: each has a process of its own, so that none finds another's memory.
"""

import json
import math
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from statistics import fmean, median, stdev
from typing import Any

from ltrain.config import Config, ConfigError, FP8Config, load, to_yaml, validate

LAST = 20  # steps whose mean loss counts as the final one
FIRST = 10  # steps left out of the time of a step: compilation, autotuning, the search for delayed scales


def variant(config: Config, recipe: str, steps: int) -> Config:
    """The config with this recipe for so many steps; which layers stay in bf16 is as the config has it."""
    fp8 = FP8Config()
    if recipe != "none":
        fp8 = replace(config.fp8, recipe=recipe, amax_history=config.fp8.amax_history if recipe == "delayed" else fp8.amax_history)
    train = replace(config.train, steps=steps, tokens=0, warmup_steps=min(config.train.warmup_steps, steps))
    made = replace(config, fp8=fp8, train=train)
    validate(made, 1)
    return made


def compare(config: Config, recipes: list[str], steps: int, seeds: int = 1) -> dict[str, list[dict[str, Any]]]:
    """Run each recipe with so many seeds, from the config's on; print a table and write run.dir/bench-fp8.json and .png. Without `none` there is
    nothing to compare with. One short run does not tell a hundredth of the loss: of the same in bf16, on three machines, the ends lay 0.6% apart.

    Returns the runs of each recipe, in the order of the seeds.

    Raises ConfigError for what cannot run, before anything runs, and RuntimeError where a run fails: those before it are written.
    """
    import torch

    from ltrain.parallel import fp8

    if "none" not in recipes or len(set(recipes)) < len(recipes):
        raise ConfigError(f"--recipes {','.join(recipes)} must have each recipe once, and none among them: the run in bf16 to compare with")
    variants = {recipe: variant(config, recipe, steps) for recipe in recipes}
    for made in variants.values():
        fp8.refuse(made, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    folder = Path(config.run.dir)
    folder.mkdir(parents=True, exist_ok=True)
    results: dict[str, list[dict[str, Any]]] = {recipe: [] for recipe in recipes}
    for seed in range(config.seed, config.seed + seeds):
        for recipe, made in variants.items():
            written, found = (folder / f"bench-fp8-{recipe}-{seed}{ending}" for ending in (".yaml", ".json"))
            written.write_text(to_yaml(replace(made, seed=seed)))
            found.unlink(missing_ok=True)
            subprocess.run([sys.executable, "-m", "ltrain.plan.fp8", str(written), str(found)], check=False)
            if not found.is_file():
                raise RuntimeError(f"the run in {recipe} with seed={seed} has failed: see above")
            results[recipe].append(json.loads(found.read_text()))
            print(f"{recipe}, seed {seed}: final loss {results[recipe][-1]['final_loss']:.4f}", flush=True)
            (folder / "bench-fp8.json").write_text(json.dumps(results, indent=2) + "\n")
    print(table(results))
    draw(results, folder / "bench-fp8.png")
    print(f"written to {folder / 'bench-fp8.json'} and bench-fp8.png")
    return results


def run(config: Config) -> dict[str, Any]:
    """Train on this process alone, and keep the loss and the time of every step."""
    import torch

    from ltrain.parallel.engines import build_engine
    from ltrain.plan.hardware import device_name, peak_memory, synchronise
    from ltrain.train.feed import Feed, joined
    from ltrain.train.schedule import learning_rate

    with joined(config) as mesh:
        feed = Feed(config, mesh)
        engine = build_engine(config, feed.vocab, mesh)
        device = mesh.device
        losses, norms, seconds = [], [], []
        for step in range(config.train.steps):
            batches, labels, _ = feed.step()
            synchronise(device)
            began = time.perf_counter()
            losses.append(engine.forward_backward(batches, labels, feed.micro_batches)["loss"])
            norms.append(engine.step(learning_rate(step, config.train)))
            synchronise(device)
            seconds.append(time.perf_counter() - began)
            if not math.isfinite(losses[-1] + norms[-1]):
                raise RuntimeError(f"loss {losses[-1]} and gradient norm {norms[-1]} at step {step + 1} with fp8.recipe={config.fp8.recipe}")
        feed.close()
        params, active = engine.stack.num_params()
        return {
            "device": device_name(device),
            "torch": torch.__version__,
            "recipe": config.fp8.recipe,
            "bf16_layers": [config.fp8.bf16_first, config.fp8.bf16_last],
            "parameters": params,
            "active_parameters": active,
            "tokens_per_step": config.train.tokens_per_step,
            "stream_tokens": config.data.tokens,
            "final_loss": fmean(losses[-LAST:]),
            "seconds_per_step": median(seconds[FIRST:] or seconds),
            "peak_memory_bytes": peak_memory(device),
            "losses": losses,
            "gradient_norms": norms,
        }


def table(results: dict[str, list[dict[str, Any]]]) -> str:
    """One line for each recipe, beside bf16: means over the seeds, and of each seed's distance, with its standard error, where there are several."""
    lines = [f"{'recipe':10} {'final loss':>10} {'to bf16':>16} {'ms/step':>8} {'to bf16':>8} {'peak GiB':>9} {'to bf16':>8}"]
    for recipe, runs in results.items():
        cells = []
        for key, width, form in (("final_loss", 10, ".4f"), ("seconds_per_step", 8, ".1f"), ("peak_memory_bytes", 9, ".2f")):
            unit = {"seconds_per_step": 1e3, "peak_memory_bytes": 2**-30}.get(key, 1.0)
            apart = [found[key] / half[key] - 1 for found, half in zip(runs, results["none"], strict=True)]
            error = f" +- {stdev(apart) / len(apart) ** 0.5:.2%}" if key == "final_loss" and len(apart) > 1 else ""
            told = f"{fmean(apart):+.2%}{error}"
            cells += [f"{fmean(found[key] for found in runs) * unit:{width}{form}}", f"{told:>{16 if key == 'final_loss' else 8}}"]
        lines.append(f"{'bf16' if recipe == 'none' else recipe:10} {' '.join(cells)}")
    return "\n".join(lines)


def draw(results: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """The loss curves, and below each one's distance from bf16's, both as means over the seeds and LAST steps."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 6), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    top, below = figure.subplots(2, 1, sharex=True, height_ratios=[2, 1])

    def smooth(runs: list[dict[str, Any]]) -> list[float]:
        values = [fmean(of_step) for of_step in zip(*(found["losses"] for found in runs), strict=True)]
        return [fmean(values[max(0, i + 1 - LAST) : i + 1]) for i in range(len(values))]

    half = smooth(results["none"])
    for recipe, runs in results.items():
        line = smooth(runs)
        top.plot(range(1, len(line) + 1), line, label="bf16" if recipe == "none" else recipe, linewidth=1.2)
        if recipe != "none":
            below.plot(range(1, len(line) + 1), [100 * (a / b - 1) for a, b in zip(line, half, strict=True)], label=recipe, linewidth=1.2)
    top.set(ylabel="loss, nats per token")
    top.legend()
    below.set(xlabel="step", ylabel="to bf16, %")
    for axis in (top, below):
        axis.grid(alpha=0.3)
    below.axhspan(-1, 1, color="grey", alpha=0.15)
    figure.savefig(path)


if __name__ == "__main__":
    Path(sys.argv[2]).write_text(json.dumps(run(load(sys.argv[1])), indent=2) + "\n")
