"""Protocols: the packaged ones, a researcher's own, and what a run says of the one it follows."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedcl.commands.cli import run_command_line
from fedcl.config import config_hash, load_config, to_yaml
from fedcl.data import catalog
from fedcl.errors import UsageError
from fedcl.settings import presets, protocols

NAMES = [preset.name for preset in presets.presets(kind="protocols")]
FULL = [name for name in NAMES if not name.endswith("-small")]
TWINS = [name for name in NAMES if name.endswith("-small")]

EACH = {"cifar100": 12, "cifar10": 120, "fashion_mnist": 600, "mnist": 64, "mini_imagenet": 12, "tiny_imagenet": 12}
"""Images a class of the noise that stands for a dataset: as few as the splits of the twins allow."""

MINE = """
# My comparison
card:
  title: My comparison
  paper: mine
  metric: average_accuracy
  certain: all of it
  guessed: nothing
  varies: {partition.alpha: [0.1, 1.0], options.replay.budget: [500]}
  numbers:
    - {source: table 1, unit: accuracy in %, columns: [a, b], rows: {FedAvg: [12.5, 1±2], Mine: [null, 99]}}
data: {limit: 12, validation: 0.0}
scenario: {tasks: 2}
partition: {alpha: 0.5}
federation: {clients: 3, rounds: 2, epochs: 1}
strategy: [finetune]
options: {replay: {budget: 640}}
"""


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    (tmp_path / "protocols").mkdir()
    path = tmp_path / "protocols" / "mine.yaml"
    path.write_text(MINE)
    return path


def follow(path: Path, *overrides: Any) -> Any:
    return load_config(None, [("protocol", str(path)), *overrides])


def test_every_protocol_has_a_twin_and_a_whole_card():
    assert len(FULL) >= 12
    assert sorted(f"{name}-small" for name in FULL) == TWINS
    for name in NAMES:
        found = protocols.find(name)
        assert found is not None
        assert found.card is not None
        assert found.summary
        assert bool(found.card.cut) == (name in TWINS)
        # a twin has numbers of its own only once somebody has measured them
        assert bool(found.card.tables) == (name in FULL)
        fixed = found.config.protocol.fixed
        said = {"data.name", "scenario.name", "scenario.order", "partition.name", "model.name", "federation.clients"}
        said |= {"federation.rounds", "federation.epochs", "federation.batch_size", "optimiser.name", "optimiser.lr"}
        assert said <= set(fixed)
        assert {"scenario.tasks", "scenario.increment"} & set(fixed)


@pytest.mark.parametrize("name", FULL)
def test_a_twin_says_all_that_it_changes(name):
    full, twin = protocols.find(name), protocols.find(f"{name}-small")
    other = {k for k, v in twin.config.protocol.fixed.items() if full.config.protocol.fixed.get(k) != v}
    allowed = {"data.limit", "data.size", "model.name", "model.bias", "model.norm", "federation.rounds"}
    allowed |= {"federation.epochs", "federation.batch_size", "optimiser.lr", "optimiser.milestones"}
    assert other <= allowed
    assert f"{twin.config.data.limit} of" in twin.card.cut
    words = {"federation.batch_size": "batches of", "optimiser.lr": "learning rate", "model.name": "slim ResNet-18"}
    assert all(words[key] in twin.card.cut for key in other & set(words))
    assert twin.card.varies == full.card.varies or "budget" in str(full.card.varies)


@pytest.fixture(scope="session")
def small_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data root with noise under the names of the datasets that protocols ask for."""
    from fedcl import random as counter

    root = tmp_path_factory.mktemp("data")
    for name, classes, shape in (("cifar100", 100, (32, 32, 3)), ("cifar10", 10, (32, 32, 3)),
                                 ("fashion_mnist", 10, (28, 28)), ("mnist", 10, (28, 28)), ("svhn", 10, (32, 32, 3)),
                                 ("notmnist", 10, (28, 28)), ("mini_imagenet", 100, (32, 32, 3)),
                                 ("tiny_imagenet", 200, (32, 32, 3))):  # fmt: skip
        labels = np.tile(np.arange(classes), EACH.get(name, 64))
        noise = counter.uniform(len(labels) * int(np.prod(shape)), 0, name).reshape(-1, *shape)
        images = (noise * 255).astype(np.uint8)
        np.savez(root / f"{name}.npz", train_x=images, train_y=labels, test_x=images[: 2 * classes],
                 test_y=labels[: 2 * classes])  # fmt: skip
    return root


@pytest.mark.parametrize("name", TWINS)
def test_a_twin_runs_a_round(name, small_root, tmp_path):
    from fedcl.run import execute
    from fedcl.tell.progress import QuietProgress

    limit = EACH[load_config(None, [("protocol", name)]).data.name]
    cut = {
        "data.root": str(small_root), "data.limit": limit, "scenario.first": 1, "federation.rounds": 1,
        "federation.epochs": 1, "engine.threads": 1, "engine.device": "cpu", "output.plots": False,
    }  # fmt: skip
    config = load_config(None, [("protocol", name), *cut.items()])
    if config.model.name == "slim_resnet18":
        config.model.width = 2
    config.output.dir = str(tmp_path)
    result = execute(config, progress=QuietProgress())
    assert result.summary["status"] == "done"
    start = f"{name} (modified: "
    assert result.summary["protocol"].startswith(start)
    modified = set(result.summary["protocol"][len(start) : -1].split(", "))
    assert modified
    assert modified <= {"data.limit", "federation.rounds", "federation.epochs"}
    assert result.folder == tmp_path / f"{name}-{config.strategy[0]}" / "seed-0"
    assert result.summary["personal" if name.startswith("gpfl") else "average_accuracy"] is not None


@pytest.mark.parametrize("name", NAMES)
def test_a_protocol_fits_its_dataset_or_names_what_is_missing(name):
    from fedcl.build import build_split

    config = load_config(None, [("protocol", name)])
    info = next(i for i in catalog.available() if i.name == config.data.name)
    if not info.found:
        with pytest.raises(UsageError) as caught:
            build_split(config)
        assert caught.value.key == "data.name"
        assert config.data.name in str(caught.value)
        assert "\n" not in str(caught.value)
        return
    assert os.environ.get(catalog.ROOT_VARIABLE)
    stream, split, _ = build_split(config)
    tasks = config.scenario.tasks if config.scenario.increment is None else 11
    assert stream.num_tasks == tasks
    assert split.clients == config.federation.clients
    assert not any(split.empty)


@pytest.mark.parametrize("name", ["cifar100", "fashion_mnist"])
def test_a_missing_dataset_is_one_line(name, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    protocol = next(n for n in FULL if load_config(None, [("protocol", n)]).data.name == name)
    assert run_command_line(["run", f"protocol={protocol}", f"data.root={tmp_path}", "--quiet"]) == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    assert line.startswith(f"fedcl: data.name='{name}': not found")


def test_list_and_show(capsys):
    assert run_command_line(["list", "protocols"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == NAMES
    assert run_command_line(["show", "fedcbdr-cifar100-5"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    for text in (
        "alpha 0.5 (also 0.1, 1.0)",
        "rounds 100",
        "FedLwF 33.97±2.6",
        "arXiv:2507.07712",
        "guessed",
        "buffer",
    ):
        assert text in shown
    assert run_command_line(["show", "fedcbdr-cifar100-5", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["settings"]["federation.rounds"] == 100
    assert found["card"]["numbers"][0]["rows"]["FedCBDR"][0] == "46.40±1.6"
    assert run_command_line(["show", "fedcbdr-cifar100-6"]) == 2
    assert "Did you mean 'fedcbdr-cifar100-5'" in capsys.readouterr().err


def test_what_a_run_says_of_its_protocol(mine):
    config = follow(mine)
    assert (protocols.label(config), config.name) == ("mine", "mine-finetune")
    said = [
        ("strategy", ["fedlwf"]), ("seed", 7), ("engine.threads", 1), ("name", "other"), ("federation.rounds", 2),
        ("partition.alpha", 1.0),
    ]  # fmt: skip
    config = follow(mine, *said)
    assert (protocols.label(config), config.name) == ("mine (partition.alpha=1.0)", "other")
    config = follow(mine, ("partition.alpha", 0.3), ("federation.steps", 5))
    assert protocols.label(config) == "mine (modified: partition.alpha, federation.epochs)"
    config = follow(mine, ("partition.alpha", 0.1), ("data.limit", 9))
    assert protocols.label(config) == "mine (partition.alpha=0.1; modified: data.limit)"
    assert protocols.label(load_config()) is None


def test_options_count_where_the_strategy_is_in_the_stack(mine):
    assert follow(mine).options == {}
    assert follow(mine, ("strategy", ["er"])).options == {"replay": {"budget": 640}}
    config = follow(mine, ("strategy", ["replay"]), ("options.replay.batch_size", 4))
    assert config.options == {"replay": {"budget": 640, "batch_size": 4}}
    assert protocols.label(config) == "mine"
    chosen = follow(mine, ("strategy", ["replay"]), ("options.replay.budget", 500))
    assert protocols.label(chosen) == "mine (options.replay.budget=500)"
    changed = follow(mine, ("strategy", ["replay"]), ("options.replay.budget", 501))
    assert protocols.label(changed) == "mine (modified: options.replay.budget)"


def test_the_record_outlives_the_file(mine, tmp_path):
    (tmp_path / "config.yaml").write_text(to_yaml(follow(mine, ("strategy", ["replay"]))))
    mine.unlink()
    config = load_config(tmp_path / "config.yaml")
    assert protocols.label(config) == "mine"
    again = load_config(tmp_path / "config.yaml", ["federation.rounds=9"])
    assert protocols.label(again) == "mine (modified: federation.rounds)"
    plain = load_config(to_mapping(config))
    assert config_hash(plain) == config_hash(config)


def to_mapping(config: Any) -> dict[str, Any]:
    from dataclasses import asdict

    return {key: value for key, value in asdict(config).items() if key != "protocol"}


def test_the_default_stack_is_no_part_of_a_protocol(mine):
    config = follow(mine)
    assert config.data.augment == []
    assert (config.model.width, config.strategy, config.partition.name) == (None, ["finetune"], "dirichlet")


def test_a_file_may_follow_a_protocol_and_a_protocol_may_build_on_another(mine, tmp_path):
    (tmp_path / "a.yaml").write_text("name: a\nprotocol: protocols/mine.yaml\nfederation: {rounds: 4}\n")
    for source in ("a.yaml", {"protocol": str(mine), "name": "a", "federation": {"rounds": 4}}):
        config = load_config(tmp_path / source if isinstance(source, str) else source, search=[tmp_path])
        assert (protocols.label(config), config.name) == ("mine (modified: federation.rounds)", "a")
    card = MINE[: MINE.index("  varies")]
    (tmp_path / "protocols" / "next.yaml").write_text(f"presets: [protocols/mine]\n{card}seed: 3\ndata: {{limit: 5}}\n")
    config = load_config(None, [("protocol", "next")], search=[tmp_path])
    assert (protocols.label(config), config.protocol.varies) == ("next", {})
    assert (config.protocol.fixed["data.limit"], config.protocol.fixed["federation.rounds"]) == (5, 2)
    assert "seed" not in config.protocol.fixed


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("  metric:", "  metrik:", ["card.metrik", "did you mean 'card.metric'", "mine.yaml"]),
        ("  guessed: nothing\n", "", ["card.guessed", "must be given", "mine.yaml"]),
        ("Mine: [null, 99]", "Mine: [99]", ["card.numbers[0]", "row Mine has 1 numbers for 2 columns", "mine.yaml"]),
        ("{partition.alpha: [0.1, 1.0]", "{partition.alpha: 1", ["varies.partition.alpha must be a list", "mine.yaml"]),
        ("{partition.alpha: [0.1, 1.0]", "{partition.skew: [0.1, 1.0]", ["card.varies.partition.skew", "mine fixes"]),
        ("  title: My comparison\n", "  title: 3\n", ["card.title=3", "must be text", "mine.yaml"]),
        ("tasks: 2", "task: 2", ["scenario.task", "mine.yaml"]),
    ],
)  # fmt: skip
def test_a_wrong_file_is_one_line(mine, old, new, words):
    assert MINE.count(old) == 1
    mine.write_text(MINE.replace(old, new))
    with pytest.raises(UsageError) as caught:
        follow(mine)
    assert "\n" not in str(caught.value)
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_what_cannot_be_followed_is_refused(mine):
    with pytest.raises(UsageError, match="second protocol: mine is followed already"):
        follow(mine, ("protocol", NAMES[0]))
    with pytest.raises(UsageError, match="follow a protocol with protocol=NAME"):
        load_config(None, ["protocol.name=x"])
    with pytest.raises(UsageError, match="there is no such protocol"):
        load_config(None, ["protocol=fedcbdr"])


def test_a_run_writes_the_protocol_it_follows(mine, tiny_config):
    from fedcl.run import execute, resume
    from fedcl.tell.progress import QuietProgress

    tiny = tiny_config({})
    given = [("protocol", str(mine)), ("output.dir", tiny.output.dir), ("engine.device", "cpu"), ("engine.threads", 1)]
    config = load_config(None, [*given, ("output.plots", False), ("model.width", 8), ("federation.rounds", 1)])
    result = execute(config, progress=QuietProgress())
    assert result.summary["protocol"] == "mine (modified: federation.rounds)"
    (result.folder / "summary.json").unlink()
    assert resume(result.folder, progress=QuietProgress()).summary["protocol"] == result.summary["protocol"]
