import json
import os
import sysconfig
from pathlib import Path

import pytest

from ltrain.config import DataConfig
from ltrain.data.sources import Files, HubStream, open_source


@pytest.fixture(autouse=True)
def table_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("tables")))


def write_jsonl(path: Path, rows: list) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_stdlib_is_sorted_and_leaves_out_installed_packages_and_other_encodings():
    source = open_source(DataConfig())
    root = sysconfig.get_paths()["stdlib"]
    names = [os.path.relpath(source.name(i), root).replace(os.sep, "/") for i in range(len(source))]
    assert names == sorted(names) and len(names) > 500
    assert not any(part in ("site-packages", "dist-packages", "__pycache__") for name in names for part in name.split("/"))
    json_decoder = names.index("json/decoder.py")
    assert source.text(json_decoder) == Path(root, "json/decoder.py").read_bytes().decode()


def test_other_encodings_are_left_out_or_refused(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"caf\xe9")
    (tmp_path / "b.txt").write_text("café", encoding="utf-8")
    paths = [str(tmp_path / "a.txt"), str(tmp_path / "b.txt")]
    assert [Files(paths, str(tmp_path), leave_out=True).text(i) for i in range(2)] == [None, "café"]
    with pytest.raises(ValueError, match=r"a\.txt is not UTF-8 at byte 3"):
        Files(paths, str(tmp_path)).text(0)


def test_text_globs_are_sorted_without_doubles_and_keep_line_ends(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "b.md").write_bytes(b"two\r\n")
    (tmp_path / "a.md").write_bytes(b"one\n")
    source = open_source(DataConfig(source="text", files=[str(tmp_path / "**/*.md"), str(tmp_path / "a.md")]))
    assert [source.text(i) for i in range(len(source))] == ["one\n", "two\r\n"]


def test_fingerprint_follows_the_documents_and_not_their_place(tmp_path):
    prints = []
    for place, text in (("x", "same"), ("y", "same"), ("z", "other!")):
        (tmp_path / place).mkdir()
        (tmp_path / place / "a.txt").write_text("one")
        (tmp_path / place / "b.txt").write_text(text)
        prints.append(open_source(DataConfig(source="text", files=[str(tmp_path / place / "*.txt")])).fingerprint)
    assert prints[0] == prints[1] != prints[2]


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_tables_have_random_access(tmp_path, kind):
    import pyarrow
    import pyarrow.parquet

    texts = [["a\n", "", "ü 🙂"], ["d", "e"]]
    for i, part in enumerate(texts):
        if kind == "jsonl":
            write_jsonl(tmp_path / f"{i}.jsonl", [{"body": t, "n": 1} for t in part])
        else:
            pyarrow.parquet.write_table(pyarrow.table({"body": part, "n": [1] * len(part)}), tmp_path / f"{i}.parquet")
    source = open_source(DataConfig(source=kind, files=[str(tmp_path / f"*.{kind}")], field="body"))
    assert [source.text(i) for i in (4, 0, 1, 2, 3)] == ["e", "a\n", "", "ü 🙂", "d"]
    with pytest.raises(ValueError, match="no column 'text': write one of body, n"):
        open_source(DataConfig(source=kind, files=[str(tmp_path / f"*.{kind}")]))
    numbers = open_source(DataConfig(source=kind, files=[str(tmp_path / f"*.{kind}")], field="n"))
    with pytest.raises(ValueError, match="row 0 of .* holds int, not text"):
        numbers.text(0)


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_a_corrupt_file_is_named(tmp_path, kind):
    write_jsonl(tmp_path / "good.jsonl", [{"text": "a"}])
    (tmp_path / f"bad.{kind}").write_text('{"text": "a"}\n{"text": \n')
    with pytest.raises(ValueError, match=rf"bad\.{kind} is not readable as {kind}" + (r" \(line 2" if kind == "jsonl" else "")):
        open_source(DataConfig(source=kind, files=[str(tmp_path / f"*.{kind}")]))


def test_the_hub_is_streamed_and_can_be_entered_anywhere(tmp_path):  # a local folder goes the way of a hub name
    for i in range(3):
        write_jsonl(tmp_path / f"train-{i}.jsonl", [{"text": f"{i}.{j}"} for j in range(50)])
    source = open_source(DataConfig(source="hub", name=str(tmp_path)))
    assert isinstance(source, HubStream)
    texts = [text for _, text in source.open(0)]
    assert texts == [f"{i}.{j}" for i in range(3) for j in range(50)]
    assert next(source.open(47)) == (f"document 47 of {tmp_path}", "0.47")
    assert [text for _, text in source.open(99)] == texts[99:]
    assert list(source.open(1000)) == []
    with pytest.raises(ValueError, match="no column 'body': write one of text"):
        next(HubStream(DataConfig(source="hub", name=str(tmp_path), field="body")).open(0))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (DataConfig(source="web"), "data.source=web is not known: write one of stdlib, text"),
        (DataConfig(source="text"), "data.files is empty"),
        (DataConfig(source="text", files=["/nowhere/*.txt"]), r"no file matches /nowhere/\*.txt"),
        (DataConfig(source="hub"), "data.name is empty"),
    ],
)
def test_what_cannot_be_opened_is_said_in_one_sentence(config, message):
    with pytest.raises(ValueError, match=message) as caught:
        open_source(config)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["text", "jsonl"])
def test_empty_data_is_refused(tmp_path, kind):
    (tmp_path / "a").write_text("")
    (tmp_path / "b").write_text("")
    with pytest.raises(ValueError, match="empty"):
        open_source(DataConfig(source=kind, files=[str(tmp_path / "*")]))


def test_a_missing_hub_folder_is_named():
    with pytest.raises(ValueError, match="data.name=./no_such_data .*cannot be opened"):
        next(HubStream(DataConfig(source="hub", name="./no_such_data")).open(0))
