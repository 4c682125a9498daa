import random
from collections import Counter

import numpy as np

from ltrain.config import TokenizerConfig
from ltrain.data.synthetic import copying, filler
from ltrain.data.tokenizer import build_tokenizer


def haystack(tmp_path):
    texts = iter(["def f(x):\n    return x + 1\n" * 50])
    return filler(build_tokenizer(TokenizerConfig(vocab=300, cache=str(tmp_path)), texts, "copying"))


def test_half_of_the_tokens_were_there_before(tmp_path):
    hay = haystack(tmp_path)
    ids = copying.document(20_000, random.Random(1), hay)
    assert len(ids) == 19_999 and ids.dtype == np.int32
    assert 0 <= ids.min() and ids.max() < hay.tokenizer.vocab_size and hay.tokenizer.eos not in ids
    # eight random ids come again by chance once in 300^8: what does is a copy, whose first place is anywhere before
    grams = [tuple(ids[i : i + 8].tolist()) for i in range(len(ids) - 8)]
    first: dict[tuple[int, ...], int] = {}
    distances = [i - first.setdefault(gram, i) for i, gram in enumerate(grams)]
    repeated = [d for d in distances if d]
    assert 0.35 < len(repeated) / len(grams) < 0.85  # the text around is a few sentences again and again
    assert max(repeated) > 10_000
    assert max(Counter(ids.tolist()).values()) < len(ids) / 8  # not a few tokens only: the commonest is the filler's blank


def test_the_same_from_the_same_numbers(tmp_path):
    hay = haystack(tmp_path)
    one, two, other = (copying.document(500, random.Random(seed), hay) for seed in (3, 3, 4))
    assert np.array_equal(one, two) and not np.array_equal(one, other)
    assert [len(copying.document(n, random.Random(0), hay)) for n in (1, 2, 9)] == [0, 1, 8]
