"""Names, aliases, plugins, and what is said when one of them is broken."""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path

import pytest

from fedcl import registry
from fedcl.config import load_config
from fedcl.errors import UsageError
from fedcl.registry import Registry
from fedcl.settings.resolve import resolve

PLUGIN = '''
"""A plugin."""
from dataclasses import dataclass
import fedcl
from fedcl.cards import option

class Mine(fedcl.Strategy):
    """Does {text}."""
    name = "{name}"
    aliases = ("{name}_alias",)

    @dataclass(frozen=True)
    class Options:
        weight: float = option(1.0, "of the term")
'''


def plugin(folder: Path, file: str = "mine.py", name: str = "mine_x", text: str = "nothing") -> Path:
    path = folder / file
    path.parent.mkdir(exist_ok=True)
    path.write_text(PLUGIN.format(name=name, text=text))
    return path


def distribution(folder: Path, monkeypatch: pytest.MonkeyPatch, name: str, points: str) -> None:
    """An installed distribution with entry points, as importlib.metadata sees one."""
    info = folder / f"{name}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(points)
    if str(folder) not in sys.path:
        monkeypatch.syspath_prepend(str(folder))


def test_every_built_in_loads_under_its_own_name() -> None:
    for kind in registry.KINDS:
        entries = registry.entries(kind)
        assert entries, kind
        for entry in entries:
            assert entry.cls is not None, entry.problem
            assert entry.cls.name == entry.name


def test_aliases_and_nearest_names() -> None:
    assert registry.load("strategies", "fedavg") is registry.load("strategies", "finetune")
    with pytest.raises(UsageError, match=r"strategy='finetun'.*Did you mean 'finetune'\?"):
        registry.load("strategies", "finetun")
    with pytest.raises(UsageError, match=r"partition\.name='dirichet'.*'dirichlet'"):
        registry.load("partitions", "dirichet")


def test_a_plugin_file_is_loaded_by_path(tmp_path: Path) -> None:
    own = Registry()
    path = plugin(tmp_path)
    loaded = own.add_plugin(path)
    assert loaded.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert loaded.classes == (("strategies", "mine_x"),)
    assert own.load("strategies", "mine_x").__name__ == "Mine"
    assert own.load("strategies", "mine_x_alias") is own.load("strategies", "mine_x")
    assert own.add_plugin(path) is loaded
    assert "mine_x" not in Registry().names("strategies")


def test_two_plugins_of_one_name_are_both_named(tmp_path: Path) -> None:
    own = Registry()
    first = plugin(tmp_path / "a")
    second = plugin(tmp_path / "b", text="something")
    own.add_plugin(first)
    with pytest.raises(UsageError) as caught:
        own.add_plugin(second)
    assert str(first) in str(caught.value)
    assert str(second) in str(caught.value)
    with pytest.raises(UsageError, match=r"finetune.*taken by the entry point fedcl"):
        own.add_plugin(plugin(tmp_path, "c.py", name="finetune"))


@pytest.mark.parametrize(
    ("source", "parts"),
    [
        ("x = 1\n\n1 / 0\n", ["ZeroDivisionError: division by zero", "line 3"]),
        ("import no_such_module_here\n", ["ModuleNotFoundError", "no_such_module_here", "line 1"]),
        ("def f(:\n", ["SyntaxError", "line 1"]),
        ("raise SystemExit('bye')\n", ["SystemExit: bye", "line 1"]),
        ("raise ValueError('two\\nlines')\n", ["ValueError: two lines"]),
        ("import json\njson.loads('{')\n", ["JSONDecodeError", "line 2)"]),
        ("from fedcl.strategies.federated.finetune import Finetune\n", ["no subclass of fedcl.Strategy"]),
        ("", ["no subclass of fedcl.Strategy"]),
    ],
)
def test_a_broken_plugin_is_one_line_that_names_it(tmp_path: Path, source: str, parts: list[str]) -> None:
    path = tmp_path / "broken_one.py"
    path.write_text(source)
    with pytest.raises(UsageError) as caught:
        Registry().add_plugin(path)
    text = str(caught.value)
    assert "\n" not in text
    for part in ["broken_one.py", *parts]:
        assert part in text
    assert not [name for name in sys.modules if "broken_one" in name]


def test_a_missing_plugin_and_one_without_the_ending(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such file"):
        Registry().add_plugin(tmp_path / "none.py")
    with pytest.raises(UsageError, match=r"\.py"):
        Registry().add_plugin(plugin(tmp_path, "mine.txt"))


def test_a_broken_installed_package_breaks_nothing_but_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "stranger_broken.py").write_text("x = 1\nimport no_such_module_here\n")
    (tmp_path / "stranger_good.py").write_text(PLUGIN.format(name="stranger_good", text="well"))
    points = "[fedcl.strategies]\nstranger_bad = stranger_broken:X\nstranger_good = stranger_good:Mine\n"
    distribution(tmp_path, monkeypatch, "stranger", points)
    own = Registry()
    entries = {entry.name: entry for entry in own.entries("strategies")}
    assert entries["stranger_good"].cls is not None
    assert entries["finetune"].cls is not None
    assert entries["stranger_bad"].cls is None
    for part in ("stranger_bad", "ModuleNotFoundError", "stranger_broken.py, line 2"):
        assert part in entries["stranger_bad"].problem
    with pytest.raises(UsageError, match=r"stranger_bad.*ModuleNotFoundError"):
        own.load("strategies", "stranger_bad")
    assert own.load("strategies", "fedavg").name == "finetune"


def test_installed_packages_that_share_a_name_or_lie_about_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "stranger_two.py").write_text(PLUGIN.format(name="other", text="well"))
    distribution(tmp_path, monkeypatch, "twin_a", "[fedcl.strategies]\ntwin = stranger_two:Mine\n")
    points = "[fedcl.strategies]\ntwin = json:loads\nliar = stranger_two:Mine\nfunction = json:loads\n"
    distribution(tmp_path, monkeypatch, "twin_b", points)
    problems = {entry.name: entry.problem for entry in Registry().entries("strategies")}
    assert "twin_a" in problems["twin"]
    assert "twin_b" in problems["twin"]
    assert "'other'" in problems["liar"]
    assert "no subclass" in problems["function"]


def test_options_are_checked_against_the_stack() -> None:
    def error(*overrides: str) -> str:
        with pytest.raises(UsageError) as caught:
            resolve(load_config({}, list(overrides)))
        return str(caught.value)

    resolved = resolve(load_config({}, ["strategy=[lwf, supcon]", "options.fedlwf.weight=7"]))
    assert [s.name for s in resolved.strategies] == ["fedlwf", "supcon"]
    assert resolved.strategies[0].options.weight == 7.0
    assert "supcon is not in the stack" in error("strategy=[fedlwf]", "options.supcon.temperature=1")
    assert "'options.fedlwf'" in error("strategy=[fedlwf]", "options.fedlw.weight=1")
    assert "options.fedlwf.weight" in error("strategy=[fedlwf]", "options.fedlwf.wieght=1")
    assert "options.fedlwf.weight='a'" in error("strategy=[fedlwf]", "options.fedlwf.weight=a")
    assert "same strategy" in error("strategy=[fedlwf, lwf]")
    assert "same strategy" in error("strategy=[lwf]", "options.lwf.weight=1", "options.fedlwf.weight=1")


def test_options_follow_an_alias_when_the_stack_changes() -> None:
    low = {"strategy": ["lwf", "supcon"], "options": {"fedlwf": {"weight": 2}, "supcon": {"weight": 1}}}
    assert load_config(low, ["strategy=[lwf]"]).options == {"fedlwf": {"weight": 2}}
