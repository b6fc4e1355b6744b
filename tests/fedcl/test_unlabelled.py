"""Runs with images whose labels are hidden: what strategies see, what is learned, what is measured, and going on."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from fedcl.build import build
from fedcl.conduct import initial_state
from fedcl.errors import Interrupted, RunFailed
from fedcl.federation.server import Callbacks, Federation
from fedcl.federation.store import ClientStore
from fedcl.local.stacked import train_cohort
from fedcl.local.training import train_client
from fedcl.run import execute, resume
from fedcl.tell.progress import QuietProgress

if TYPE_CHECKING:
    from fedcl.config import Config
    from fedcl.federation.call import Call
    from fedcl.run import RunResult

Tiny = Callable[[Mapping[str, Any]], "RunResult"]
Settings = Callable[[Mapping[str, Any]], "Config"]

SPY = """
unlabelled = "UNLABELLED"
reductions = {"n": "sum"}

def note(self, hook, y, batch=None, ctx=None):
    SEEN.append((hook, y.tolist(), None if batch is None else batch.labels.tolist()))
    if ctx is not None:
        SEEN.append((hook + " store", ctx.store.label_tensor[ctx.unlabelled].tolist(), None))
        SEEN.append((hook + " own", ctx.labels.tolist(), None))
        SEEN.append((hook + " counts", [int(ctx.counts.sum())], [len(ctx.ids)]))

def check(self, config, stream, split):
    SEEN.append(("check store", stream.train_labels[split.hidden].tolist(), None))
    SEEN.append(("check store", split.train_labels[split.hidden].tolist(), None))

def sources(self, ctx):
    self.note("sources", ctx.labels, ctx=ctx)
    return []

def loss(self, step):
    self.note("loss", step.y, step.batch)
    return {"nothing": step.output.logits.sum() * 0}

def edit_gradients(self, step, grads):
    self.note("edit_gradients", step.y, step.batch)
    return grads

def after_step(self, step, params):
    self.note("after_step", step.y, step.batch)
    return params

def end_round(self, ctx, trained, steps):
    self.note("end_round", ctx.labels, ctx=ctx)
    return {"n": torch.tensor(1)}, {"n": torch.tensor(1)}

def asked(self, ctx):
    self.note("asked", ctx.labels, ctx=ctx)
    for _, labels in ctx.batches():
        self.note("batches", labels)
    return {"n": torch.tensor(len(ctx.ids))}, ctx.state

def finish_task(self, server):
    SEEN.append(("holders", [int(server.exchange(self.asked).get("n", 0))], None))
    return Finished(server.arrays), server.state
"""


@pytest.mark.parametrize("how", ["ignores", "sees"])
@pytest.mark.parametrize("labels", [{"labels.rate": 0.4}, {"labels.rate": 0.5, "labels.per": "client"}])
def test_no_hook_sees_a_hidden_label(how: str, labels: dict[str, Any], tiny: Tiny, plugin: Any) -> None:
    spied = plugin(SPY.replace("UNLABELLED", how), **labels)
    spied["strategy"] = ["simclr", *spied["strategy"]]
    result = tiny(spied)
    noted = plugin.seen(spied)
    hooks = {hook for hook, _, _ in noted}
    assert {"sources", "loss", "edit_gradients", "after_step", "end_round", "asked", "batches"} <= hooks
    found = {hook: {y for h, ys, _ in noted if h == hook for y in ys} for hook in hooks}
    for hook in hooks:
        if hook.endswith("store"):
            assert found[hook] <= {-1}
        elif hook in ("loss", "edit_gradients", "after_step"):
            assert (-1 in found[hook]) is (how == "sees")
            assert all(ys == batch for h, ys, batch in noted if h == hook)
            assert all(ys for h, ys, _ in noted if h == hook)  # an empty step is no step
        elif not hook.endswith("counts"):
            assert -1 not in found[hook]
    assert all(a == b for h, a, b in noted if h.endswith("counts"))
    assert found["sources store"] == found["check store"] == {-1}
    labelled = [sum(len(ids) for ids in task) for task in build_again(result).split.rows]
    assert [ys[0] for hook, ys, _ in noted if hook == "holders"] == labelled


def build_again(result: RunResult) -> Any:
    from fedcl.config import load_config

    return build(load_config(result.folder / "config.yaml"))


DROPPED = """
def arrange(self, split):
    import json
    hidden = set(json.loads(open("FILE").read()))
    return [[ids[[i not in hidden for i in ids.tolist()]] for ids in task] for task in split]
"""


@pytest.mark.parametrize("labels", [{"labels.rate": 0.4}, {"labels.rate": 0.5, "labels.per": "client"}])
def test_a_stack_that_learns_from_labels_trains_as_if_the_others_were_not_there(
    labels: dict[str, Any], tiny: Tiny, tiny_config: Settings, plugin: Any, tmp_path: Path
) -> None:
    semi = tiny({"strategy": ["finetune"], "engine.path": "sequential", **labels})
    hidden = build(tiny_config(labels)).split.hidden.tolist()
    assert hidden
    file = tmp_path / "hidden.json"
    file.write_text(json.dumps(hidden))
    alone = tiny(plugin(DROPPED.replace("FILE", str(file))))
    assert semi.summary["model_sha256"] == alone.summary["model_sha256"]
    assert semi.matrix == alone.matrix


def test_everything_labelled_is_the_run_it_always_was(tiny: Tiny) -> None:
    plain = tiny({})
    for labels in ({"labels.rate": 1.0}, {"labels.count": 1000}):
        result = tiny(labels)
        for key in ("model_sha256", "split_sha256", "average_accuracy"):
            assert result.summary[key] == plain.summary[key]
    assert tiny({"labels.rate": 0.5}).summary["split_sha256"] != plain.summary["split_sha256"]


def npz(path: Path, shuffled: int) -> str:
    """40 training images of 4 classes; the labels of the training images in another order."""
    from fedcl import random as counter

    noise = counter.uniform(44 * 16, 0, "images").reshape(-1, 4, 4)
    images = (noise * 255).astype(np.uint8)
    labels = np.arange(40) % 4
    if shuffled:
        labels = labels[counter.permutation(40, shuffled)]
    np.savez(path, train_x=images[:40], train_y=labels, test_x=images[40:], test_y=np.arange(4))
    return str(path)


def test_an_unlabelled_run_does_not_depend_on_the_labels(tiny: Tiny, tmp_path: Path) -> None:
    """One task, dealt at random: nothing but the labels themselves could tell these two data sets apart."""
    common = {"scenario.tasks": 1, "partition.name": "iid", "data.limit": None, "scenario.order": "natural"}
    runs = {}
    for rate in (0.0, 1.0):
        for shuffled in (0, 1):
            name = npz(tmp_path / f"{rate}-{shuffled}.npz", shuffled)
            stack = {"strategy": ["simclr"], "labels.rate": rate, "data.name": name, **common}
            runs[rate, shuffled] = tiny(stack).summary["model_sha256"]
    assert runs[0.0, 0] == runs[0.0, 1]
    assert runs[1.0, 0] != runs[1.0, 1]


MIXED: dict[str, Any] = {
    "federation.clients": 6, "federation.rounds": 1, "federation.batch_min": 2, "partition.alpha": 0.5,
    "data.limit": 14, "data.augment": ["crop(1)"], "model.norm": "batch", "model.dropout": 0.3,
    "engine.path": "sequential", "model.projector_dim": 4,
}  # fmt: skip


@pytest.mark.parametrize(
    "labels",
    [{"labels.rate": 0.4}, {"labels.rate": 0.5, "labels.per": "client"}, {"labels.rate": 0.0}],
    ids=["per sample", "per client", "none"],
)
def test_stacked_is_one_by_one(labels: dict[str, Any], tiny_config: Settings, tmp_path: Path) -> None:
    stack = ["fedlwf", "fedprox", "replay", "simclr", "supcon"]
    experiment = build(tiny_config({"strategy": stack, "labels.batch_size": 3, **MIXED, **labels}))
    node = experiment.node
    node.clients = ClientStore(tmp_path / "clients", 1 << 20)
    calls: list[Call] = []

    def send(call: Call) -> list[Any]:
        if call.header.function == "train":
            calls.append(call)
        return [node.handle(call)]

    callbacks = Callbacks(lambda state, measured: state, lambda state: state, lambda state, ended: None)
    Federation(node, experiment.stream, experiment.split, send, callbacks).run(initial_state(experiment))
    for call in calls:
        clients = [node.client(call, c) for c in call.header.clients if node.steps_size(call, c)]
        assert len(clients) > 2
        for one, (_, other) in zip(map(train_client, clients), train_cohort(clients).clients, strict=True):
            assert (one.steps, one.samples, one.dropped) == (other.steps, other.samples, other.dropped)
            assert set(one.losses) == set(other.losses)
            for name, array in one.arrays.items():
                torch.testing.assert_close(other.arrays[name], array, rtol=0, atol=1e-9)
            for name, value in one.losses.items():
                assert other.losses[name] == pytest.approx(value, abs=1e-9)
    bare = [c for c in clients if not len(c.ids)]
    assert bool(bare) is (labels["labels.rate"] == 0.0 or "labels.per" in labels)
    assert all("task" not in train_client(c).losses for c in bare)


def test_clients_without_labels_count_and_are_weighed_where_they_can_learn(tiny: Tiny) -> None:
    semi = {"labels.rate": 0.5, "labels.per": "client", "federation.rounds": 1, "scenario.tasks": 1}
    events = {}
    for stack in (["finetune"], ["finetune", "simclr"]):
        result = tiny({"strategy": stack, **semi})
        lines = (result.folder / "events.jsonl").read_text().splitlines()
        events[len(stack)] = [json.loads(line) for line in lines]
    rounds = {n: next(e for e in found if e["event"] == "round") for n, found in events.items()}
    notes = {n: [e["message"] for e in found if e["event"] == "warning"] for n, found in events.items()}
    split = build_again(result).split
    bare = [c for c in range(3) if not split.size(0, c)]
    assert len(bare) == 1
    assert rounds[1]["empty_clients"] == bare
    assert rounds[2]["empty_clients"] == []
    assert rounds[1]["samples"] == sum(split.size(0, c) for c in range(3))
    assert rounds[2]["samples"] == 120
    assert any(f"1 client has images but no label, they do not train: {bare[0]}" in note for note in notes[1])
    assert any(f"1 client has images but no label, they train on images alone: {bare[0]}" in n for n in notes[2])
    # the task loss is the mean over those that have one
    assert rounds[2]["losses"]["task"] > 1.5


class Stops(QuietProgress):
    """Ctrl-C after a number of rounds."""

    def __init__(self, after: int) -> None:
        super().__init__()
        self.left = after

    def round(self, *args: Any) -> None:
        self.left -= 1
        if not self.left:
            raise KeyboardInterrupt


@pytest.mark.parametrize("labels", [{"labels.rate": 0.3}, {"labels.rate": 0.0}])
def test_a_stopped_run_goes_on_to_the_same_bits(labels: dict[str, Any], tiny_config: Settings) -> None:
    stack = {"strategy": ["replay", "simclr"], "evaluate.probes": ["novelty", "clustering"], **labels}
    whole = execute(tiny_config(stack), progress=QuietProgress()).summary
    stopped = tiny_config(stack)
    with pytest.raises(Interrupted):
        execute(stopped, progress=Stops(3))
    folder = Path(stopped.output.dir) / stopped.name / "seed-0"
    again = resume(folder, progress=QuietProgress()).summary
    for key in ("model_sha256", "state_sha256", "split_sha256", "average_accuracy", "probes"):
        assert again[key] == whole[key]


def test_nodes_elsewhere_hide_the_same_labels(tiny_config: Settings, tmp_path: Path) -> None:
    from fedcl.runtimes.setup import Setup, build_node

    experiment = build(tiny_config({"labels.rate": 0.3, "engine.runtime": "ray", "engine.nodes": 1}))
    setup = Setup.from_json(Setup.of(experiment, tmp_path).to_json())
    node = build_node(setup, {})
    assert np.array_equal(node.store.labels, experiment.node.store.labels)
    assert np.flatnonzero(node.store.labels < 0).tolist() == experiment.split.hidden.tolist()


def test_a_source_of_both_kinds_is_refused(tiny: Tiny, plugin: Any) -> None:
    body = """
    def sources(self, ctx):
        return [Source(torch.cat([ctx.ids[:1], ctx.unlabelled[:1]]), 2)]
    """
    with pytest.raises(RunFailed, match="mixes labelled and unlabelled images"):
        tiny(plugin(body, **{"labels.rate": 0.5}))


def test_images_that_are_seen_once_have_their_labels_once(tiny: Tiny, oracle: ModuleType) -> None:
    once = {"federation.passes": "once", "labels.rate": 0.5, "strategy": ["finetune", "simclr"]}
    one, other = tiny({**once, "engine.path": "stacked"}), tiny({**once, "engine.path": "sequential"})
    assert oracle.distance(oracle.final(one), oracle.final(other)) < 1e-9


def test_only_images_that_a_client_can_train_on_fill_its_rounds(tiny_config: Settings) -> None:
    """Twenty images of each client and task, four of them labelled, in ten rounds."""
    settings = {"federation.passes": "once", "federation.rounds": 10, "partition.name": "iid", "labels.rate": 0.2}
    told = {
        stack: [text for text in build(tiny_config({**settings, "strategy": [stack]})).warnings if "passes" in text]
        for stack in ("finetune", "simclr")
    }
    assert [text.split(" a client")[0] for text in told["finetune"]] == ["federation.passes=once: in 6 cases"]
    assert not told["simclr"]  # it learns from the others, too
    none = build(tiny_config({**settings, "labels.rate": 0.0, "strategy": ["simclr"]})).warnings
    assert not any("passes" in text for text in none)


def test_bounds_and_absent_clients_keep_what_is_hidden(tiny_config: Settings) -> None:
    semi = {"labels.rate": 0.5, "federation.clients": 4}
    plain = build(tiny_config(semi)).split
    for stack in ("cumulative", "joint"):
        split = build(tiny_config({"strategy": [stack], **semi})).split
        assert split.hidden.tolist() == plain.hidden.tolist()
        assert set(np.concatenate(split.rows[1]).tolist()).isdisjoint(split.hidden.tolist())
        assert len(np.concatenate(split.rows[1])) == 120 - len(split.hidden)
    late = build(tiny_config({**semi, "time.joining": 0.5})).split
    assert all(not late.unlabelled_size(0, c) for c in range(4) if c not in late.present(0))
    assert replace(late, train=late.unlabelled or ()).rows
