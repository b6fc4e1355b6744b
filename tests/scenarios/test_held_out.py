"""Clients that never train: who they are, what they hold, and how the model does on them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fedcl import config as settings
from fedcl.build import build, load_model
from fedcl.errors import UsageError
from fedcl.measure.evaluation import Evaluator
from fedcl.partitioning import held_out_clients, partition_stream
from fedcl.scenarios.partitions.iid import IID
from fedcl.stream import Stage, Stream
from fedcl.streams.population import draw_population

NOTHING = np.empty(0, np.int64)


def stream_of(labels):
    """Each class to one of two tasks, ``class % 2``."""
    count = int(labels.max()) + 1
    stages = tuple(
        Stage(t, tuple(range(t, count, 2)), np.flatnonzero(labels % 2 == t), NOTHING, NOTHING) for t in range(2)
    )
    return Stream("given", tuple(range(count)), stages, count, labels, NOTHING)


def split(stream, clients, seed=0, **config):
    return partition_stream(stream, IID(), settings.Partition(name="iid", **config), clients, seed)


@pytest.mark.parametrize(
    ("asked", "clients", "count"), [(0, 9, 0), (2, 9, 2), (0.2, 10, 2), (0.21, 10, 3), (0.01, 3, 1)]
)
def test_how_many_are_held_out(asked, clients, count):
    assert held_out_clients(settings.Partition(held_out=asked), clients) == count


@pytest.mark.parametrize("test", ["global", "holdout(0.25)"])
def test_held_out_clients_hold_what_the_others_do_not(test):
    stream = stream_of(np.tile(np.arange(6), 20))
    whole = split(stream, 7, test=test)
    found = split(stream, 7, test=test, held_out=3)
    never = found.held_out
    assert (found.clients, never.clients, never.held_out) == (4, 3, None)
    for task, stage in enumerate(stream.stages):
        parts = [*found.rows[task], *never.rows[task]]
        if test == "global":
            assert np.sort(np.concatenate(parts)).tolist() == stage.train_ids.tolist()
        # the same clients as without anybody held out, under other numbers
        assert sorted(p.tolist() for p in parts) == sorted(p.tolist() for p in whole.rows[task])
    assert (never.test is None) == (test == "global")
    others = {
        tuple(tuple(r.tolist()) for r in split(stream, 7, seed, held_out=3).held_out.rows[0]) for seed in range(3)
    }
    assert len(others) == 3


def test_of_a_drawn_population_the_last_clients_are_held_out():
    stream = stream_of(np.tile(np.arange(6), 20))
    plain, config = settings.Partition(size=5), settings.Partition(size=5, held_out=2)
    whole = draw_population(stream, IID(), plain, 1000, 0)
    found = draw_population(stream, IID(), config, 1000, 0)
    assert (found.clients, len(found.train[0]), found.held_out.clients) == (998, 998, 2)
    assert [r.tolist() for r in found.held_out.rows[1]] == [whole.train[1][c].tolist() for c in (998, 999)]
    with pytest.raises(UsageError, match=r"partition\.held_out.*at most 10000"):
        draw_population(stream, IID(), settings.Partition(size=5, held_out=10_001), 10**6, 0)


@pytest.mark.parametrize("test", ["global", "same_mix", "holdout(0.5)"])
def test_newcomers_are_tested_and_never_trained(tiny, tiny_config, test):
    settings_ = {"federation.clients": 5, "partition.held_out": 2, "partition.test": test, "partition.min_size": 2}
    result = tiny(settings_)
    assert result.summary["num_clients"] == 3
    newcomers = result.summary["newcomers"]["average_accuracy"]
    assert newcomers["clients"] == 2
    experiment = build(tiny_config(settings_))
    never = experiment.split.held_out
    trained = {int(i) for task in experiment.split.rows for rows in task for i in rows}
    assert not trained & {int(i) for task in never.rows for rows in task for i in rows}
    # the final model by hand, on each newcomer's images
    model = load_model(result.folder).double()
    on_test = test == "same_mix"
    store = experiment.test if on_test else experiment.node.store
    means = []
    for client in range(2):
        per_task = []
        for task in never.rows if test == "global" else never.test:
            rows = task[client]
            if len(rows):
                with torch.no_grad():
                    scores = model(store.batch(torch.from_numpy(rows), torch.float64)).logits
                hits = int((scores.argmax(dim=1) == store.label_tensor[rows]).sum())
                per_task.append(hits / len(rows))
        means.append(sum(per_task) / len(per_task))
    assert newcomers["mean"] == pytest.approx(sum(means) / 2)
    evaluator = Evaluator(experiment.node, experiment.stream, experiment.split, experiment.test)
    known = evaluator.known(1)
    found = evaluator.newcomers(evaluator.predictor(dict(model.state_dict()), {}, known))
    assert [sum(t) for t in found["total"]] == [
        sum(len(task[c]) for task in (never.rows if test == "global" else never.test)) for c in range(2)
    ]


def test_a_stack_can_make_newcomers_models_of_their_own(tiny, tiny_config, plugin):
    """From their own training images of the latest task of which they hold any, and what the server knows."""
    settings_ = {
        "federation.clients": 5, "partition.held_out": 2, "partition.test": "holdout(0.5)", "partition.min_size": 2,
    }  # fmt: skip
    settings_ = plugin(
        """
        def finish_task(self, server):
            return Finished(server.arrays), {"task": torch.tensor(server.task)}

        def newcomer(self, predictor, images):
            images = list(images)
            labels = torch.cat([y for _, y in images])
            most = labels.bincount(minlength=len(predictor.known)).argmax()
            SEEN.append((int(predictor.state["task"]), sum(len(x) for x, _ in images), sorted(labels.tolist())))
            bias = predictor.arrays["head.bias"].clone()
            bias[most] = 1e6
            return {**predictor.arrays, "head.bias": bias}
        """,
        **settings_,
    )
    result = tiny(settings_)
    experiment = build(tiny_config(settings_))
    never, labels = experiment.split.held_out, experiment.stream.train_labels
    expected, shares = [], []
    for task in range(2):
        for client in range(2):
            held = [never.rows[t][client] for t in range(task + 1) if len(never.rows[t][client])]
            if held:
                expected.append((task, len(held[-1]), sorted(labels[held[-1]].tolist())))
    for client in range(2):
        held = [task[client] for task in never.rows if len(task[client])]
        most = np.bincount(labels[held[-1]]).argmax()
        per_task = [float((labels[task[client]] == most).mean()) for task in never.test if len(task[client])]
        shares.append(sum(per_task) / len(per_task))
    assert len(expected) > 2
    assert plugin.seen(settings_) == expected
    assert result.summary["newcomers"]["average_accuracy"]["mean"] == pytest.approx(sum(shares) / 2)


def test_without_held_out_clients_there_are_no_newcomers(tiny):
    assert tiny({}).summary["newcomers"] is None
