"""What is said not to go together is refused, and nothing else is said."""

import re
from pathlib import Path

import pytest

from ltrain.config import ConfigError, load, validate

ROOT = Path(__file__).parents[1]
ROWS = re.findall(r"^\| ([^|]+) \| [^|]+ \| `([^`|]+)` \|$", (ROOT / "docs/refusals.md").read_text(), re.MULTILINE)


def overrides(changes: str) -> list[str]:
    """Words of a command line, in which braces hold spaces."""
    return re.findall(r"(?:[^ {]|\{[^}]*\})+", changes)


def test_the_list_is_read() -> None:
    assert len(ROWS) == 21
    assert overrides("a=1 b={c: d, e: f} g=[h,i]") == ["a=1", "b={c: d, e: f}", "g=[h,i]"]


@pytest.mark.parametrize(("what", "changes"), ROWS, ids=[what for what, _ in ROWS])
def test_what_does_not_go_together_is_refused_in_one_sentence(what: str, changes: str) -> None:
    with pytest.raises(ConfigError) as refused:
        validate(load(ROOT / "configs/quickstart.yaml", overrides(changes)), world_size=12)
    sentence = str(refused.value)
    assert "\n" not in sentence and not re.search(r"\. [A-Z]", sentence), sentence
    # it names the first key of the row, or the layer that has it, and says what to write
    key = overrides(changes)[0].partition("=")[0]
    assert key in sentence or key.startswith("model.layers") and key.rpartition(".")[0] in sentence, sentence
    assert re.search(r"write|take (it|them) out|give it|start with", sentence), sentence


@pytest.mark.parametrize(("what", "changes"), ROWS, ids=[what for what, _ in ROWS])
def test_each_change_alone_is_not_what_is_refused(what: str, changes: str) -> None:
    """Else the row would say too much: without one of its changes the config is read, or refused for another reason."""
    words = overrides(changes)
    if len(words) < 2:
        return
    full = _refusal(words)
    assert any(_refusal(words[:i] + words[i + 1 :]) != full for i in range(len(words)))


def test_the_list_has_what_mixers_refuse() -> None:
    """Whatever a mixer says that it does not work with, for some of its options."""
    said = "".join(path.read_text() for path in (ROOT / "ltrain/model/options").glob("*.py"))
    sentences = set(re.findall(r'"(?:pipeline|tensor|context|training)": "([^"]+)"', said))
    refusals = [_refusal(overrides(changes)) for _, changes in ROWS]
    assert sentences and all(any(sentence in refusal for refusal in refusals) for sentence in sentences), sentences


def _refusal(words: list[str]) -> str:
    try:
        validate(load(ROOT / "configs/quickstart.yaml", words), world_size=12)
    except ConfigError as error:
        return str(error)
    return ""
