import ast
from pathlib import Path

import pytest

from ltrain import catalogue
from ltrain.cli import main
from ltrain.families import FAMILIES
from ltrain.model.options import MIXERS, NO_MIXER, AttentionOptions

ROOT = Path(__file__).parent.parent


def test_the_readme_has_the_tables(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    readme = (ROOT / "README.md").read_text()
    assert catalogue.placed(readme) == readme, "run `ltrain models --into README.md`"
    main(["models", "--markdown"])
    assert capsys.readouterr().out in readme
    (tmp_path / "page.md").write_text(f"before\n{catalogue.BEGIN}\nold\n{catalogue.END}\nafter\n")
    main(["models", "--into", str(tmp_path / "page.md")])
    page = (tmp_path / "page.md").read_text()
    assert page.startswith("before\n") and page.endswith("\nafter\n") and "| `attention` |" in page and "old" not in page


def test_every_mixer_and_family_is_listed_with_what_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    rows = {row.name: row for row in (*catalogue.mixers(), *catalogue.families())}
    assert rows.keys() == {*MIXERS, *FAMILIES} - {NO_MIXER}
    assert all(row.about and len(row.about) < 150 for row in rows.values()), {name: row.about for name, row in rows.items() if len(row.about) >= 150}
    assert rows["qwen3_next"].mixers == ("gated_delta_net", "attention")
    main(["models"])
    out = capsys.readouterr().out
    assert all(name in out for name in rows)


def test_what_is_refused_and_what_is_not_in_fp8_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(AttentionOptions, "refuses", lambda self: {"context": "why"} if self.gate != "none" else {})
    assert catalogue.supports("attention", {}) == {"tensor": True, "context": False, "pipeline": True, "FP8": True, "decode": True}
    assert catalogue.supports("attention", {"gate": "none"})["context"]
    rows = {row.name: row for row in catalogue.families()}
    assert rows["llama"].supports["context"] and not rows["qwen3_next"].supports["context"]


def test_the_products_in_fp8_are_those_of_its_factory() -> None:
    tree = ast.parse((ROOT / "parallel" / "fp8_layers.py").read_text())
    factory = next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "FP8Layers")
    methods = {node.name for node in factory.body if isinstance(node, ast.FunctionDef)}
    assert set(catalogue.FP8_PRODUCTS) == methods & {"column", "row", "experts", "router", "embedding", "head", "conv", "per_head"}
