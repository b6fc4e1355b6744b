"""``fedcl new strategy``: the skeleton works as it is written."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

from fedcl.commands.cli import run_command_line
from fedcl.commands.new import class_name, new_strategy


def test_the_skeleton_passes_its_own_test_and_the_checks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = new_strategy("my_method2", tmp_path / "here")
    assert [path.name for path in files] == ["my_method2.py", "test_my_method2.py", "README.md"]
    # In this process: another one would spend most of its time on importing torch.
    monkeypatch.syspath_prepend(str(tmp_path / "here"))
    tests = [test for name, test in runpy.run_path(str(files[1])).items() if name.startswith("test_")]
    assert len(tests) == 2
    for test in tests:
        test()


def test_the_skeleton_runs_as_its_readme_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run_command_line(["new", "strategy", "my_method"]) == 0
    shown = capsys.readouterr().out
    assert shown.endswith("next: fedcl check my_method/my_method.py, then fedcl run --plugin my_method/my_method.py "
                          "strategy=my_method\n")  # fmt: skip
    command = ["run", "--plugin", "my_method/my_method.py", "strategy=my_method", "options.my_method.weight=0.5",
               "scenario.tasks=2", "federation.rounds=1", "data.limit=12", "engine.threads=1", "output.plots=false",
               "--quiet"]  # fmt: skip
    assert run_command_line(command) == 0
    assert run_command_line(["show", "my_method", "--plugin", "my_method/my_method.py"]) == 0
    assert "options.my_method.weight" in capsys.readouterr().out


def test_nothing_is_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place = tmp_path / "there"
    place.mkdir()
    (place / "README.md").write_text("mine")
    assert run_command_line(["new", "strategy", "my_method", "--dir", str(place)]) == 2
    assert "README.md is there already and is not overwritten" in capsys.readouterr().err
    assert [path.name for path in place.iterdir()] == ["README.md"]
    assert (place / "README.md").read_text() == "mine"


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("MyMethod", "lower case with underscores"),
        ("my-method", "lower case with underscores"),
        ("my__method", "lower case with underscores"),
        ("2fast", "lower case with underscores"),
        ("class", "no word of Python"),
        ("x" * 51, "lower case with underscores"),
        ("fedprox", "is the name of a strategy of fedcl-sim already"),
        ("wa", "is the name of a strategy of fedcl-sim already"),
        ("random", "is a Python module here"),
        ("torch", "is a Python module here"),
    ],
)
def test_bad_names(name: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command_line(["new", "strategy", name, "--dir", str(tmp_path)]) == 2
    assert said in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_only_strategies_can_be_made(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command_line(["new", "scenario", "mine"]) == 2
    assert "must be strategy" in capsys.readouterr().err


@pytest.mark.parametrize(("name", "expected"), [("a", "A"), ("fed_x_2", "FedX2"), ("my_method", "MyMethod")])
def test_class_name(name: str, expected: str) -> None:
    assert class_name(name) == expected
