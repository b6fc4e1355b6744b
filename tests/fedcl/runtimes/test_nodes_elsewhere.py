"""Nodes that are built from what messages say, here in one process: as SuperNodes with folders of their own."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from fedcl import app
from fedcl.errors import RunFailed, UsageError
from fedcl.federation.flower_internals import LocalGrid, Message, make_error, number_message
from fedcl.run import RunResult, execute, resume
from fedcl.tell.progress import QuietProgress

if TYPE_CHECKING:
    from fedcl.config import Config

TinyConfig = Callable[[Mapping[str, Any]], "Config"]
STACK: dict[str, Any] = {
    "strategy": ["replay", "fedewc"],
    "federation.clients": 5,
    "partition.test": "same_mix",
    "engine.path": "sequential",
    "checkpoint.every": 1,
    "checkpoint.keep": 3,
}
DEPLOY = {"engine.runtime": "deploy", "engine.nodes": 2}
NODE_UNAVAILABLE = 5


class SuperNodes(LocalGrid):
    """Two nodes with folders of their own, each message met by a new process as far as fedcl can tell.

    Args:
        place: where the folders are.
        numbers: their partition ids.
        lost: how many messages node 1 answers before it is lost, told as a SuperLink does.
    """

    def __init__(self, place: Path, numbers: tuple[int, int] = (0, 1), lost: int = 1000) -> None:
        super().__init__(app.client, 2)
        self.left = lost
        for number, context in zip(numbers, self.contexts.values(), strict=True):
            context.node_config.update({"partition-id": number, "state-dir": str(place / f"node{number}")})

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        pushed: list[str] = []
        for message in messages:
            app.NODES.clear()
            if message.metadata.dst_node_id == max(self.contexts):
                self.left -= 1
            if self.left >= 0:
                pushed += super().push_messages([message])
            else:
                name = number_message(message)
                self._replies[name] = make_error(NODE_UNAVAILABLE, "no heartbeat", message)
                pushed.append(name)
        return pushed


def measured(result: RunResult) -> dict[str, Any]:
    return {name: value for name, value in result.summary.items() if name not in ("wall_seconds", "measured")}


def folder_of(config: Config) -> Path:
    return Path(config.output.dir) / config.name / f"seed-{config.seed}"


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"model.norm": "batch", "model.batch_norm": "local", "evaluate.personal": False, "federation.batch_min": 2},
        {"strategy": ["fedadam"]},
        {"time.order": "asynchronous", "time.joining": 0.4, "time.stragglers": 0.4, "time.straggler_policy": "partial"},
    ],
)
def test_nodes_with_folders_of_their_own_give_the_numbers_of_one(
    tiny_config: TinyConfig, tmp_path: Path, more: dict[str, Any]
) -> None:
    alone = execute(tiny_config({**STACK, **more}), progress=QuietProgress())
    apart = execute(tiny_config({**STACK, **more, **DEPLOY}), progress=QuietProgress(), grid=SuperNodes(tmp_path))
    assert measured(apart) == measured(alone)
    assert apart.matrix == alone.matrix
    assert not (apart.folder / "clients").exists()


def test_what_starts_at_a_client_starts_from_a_file_that_only_the_server_has(
    tiny_config: TinyConfig, tmp_path: Path
) -> None:
    base = execute(tiny_config({"seed": 5, "model.norm": "batch", "federation.batch_min": 2}), progress=QuietProgress())
    own = {
        **STACK, "init": f"{base.folder}@task0", "model.norm": "batch", "model.batch_norm": "local",
        "federation.batch_min": 2, "evaluate.personal": False, "federation.rounds": 1,
    }  # fmt: skip
    alone = execute(tiny_config(own), progress=QuietProgress())
    apart = execute(tiny_config({**own, **DEPLOY}), progress=QuietProgress(), grid=SuperNodes(tmp_path))
    assert measured(apart) == measured(alone)


@pytest.mark.parametrize("lost", [0, 1, 2, 4])
def test_a_lost_node_ends_the_run_with_its_checkpoint(tiny_config: TinyConfig, tmp_path: Path, lost: int) -> None:
    alone = execute(tiny_config(STACK), progress=QuietProgress())
    settings = tiny_config({**STACK, **DEPLOY})
    folder = folder_of(settings)
    with pytest.raises(RunFailed, match=r"node 1 is gone.*go on with: fedcl resume") as failed:
        execute(settings, progress=QuietProgress(), grid=SuperNodes(tmp_path, lost=lost))
    assert failed.value.exit_code == 1
    assert json.loads((folder / "summary.json").read_text())["status"] == "failed"
    assert bool(list(folder.glob("checkpoints/*/meta.json"))) == (lost > 0)
    again = resume(folder, progress=QuietProgress(), grid=SuperNodes(tmp_path))
    assert measured(again) == measured(alone)


def test_a_run_goes_on_only_where_its_states_are(tiny_config: TinyConfig, tmp_path: Path) -> None:
    settings = tiny_config({**STACK, **DEPLOY})
    with pytest.raises(RunFailed, match=r"is gone"):
        execute(settings, progress=QuietProgress(), grid=SuperNodes(tmp_path, lost=3))
    with pytest.raises(RunFailed, match=r"node 0 of 2 has no state of this run"):
        resume(folder_of(settings), progress=QuietProgress(), grid=SuperNodes(tmp_path / "elsewhere"))
    swapped = SuperNodes(tmp_path, (1, 0))
    for context in swapped.contexts.values():
        context.node_config["partition-id"] = 1 - int(context.node_config["partition-id"])
    with pytest.raises(RunFailed, match=r"node 0 of 2 has node 1 of 2 of it"):
        resume(folder_of(settings), progress=QuietProgress(), grid=swapped)
    resume(folder_of(settings), progress=QuietProgress(), grid=SuperNodes(tmp_path, (1, 0)))


def test_a_new_run_in_the_place_of_an_old_one_sees_none_of_its_states(tiny_config: TinyConfig, tmp_path: Path) -> None:
    own = {
        "federation.clients": 5, "federation.rounds": 3, "federation.batch_min": 2, "engine.path": "sequential",
        "model.norm": "batch", "model.batch_norm": "local",
    }  # fmt: skip
    first = execute(tiny_config({**own, **DEPLOY}), progress=QuietProgress(), grid=SuperNodes(tmp_path))
    shutil.rmtree(first.folder)
    few = {**own, "federation.participation": 0.4}
    alone = execute(tiny_config(few), progress=QuietProgress())
    where = {"output.dir": str(first.folder.parents[1])}
    again = execute(tiny_config({**few, **DEPLOY, **where}), progress=QuietProgress(), grid=SuperNodes(tmp_path))
    assert measured(again) == measured(alone)


def test_old_states_are_discarded_once_no_checkpoint_needs_them(tiny_config: TinyConfig, tmp_path: Path) -> None:
    settings = tiny_config({**STACK, **DEPLOY, "federation.rounds": 6, "checkpoint.keep": 1})
    execute(settings, progress=QuietProgress(), grid=SuperNodes(tmp_path))
    states = list(tmp_path.glob("node0/*/clients/0000/0000000/*.safetensors"))
    assert 1 <= len(states) <= 3


def test_nodes_that_do_not_fit_are_one_line(tiny_config: TinyConfig, tmp_path: Path) -> None:
    def said(change: Callable[[SuperNodes], None], **settings: Any) -> str:
        grid = SuperNodes(tmp_path)
        change(grid)
        with pytest.raises(RunFailed) as failed:
            execute(tiny_config({**STACK, **DEPLOY, **settings}), progress=QuietProgress(), grid=grid)
        return str(failed.value)

    def configure(**values: Any) -> Callable[[SuperNodes], None]:
        return lambda grid: grid.contexts[max(grid.contexts)].node_config.update(values)

    assert "two nodes have the same partition-id" in said(configure(**{"partition-id": 0}))
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "other.npz").write_bytes(b"")
    assert "data-root" not in said(lambda grid: grid.contexts[max(grid.contexts)].node_config.pop("state-dir"))
    lines = said(lambda grid: grid.contexts[max(grid.contexts)].node_config.pop("state-dir"))
    assert "node 1 failed in 'hello': state-dir=None" in lines
    assert "\n" not in lines


def test_a_node_with_other_images_is_refused(tiny_config: TinyConfig, tmp_path: Path) -> None:
    import numpy as np

    for name, shift in (("here", 0), ("there", 1)):
        (tmp_path / name).mkdir()
        labels = (np.arange(40) + shift * (np.arange(40) == 3)) % 4
        images = np.arange(40 * 16, dtype=np.uint8).reshape(40, 4, 4)
        np.savez(tmp_path / name / "few.npz", train_x=images, train_y=labels, test_x=images, test_y=labels)
    data = {"data.name": "few", "data.root": str(tmp_path / "here"), "partition.min_size": 0}
    grid = SuperNodes(tmp_path)
    for context, name in zip(grid.contexts.values(), ("here", "there"), strict=True):
        context.node_config["data-root"] = str(tmp_path / name)
    with pytest.raises(RunFailed, match=r"node 1 holds other images of data.name='few'"):
        execute(tiny_config({**STACK, **DEPLOY, **data}), progress=QuietProgress(), grid=grid)


def test_a_plugin_file_is_refused_where_it_cannot_be_sent(tiny_config: TinyConfig, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"plugins.*SuperNodes.*install it there"):
        execute(tiny_config({**DEPLOY, "plugins": ["a.py"]}), progress=QuietProgress())


def test_private_parts_cannot_be_tested_at_the_server(tiny_config: TinyConfig, tmp_path: Path) -> None:
    local = {**STACK, **DEPLOY, "model.norm": "batch", "model.batch_norm": "local", "federation.batch_min": 2}
    with pytest.raises(UsageError, match=r"evaluate.personal"):
        execute(tiny_config(local), progress=QuietProgress(), grid=SuperNodes(tmp_path))
