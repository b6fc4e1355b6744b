"""The command line without training: exit codes, one-line errors, machine-readable forms."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import fedcl
from fedcl.commands.cli import run_command_line
from fedcl.commands.crash import crash_report
from fedcl.errors import RunFailed, UsageError

MULTILINE_PLUGIN = "import fedcl\n\n\nclass Mine(fedcl.Strategy):\n    '''Does [bold]this[/bold].'''\n"


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("FEDCL_DATA_ROOT", raising=False)

    def call(*arguments: str) -> tuple[int, str, str]:
        code = run_command_line(list(arguments))
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


def test_help_and_version_import_nothing_heavy() -> None:
    code = (
        "import sys; from fedcl.commands.cli import run_command_line; code = run_command_line(sys.argv[1:]);"
        "heavy = ('torch', 'flwr', 'avalanche', 'matplotlib', 'omegaconf', 'numpy', 'rich.console');"
        "print([m for m in heavy if m in sys.modules], file=sys.stderr); sys.exit(code)"
    )
    for arguments in (["--help"], ["run", "--help"], ["--version"], []):
        done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
        assert done.returncode == 0
        assert done.stderr.strip() == "[]"
        assert "fedcl" in done.stdout


def test_importing_the_package_turns_telemetry_off_and_stays_light() -> None:
    code = (
        "import sys, os, fedcl; assert 'torch' not in sys.modules;"
        "print(os.environ['FLWR_TELEMETRY_ENABLED'], os.environ['FLWR_DISABLE_UPDATE_CHECK'])"
    )
    clean = {key: value for key, value in os.environ.items() if not key.startswith("FLWR")}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=clean)
    assert done.stdout.split() == ["0", "1"], done.stderr
    assert fedcl.Strategy.__name__ == "Strategy"
    with pytest.raises(AttributeError, match="nothing_here"):
        _ = fedcl.nothing_here


def test_fedcl_run_is_callable_whatever_is_imported_first() -> None:
    code = "import fedcl.run, fedcl; from fedcl.run import execute; assert callable(fedcl.run); print('ok')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "ok\n", done.stderr


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["rnu"], ["rnu", "'run'"]),
        (["run", "--sed", "1"], ["--sed", "'--seed'"]),
        (["run", "--seed", "x"], ["--seed", "'x'"]),
        (["run", "--seed", "1", "seed=2"], ["seed", "twice"]),
        (["run", "nothing"], ["CONFIG='nothing'"]),
        (["run", "none/a=b.yaml"], ["CONFIG='none/a=b.yaml'"]),
        (["run", "default", "clients"], ["override='clients'", "key=value"]),
        (["run", "federation.clients=0"], ["federation.clients=0", "at least 1"]),
        (["run", "strategy=fedlfw"], ["strategy='fedlfw'", "'fedlwf'"]),
        (["run", "--runtime", "deploy", "plugins=[a.py]"], ["plugins", "SuperNodes"]),
        (["run", "--runtime", "loca"], ["'local'"]),
        (["run", "--device", "gpu"], ["engine.device='gpu'"]),
        (["run", "--plugin", "none.py"], ["--plugin='none.py'"]),
        (["resume"], ["RUN_DIR"]),
        (["resume", "none"], ["RUN_DIR='none'"]),
        (["list"], ["KIND"]),
        (["list", "strategy"], ["KIND='strategy'", "'strategies'"]),
        (["list", "datasets", "--data-root", "none"], ["data.root='none'"]),
        (["show", "fedlfw"], ["NAME='fedlfw'", "'fedlwf'"]),
        (["plot", "acuracy", "x"], ["KIND='acuracy'", "'accuracy'"]),
        (["plot", "matrix", "none"], ["DIR='none'", "is no folder"]),
        (["split", "data.name=mnist"], ["mnist"]),
    ],
)
def test_wrong_use_is_one_line_and_code_2(command: Any, arguments: list[str], parts: list[str]) -> None:
    code, out, err = command(*arguments)
    assert code == 2
    assert out == ""
    assert err.startswith("fedcl: ")
    assert err.count("\n") == 1
    for part in parts:
        assert part in err


@pytest.mark.parametrize(
    "kind", ["strategies", "scenarios", "partitions", "encoders", "datasets", "presets", "protocols"]
)
def test_lists_have_the_contracts_form(command: Any, kind: str) -> None:
    code, out, _ = command("list", kind, "--json")
    rows = json.loads(out)
    assert code == 0
    assert kind == "protocols" or rows
    for row in rows:
        assert set(row) == {"name", "aliases", "summary", "family"}
        assert row["summary"]
    code, out, _ = command("list", kind)
    assert [line.split()[0] for line in out.splitlines()] == [row["name"] for row in rows]


def test_show_has_the_contracts_form(command: Any) -> None:
    code, out, _ = command("show", "lwf", "--json")
    card = json.loads(out)
    assert code == 0
    assert card["name"] == "fedlwf"
    assert "lwf" in card["aliases"]
    assert {"paper", "bibtex", "leaves_client", "client_state", "server_state", "cost", "certainty"} <= set(card)
    weight = next(row for row in card["options"] if row["name"] == "weight")
    assert weight["type"] == "float"
    assert weight["default"] == 3.0
    assert weight["description"]
    for name, kind in {"class_incremental": "scenario", "dirichlet": "partition", "fedlwf": "strategy"}.items():
        code, out, _ = command("show", name)
        assert (code, out.split()[:2]) == (0, [kind, name])
        assert ("Leaves a client" in out) is (kind == "strategy")


def test_show_of_a_name_that_two_have_shows_both(command: Any) -> None:
    out = command("show", "joint")[1]
    assert [x for x in out.splitlines() if x.endswith(" joint")] == ["strategy joint", "scenario joint"]


def test_show_of_a_probe_says_how_to_ask_for_it(command: Any) -> None:
    code, _, err = command("show", "novelty")
    assert code == 2
    assert "evaluate.probes=[novelty]" in err


def test_texts_of_a_plugin_are_not_read_as_markup(command: Any, tmp_path: Path) -> None:
    (tmp_path / "markup.py").write_text(MULTILINE_PLUGIN + "    name = 'markup_plugin'\n")
    code, out, _ = command("show", "markup_plugin", "--plugin", "markup.py")
    assert code == 0
    assert "Does [bold]this[/bold]." in out
    assert "markup_plugin" in command("list", "strategies", "--plugin", "markup.py")[1]


def test_split_prints_a_table_and_writes_a_picture(command: Any, tmp_path: Path) -> None:
    settings = [
        "federation.clients=4",
        "scenario.tasks=2",
        "partition.alpha=0.05",
        "--out",
        "o",
        "--seed",
        "3",
    ]
    code, out, err = command("split", *settings)
    picture = tmp_path / "o" / "default" / "split-seed-3.png"
    assert code == 0
    assert out.splitlines()[-1] == "picture: o/default/split-seed-3.png"
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "Task 1" in out
    code, out, err = command("split", *settings, "--json")
    data = json.loads(out)
    assert len(data["tasks"]) == 2
    # The digits' names are their class numbers: a name by label position would show here.
    assert all(row["name"] == str(row["class"]) for task in data["tasks"] for row in task["classes"])
    for line in data["warnings"]:
        assert f"warning: {line}" in err
    # 30 clients and 10 images a class leave some without any.
    code, _, err = command("split", "federation.clients=30", "partition.alpha=0.05", "data.limit=10", "--out", "o")
    assert code == 0
    assert "fedcl: warning: task 1" in err


def test_doctor_tells_what_is_missing(command: Any, tmp_path: Path) -> None:
    code, out, _ = command("doctor", "--json")
    report = json.loads(out)
    assert code == 0
    assert report["ok"] is True
    assert report["versions"]["torch"]
    assert report["data"]["digits"]
    assert not (tmp_path / "runs").exists()
    (tmp_path / "file").write_text("")
    code, out, _ = command("doctor", "--out", "file/x")
    assert code == 1
    assert "file/x cannot be written" in out


def test_a_crash_keeps_its_traceback_in_the_run_folder(tmp_path: Path) -> None:
    with (
        pytest.raises(RunFailed, match=r"KeyError: 'first' \(traceback in .*error\.txt\)"),
        crash_report(tmp_path),
    ):
        raise RuntimeError("second") from KeyError("first")
    assert "RuntimeError: second" in (tmp_path / "error.txt").read_text()
    with pytest.raises(UsageError), crash_report(tmp_path / "none"):
        raise UsageError("a", 1, "b")
    with pytest.raises(RunFailed, match="OSError: gone") as caught, crash_report(tmp_path / "none"):
        raise OSError("gone")
    stored = Path(str(caught.value).split("traceback in ")[1].rstrip(")"))
    assert "OSError: gone" in stored.read_text()
    stored.unlink()


def test_a_reader_that_goes_away_leaves_no_traceback() -> None:
    line = f"{sys.executable} -m fedcl list encoders | true"
    done = subprocess.run(["bash", "-c", f"{line}; echo ${{PIPESTATUS[0]}}"], capture_output=True, text=True)
    assert done.stderr == ""
    assert done.stdout.strip() in {"0", "1"}
