"""The closing words of a run: what was learned, a sample, and what to do next."""

import math
import shlex
from dataclasses import dataclass
from pathlib import Path

from ltrain.config import Config


@dataclass(frozen=True)
class Summary:
    config: Config
    step: int
    first_loss: float  # of this process's first step, nats per token
    last_loss: float
    eval_loss: float | None  # held-out, nats per token
    unigram_entropy: float | None  # of the same held-out tokens
    checkpoint: Path
    config_path: str  # what `ltrain train` was called with
    tracking_uri: str


def learned(s: Summary) -> list[str]:
    lines = [f"step {s.step}: checkpoint {s.checkpoint}", f"training loss {s.first_loss:.3f} -> {s.last_loss:.3f} nats per token"]
    if s.eval_loss is not None and s.unigram_entropy is not None:
        gain = s.unigram_entropy - s.eval_loss
        lines.append(
            f"held-out loss {s.eval_loss:.3f}, unigram entropy of the same tokens {s.unigram_entropy:.3f}: "
            + (f"context saves {gain:.2f} nats per token (perplexity {math.exp(s.unigram_entropy):.0f} -> {math.exp(s.eval_loss):.0f})"
               if gain > 0 else "no better yet than knowing how frequent each token is: train longer")
        )  # fmt: skip
    return lines


def next_commands(s: Summary) -> list[str]:
    """The commands of a user who wants to see the run, go on with it, or hear it speak."""
    run = shlex.quote(str(s.config.run.dir))
    more = s.config.train.steps * 2
    return [
        f"uv run mlflow ui --backend-store-uri {shlex.quote(s.tracking_uri)}",
        f"uv run ltrain train {shlex.quote(s.config_path)} run.dir={run} run.resume=true train.steps={more}",
        f"uv run ltrain generate {run} --prompt {shlex.quote(s.config.run.sample_prompt)}",
    ]


def sample(s: Summary) -> str | None:
    """Text from the saved checkpoint, read back as a user would."""
    if not s.config.run.sample_tokens:
        return None
    from ltrain.evals.generate import generate, load

    model, tokenizer, _ = load(s.checkpoint)
    prompt = tokenizer.encode(s.config.run.sample_prompt)
    return tokenizer.decode(prompt + generate(model, [prompt], s.config.run.sample_tokens, temperature=0.8, seed=s.config.seed)[0])


def text(s: Summary) -> str:
    parts = ["", "What was learned", *(f"  {line}" for line in learned(s))]
    spoken = sample(s)
    if spoken is not None:
        parts += ["", "A sample (temperature 0.8)", *(f"  | {line}" for line in spoken.splitlines())]
    parts += ["", "Next", *(f"  {command}" for command in next_commands(s)), ""]
    return "\n".join(parts)
