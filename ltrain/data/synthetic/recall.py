"""Recall tasks: lines that give a value to a key, hidden in a haystack, and questions that repeat a line up to its value.

After the passkey (Mohtashami & Jaggi 2023) and RULER's needles and variable tracking (Hsieh et al. 2024). All work is on token ids; the text before a
value, the value and the text after it are encoded apart, so that the value has the same ids in the needle and in the answer.
"""

import random
import re
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from ltrain.data.synthetic import depths, formats, templates
from ltrain.data.synthetic.formats import Format
from ltrain.data.synthetic.haystack import Cuts, Haystack, Ids
from ltrain.data.synthetic.templates import Chain, Template
from ltrain.data.tokenizer import Tokenizer

TASKS = ("passkey", "kv", "multi_query", "variables")
SPLITS = ("train", "held_out")
NEEDLES = {"passkey": 1, "kv": 4, "multi_query": 16, "variables": 2}  # of a sample, unless told otherwise or too short for them
HOPS = 4  # names of a chain of variables at most
SHORTEST = 64  # tokens
TRIES = 64
DRAWN = 0.7  # share of training's lines that come from no list of templates
ALIKE = 0.3  # share of these that differ from another line of the document in one word
OWN = 0.5  # share of the others, and of keys and values, whose words are the haystack's: none of them alone tells where the line is
FEWEST = 8  # different words of the haystack that lines are made of: a table of numbers has none
FIRST = 0.03  # share of training's needles that are the very first line
WORD = re.compile(r"[A-Za-z]{2,12}")


@dataclass(frozen=True)
class Fact:
    """What is hidden and asked for: its lines in their order (of which only the first has the value), and its question.

    Each line and the question are (before the value, value, after it).
    """

    template: str
    key: str
    lines: tuple[Ids, ...]
    lead: Ids  # the line before the question, with its newline; may be empty
    question: Ids  # up to the value
    answer: Ids
    rest: Ids  # of the question's line after the value, with its newline

    @property
    def size(self) -> int:
        return sum(len(line) for line in self.lines)

    @property
    def asked_size(self) -> int:
        return len(self.lead) + len(self.question) + len(self.answer) + len(self.rest)


@dataclass
class Sample:
    """One prompt and the only right continuation of it.

    Attributes:
        prompt_ids, answer_ids: int32; together at most the length that was asked for, and at least 97% of it.
        depth: of the asked needle (of the first line of a chain), see `depths`.
        needles: how many were hidden, the asked one included.
        template_id: of its line.
    """

    tokenizer: Tokenizer
    task: str
    key: str
    depth: float
    template_id: str
    needles: int
    prompt_ids: Ids
    answer_ids: Ids

    @cached_property
    def prompt(self) -> str:
        return self.tokenizer.decode(self.prompt_ids)

    @cached_property
    def answer(self) -> str:
        return self.tokenizer.decode(self.answer_ids)


class _Facts:
    """Draws facts of one split and encodes them."""

    def __init__(self, rng: random.Random, tokenizer: Tokenizer, split: str, haystack: Haystack):
        if split not in SPLITS:
            raise ValueError(f"split={split!r} is not known: write one of {', '.join(SPLITS)}")
        held_out = split == "held_out"
        self.rng, self.tokenizer, self.drawn = rng, tokenizer, 0.0 if held_out else DRAWN
        self.haystack = haystack
        self.keyed = templates.HELD_OUT_KEYED if held_out else templates.KEYED
        self.passkeys = templates.HELD_OUT_PASSKEY if held_out else templates.PASSKEY
        self.chains = templates.HELD_OUT_CHAINS if held_out else templates.CHAINS
        self.leads = templates.HELD_OUT_LEADS if held_out else templates.LEADS
        self.formats = formats.HELD_OUT_FORMATS if held_out else formats.FORMATS
        self.names = formats.HELD_OUT_NAMES if held_out else formats.NAMES

    def draw(self, task: str, count: int) -> list[Fact]:
        """At most `count` facts of a task; no two share a key or a value."""
        if task == "passkey":
            chosen = self._templates(self.passkeys, count, keyed=False)
            return [self._fact(t, "", value) for t, value in zip(chosen, self._distinct(self.formats, len(chosen)), strict=True)]
        values = self._distinct(self.formats, count)
        if task == "variables":
            chain = self.rng.choice(self.chains)
            names = self._distinct(self.names, count * HOPS)
            return [self._chain(chain, names[i * HOPS : (i + 1) * HOPS][: self.rng.randint(2, HOPS)], value) for i, value in enumerate(values)]
        # Few templates for many needles: neither the sentence nor its being the last of its kind tells the answer.
        shared = self._templates(self.keyed, 1 + count // 16, keyed=True)
        keys = self._distinct(self.formats, count)
        return [self._fact(self.rng.choice(shared), key, value) for key, value in zip(keys, values, strict=True)]

    def _templates(self, listed: list[Template], count: int, keyed: bool) -> list[Template]:
        """Different ones: of the list, which evaluation has nothing else than, and drawn."""
        free = sum(self.rng.random() < self.drawn for _ in range(count))
        found = {t.prefix: t for t in self.rng.sample(listed, min(len(listed), count - free))}
        while self.drawn and len(found) < count:
            made = self._made(list(found.values()), keyed)
            if made.prefix not in templates.HELD_OUT_PREFIXES:
                found[made.prefix] = made
        return self.rng.sample(list(found.values()), len(found))

    @cached_property
    def _words(self) -> list[str]:
        """Of a piece of the haystack, as often as they are there."""
        words = WORD.findall(self.tokenizer.decode(self.haystack.take(self.rng, 512).tolist()))
        return words if len(set(words)) >= FEWEST else formats.WORDS

    def _made(self, others: list[Template], keyed: bool) -> Template:
        """A line that no list has."""
        words = self._words if self.rng.random() < OWN else formats.WORDS
        if others and self.rng.random() < ALIKE:
            return templates.alike(self.rng, self.rng.choice(others), words)
        return templates.drawn(self.rng, words, keyed)

    def _distinct(self, known: dict[str, Format], count: int) -> list[str]:
        """Different texts of one format (of several, where one has too few)."""

        def any_format() -> Format:
            if known is formats.FORMATS and self.rng.random() < OWN:  # words that no list has: copying is learned, not words
                return formats.assembled(self.rng.randint(2, 5), self._words)
            return known[self.rng.choice(list(known))]

        form = any_format()
        found: dict[str, None] = {}
        tries = 0
        while len(found) < count:
            tries += 1
            if tries % (4 * count) == 0:
                form = any_format()
            found[form(self.rng)] = None
        return list(found)

    def _ids(self, text: str) -> Ids:
        return np.array(self.tokenizer.encode(text), dtype=np.int32)

    def _line(self, template: Template, key: str, value: str) -> tuple[Ids, Ids, Ids]:
        texts = (template.prefix.replace("{key}", key), template.value.replace("{value}", value), template.suffix)
        before, inside, after = map(self._ids, texts)
        return before, inside, after

    def _fact(self, template: Template, key: str, value: str) -> Fact:
        before, inside, after = self._line(template, key, value)
        lead = self.rng.choice([lead for lead in self.leads if key or "{key}" not in lead])
        return self._asked(template.id, key, (np.concatenate([before, inside, after]),), lead, before, inside, after)

    def _chain(self, chain: Chain, names: list[str], value: str) -> Fact:
        lines = [np.concatenate(self._line(chain.first, names[0], value))]
        for before, name in zip(names, names[1:], strict=False):
            lines.append(self._ids(chain.link.replace("{key}", name).replace("{of}", before)))
        return self._asked(chain.id, names[-1], tuple(lines), "", *self._line(chain.question, names[-1], value))

    def _asked(self, template: str, key: str, lines: tuple[Ids, ...], lead: str, question: Ids, answer: Ids, after: Ids) -> Fact:
        newline = self._ids("\n")
        lead_ids = self._ids(lead.replace("{key}", key) + "\n") if lead else newline[:0]
        return Fact(template, key, lines, lead_ids, question, answer, np.concatenate([after, newline]))


def sample(
    task: str,
    length_tokens: int,
    rng: random.Random,
    tokenizer: Tokenizer,
    haystack: Haystack,
    *,
    split: str,
    depth: float | None = None,
    needles: int | None = None,
) -> Sample:
    """One question at the end of `length_tokens` tokens (answer included); `multi_query` answers three others before it.

    Args:
        task: one of TASKS.
        rng: everything drawn comes from it: an equal state and haystack give an equal sample.
        haystack: `open_haystack`; of the same split, where evaluation is to see no text of training.
        split: train | held_out: which templates, formats of keys and values, lead-in lines and depths are used.
        depth: of the asked needle, from 0 to 1; None: drawn from the split's depths. What lies nearest between two lines is taken.
        needles: how many are hidden (chains, for variables); the others are distractors. None: see NEEDLES.

    Raises:
        ValueError: an unknown task or split, a depth outside [0, 1], a length too short for the needles.
    """
    if task not in TASKS:
        raise ValueError(f"task={task!r} is not known: write one of {', '.join(TASKS)}")
    if depth is not None and not 0 <= depth <= 1:
        raise ValueError(f"depth={depth:g} is not a share of the haystack: write a number from 0 to 1")
    if needles is not None and needles < 1:
        raise ValueError(f"needles={needles} hides nothing to ask for: write 1 or more")
    count = needles or max(1, min(NEEDLES[task], length_tokens // 256))
    slack = max(2, length_tokens // 200)  # where two pieces of text meet, their common tokenisation may differ by a token
    for _ in range(TRIES):  # a short prompt may have no place for long lines
        facts = _Facts(rng, tokenizer, split, haystack).draw(task, count)
        asked, others = facts[0], facts[1:]
        answered = others[:3] if task == "multi_query" else []
        ending = [*(part for fact in answered for part in (fact.lead, fact.question, fact.answer, fact.rest)), asked.lead, asked.question]
        lines = sum(fact.size + len(haystack.newline) * len(fact.lines) for fact in facts)
        room = length_tokens - slack - lines - sum(map(len, ending)) - len(asked.answer) - len(haystack.newline)
        if room >= SHORTEST // 2:
            break
    else:
        raise ValueError(f"{length_tokens} tokens are too few for {count} needles of task {task}: ask for more tokens or fewer needles")
    if depth is None and split == "train":
        hay = haystack.trimmed(haystack.take(rng, room))
        cuts = haystack.cuts(hay)
        found = _outside_bands(rng, cuts.at, len(hay))
    else:
        hay, cuts, found = _window(haystack, rng, room, depths.draw(rng) if depth is None else depth)
    lines_at = _spread(asked, found, cuts, rng)
    for fact in others:
        lines_at += _spread(fact, rng.randrange(len(cuts.at)), cuts, rng)
    ids = np.concatenate([*_insert(hay, cuts, lines_at, haystack), *ending])
    return Sample(tokenizer, task, asked.key, float(cuts.at[found] / len(hay)), asked.template, len(facts), ids, asked.answer)


def document(task: str, tokens: int, rng: random.Random, tokenizer: Tokenizer, haystack: Haystack, *, per_1k: float, most: int) -> Ids:
    """A training document of `tokens` ids (its end-of-document token included) with many needles, each of them asked for once.

    At the end all that is hidden is asked for, in any order; in multi_query half of it in the middle already. No question has its needle at a
    depth of evaluation.

    Args:
        per_1k: needles (or chains' lines) per 1000 tokens; kv has at most 8.
        most: needles at most.

    Raises:
        ValueError: too few tokens for one needle.
    """
    count = max(1, min(most, round(tokens * per_1k / 1000)))
    count = {"kv": rng.randint(1, min(8, count)), "variables": max(1, count // HOPS)}.get(task, count)
    facts: list[Fact] = []

    def room() -> int:
        return tokens - 1 - len(haystack.newline) - sum(f.size + f.asked_size + len(haystack.newline) * (len(f.lines) + 1) for f in facts)

    for _ in range(TRIES):  # in a short document there may be no place for a long line
        facts = _Facts(rng, tokenizer, "train", haystack).draw(task, count)
        while len(facts) > 1 and room() < tokens // 2:
            facts.pop()
        if room() >= SHORTEST // 2:
            break
    else:
        raise ValueError(f"a synthetic document of {tokens} tokens has no place for a needle: write at least 256 as its length")
    # A question in the middle takes a newline more than one at the end: what is spared goes to the haystack.
    middle = facts[: len(facts) // 2] if task == "multi_query" else []
    hay = haystack.trimmed(haystack.take(rng, room() + len(haystack.newline) * (len(facts) - len(middle))))
    cuts = haystack.cuts(hay)
    placed: list[tuple[int, Ids]] = []
    asked: list[tuple[int, Ids]] = []
    ending: list[Ids] = []
    for number, fact in enumerate(facts):
        first = _outside_bands(rng, cuts.at, len(hay))
        placed += _spread(fact, first, cuts, rng)
        question = np.concatenate([fact.lead, fact.question, fact.answer, fact.rest])
        at = _later(rng, cuts.at, first) if number < len(middle) else None
        if at is None:
            ending.append(question)
        else:
            asked.append((at, question[: len(question) - len(haystack.newline)]))
    rng.shuffle(ending)
    return np.concatenate([*_insert(hay, cuts, placed + asked, haystack), *ending])


def _outside_bands(rng: random.Random, at: NDArray[np.int64], tokens: int) -> int:
    """A cut at a depth of training, a far one rather than a near one; any, where a short text has none.

    Near ones are learned at once. With all depths alike, a model that found 97 needles of 100 found one in ten of those at the beginning of
    4096 tokens. The first line is one of many thousands and has its own share.
    """
    if rng.random() < FIRST:
        return 0
    cut = 0
    for _ in range(64):
        cut = int(len(at) * rng.random() ** 2)
        if not depths.is_held_out(at[cut] / tokens):
            break
    return cut


def _later(rng: random.Random, at: NDArray[np.int64], first: int) -> int | None:
    """A cut for the question about a needle at cut `first`, such that its depth is one of training, or None."""
    for _ in range(8):
        question = rng.randrange(first, len(at))
        if question > first and not depths.is_held_out(at[first] / at[question]):
            return question
    return None


def _spread(fact: Fact, first: int, cuts: Cuts, rng: random.Random) -> list[tuple[int, Ids]]:
    """A fact's lines with the cuts they go to: the first one's, and later ones in order."""
    after = sorted(rng.randrange(first, len(cuts.at)) for _ in fact.lines[1:])
    return list(zip([first, *after], fact.lines, strict=True))


def _window(haystack: Haystack, rng: random.Random, tokens: int, depth: float) -> tuple[Ids, Cuts, int]:
    """`tokens` of the haystack from some line's beginning on, its cuts, and which of them lies at the depth (within BAND, unless lines are long).

    For a depth of evaluation it is a cut that training leaves out, if there is any such window: beside the ends, the ends themselves are training's.
    """

    def fits(cut: int, whole: int) -> bool:
        return not depths.is_held_out(depth) or (depths.is_held_out(cut / whole) and abs(cut / whole - depth) <= 2 * depths.BAND)

    spare = min(tokens, 2048)
    ids = haystack.take(rng, tokens, spare)
    cuts = haystack.cuts(ids)
    best, least = 0, float("inf")
    for begin in cuts.at[(cuts.at <= spare) & ~cuts.opens].tolist():
        wanted = begin + depth * tokens
        after = int(np.searchsorted(cuts.at, wanted))
        near = [begin, begin + tokens, *(c for c in cuts.at[max(0, after - 1) : after + 1].tolist() if begin <= c <= begin + tokens)]
        error = min((abs(c - wanted) for c in near if fits(c - begin, tokens)), default=float("inf"))
        if error < least:
            best, least = begin, error
        if error <= tokens * depths.BAND / 4:
            break
    hay = haystack.trimmed(ids[best : best + tokens])
    cuts = haystack.cuts(hay)
    nearest = np.argsort(np.abs(cuts.at - depth * len(hay)), kind="stable").tolist()
    return hay, cuts, next((n for n in nearest if fits(int(cuts.at[n]), len(hay))), nearest[0])


def _insert(hay: Ids, cuts: Cuts, lines: list[tuple[int, Ids]], haystack: Haystack) -> list[Ids]:
    """The haystack with lines at some of its cuts, in their order at each, and a newline at its end."""
    parts: list[Ids] = []
    done = 0
    for cut, line in sorted(lines, key=lambda placed: placed[0]):
        at = int(cuts.at[cut])
        parts += [hay[done:at], haystack.newline, line] if cuts.opens[cut] else [hay[done:at], line, haystack.newline]
        done = at
    parts.append(hay[done:])
    # the last cut opens exactly where the haystack ends inside a line
    return [*parts, haystack.newline] if cuts.opens[-1] else parts
