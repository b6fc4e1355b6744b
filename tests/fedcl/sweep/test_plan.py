"""From the command line to runs: variants, folders, options of strategies, what is done already; and messages."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fedcl.commands.cli import run_command_line
from fedcl.errors import UsageError
from fedcl.sweep.command import dry_run, locked
from fedcl.sweep.machine import ESTIMATE, available_memory, make_room, visible_gpus
from fedcl.sweep.plan import Loader
from fedcl.sweep.prepare import Asked, prepare
from fedcl.sweep.states import clear_unstarted


def planned(
    tmp_path: Path, *overrides: str, source: str | None = None, seeds: str | None = "0"
) -> list[dict[str, Any]]:
    return dry_run(Asked(source, overrides, (("output.dir", str(tmp_path)),), seeds=seeds))


def test_each_combination_has_a_folder_and_a_seed(tmp_path: Path) -> None:
    runs = planned(tmp_path, "strategy=finetune,[fedlwf,supcon]", "optimiser.lr=0.1,0.2", seeds="0-1")
    root = tmp_path / "default"
    variants = ["finetune,lr=0.1", "finetune,lr=0.2", "fedlwf+supcon,lr=0.1", "fedlwf+supcon,lr=0.2"]
    assert [run["folder"] for run in runs] == [str(root / v / f"seed-{s}") for v in variants for s in (0, 1)]
    assert {run["todo"] for run in runs} == {"run"}
    points = prepare(Asked(None, ("strategy=fedlwf,finetune",), seeds="3")).points()
    assert [(p.config.name, p.config.strategy, p.config.seed) for p in points] == [
        ("fedlwf", ["fedlwf"], 3),
        ("finetune", ["finetune"], 3),
    ]


def test_without_anything_varied_the_variant_is_named_after_its_strategies(tmp_path: Path) -> None:
    runs = planned(tmp_path, "strategy=finetune", "name=own", seeds="7")
    assert [run["folder"] for run in runs] == [str(tmp_path / "own" / "finetune" / "seed-7")]


def test_options_count_only_where_their_strategy_is_in_the_stack(tmp_path: Path) -> None:
    runs = planned(tmp_path, "strategy=finetune,fedprox,fedlwf", "options.fedprox.mu=0.1,1", "options.fedlwf.weight=2")
    assert [run["variant"] for run in runs] == ["finetune", "fedprox,mu=0.1", "fedprox,mu=1", "fedlwf"]
    points = prepare(Asked(None, ("strategy=finetune,fedlwf", "options.fedlwf.weight=2"), seeds="0")).points()
    assert [point.config.options for point in points] == [{}, {"fedlwf": {"weight": 2}}]
    with pytest.raises(UsageError, match=r"options.fedprox.*is not in the stack"):
        planned(tmp_path, "strategy=finetune,fedlwf", "options.fedprox.mu=1")


def test_a_file_with_a_sweep_section(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(
        "name: mine\npresets: [default]\nfederation: {rounds: 2}\n"
        "sweep:\n  seeds: 1-2\n  runs:\n    - {name: weak, strategy: fedprox, options: {fedprox: {mu: 0.01}}}\n"
        "    - {strategy: finetune}\n  grid:\n    optimiser.lr: [0.1, 0.2]\n"
    )
    runs = planned(tmp_path, source=str(file), seeds=None)
    names = ["weak,lr=0.1", "weak,lr=0.2", "finetune,lr=0.1", "finetune,lr=0.2"]
    assert [(run["variant"], run["seed"]) for run in runs] == [(name, seed) for name in names for seed in (1, 2)]
    assert Path(runs[0]["folder"]).parent.parent == tmp_path / "mine"
    runs = planned(tmp_path, "optimiser.lr=0.5", source=str(file), seeds="9")
    assert [(run["variant"], run["seed"]) for run in runs] == [("weak", 9), ("finetune", 9)]
    from fedcl.config import load_config

    assert load_config(file).federation.rounds == 2, "a single run is of the settings around the section"


def test_a_protocol_brings_its_seeds_and_the_values_that_it_varies(tmp_path: Path) -> None:
    runs = planned(tmp_path, "protocol=efc-cifar100-cold-small", "strategy=finetune,fedlwf", seeds=None)
    from fedcl.settings.protocols import find

    protocol = find("efc-cifar100-cold-small")
    assert protocol is not None
    assert protocol.card is not None
    assert [run["seed"] for run in runs] == protocol.card.seeds * 2
    assert Path(runs[0]["folder"]).parent.parent == tmp_path / "efc-cifar100-cold-small"
    key, values = next(iter(protocol.card.varies.items()))
    runs = planned(tmp_path, "protocol=efc-cifar100-cold-small", "strategy=finetune", f"{key}=varies")
    assert [run["settings"][key] for run in runs] == values
    with pytest.raises(UsageError, match=r"optimiser.lr='varies': protocol efc-cifar100-cold-small varies"):
        planned(tmp_path, "protocol=efc-cifar100-cold-small", "strategy=finetune", "optimiser.lr=varies")
    with pytest.raises(UsageError, match="needs a protocol"):
        planned(tmp_path, "optimiser.lr=varies")


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["optimiser.lr=0.1..1"], 2, "optimiser.lr='0.1..1': is an interval, which needs --search N"),
        (["--seeds", "0-4,x"], 2, "--seeds='0-4,x'"),
        (["--seeds", "1", "seed=2"], 2, "is given by --seeds too"),
        (["--scheduler", "slurm"], 2, "must be one of local, ray"),
        (["--workers", "0"], 2, "--workers=0: must be at least 1"),
        (["--tune-on", "first:2"], 2, "is only read with --search N"),
        (["optimiser.lr=0.1,much"], 2, "optimiser.lr='much': must be a finite number"),
        (["strategy=finetune,fedlfw"], 2, "Did you mean 'fedlwf'?"),
        (["engine.runtime=deploy"], 2, "must be local or ray in a sweep"),
        (["engine.runtime=ray", "--scheduler", "ray"], 2, "must be local in a sweep of --scheduler ray"),
        (["--search", "3"], 2, "has nothing to search"),
        (["--search", "3", "optimiser.lr=0.1..1", "--tune-on", "first:5"], 2, "fewer tasks than the stream has, 5"),
        (["--search", "3", "optimiser.lr=0.1..1", "--tune-on", "last:5"], 2, "must be first:K"),
        (["--search", "3", "optimiser.lr=0.1..1", "--tune-on", "stream:0"], 2, "a seed that no final run has"),
        (["--search", "3", "optimiser.lr=0.1..1", "data.validation=0"], 2, "data.validation=0.0: must be above 0"),
        (["--search", "3", "optimiser.momentum=0.1..1"], 2, "must be in [0, 1)"),
        (
            ["--search", "3", "optimiser.lr=0.1..1", "--tune-on", "stream:9", "scenario.order=natural"], 2,
            "every seed has the same tasks",
        ),
    ],
)  # fmt: skip
def test_wrong_use_is_one_line_and_nothing_runs(
    arguments: list[str], code: int, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command_line(["sweep", *arguments, "--quiet", "--out", str(tmp_path)]) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("fedcl: ")
    assert captured.err.count("\n") == 1
    assert said in captured.err
    assert not list(tmp_path.rglob("config.yaml"))


def test_a_dry_run_says_what_would_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["sweep", "--dry-run", "--seeds", "0-1", "strategy=finetune", "--out", str(tmp_path)]
    assert run_command_line(command) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "2 runs, 2 of them new"
    assert run_command_line([*command, "--json"]) == 0
    assert [run["todo"] for run in json.loads(capsys.readouterr().out)] == ["run", "run"]
    assert not (tmp_path / "default").exists()


def test_a_file_that_varies_presets_keeps_its_own_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "mine.yaml"
    for name, folder in (("name: mine\n", "mine"), ("", "sweep")):
        source.write_text(name + "sweep: {grid: {preset: [default, mnist]}}\n")
        assert run_command_line(["sweep", "--dry-run", str(source), "--out", str(tmp_path / "out")]) == 0
        assert capsys.readouterr().out.startswith(str(tmp_path / "out" / folder / "default"))


def test_two_sweeps_on_one_folder(tmp_path: Path) -> None:
    with locked(tmp_path), pytest.raises(UsageError, match="another sweep works in this folder"), locked(tmp_path):
        pass
    with locked(tmp_path):  # free again
        pass


def test_the_command_to_go_on_asks_for_the_same() -> None:
    asked = Asked(
        "my file.yaml", ("strategy=a,[b,c]",), (("output.dir", "x"),), ("p.py",), "0-4", 2, "ray", 3, "first:1"
    )
    assert asked.command == (
        "fedcl sweep 'my file.yaml' 'strategy=a,[b,c]' output.dir=x --seeds 0-4 --workers 2 --search 3 "
        "--tune-on first:1 --scheduler ray --plugin p.py"
    )


def test_a_folder_without_a_run_is_cleared_of_plugins_alone(tmp_path: Path) -> None:
    (tmp_path / "plugins" / "0").mkdir(parents=True)
    (tmp_path / ".lock").touch()
    clear_unstarted(tmp_path)
    assert not (tmp_path / "plugins").exists()
    (tmp_path / "plugins").mkdir()
    (tmp_path / "notes.txt").touch()
    clear_unstarted(tmp_path)
    assert (tmp_path / "plugins").exists(), "what is not a run's is not touched"


def test_room_for_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    from fedcl.sweep import machine

    monkeypatch.setattr(machine, "usable_cpus", lambda: 8)
    monkeypatch.setattr(machine, "visible_gpus", lambda: ())
    monkeypatch.setattr(machine, "available_memory", lambda: 100 * ESTIMATE)
    base = Loader(None).load({}, {}, frozenset())
    assert (make_room(None, 100, base).workers, make_room(None, 100, base).cpus) == (8, 1)
    assert (make_room(None, 3, base).workers, make_room(None, 3, base).cpus) == (3, 2)
    assert make_room(2, 100, base).environment(0) == {
        "FEDCL_CPUS": "4", "OMP_NUM_THREADS": "4", "MKL_NUM_THREADS": "4", "OPENBLAS_NUM_THREADS": "4",
    }  # fmt: skip
    base.engine.threads = 4
    assert make_room(None, 100, base).workers == 2
    base.engine.runtime = "ray"
    assert make_room(None, 100, base).workers == 1
    monkeypatch.setattr(machine, "available_memory", lambda: int(3.5 * ESTIMATE))
    room = make_room(8, 100, base)
    assert room.workers == 3
    assert "memory for 3, by an estimate of 1.5 GB a run" in room.words
    assert [room.fitting(int(peak * ESTIMATE)) for peak in (0.1, 1.6, 99)] == [3, 1, 1]
    monkeypatch.setattr(machine, "visible_gpus", lambda: ("0", "2"))
    base.engine.runtime = "local"
    monkeypatch.setattr(machine, "available_memory", lambda: None)
    room = make_room(None, 100, base)
    assert room.workers == 2
    assert [room.environment(i)["CUDA_VISIBLE_DEVICES"] for i in range(3)] == ["0", "2", "0"]
    base.engine.device = "cpu"
    assert make_room(None, 100, base).gpus == ()


def test_the_memory_of_a_container_counts(tmp_path: Path) -> None:
    info, group = tmp_path / "meminfo", tmp_path / "group"
    assert available_memory(info, group) is None
    info.write_text("MemTotal: 9 kB\nMemAvailable:    8000 kB\n")
    assert available_memory(info, group) == 8_192_000
    group.mkdir()
    (group / "memory.max").write_text("5000000\n")
    (group / "memory.current").write_text("3000000\n")
    (group / "memory.stat").write_text("anon 1\ninactive_file 500000\n")
    assert available_memory(info, group) == 2_500_000
    (group / "memory.max").write_text("max\n")
    assert available_memory(info, group) == 8_192_000


def test_gpus_are_those_that_cuda_may_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1,3")
    assert visible_gpus() == ("1", "3")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert visible_gpus() == ()
