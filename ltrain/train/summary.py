"""The closing words of a run: what was learned, a sample, and what to do next."""

import math
import shlex
from dataclasses import dataclass
from pathlib import Path

from ltrain.config import Config
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


def next_commands(s: Summary) -> list[str]:
    """The commands of a user who wants to see the run, go on with it, or hear it speak."""
    config, run = s.config, Path(s.config.run.dir)
    start = "ltrain" if s.ranks == 1 else f"torchrun --nproc-per-node {s.ranks} -m ltrain"
    resume = [*start.split(), "train", str(run / "config.yaml"), "run.resume=true"]
    if s.step == config.train.steps:
        resume.append(f"train.steps={2 * s.step}")
    commands = [resume, ["ltrain", "generate", str(run), "--prompt", config.run.sample_prompt]]
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


def text(s: Summary, spoken: str | None) -> str:
    parts = ["", "What was learned", *(f"  {line}" for line in learned(s))]
    if spoken is not None:
        parts += ["", "A sample (temperature 0.8)", *(f"  | {line}" for line in spoken.splitlines())]
    return "\n".join([*parts, "", "Next", *(f"  {command}" for command in next_commands(s)), ""])
