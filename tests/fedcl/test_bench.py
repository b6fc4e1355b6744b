"""`fedcl bench`: turns, contestants that are missing or fail, and what is printed."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from fedcl.bench import measure as measuring
from fedcl.bench.measure import CONTESTANTS, Contestant, measure, take_part
from fedcl.bench.players import Player, PlayerFailed, peak_memory, play
from fedcl.bench.report import bar_chart, scaling_chart, text
from fedcl.bench.workloads import STANDARD, of_cohort
from fedcl.commands.cli import run_command_line
from fedcl.errors import UsageError

# Takes part at once: no torch. What it does before a turn's end is given by its first argument.
FAST = """
import os, subprocess, sys
from pathlib import Path
from fedcl.bench.turns import Turns

kind, place, rounds = "{kind}", Path(r"{place}"), int(sys.argv[2])
turns = Turns()
print("a library prints on standard output")
os.system("echo and so does a child")
turns.ready({{"device": "cpu", "gpu": None}})
for index in range(rounds):
    turns.wait()
    with (place / "order").open("a") as order:
        order.write(kind + " ")
    if kind == "failing" and index == 1:
        raise ValueError("no more of this")
    if kind == "dying" and index == 1:
        os._exit(7)
    if kind == "hanging":
        subprocess.run(["sleep", "600"], start_new_session=True)
    turns.done()
turns.finish({{"engine": {{"path": "none"}}}})
print("last words")
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """``module(kind)``: the name of a fast contestant's module; ``module.order()``: who had turns so far."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))

    def make(kind: str) -> str:
        (tmp_path / f"fast_{kind}.py").write_text(FAST.format(kind=kind, place=tmp_path))
        return f"fast_{kind}"

    make.order = lambda: (tmp_path / "order").read_text().split()  # type: ignore[attr-defined]
    return make


@pytest.fixture
def fast(module: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fast contestants in place of the real ones; pfl is not installed, Flower fails."""
    monkeypatch.setitem(CONTESTANTS, "fedcl", Contestant(module("a")))
    monkeypatch.setitem(CONTESTANTS, "loop", Contestant(module("b")))
    monkeypatch.setitem(CONTESTANTS, "pfl", Contestant("nothing", ("no_such_package",), "pip install it"))
    monkeypatch.setitem(CONTESTANTS, "flower-ray", Contestant(module("failing")))
    monkeypatch.setitem(CONTESTANTS, "flower-ray-kept", Contestant(module("failing")))


def runs(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def command(module: str, rounds: int) -> list[str]:
    return [sys.executable, "-m", module, "mlp-100", str(rounds)]


def test_turns_go_round_after_each_has_warmed_up(module: Any, tmp_path: Path) -> None:
    said: list[str] = []
    players = play({k: command(module(k), 3) for k in ("a", "b")}, 2, tmp_path, said.append)
    assert module.order() == ["a", "b", "a", "b", "b", "a"]
    assert [len(p.seconds) for p in players] == [3, 3]
    assert all(0 <= s < 60 for p in players for s in p.seconds)
    assert players[0].facts == {"device": "cpu", "gpu": None, "engine": {"path": "none"}, "device_memory_mb": None}
    assert players[0].failure is None
    assert players[0].peak is None or 1 < players[0].peak < 1000
    log = (tmp_path / "a.log").read_text()
    assert "a library prints" in log
    assert "and so does a child" in log
    assert len(said) == 4


def test_one_that_fails_or_dies_leaves_the_others_their_turns(module: Any, tmp_path: Path) -> None:
    kinds = ("failing", "dying", "a")
    failing, dying, good = play({k: command(module(k), 4) for k in kinds}, 3, tmp_path, lambda line: None)
    assert failing.failure == "ValueError: no more of this"
    assert dying.failure == "and so does a child"  # the last line of its log
    assert good.failure is None
    assert len(good.seconds) == 4
    assert module.order().count("failing") == module.order().count("dying") == 2


def test_a_contestant_that_does_not_start_says_why(tmp_path: Path) -> None:
    (player,) = play({"x": command("no_such_module", 2)}, 1, tmp_path, lambda line: None)
    assert player.failure is not None
    assert "no_such_module" in player.failure


@pytest.mark.skipif(sys.platform != "linux", reason="looks at processes as Linux tells them")
def test_closing_ends_a_busy_contestant_and_its_children(module: Any, tmp_path: Path) -> None:
    from fedcl.bench import players

    player = Player("hanging", command(module("hanging"), 1), tmp_path / "log")
    player.wait_ready()
    process = player._process
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(players, "TURN_LIMIT", 0.5)
        with pytest.raises(PlayerFailed, match=r"no answer within 0\.5 s"):
            player.turn()
    while len(family := players.descendants(process.pid)) < 2:
        assert process.poll() is None
    assert peak_memory(process.pid)
    player.close()
    assert process.poll() is not None
    deadline = time.monotonic() + 60  # a killed process takes a moment to go
    while any(map(runs, family)) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert [p for p in family if runs(p)] == []


@pytest.mark.usefixtures("fast")
def test_the_result_names_every_contestant(module: Any) -> None:
    result = measure("mlp-100", of_cohort(10), 2, tuple(CONTESTANTS), [], "cpu", lambda line: None)
    assert set(result["seconds_per_round"]) == {"fedcl", "loop", "pfl", "flower-ray", "flower-ray-kept"}
    assert set(result["ratio"]) == {"loop", "pfl", "flower-ray", "flower-ray-kept"}
    assert result["device"] == "cpu"
    ours, loop = (sorted(result["seconds"][name]) for name in ("fedcl", "loop"))
    assert result["seconds_per_round"]["fedcl"] == pytest.approx(sum(ours) / 2)
    assert result["ratio"]["loop"] == pytest.approx(sum(loop) / sum(ours))
    assert result["overhead_over_loop"] == pytest.approx(sum(ours) / sum(loop) - 1)
    assert result["seconds_per_round"]["pfl"] is result["ratio"]["pfl"] is None
    assert result["seconds_per_round"]["flower-ray"] is result["ratio"]["flower-ray"] is None
    assert result["reasons"] == {
        "pfl": "not installed: there is no no_such_package; pip install it",
        "flower-ray": "ValueError: no more of this",
        "flower-ray-kept": "ValueError: no more of this",
    }
    assert result["engine"] == {"path": "none"}
    assert result["machine"]["versions"]["torch"] == torch.__version__.partition("+")[0]


@pytest.mark.usefixtures("fast")
def test_json_is_all_that_is_printed_and_nothing_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    assert run_command_line(["bench", "--workload", "all", "--rounds", "1", "--json"]) == 0
    captured = capsys.readouterr()
    results = json.loads(captured.out)
    assert [r["workload"] for r in results] == list(STANDARD)
    assert results[0]["seconds_per_round"]["pfl"] is None
    assert "pip install it" in captured.err
    assert list(here.iterdir()) == []


@pytest.mark.usefixtures("fast")
def test_tables_and_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "new" / "folder"
    assert run_command_line(["bench", "--rounds", "1", "--out", str(out), "--quiet"]) == 0
    captured = capsys.readouterr()
    shown = {line.split("  ")[1]: line for line in captured.out.splitlines() if line.startswith("  ") and line.strip()}
    assert "not installed" in shown["pfl"]
    assert "failed" in shown["Flower Ray"]
    assert " s " in shown["bare PyTorch loop"]
    assert all("failed" in line or "not installed" in line for line in captured.err.splitlines())
    assert json.loads((out / "mlp-100.json").read_text())["workload"] == "mlp-100"
    assert (out / "mlp-100.png").read_bytes().startswith(b"\x89PNG")
    assert b"<svg" in (out / "mlp-100.svg").read_bytes()


@pytest.mark.usefixtures("fast")
def test_ours_failing_is_an_error_after_the_others_are_shown(
    module: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(CONTESTANTS, "fedcl", Contestant(module("dying")))
    assert run_command_line(["bench", "--rounds", "1", "--json", "--peers", "loop"]) == 1
    captured = capsys.readouterr()
    result = json.loads(captured.out)
    assert result["seconds_per_round"]["fedcl"] is result["ratio"]["loop"] is None
    assert result["seconds_per_round"]["loop"] > 0
    assert result["reasons"]["pfl"] == "not asked for"
    assert captured.err.splitlines()[-1].startswith("fedcl: fedcl failed in mlp-100")


@pytest.mark.usefixtures("fast")
def test_an_interruption_is_one_line(
    module: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    closed: list[str] = []
    close = Player.close

    def interrupt(player: Player) -> float:
        raise KeyboardInterrupt

    def noted(player: Player) -> None:
        close(player)
        assert player._process.poll() is not None
        closed.append(player.name)

    monkeypatch.setattr(Player, "turn", interrupt)
    monkeypatch.setattr(Player, "close", noted)
    assert run_command_line(["bench", "--rounds", "1", "--json", "--peers", "loop", "--quiet"]) == 130
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("fedcl: interrupted")
    assert len(captured.err.splitlines()) == 1
    assert closed == ["fedcl"]


@pytest.mark.usefixtures("fast")
def test_scaling_varies_cohort_and_width(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measuring, "COHORTS", (10, 20))
    monkeypatch.setattr(measuring, "WIDTHS", (8,))
    result = measuring.bench("scaling", 1, ("fedcl", "loop"), [], None, lambda line: None)
    assert [p["cohort"] for p in result["cohort"]] == [10, 20]
    assert result["cohort"][1]["overrides"] == ["federation.clients=20", "data.limit=100"]
    assert [p["width"] for p in result["width"]] == [8]
    assert "cohort 20" in text([result])
    pictures = scaling_chart(result)
    assert pictures["png"].startswith(b"\x89PNG")
    assert scaling_chart(result) == pictures


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--workload", "mlp-10"], ["--workload='mlp-10'", "'mlp-100'"]),
        (["--peers", "pdl"], ["--peers='pdl'", "'pfl'"]),
        (["--rounds", "0"], ["--rounds", "0"]),
        (["data.limit=3"], ["override='data.limit=3'", "same work"]),
        (["engine.path=fast"], ["engine.path='fast'", "stacked"]),
        (["--device", "tpu"], ["engine.device='tpu'"]),
        (["--device", "cpu", "engine.device=cpu"], ["engine.device", "twice"]),
    ],
)
def test_wrong_arguments_are_one_line(
    arguments: list[str], parts: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert run_command_line(["bench", "--out", str(tmp_path / "out"), *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert len(captured.err.splitlines()) == 1
    assert all(part in captured.err for part in parts)
    assert not (tmp_path / "out").exists()


def test_peers_are_chosen_by_name() -> None:
    assert take_part("pfl, loop", "mlp-100") == ("fedcl", "loop", "pfl")
    assert take_part(None, "mlp-100") == tuple(CONTESTANTS)
    assert take_part(None, "resnet18") == ("fedcl", "loop")


def test_a_chart_without_any_number_is_drawn() -> None:
    none = dict.fromkeys(CONTESTANTS)
    result = {
        "workload": "mlp-100", "device": None, "rounds": 1, "seconds": none, "seconds_per_round": none, "ratio": none,
        "reasons": dict.fromkeys(CONTESTANTS, "not installed: no"), "engine": None,
        "machine": {"gpu": None, "cpu": "C", "cpus_usable": 2,
                    "versions": dict.fromkeys(["torch", "flwr", "ray", "pfl"])},
    }  # fmt: skip
    assert bar_chart([result])["png"].startswith(b"\x89PNG")


def test_an_unknown_override_is_found_before_anything_runs() -> None:
    with pytest.raises(UsageError, match=r"engine\.pth"):
        measure("mlp-100", (), 1, ("fedcl",), ["engine.pth=x"], None, lambda line: None)
