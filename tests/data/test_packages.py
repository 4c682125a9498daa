import random
from pathlib import Path

import pytest

from ltrain.config import DataConfig
from ltrain.data.order import split
from ltrain.data.packages import Packages, import_order
from ltrain.data.sources import open_source


def test_a_file_comes_after_those_it_imports():
    sources = {
        "p/__init__.py": "from .core import f\nfrom p import z",
        "p/a.py": "from . import late\nimport os",
        "p/core.py": "from p.sub.deep import (\n    x,  # first\n    y,\n)\nimport p.m, sys",
        "p/late.py": '"""from p import a is only words\nimport p.nothing"""',
        "p/m.py": "try:\n    from .sub import thing\nexcept ImportError:\n    pass",
        "p/sub/__init__.py": "def f():\n    from ..z import w",
        "p/sub/deep.py": "from .. import z as y",
        "p/z.py": "",
    }
    order = import_order(sources)
    assert sorted(order) == sorted(sources)

    def before(first, then):
        return order.index(f"p/{first}.py") < order.index(f"p/{then}.py")

    assert before("core", "__init__") and before("z", "__init__") and before("late", "a") and before("sub/deep", "core")
    assert before("m", "core") and before("sub/__init__", "m") and before("z", "sub/__init__") and before("z", "sub/deep")
    assert import_order(dict(random.Random(0).sample(sorted(sources.items()), len(sources)))) == order


def test_circles_are_broken_by_path_and_long_chains_are_no_trouble():
    assert import_order({"p/a.py": "import p.b", "p/b.py": "import p.c", "p/c.py": "import p.a"}) == ["p/c.py", "p/b.py", "p/a.py"]
    chain = {f"p/m{i:05}.py": f"import p.m{i + 1:05}" for i in range(5000)}
    assert import_order(chain) == sorted(chain, reverse=True)


@pytest.fixture
def root(tmp_path):
    for path, text in {
        "one/__init__.py": "from one.b import x",
        "one/b.py": "x = 1",
        "one/empty.py": "",
        "one/data.txt": "no code",
        "two/sub/c.py": "y = 2",
        "two/bad.py": None,
        "two-1.0.dist-info/x.py": "z",
        "notes/readme.md": "text",
        "only_bad/x.py": None,
    }.items():
        (tmp_path / "a" / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "a" / path).write_bytes(b"\xe9\n" if text is None else text.encode())
    return tmp_path


def test_a_document_is_a_package_with_its_files_in_order(root):
    packages = open_source(DataConfig(source="packages", roots=[str(root / "*")]))
    assert [packages.name(i) for i in range(len(packages))] == ["one", "only_bad", "two"]
    assert packages.text(0) == "# one/b.py\nx = 1\n# one/__init__.py\nfrom one.b import x"
    assert packages.text(1) is None  # no file in it is UTF-8
    assert packages.text(2) == "# two/sub/c.py\ny = 2"
    assert list(packages.sizes()) == [5 + 19, 2, 2 + 5]
    with pytest.raises(ValueError, match=r"data.roots: no folder matches .*nothing"):
        Packages([str(root / "nothing")])
    with pytest.raises(ValueError, match=r"there is no Python package in .*: name their folders in data.roots"):
        Packages([str(root / "a" / "one")])


def test_installed_packages_are_found_and_nothing_is_read_to_list_them(monkeypatch):
    monkeypatch.setattr(Path, "read_bytes", lambda self: pytest.fail(f"{self} was read"))
    packages = Packages([])
    names = [packages.name(i) for i in range(len(packages))]
    assert {"pytest", "numpy", "torch"} <= set(names) and len(set(names)) == len(names)
    assert "json" not in names and "asyncio" not in names  # the standard library is a source of its own
    monkeypatch.undo()
    text = packages.text(names.index("_pytest"))
    assert text.count("# _pytest/") > 50 and text.index("# _pytest/config/__init__.py\n") > text.index("# _pytest/outcomes.py\n")


class Named:
    by_name = True

    def __init__(self, names):
        self.names, self.fingerprint = names, "named"

    def __len__(self):
        return len(self.names)

    def name(self, index):
        return self.names[index]

    def sizes(self):
        return [len(name) * 100 for name in self.names]


def held(names, sizes=None):
    order, n, _ = split(Named(names), 0.1, sizes)
    return {names[int(i)] for i in order[:n]}


def test_packages_are_held_out_by_name_whatever_else_is_installed():
    names = [f"{'x' * (i % 7)}package{i}" for i in range(400)]
    whole = held(names)
    assert 20 <= len(whole) <= 60
    assert held(names[::2]) == whole & set(names[::2]) and held(names, (900, 1200)) == {n for n in whole if 900 <= len(n) * 100 <= 1200}
    assert len(held(names[:3])) >= 1
