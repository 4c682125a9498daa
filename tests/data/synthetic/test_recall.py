import argparse
import ast
import bisect
import dataclasses
import heapq
import random
import re
import textwrap
import types
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from ltrain.data.synthetic import HAYSTACKS, Haystack, depths, document, filler, formats, held_out_depths, open_haystack, sample, templates
from ltrain.data.synthetic.recall import TASKS, _Facts
from ltrain.data.synthetic.templates import Template
from ltrain.data.tokenizer import END, Tokenizer, train_bpe

MODULES = (argparse, ast, bisect, dataclasses, heapq, random, textwrap, types)  # whose files are the haystack


@cache
def texts():
    return [Path(module.__file__).read_text() for module in MODULES]


@cache
def tokenizer(kind):
    if kind == "bytes":
        return Tokenizer("bytes", 256)
    model = train_bpe(texts(), 1024, kind)
    return Tokenizer("bpe", model.token_to_id(END), model)


@cache
def haystack(kind):
    ids = [np.array(tokenizer(kind).encode(text), dtype=np.int32) for text in texts()]
    return Haystack(tokenizer(kind), ids.__getitem__, len(ids), "ltrain")


KINDS = ("bytes", "split", "merge")


def make(task, tokens, seed, kind="split", **options):
    options = {"split": "held_out", **options}
    return sample(task, tokens, random.Random(seed), tokenizer(kind), haystack(kind), **options)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("task", TASKS)
def test_a_sample_is_as_long_as_asked_and_encodes_to_its_own_ids(kind, task):
    for seed in range(12):
        tokens = random.Random(seed).choice([1024, 1500, 4096, 20000])
        for split in ("train", "held_out"):
            s = make(task, tokens, seed, kind, split=split)
            ids = tokenizer(kind).encode(s.prompt + s.answer)
            assert 0.97 * tokens <= len(ids) <= tokens
            assert ids == [*s.prompt_ids, *s.answer_ids]  # so the text is tokenised as any other, and the value as in its needle
            assert s.prompt_ids.dtype == s.answer_ids.dtype == np.int32


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("split", ["train", "held_out"])
def test_the_value_has_the_same_tokens_in_every_template_and_format(kind, split):
    """Encoded as a whole, a needle's line has the ids of its parts, whatever the format of its key and value."""
    train = split == "train"
    t, rng = tokenizer(kind), random.Random(0)
    keyed = (*templates.KEYED, *templates.PASSKEY) if train else (*templates.HELD_OUT_KEYED, *templates.HELD_OUT_PASSKEY)
    chains = templates.CHAINS if train else templates.HELD_OUT_CHAINS
    known = formats.FORMATS if train else formats.HELD_OUT_FORMATS
    for template in (*keyed, *(c.first for c in chains), *(c.question for c in chains)):
        for make_key in known.values():
            for make_value in known.values():
                texts = [
                    s.replace("{key}", make_key(rng)) for s in (template.prefix, template.value.replace("{value}", make_value(rng)), template.suffix)
                ]
                parts = [t.encode(text) for text in texts]
                assert t.encode(f"x\n{''.join(texts)}\n") == [*t.encode("x\n"), *sum(parts, []), *t.encode("\n")], texts


def lines(text):
    return text.split("\n")


@pytest.mark.parametrize("task", ["passkey", "kv", "multi_query"])
def test_the_question_repeats_its_needle_up_to_the_value(task):
    for seed in range(30):
        s = make(task, 4096, seed, split=random.Random(seed).choice(["train", "held_out"]))
        *context, question = lines(s.prompt)
        needles = [line for line in context if line.startswith(question)]
        assert len(needles) == 1 and needles[0].startswith(question + s.answer)
        assert s.key in question and s.prompt.count(s.answer.strip()) == 1
        after = needles[0][len(question + s.answer) :]
        assert not after[:1].isalnum()  # the answer is all of the value
        fixed = question.replace(s.key, "\0") if s.key else None
        if fixed and s.needles <= 15:  # one template: the others differ by their keys, and the last of them is not always the answer
            shared = [line for line in context if line.startswith(fixed.split("\0")[0]) and fixed.split("\0")[1] in line]
            assert len(shared) >= s.needles


def test_neither_the_first_nor_the_last_needle_is_the_asked_one():
    place = []
    for seed in range(60):
        s = make("kv", 4096, seed, needles=6)
        question = lines(s.prompt)[-1].replace(s.key, "\0").split("\0")
        found = [i for i, line in enumerate(lines(s.prompt)[:-1]) if line.startswith(question[0]) and question[1] in line and not line.endswith("?")]
        asked = next(i for i in found if s.key in lines(s.prompt)[i])
        place.append(sorted(found).index(asked))
    assert all(place.count(n) >= 2 for n in range(6)), place


def test_variables_are_followed_through_their_chain():
    for seed in range(30):
        s = make("variables", 4096, seed, needles=3, split="train" if seed % 2 else "held_out")
        chain = next(c for c in (*templates.CHAINS, *templates.HELD_OUT_CHAINS) if c.id == s.template_id)
        context = lines(s.prompt)
        link = re.compile(
            re.escape(chain.link).replace(r"\{key\}", r"(?P<key>\w+)", 1).replace(r"\{key\}", r"\w+").replace(r"\{of\}", r"(?P<of>\w+)")
        )
        name, hops, at = s.key, 0, len(context)
        while True:
            found = [(i, m["of"]) for i, line in enumerate(context[:-1]) if (m := link.fullmatch(line)) and m["key"] == name]
            if not found or found[0][1] == s.answer.strip():  # the chain's first line, whose value may look like a name
                break
            ((i, name),) = found
            assert i < at  # an assignment stands before what uses it
            hops, at = hops + 1, i
        first = (chain.first.prefix + chain.first.value + chain.first.suffix).replace("{key}", name).replace(" {value}", s.answer.rjust(0))
        first = first.replace("{value}", s.answer.strip()) if "{value}" in first else first
        assert 1 <= hops <= 3
        assert sum(s.answer.strip() in line and name in line for line in context[:-1]) == 1, (first, s.answer)


@pytest.mark.parametrize("tokens", [8192, 16384])
def test_depths_are_met_and_those_of_evaluation_never_trained(tokens):
    for task in TASKS:
        for depth in held_out_depths(11):
            made = [make(task, tokens, seed, depth=depth).depth for seed in range(3 if 0.1 <= depth <= 0.9 else 12)]
            assert all(abs(found - depth) <= depths.BAND for found in made)
            assert all(map(depths.is_held_out, made)), (depth, made)
        trained = [make(task, tokens, seed, split="train").depth for seed in range(20)]
        assert not any(map(depths.is_held_out, trained))
    assert min(make("kv", tokens, seed, split="train").depth for seed in range(60)) == 0  # evaluated beginnings lie behind the first line
    rng = random.Random(0)
    assert all(depths.is_held_out(depths.draw(rng)) for _ in range(2000))
    assert held_out_depths(1) == [0.5] and held_out_depths(3) == [0.001, 0.5, 0.999] and len(set(held_out_depths(10))) == 10


def test_depth_is_the_share_of_the_haystack_before_the_needle():
    s = make("passkey", 4096, 1, "bytes", depth=0.3)
    at = s.prompt.index(lines(s.prompt)[-1])
    assert abs(at / len(s.prompt) - 0.3) < 0.03


def questions(text):
    """(line of the needle, line of the question) for every line that stands twice."""
    seen, found = {}, []
    for i, line in enumerate(lines(text)):
        if line in seen and len(line) > 12:
            found.append((seen[line], i))
        seen.setdefault(line, i)
    return found


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("line", ["2031-01-02: x", "word = 1", '{"key": 2}', "# 7"])
def test_a_line_can_be_put_at_every_cut_without_another_tokenisation(kind, line):
    t, hay = tokenizer(kind), haystack(kind)
    text = (
        "\n".join(
            [
                "def f(x):",
                "    y = 1",
                "",
                "    return  y ",
                "",
                "",
                "2024 is a",
                "",
                "7, and",
                "\tend\r",
                "x",
                "",
                "class A:",
                "  z",
                "a = 1",
                "b = 2",
                "3",
            ]
        )
        + "\n"
    )
    ids = np.array(t.encode(text), dtype=np.int32)
    cuts = hay.cuts(ids)
    assert len(cuts.at) >= 10
    new, nl = t.encode(line), t.encode("\n")
    for at, opens in zip(cuts.at.tolist(), cuts.opens.tolist(), strict=True):
        whole = [*ids[:at], *(nl + new if opens else new + nl), *ids[at:]]
        assert t.encode(t.decode(whole)) == whole, (at, opens)
        assert line in lines(t.decode(whole))


@pytest.mark.parametrize("kind", KINDS)
def test_training_documents_ask_for_what_they_hide_at_the_end_and_before(kind):
    t, hay = tokenizer(kind), filler(tokenizer(kind))
    line = lines(t.decode(hay.ids(0)))[0]
    for seed in range(12):
        ids = document("multi_query", 4096, random.Random(seed), t, hay, per_1k=5, most=64)
        text = t.decode(ids)
        assert 0.97 * 4096 <= len(ids) < 4096 and t.encode(text) == ids.tolist()
        last = max(i for i, this in enumerate(lines(text)) if this == line)
        pairs = [(a, b) for a, b in questions(text) if lines(text)[a] not in (line, *templates.LEADS)]
        assert len(pairs) >= (3 if kind == "bytes" else 10)
        assert len(pairs) // 4 <= sum(b < last for _, b in pairs) <= len(pairs) // 2


@pytest.mark.parametrize("task", ["passkey", "kv", "multi_query"])
def test_no_question_of_training_has_its_needle_at_a_depth_of_evaluation(task):
    t = tokenizer("bytes")
    dots = np.array(t.encode(".\n" * 4096), dtype=np.int32)  # of which any line before a needle is counted in the text
    hay = Haystack(t, lambda index: dots, 1, "dots")
    checked = 0
    for seed in range(12):
        text = lines(t.decode(document(task, 16384, random.Random(seed), t, hay, per_1k=2, most=32)))
        before = np.cumsum([line == "." for line in text])
        for needle, question in questions("\n".join(text)):
            if text[needle] == "." or text[needle] in templates.LEADS:
                continue
            # the cut is before or after the newline of the last dot
            near = [(2 * before[needle] - i) / (2 * before[question] - j) for i in (0, 1) for j in (0, 1)]
            assert not all(map(depths.is_held_out, near)), (seed, near)
            checked += 1
    assert checked > 30


def test_documents_are_dense_and_capped():
    t, hay = tokenizer("split"), filler(tokenizer("split"))
    many = document("multi_query", 16384, random.Random(0), t, hay, per_1k=5, most=64)
    few = document("multi_query", 16384, random.Random(0), t, hay, per_1k=5, most=4)
    line = lines(t.decode(hay.ids(0)))[0]
    few, many = ([a for a, _ in questions(text) if lines(text)[a] not in (line, *templates.LEADS)] for text in map(t.decode, (few, many)))
    assert len(few) <= 4 and 50 <= len(many) <= 64
    with pytest.raises(ValueError, match="a synthetic document of 40 tokens has no place"):
        document("kv", 40, random.Random(0), t, hay, per_1k=5, most=4)


def shape(template):
    """Of any line that is made from it."""
    return re.compile(".+".join(map(re.escape, template.prefix.split("{key}"))) + " ?.+" + re.escape(template.suffix))


def test_what_evaluation_uses_is_in_no_training_document():
    held = [*templates.HELD_OUT_KEYED, *templates.HELD_OUT_PASSKEY, *(t for c in templates.HELD_OUT_CHAINS for t in (c.first, c.question))]
    known = [*templates.KEYED, *templates.PASSKEY, *(t for c in templates.CHAINS for t in (c.first, c.question))]
    assert len(templates.KEYED) >= 40 and len(templates.HELD_OUT_KEYED) >= 8 and len(formats.FORMATS) >= 8 and len(formats.HELD_OUT_FORMATS) >= 3
    assert not {(t.prefix, t.suffix) for t in held} & {(t.prefix, t.suffix) for t in known}
    assert not set(formats.WORDS) & set(formats.HELD_OUT_WORDS) and not set(templates.LEADS[1:]) & set(templates.HELD_OUT_LEADS[1:])
    t, hay, rng = tokenizer("split"), filler(tokenizer("split")), random.Random(0)
    text = "\n".join(t.decode(document(task, 4096, rng, t, hay, per_1k=8, most=64)) for task in sorted(TASKS) * 50)
    assert sum(c.prefix.split("{key}")[0] in text for c in templates.KEYED) > 35  # the others are seen
    for template in held:
        assert not any(map(shape(template).fullmatch, lines(text))), template
        assert shape(template).fullmatch(template.prefix.replace("{key}", "k") + template.value.replace("{value}", "v") + template.suffix)
    assert not re.findall(rf"\b(?:{'|'.join(w for w in formats.HELD_OUT_WORDS)})\b", text.lower())
    shapes = {  # of the held-out formats
        "plate": r"\b[A-Z]{3}-\d{4}\b", "clock": r"\b\d\d:\d\d:\d\d\.\d{3}\b", "path": r"\b[a-z]+/[a-z]+/\d\d\b", "pair": r"\b\d{4}-\d{5}\b",
    }  # fmt: skip
    assert set(shapes) == set(formats.HELD_OUT_FORMATS)
    for name, pattern in shapes.items():
        assert all(re.fullmatch(pattern, formats.HELD_OUT_FORMATS[name](rng)) for _ in range(50))
        assert not re.search(pattern, text), name
        assert not any(re.fullmatch(pattern, make_text(rng)) for make_text in formats.FORMATS.values() for _ in range(200))


def test_a_sample_is_a_function_of_its_generator_alone():
    for task in TASKS:
        first, again, other = make(task, 2048, 1), make(task, 2048, 1), make(task, 2048, 2)
        assert (first.prompt, first.answer) == (again.prompt, again.answer) != (other.prompt, other.answer)
    assert make("kv", 2048, 5).answer == " saucer/goblet/98"  # written down once: another machine draws the same


def test_long_samples_are_made_on_ids():
    make("kv", 131072, 0)
    encoded = []
    t = Tokenizer("bytes", 256)
    hay = Haystack(t, lambda i: np.frombuffer(texts()[i].encode(), dtype=np.uint8).astype(np.int32), len(texts()), "x")
    t.encode = lambda text: encoded.append(len(text)) or list(text.encode())
    s = sample("kv", 131072, random.Random(0), t, hay, split="held_out", depth=0.5)
    assert len(s.prompt_ids) > 127000 and sum(encoded) < 2000


def test_what_cannot_be_sampled_is_refused():
    for words, message in (
        (("needle", 1024, {}), "task='needle' is not known: write one of passkey, kv"),
        (("kv", 1024, {"split": "test"}), "split='test' is not known"),
        (("kv", 1024, {"depth": 1.5}), "depth=1.5 is not a share"),
        (("kv", 1024, {"needles": 0}), "needles=0 hides nothing"),
        (("kv", 256, {"needles": 60}), "256 tokens are too few for 60 needles of task kv"),
    ):
        with pytest.raises(ValueError, match=message):
            make(words[0], words[1], 0, **words[2])
    with pytest.raises(ValueError, match="12 depths were asked for"):
        held_out_depths(12)
    with pytest.raises(ValueError, match=f"haystack=sea is not known: write one of {', '.join(HAYSTACKS)}"):
        open_haystack("sea", tokenizer("bytes"), "train")


def test_the_haystack_of_evaluation_shares_no_file_with_training_and_is_tokenised_once(tmp_path, monkeypatch):
    t = tokenizer("split")
    found = {}
    for split in ("train", "held_out"):
        hay = open_haystack("stdlib", t, split, cache=str(tmp_path))
        found[split] = {bytes(hay.ids(i)) for i in range(0, hay.size, 40 if split == "train" else 5) if len(hay.ids(i)) > 50}
    assert found["train"] and found["held_out"] and not found["train"] & found["held_out"]
    again = open_haystack("stdlib", t, "held_out", cache=str(tmp_path))
    monkeypatch.setattr(Tokenizer, "document_ids", lambda self, text: pytest.fail("it was tokenised again"))
    assert all((again.ids(i) == hay.ids(i)).all() for i in range(0, hay.size, 5) if len(hay.ids(i)))


@pytest.mark.parametrize("keyed", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_drawn_lines_are_all_different_and_their_values_have_their_own_tokens(kind, keyed):
    t, rng = tokenizer(kind), random.Random(0)
    made = [templates.drawn(rng, formats.WORDS, keyed) for _ in range(400)]
    assert len({m.prefix for m in made}) > 390 and all(("{key}" in m.prefix) == keyed for m in made)
    for m in made:
        texts = [s.replace("{key}", "k-1").replace("{value}", "sevenths") for s in (m.prefix, m.value, m.suffix)]
        line = "".join(texts)
        assert not line[0].isspace() and not line[-1].isspace() and "'" not in line
        assert t.encode(f"x\n{line}\n") == [*t.encode("x\n"), *sum(map(t.encode, texts), []), *t.encode("\n")], texts


def test_lines_that_are_alike_differ_in_one_word_and_their_values_have_their_own_tokens():
    t, rng = tokenizer("split"), random.Random(0)
    for listed in (*templates.KEYED, *templates.PASSKEY):
        other = templates.alike(rng, listed, ["walrus"])
        words = [re.findall(r"[a-z]+|[^a-z]", m.prefix, re.IGNORECASE) for m in (listed, other)]
        changed = [(a, b) for a, b in zip(*words, strict=True) if a != b]
        assert len(changed) <= 1 and all(b == "walrus" for _, b in changed) and listed.prefix.count("{key}") == other.prefix.count("{key}")
        texts = [s.replace("{key}", "k-1").replace("{value}", "sevenths") for s in other[1:]]
        assert t.encode("".join(texts)) == sum(map(t.encode, texts), []), texts
    assert templates.alike(rng, Template.of("", '{key}: "{value}"'), ["walrus"]).prefix == '{key}: "'


def test_drawn_lines_take_words_of_the_text_around_them():
    t, hay = tokenizer("split"), filler(tokenizer("split"))
    lines = [m.prefix for n in range(20) for m in _Facts(random.Random(n), t, "train", hay)._templates([], 20, keyed=False)]
    own = sum(bool(re.search(r"grass|green|blue|yellow", line)) for line in lines) / len(lines)
    assert 0.2 < own < 0.7 and not set(lines) & templates.HELD_OUT_PREFIXES


@pytest.mark.parametrize("text", ["0 1 2 3\n" * 64, "one\n" * 64])
def test_a_text_of_few_words_has_lines_of_others(text):
    t = tokenizer("split")
    ids = np.array(t.encode(text), dtype=np.int32)
    hay = Haystack(t, lambda index: ids, 1, "few")
    for n in range(20):
        lines = _Facts(random.Random(n), t, "train", hay)._templates([], 20, keyed=False)
        assert len({m.prefix for m in lines}) == 20
    assert len(templates.drawn(random.Random(0), ["one"], False).prefix) > 3


def test_most_lines_of_training_are_drawn_and_none_of_evaluation():
    t, hay = tokenizer("split"), filler(tokenizer("split"))
    for task in ("passkey", "kv", "multi_query"):
        ids = {split: [sample(task, 4096, random.Random(n), t, hay, split=split).template_id for n in range(60)] for split in ("train", "held_out")}
        assert 30 < ids["train"].count("drawn") < 55 and "drawn" not in ids["held_out"]


def test_training_asks_for_what_lies_far_back_more_often_than_for_what_is_near():
    t, hay = tokenizer("split"), filler(tokenizer("split"))
    places = [sample("passkey", 2048, random.Random(n), t, hay, split="train").depth for n in range(600)]
    assert 0.65 < sum(depth < 0.5 for depth in places) / 600 < 0.8  # the square of a uniform number
