"""Learning rates against values computed by hand."""

import pytest

from ltrain.config import TrainConfig
from ltrain.train.schedule import learning_rate


def rates(**keys: object) -> list[float]:
    train = TrainConfig(**{"lr": 1.0, "min_lr": 0.0, **keys})  # type: ignore[arg-type]
    return [learning_rate(step, train) for step in range(train.steps)]


def test_warm_up_stable_decay() -> None:
    # the last four of ten: 1 - sqrt(1/4), 1 - sqrt(2/4), 1 - sqrt(3/4), 0
    decay = [0.5, 1 - 0.5**0.5, 1 - 0.75**0.5, 0.0]
    expected = [0.5, 1.0, 1.0, 1.0, 1.0, 1.0, *decay]
    assert rates(schedule="wsd", steps=10, warmup_steps=2, decay_steps=4) == pytest.approx(expected)
    assert rates(schedule="wsd", steps=10, warmup_steps=2, decay_fraction=0.4) == pytest.approx(expected)
    assert rates(schedule="wsd", steps=10, warmup_steps=2, decay_steps=4, min_lr=0.2)[6:] == pytest.approx([0.2 + 0.8 * x for x in decay])


def test_a_decay_of_everything_begins_after_the_warm_up() -> None:
    assert rates(schedule="wsd", steps=6, warmup_steps=2, decay_fraction=1.0) == pytest.approx([0.5, 1.0, 0.5, 1 - 0.5**0.5, 1 - 0.75**0.5, 0.0])


def test_constant_and_cosine() -> None:
    assert rates(schedule="constant", steps=5, warmup_steps=2) == [0.5, 1.0, 1.0, 1.0, 1.0]
    assert rates(schedule="cosine", steps=6, warmup_steps=2) == pytest.approx([0.5, 1.0, (2 + 2**0.5) / 4, 0.5, (2 - 2**0.5) / 4, 0.0])
    assert rates(schedule="cosine", steps=4, warmup_steps=4) == [0.25, 0.5, 0.75, 1.0]
