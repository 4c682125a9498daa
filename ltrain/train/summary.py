"""The closing words of a run: what was learned, a sample, and what to do next."""

import math
import shlex
from dataclasses import dataclass
from pathlib import Path

from ltrain.config import Config
from ltrain.stages import length
from ltrain.tracking import store, without_password


@dataclass(frozen=True)
class Summary:
    config: Config
    ranks: int
    step: int
    first_loss: float  # of this process's first step, nats per token
    last_loss: float
    eval_loss: float | None  # held-out, nats per token
    unigram_entropy: float  # of the same held-out tokens
    checkpoint: Path


def learned(s: Summary) -> list[str]:
    lines = [f"step {s.step}: checkpoint {s.checkpoint}", f"training loss {s.first_loss:.3f} -> {s.last_loss:.3f} nats per token"]
    if s.eval_loss is not None:
        gain = s.unigram_entropy - s.eval_loss
        if gain > 0:
            meaning = f"context saves {gain:.2f} nats per token (perplexity {math.exp(s.unigram_entropy):.0f} -> {math.exp(s.eval_loss):.0f})"
        else:
            meaning = "no better yet than knowing how frequent each token is: train longer"
        lines.append(f"held-out loss {s.eval_loss:.3f}, unigram entropy of the same tokens {s.unigram_entropy:.3f}: {meaning}")
    return lines


def of_stage(s: Summary) -> str:
    held_out = "" if s.eval_loss is None else f", held-out {s.eval_loss:.3f} (unigram entropy {s.unigram_entropy:.3f})"
    data = s.config.data
    losses = f"training loss {s.first_loss:.3f} -> {s.last_loss:.3f}{held_out}"
    return f"{Path(s.config.run.dir).name}, {length(data)} tokens long: step {s.step}, {losses}, checkpoint {s.checkpoint}"


def next_commands(s: Summary, whole: Config | None = None) -> list[str]:
    """The commands of a user who wants to see the run, go on with it, or hear it speak. whole: the run that `s` is the last stage of."""
    config, run = s.config, Path(s.config.run.dir)
    resumed = Path(whole.run.dir) if whole else run
    start = "ltrain" if s.ranks == 1 else f"torchrun --nproc-per-node {s.ranks} -m ltrain"
    resume = [*start.split(), "train", str(resumed / "config.yaml"), "run.resume=true"]
    commands = []
    if s.step < config.train.steps:
        commands.append(resume)
    elif whole is None:
        commands.append([*resume, f"train.steps={2 * s.step}"])
    else:
        name = next(reversed(whole.stages))
        commands.append([*resume, f"stages.{name}.train.steps={2 * s.step}"])
    commands += [["ltrain", "generate", str(run), "--prompt", config.run.sample_prompt]]
    if config.tracking.enabled:
        commands.insert(0, ["mlflow", "ui", "--backend-store-uri", without_password(store(config))])
    return [shlex.join(["uv", "run", *command]) for command in commands]


def sample(s: Summary) -> str | None:
    """Text from the saved checkpoint, read back as a user would, on the CPU: the device may still be full of the training."""
    if not s.config.run.sample_tokens:
        return None
    from ltrain.evals.generate import generate, load

    model, tokenizer, _ = load(s.checkpoint, device="cpu")
    prompt = tokenizer.encode(s.config.run.sample_prompt)
    (new,) = generate(model, [prompt], s.config.run.sample_tokens, 0.8, s.config.seed, vocab=tokenizer.vocab_size, eos=tokenizer.eos)
    return tokenizer.decode([*prompt, *new])


def text(whole: Config, summaries: list[Summary], spoken: str | None) -> str:
    """Of a run without stages, or of the stages that were trained, the last of which speaks."""
    last = summaries[-1]
    lines = [of_stage(s) for s in summaries] if whole.stages else learned(last)
    parts = ["", "What was learned", *(f"  {line}" for line in lines)]
    if spoken is not None:
        parts += ["", "A sample (temperature 0.8)", *(f"  | {line}" for line in spoken.splitlines())]
    commands = next_commands(last, whole if whole.stages else None)
    return "\n".join([*parts, "", "Next", *(f"  {command}" for command in commands), ""])


def conclude(whole: Config, summaries: list[Summary]) -> None:
    """Print the closing words. The run is over and saved: a sample that fails is no failure of the run."""
    try:
        spoken = sample(summaries[-1])
    except Exception as error:
        spoken = f"(no sample: {error})"
    print(text(whole, summaries, spoken))
