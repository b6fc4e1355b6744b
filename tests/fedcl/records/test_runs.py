"""Finding and reading run folders, whole ones and every kind of broken one."""

import json
import shutil
from dataclasses import asdict
from pathlib import Path

import pytest

from fedcl.config import Config
from fedcl.errors import RunFailed, UsageError
from fedcl.records.runs import METHOD, SAME_RUN, as_run, find_runs, flat, within


def made(made_runs, out, name="a", seed=0, settings=None, summary=None):
    return made_runs.make_run(out, name, seed, 0.5, settings or {}, summary or {})


def test_runs_are_found_once_at_any_depth(tmp_path, made_runs):
    for name, seed in (("b", 1), ("a", 0), ("a", 10), ("a", 2)):
        made(made_runs, tmp_path / "deep" / "er", name, seed)
    # Files of a run are no runs.
    for place in ("checkpoints/x", "copy/of/it"):
        inside = tmp_path / "deep" / "er" / "a" / "seed-0" / place
        inside.mkdir(parents=True)
        (inside / "config.yaml").write_text("name: x\n")
    (tmp_path / "link").symlink_to(tmp_path / "deep" / "er" / "b" / "seed-1")
    found = find_runs([tmp_path, tmp_path / "deep" / "er" / "a", tmp_path / "link", tmp_path / "deep" / ".." / "deep"])
    assert [run.folder.relative_to(tmp_path / "deep" / "er").as_posix() for run in found.runs] == [
        "a/seed-0", "a/seed-10", "a/seed-2", "b/seed-1",
    ]  # fmt: skip
    assert found.broken == ()


def test_what_a_run_says(tmp_path, made_runs):
    folder = made(made_runs, tmp_path, "my run", 3, {"strategy": ["replay", "fedprox"], "options.fedprox.mu": 0.5},
                  {"probes": {"linear": {"accuracy": 0.25}}})  # fmt: skip
    run = as_run(folder)
    assert (run.name, run.seed, run.label, run.num_tasks) == ("my run", 3, "replay + fedprox", 2)
    assert run.matrix == [[0.5, None], [0.25, 0.75]]
    assert run.metric("probes.linear.accuracy") == 0.25
    assert run.metric("probes.linear.nothing") is None
    assert run.metric("name.nothing") is None
    assert run.settings["options.fedprox.mu"] == 0.5
    assert run.config["strategy"] == ["replay", "fedprox"]
    assert run.events() == []
    assert run.rounds() == []
    (folder / "rounds.csv").write_text("task,round,loss\n0,1,\n0,2,0.5\n")
    assert run.rounds() == [{"task": 0.0, "round": 1.0, "loss": None}, {"task": 0.0, "round": 2.0, "loss": 0.5}]
    (folder / "rounds.csv").write_text("task,round\n0,x\n")
    with pytest.raises(RunFailed, match=r"rounds\.csv"):
        run.rounds()


def test_a_run_older_than_a_setting_has_its_default(tmp_path, made_runs):
    new, old = (as_run(made(made_runs, tmp_path, name)) for name in ("new", "old"))
    config = old.folder / "config.yaml"
    lines = [line for line in config.read_text().splitlines() if not line.strip().startswith("held_out")]
    config.write_text("\n".join(lines))
    older = as_run(old.folder)
    assert "held_out" not in older.config["partition"]
    assert older.settings["partition.held_out"] == 0.0
    assert older.protocol_key == new.protocol_key


def test_what_the_protocol_is_and_what_not(tmp_path, made_runs):
    base = as_run(made(made_runs, tmp_path)).protocol_key
    same = {
        "engine.dtype": "float64", "optimiser.lr": 0.7, "strategy": ["replay"], "model.width": 9, "evaluate.every": 1,
        "data.augment": ["flip"], "federation.batch_size": 5, "output.dir": "elsewhere", "data.root": "there",
    }  # fmt: skip
    other = {
        "scenario.tasks": 2, "data.name": "mnist", "data.limit": 9, "data.validation": 0.5, "partition.alpha": 0.1,
        "partition.test": "same_mix", "federation.clients": 3, "federation.rounds": 9, "federation.participation": 0.5,
        "federation.epochs": 7, "scenario.order": "natural",
    }  # fmt: skip
    for i, (key, value) in enumerate(same.items()):
        assert as_run(made(made_runs, tmp_path, f"same{i}", settings={key: value})).protocol_key == base, key
    for i, (key, value) in enumerate(other.items()):
        run = as_run(made(made_runs, tmp_path, f"other{i}", settings={key: value}))
        assert run.protocol_key != base, key
        assert run.protocol[key] == value


def test_every_named_setting_exists():
    keys = [*flat(asdict(Config())), "options"]
    for place in (*SAME_RUN, *METHOD):
        assert any(within(key, [place]) for key in keys), place


BREAKS = {
    "no summary": (lambda f: (f / "summary.json").unlink(), "is not finished (no summary.json)"),
    "no config": (lambda f: (f / "config.yaml").unlink(), "there is no config.yaml"),
    "no matrix": (lambda f: (f / "accuracy_matrix.csv").unlink(), "there is no accuracy_matrix.csv"),
    "torn summary": (lambda f: (f / "summary.json").write_text('{"name": "x"'), "summary.json is damaged"),
    "empty summary": (lambda f: (f / "summary.json").write_text(""), "summary.json is damaged"),
    "binary summary": (lambda f: (f / "summary.json").write_bytes(b"\xff\xfe\x00"), "summary.json is damaged"),
    "list for a summary": (lambda f: (f / "summary.json").write_text("[]"), "its status is not said"),
    "torn matrix": (lambda f: (f / "accuracy_matrix.csv").write_text("0.5,0.1\n0.2"), "accuracy matrix"),
    "text matrix": (lambda f: (f / "accuracy_matrix.csv").write_text("a,b\nc,d\n"), "accuracy matrix"),
    "other matrix": (lambda f: (f / "accuracy_matrix.csv").write_text("0.5\n"), "has 1 tasks"),
    "torn config": (lambda f: (f / "config.yaml").write_text("name: [1,\n"), "config.yaml is damaged"),
    "empty config": (lambda f: (f / "config.yaml").write_text(""), "holds no settings"),
    "failed": (lambda f: edit(f, status="failed", cause="the loss\nis not finite"), "failed: the loss is not finite"),
    "interrupted": (lambda f: edit(f, status="interrupted"), "its status is interrupted"),
    "no seed": (lambda f: edit(f, seed=None), "has no seed"),
    "seed of another run": (lambda f: edit(f, seed=1), "config.yaml has seed 0, summary.json has 1"),
    "seed is true": (lambda f: edit(f, seed=True), "has no seed"),
    "strategy of numbers": (lambda f: edit(f, strategy=[1]), "has no strategy"),
    "nested summary": (lambda f: (f / "summary.json").write_text("[" * 9999), "summary.json is damaged"),
    "plugins is a number": (lambda f: (f / "config.yaml").write_text("plugins: 3\n"), "plugins is no list"),
    "strategy is text": (lambda f: edit(f, strategy="finetune"), "has no strategy"),
}


def edit(folder, **entries):
    path = folder / "summary.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **entries}))


@pytest.mark.parametrize("kind", BREAKS)
def test_a_broken_run_is_listed_and_the_others_are_read(kind, tmp_path, made_runs):
    whole, broken = made(made_runs, tmp_path, "a"), made(made_runs, tmp_path, "b")
    spoil, why = BREAKS[kind]
    spoil(broken)
    found = find_runs([tmp_path])
    assert [run.folder for run in found.runs] == [whole]
    assert [run.folder for run in found.broken] == [broken]
    assert why in found.broken[0].why
    assert "\n" not in found.broken[0].why
    with pytest.raises(RunFailed):
        as_run(broken)


def test_a_path_without_runs(tmp_path):
    with pytest.raises(UsageError, match="must be a run's folder"):
        find_runs([tmp_path])
    with pytest.raises(UsageError, match="is no folder"):
        find_runs([tmp_path / "nowhere"])


def test_a_real_run_is_whole(tiny):
    result = tiny({"evaluate.every": 1})
    run = as_run(result.folder)
    assert run.summary == result.summary
    assert run.matrix == result.matrix
    assert len(run.rounds()) == 4
    assert sum(event["event"] == "round" for event in run.events()) == 4
    shutil.rmtree(Path(result.folder) / "checkpoints")
    assert as_run(result.folder).seed == run.seed
