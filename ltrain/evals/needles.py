"""Recall over length and depth: can the model repeat what it was told once, so many tokens ago?

Prompts come from `ltrain.data.synthetic`, with templates, key formats and depths that no training document has. A sample is
right if greedy decoding after the prompt gives exactly the answer's tokens. That is decided with the answer's own tokens as
input of each step: greedy decoding gives the answer if and only if each of them is then the likeliest, and the same pass
gives the answer's loss.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from ltrain.config import NeedleConfig
from ltrain.parallel.mesh import Mesh

if TYPE_CHECKING:
    from ltrain.parallel.inference import Inference


class Prompt(NamedTuple):
    """What is needed of a `ltrain.data.synthetic.Sample`: token ids."""

    prompt_ids: NDArray[np.int32]
    answer_ids: NDArray[np.int32]


@dataclass(frozen=True)
class Place:
    """One sample of the grid. It is generated from this and the seed alone."""

    task: str
    length: int  # tokens of prompt and answer, at most
    depth: int  # row of the grid, 0 at the beginning of the prompt
    number: int  # among the samples of its task and length


class Result(NamedTuple):
    place: Place
    right: bool
    loss: float  # of the answer, nats per token


@dataclass(frozen=True)
class Cell:
    """Some samples together: of a cell of the grid, or of all depths."""

    samples: int
    right: int
    loss: float  # mean over samples of the answer's loss, nats per token

    @classmethod
    def of(cls, results: Sequence[Result]) -> "Cell":
        n = len(results)
        return cls(n, sum(r.right for r in results), sum(r.loss for r in results) / n if n else float("nan"))

    @property
    def accuracy(self) -> float:
        return self.right / self.samples if self.samples else float("nan")

    @property
    def interval(self) -> tuple[float, float]:
        return wilson(self.right, self.samples)


def wilson(right: int, samples: int, z: float = 1.959963984540054) -> tuple[float, float]:
    """The 95% interval of a proportion (Wilson 1927): sensible at 0 and at 1, where the normal approximation has no width."""
    if not samples:
        return 0.0, 1.0
    p, n = right / samples, samples
    centre, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return max(0.0, (centre - half) / (1 + z * z / n)), min(1.0, (centre + half) / (1 + z * z / n))


def grid(options: NeedleConfig) -> list[list[Place]]:
    """All samples of each task and length, the depths in turn."""
    return [
        [Place(task, length, number % options.depths, number) for number in range(options.samples)]
        for task in options.tasks
        for length in options.lengths
    ]


def groups(options: NeedleConfig, stream_tokens: int) -> list[list[Place]]:
    """Samples that are packed into one stream: of one task and length, as many as `stream_tokens` tokens hold, one at least."""
    found = []
    for places in grid(options):
        together = max(1, stream_tokens // places[0].length)
        found += [places[i : i + together] for i in range(0, len(places), together)]
    return found


def answer(inference: "Inference", prompts: Sequence[Prompt], steps: int) -> list[tuple[bool, float]]:
    """For each prompt whether greedy decoding gives its answer, and the answer's loss in nats per token.

    steps: of decoding, at least the longest answer; the same on all ranks that share experts. Where the layers are spread over
    pipeline ranks the answers are scored behind their prompts in one pass, which asks the same of the model.
    """
    if not inference.decodes:
        scores = inference.score([np.concatenate(p) for p in prompts], last=[len(p.answer_ids) for p in prompts])
        tails = [(s.right[-len(p.answer_ids) :], s.loss[-len(p.answer_ids) :]) for s, p in zip(scores, prompts, strict=True)]
        return [(bool(right.all()), float(loss.mean())) for right, loss in tails]
    wanted = torch.zeros(len(prompts), steps, dtype=torch.int64)
    for row, p in zip(wanted, prompts, strict=True):
        row[: len(p.answer_ids)] = torch.from_numpy(p.answer_ids)
    wanted = wanted.to(inference.device)
    logits, decoding = inference.prefill([p.prompt_ids for p in prompts], room=steps - 1)
    losses, rights = [], []  # each [N]
    for i in range(steps):
        if i:
            logits = decoding.step(wanted[:, i - 1])
        losses.append(logits.logsumexp(-1) - logits.gather(-1, wanted[:, i : i + 1]).squeeze(-1))
        rights.append(inference.likeliest(logits) == wanted[:, i])
    loss, right = torch.stack(losses, 1).double().cpu(), torch.stack(rights, 1).cpu()  # [N, steps]
    lengths = [len(p.answer_ids) for p in prompts]
    return [(bool(right[n, :length].all()), float(loss[n, :length].mean())) for n, length in enumerate(lengths)]


def run(
    inference: "Inference", mesh: Mesh, work: list[list[Place]], samples: Iterator[list[Prompt]] | None, progress: Callable[[int, int], None]
) -> list[Result]:
    """The results of all groups in `work`, on every rank. Every rank calls.

    samples: on the first rank of each data replica what `share` of the work gives, group by group; None on the others.
    progress: called with the groups done and all of them.
    """
    rounds = -(-len(work) // mesh.data.size())
    found: list[Result] = []
    for n in range(rounds):
        prompts: list[Prompt] = mesh.spread(mesh.agree(lambda: None if samples is None else next(samples)))
        steps = max(mesh.all_gather_object(max(len(p.answer_ids) for p in prompts)))
        outcome = answer(inference, prompts, steps)
        mine = n * mesh.data.size() + mesh.data.rank()
        if mine < len(work):
            found += [Result(place, right, loss) for place, (right, loss) in zip(work[mine], outcome, strict=True)]
        progress(min((n + 1) * mesh.data.size(), len(work)), len(work))
    every = {result.place: result for results in mesh.all_gather_object(found) for result in results}
    return [every[place] for places in work for place in places]


def share(work: list[list[Place]], rank: int, ranks: int) -> list[list[Place]]:
    """Groups rank, rank + ranks, ...: equally many for each rank, which may get the last one to do again."""
    rounds = -(-len(work) // ranks)
    return [work[min(n * ranks + rank, len(work) - 1)] for n in range(rounds)]
