"""The prompts of the needle tests, generated ahead of the model in processes of their own."""

import random
from collections.abc import Iterator

import torch
from torch.utils.data import DataLoader, Dataset

from ltrain.config import Config
from ltrain.data.loader import as_is, start_worker
from ltrain.data.synthetic import held_out_depths, open_haystack, sample
from ltrain.data.tokenizer import Tokenizer
from ltrain.evals.needles import Place, Prompt

# The test's name -> the generator's task and how many needles share the prompt; None: as many as the generator's task has.
TASKS: dict[str, tuple[str, int | None]] = {
    "passkey": ("passkey", None),
    "single_key": ("kv", 1),
    "multi_key": ("kv", None),
    "variables": ("variables", None),
}


class Prompts(Dataset[list[Prompt]]):
    """The prompts of each group of `work`, in its order. One depends on its place, the seed, the tokenizer and the haystack alone.

    The haystack is the part of the standard library that training holds out by default. data.workers processes generate; 0: this
    one does, when a group is asked for.
    """

    def __init__(self, work: list[list[Place]], config: Config, tokenizer: Tokenizer):
        self.work, self.seed, self.tokenizer, self.workers = work, config.seed, tokenizer, min(config.data.workers, len(work))
        self.depths = held_out_depths(config.eval.needles.depths)
        self.haystack = open_haystack("stdlib", tokenizer, "held_out")

    def __len__(self) -> int:
        return len(self.work)

    def __getitem__(self, index: int) -> list[Prompt]:
        return [self.at(place) for place in self.work[index]]

    def at(self, place: Place) -> Prompt:
        task, needles = TASKS[place.task]
        rng = random.Random(f"{self.seed} {place.task} {place.length} {place.number}")
        depth = self.depths[place.depth]
        found = sample(task, place.length, rng, self.tokenizer, self.haystack, split="held_out", depth=depth, needles=needles)
        return Prompt(found.prompt_ids, found.answer_ids)

    def __iter__(self) -> Iterator[list[Prompt]]:
        if not self.workers:
            return (self[i] for i in range(len(self)))
        generator = torch.Generator()  # else the global one would move, which training may draw from
        return iter(DataLoader(self, None, num_workers=self.workers, worker_init_fn=start_worker, collate_fn=as_is, generator=generator))
