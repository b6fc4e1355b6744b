"""Local training: batches, sources, randomness, hooks and what may leave a client, seen through small strategies."""

from __future__ import annotations

import itertools
import textwrap
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from fedcl.config import Config, Federation
from fedcl.errors import RunFailed
from fedcl.strategy import Source
from fedcl.training import cycle, epoch_batches, plan

if TYPE_CHECKING:
    from fedcl.run import RunResult

Tiny = Callable[[Mapping[str, Any]], "RunResult"]
Plugin = Callable[..., dict[str, Any]]

_numbers = itertools.count()

HEADER = """
import torch
from fedcl.strategy import *
from fedcl.strategy import Strategy, Source, Broadcast, Finished, cross_entropy

SEEN = []

class Probe(Strategy):
    name = "NAME"
"""


@pytest.fixture
def plugin(tmp_path: Path) -> Plugin:
    """``plugin(body)``: settings of a run with a strategy whose class body is ``body``; ``SEEN`` is its module's list."""

    def write(body: str, **settings: Any) -> dict[str, Any]:
        name = f"probe_{next(_numbers)}"
        path = tmp_path / f"{name}.py"
        path.write_text(HEADER.replace("NAME", name) + textwrap.indent(textwrap.dedent(body), "    "))
        return {"strategy": [name], "plugins": [str(path)], **settings}

    return write


def seen(settings: Mapping[str, Any]) -> list[Any]:
    """What the plugin of these settings noted in ``SEEN``."""
    import sys

    from fedcl import registry

    found = next(p for p in registry.plugins() if str(p.path) == str(Path(settings["plugins"][0]).resolve()))
    noted: list[Any] = sys.modules[found.module].SEEN
    return noted


def config(**federation: Any) -> Config:
    return Config(federation=Federation(**{"epochs": 1, **federation}))


# batches


def test_an_epoch_takes_every_image_once() -> None:
    batches = epoch_batches(10, 4, 1, False, 0)
    assert [len(b) for b in batches] == [4, 4, 2]
    assert sorted(torch.cat(batches).tolist()) == list(range(10))


@pytest.mark.parametrize(
    ("count", "settings", "sizes", "dropped"),
    [
        (10, {"batch_size": 4, "epochs": 2}, [4, 4, 2, 4, 4, 2], 0),
        (10, {"batch_size": 4, "epochs": 2, "drop_last": True}, [4, 4, 4, 4], 2),
        (9, {"batch_size": 4, "batch_min": 2}, [4, 4], 1),
        (10, {"batch_size": 4, "batch_min": 2}, [4, 4, 2], 0),
        (10, {"batch_size": 4, "epochs": None, "steps": 4}, [4, 4, 2, 4], 0),
        (10, {"batch_size": 4, "epochs": None, "steps": 2}, [4, 4], 0),
        (3, {"batch_size": 4, "epochs": None, "steps": 3}, [3, 3, 3], 0),
        (3, {"batch_size": 4, "drop_last": True}, [], 3),
        (1, {"batch_size": 4, "batch_min": 2, "epochs": None, "steps": 3}, [], 1),
        (0, {"batch_size": 4}, [], 0),
        (0, {"batch_size": 4, "epochs": None, "steps": 3}, [], 0),
    ],
)
def test_plan(count: int, settings: dict[str, Any], sizes: list[int], dropped: int) -> None:
    batches, left_out = plan(count, config(**settings), (0, "client"))
    assert ([len(b) for b in batches], left_out) == (sizes, dropped)


def test_steps_are_whole_epochs_one_after_another() -> None:
    batches, _ = plan(10, config(batch_size=4, epochs=None, steps=6), (0, "client"))
    epochs, _ = plan(10, config(batch_size=4, epochs=2), (0, "client"))
    assert all(torch.equal(a, b) for a, b in zip(batches, epochs, strict=True))
    first, second = torch.cat(batches[:3]), torch.cat(batches[3:])
    assert sorted(first.tolist()) == sorted(second.tolist()) == list(range(10))
    assert not torch.equal(first, second)


def test_cycle_goes_on_for_ever_and_repeats_nothing_within_a_batch() -> None:
    source = Source(torch.arange(100, 107), 3)
    drawn = list(itertools.islice(cycle(source, 0, "source"), 20))
    assert all(len(set(b.tolist())) == 3 for b in drawn)
    passes = [torch.cat(drawn[i : i + 2]).tolist() for i in range(0, 20, 2)]
    assert all(len(set(p)) == 6 for p in passes)  # a pass repeats nothing
    assert set(itertools.chain(*passes)) == set(range(100, 107))
    again = list(itertools.islice(cycle(source, 0, "source"), 20))
    assert all(torch.equal(a, b) for a, b in zip(drawn, again, strict=True))


def test_a_source_smaller_than_its_batch_is_taken_whole() -> None:
    batch = next(cycle(Source(torch.tensor([4, 9]), 32), 0))
    assert sorted(batch.tolist()) == [4, 9]


# what a step sees


def test_clients_without_a_large_enough_batch_are_idle_and_reported(tiny: Tiny) -> None:
    from fedcl.runfolder import RunFolder

    result = tiny({"federation.batch_min": 8, "federation.clients": 8, "federation.rounds": 1, "partition.alpha": 0.1,
                   "partition.min_size": 0})  # fmt: skip
    rounds = [e for e in RunFolder.view(result.folder).events() if e["event"] == "round"]
    assert any(e["idle_clients"] for e in rounds)
    assert any(e["empty_clients"] for e in rounds)
    assert all(not set(e["idle_clients"]) & set(e["empty_clients"]) for e in rounds)
    assert result.summary["dropped_images"] == sum(e["dropped_images"] for e in rounds) > 0


def test_a_round_in_which_nobody_can_train_keeps_the_model(tiny: Tiny) -> None:
    result = tiny({"federation.batch_size": 500, "federation.drop_last": True})
    assert result.summary["empty_rounds"] == 4
    assert result.summary["bytes_up"] == 0


def test_sources_are_appended_and_marked(tiny: Tiny, plugin: Plugin) -> None:
    settings = plugin(
        """
        def sources(self, ctx):
            return [Source(ctx.ids[:3], 2), Source(ctx.ids[:0], 5), Source(ctx.ids[:4], 3)]
        def loss(self, step):
            SEEN.append((step.batch.source.tolist(), step.batch.ids.tolist(), len(step.x), step.y.tolist()))
            return {}
        """
    )
    tiny({**settings, "federation.rounds": 1, "scenario.tasks": 1})
    for source, ids, images, labels in seen(settings):
        stream = source.count(0)
        assert source == [0] * stream + [1] * 2 + [2] * 3  # the empty source in between leaves no number
        assert images == len(ids) == len(labels) == stream + 5


def test_views_are_blocks_of_the_same_images_augmented_apart(tiny: Tiny, plugin: Plugin) -> None:
    settings = plugin(
        """
        def prepare(self, batch):
            return batch.repeat(2)
        def loss(self, step):
            half = len(step.x) // 2
            SEEN.append((step.batch.views, torch.equal(step.y[:half], step.y[half:]),
                         torch.equal(step.batch.ids[:half], step.batch.ids[half:]),
                         (step.x[:half] == step.x[half:]).flatten(1).all(dim=1).float().mean().item()))
            return {}
        """
    )
    tiny({**settings, "federation.rounds": 1, "scenario.tasks": 1, "data.augment": ["crop(2)"]})
    notes = seen(settings)
    assert all(note[:3] == (2, True, True) for note in notes)
    assert sum(note[3] for note in notes) / len(notes) < 0.3  # one of 25 crops is drawn twice now and then


def test_draws_differ_between_clients_tasks_rounds_steps_and_tags_and_repeat_within_a_step(
    tiny: Tiny, plugin: Plugin
) -> None:
    settings = plugin(
        """
        def loss(self, step):
            one = step.uniform((2,), "a")
            assert torch.equal(one, step.uniform((2,), "a"))
            SEEN.append(tuple(one.tolist()))
            SEEN.append(tuple(step.uniform((2,), "b").tolist()))
            return {}
        """
    )
    tiny(settings)
    assert len(seen(settings)) > 20
    assert len(set(seen(settings))) == len(seen(settings))


def test_two_passes_of_one_step_drop_other_features(tiny: Tiny, plugin: Plugin) -> None:
    settings = plugin(
        """
        def loss(self, step):
            first, second = step.forward(step.x).logits, step.forward(step.x).logits
            still = step.forward(step.x, mode="eval").logits
            SEEN.append((torch.equal(first, second), torch.equal(still, step.forward(step.x, mode="eval").logits)))
            return {}
        """
    )
    tiny({**settings, "model.dropout": 0.5, "federation.rounds": 1, "scenario.tasks": 1})
    assert set(seen(settings)) == {(False, True)}


def test_global_generators_are_neither_read_nor_written(tiny: Tiny) -> None:
    import random as python_random

    import numpy as np

    results = []
    for salt in (1, 2):
        torch.manual_seed(salt)
        np.random.seed(salt)  # noqa: NPY002
        python_random.seed(salt)
        before = torch.get_rng_state(), python_random.getstate(), np.random.get_state()[1].tolist()  # noqa: NPY002
        results.append(
            tiny({"model.dropout": 0.3, "data.augment": ["crop(1)"], "strategy": ["replay"]}).summary["model_sha256"]
        )
        assert torch.equal(before[0], torch.get_rng_state())
        assert before[1:] == (python_random.getstate(), np.random.get_state()[1].tolist())  # noqa: NPY002
    assert results[0] == results[1]


# failures name who and where


def test_a_loss_that_is_not_finite_names_client_and_term(tiny: Tiny, plugin: Plugin) -> None:
    settings = plugin(
        """
        def loss(self, step):
            bad = step.task == 1 and step.round == 1
            return {"good": step.x.sum() * 0, "odd": step.output.logits.sum() * (float("nan") if bad else 0.0)}
        """
    )
    with pytest.raises(RunFailed, match=r"^task 2, round 2, client 0: the loss is not finite \(probe_\d+.odd = nan\)"):
        tiny(settings)


def test_a_rate_that_is_too_high_is_a_clear_failure(tiny: Tiny) -> None:
    with pytest.raises(RunFailed, match=r"not finite"):
        tiny({"optimiser.lr": 1e200})


@pytest.mark.parametrize(
    ("hook", "arguments"),
    [
        ("share", "name"), ("sources", "ctx"), ("prepare", "batch"), ("task_loss", "step"), ("loss", "step"),
        ("edit_gradients", "step, grads"), ("after_step", "step, params"), ("end_round", "ctx, trained, steps"),
        ("begin_task", "server"), ("broadcast", "server"), ("after_aggregate", "server"), ("finish_task", "server"),
        ("predict", "predictor, x"),
    ],
)  # fmt: skip
def test_a_hook_that_raises_is_named_with_its_line(tiny: Tiny, plugin: Plugin, hook: str, arguments: str) -> None:
    settings = plugin(f"def {hook}(self, {arguments}):\n    raise LookupError('broken')")
    line = len(HEADER.splitlines()) + 2
    name = settings["strategy"][0]
    with pytest.raises(RunFailed) as caught:
        tiny(settings)
    assert str(caught.value) == f"strategy '{name}' failed in {hook}: LookupError: broken ({name}.py:{line})"


def test_an_exchanged_function_that_raises_is_named(tiny: Tiny, plugin: Plugin) -> None:
    settings = plugin(
        """
        def count(self, ctx):
            raise LookupError("broken")
        def finish_task(self, server):
            server.exchange(self.count)
        """
    )
    with pytest.raises(RunFailed, match=r"failed in count: LookupError: broken \(probe_\d+.py:\d+\)"):
        tiny(settings)


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("def begin_task(self, server):\n    return None", r"failed in begin_task"),
        ("def after_aggregate(self, server):\n    return server.arrays", r"failed in after_aggregate"),
        ("def after_aggregate(self, server):\n    return {}, {}", r"the new global model has no 'encoder"),
        (
            "def after_aggregate(self, server):\n    return {**server.arrays, 'x': torch.ones(1)}, {}",
            r"'x' has another",
        ),
        ("def finish_task(self, server):\n    return server.arrays, {}", r"failed in finish_task"),
        ("def end_round(self, ctx, trained, steps):\n    return {}", r"failed in end_round"),
        ("def loss(self, step):\n    return None", r"failed in loss"),
        (
            "def after_aggregate(self, server):\n    return {n: a / 0 for n, a in server.arrays.items()}, {}",
            r"the global model is not finite after task 1, round 1",
        ),
    ],
)
def test_a_hook_that_returns_something_else_is_one_line(tiny: Tiny, plugin: Plugin, body: str, words: str) -> None:
    with pytest.raises(RunFailed, match=words):
        tiny(plugin(body))


def test_a_term_that_is_no_scalar_is_refused(tiny: Tiny, plugin: Plugin) -> None:
    settings = plugin("def loss(self, step):\n    return {'wide': step.output.logits.sum(dim=1)}")
    with pytest.raises(RunFailed, match=r"loss term 'wide' has shape \(8,\), not a scalar"):
        tiny(settings)


def test_an_undeclared_upload_is_refused(tiny: Tiny, plugin: Plugin) -> None:
    settings = plugin("def end_round(self, ctx, trained, steps):\n    return {'images': ctx.ids}, ctx.state")
    with pytest.raises(RunFailed, match=r"'probe_\d+/images' leaves a client without a declared reduction"):
        tiny(settings)


def test_an_unknown_model_name_lists_the_known(tiny: Tiny, plugin: Plugin) -> None:
    settings = plugin("def loss(self, step):\n    step.forward(step.x, 'teacher')\n    return {}")
    with pytest.raises(RunFailed, match=r"no model is named 'teacher' here; there are received, stage:previous"):
        tiny(settings)


def test_batches_of_one_image_under_batch_norm_say_what_to_set(tiny: Tiny) -> None:
    with pytest.raises(RunFailed, match=r"set federation.batch_min=2 or model.norm=group"):
        tiny({"model.norm": "batch", "federation.batch_size": 1})


# hooks act


def test_edited_gradients_and_edited_parameters_take_effect(tiny: Tiny, plugin: Plugin) -> None:
    still = tiny(plugin("def edit_gradients(self, step, grads):\n    return {n: g * 0 for n, g in grads.items()}"))
    assert _moved(still) == set()
    head = tiny(
        plugin(
            "def edit_gradients(self, step, grads):\n    return {n: g if n == 'head.bias' else g * 0 for n, g "
            "in grads.items()}"
        )
    )
    assert _moved(head) == {"head.bias"}
    ones = tiny(
        plugin("def after_step(self, step, params):\n    return {n: p.clamp(-0.01, 0.01) for n, p in params.items()}")
    )
    assert max(p.abs().max().item() for p in ones.model.parameters()) < 0.010001


def _moved(result: RunResult) -> set[str]:
    """Parameters that the run changed; the tiny run's initial ones are drawn anew."""
    from fedcl.build import build
    from fedcl.config import load_config

    experiment = build(load_config(result.folder / "config.yaml"))
    final = {n: p.detach() for n, p in result.model.named_parameters()}
    first = {n: experiment.node.grown(n, a, 10, "initial") for n, a in experiment.initial.items()}
    return {n for n, p in final.items() if not torch.equal(p, first[n])}


def test_end_round_uploads_reach_after_aggregate(tiny: Tiny, plugin: Plugin) -> None:
    settings = plugin(
        """
        reductions = {"images": "sum", "steps": "max", "each": "stack"}
        def end_round(self, ctx, trained, steps):
            n = torch.tensor(len(ctx.ids))
            rounds = ctx.state.get("rounds", torch.tensor(0)) + 1
            return {"images": n, "steps": torch.tensor(steps), "each": n}, {"rounds": rounds}
        def after_aggregate(self, server):
            up = server.uploads
            SEEN.append((int(up["images"]), int(up["steps"]), up["each"].tolist(), server.rounds_done))
            return server.arrays, {"total": server.state.get("total", torch.tensor(0)) + up["images"]}
        def ask(self, ctx):
            SEEN.append(("rounds", ctx.client, int(ctx.state["rounds"]), float(ctx.down["word"])))
            return {}, ctx.state
        def finish_task(self, server):
            server.exchange(self.ask, "all", {"word": torch.tensor(2.5)})
            return Finished(server.arrays), server.state
        """
    )
    tiny(settings)
    notes = seen(settings)
    rounds = [n for n in notes if n[0] != "rounds"]
    assert [n[3] for n in rounds] == [0, 1, 2, 3]
    assert all(total == sum(each) == 60 and len(each) == 3 for total, _, each, _ in rounds)
    assert all(steps == -(-max(each) // 8) for _, steps, each, _ in rounds)
    assert [n[1:] for n in notes if n[0] == "rounds"] == [(k, 2 * t, 2.5) for t in (1, 2) for k in range(3)]


def test_an_exchange_within_broadcast_is_counted_and_numbered(tiny: Tiny, plugin: Plugin) -> None:
    settings = plugin(
        """
        reductions = {"n": "sum"}
        def count(self, ctx):
            SEEN.append((ctx.client, int(ctx.state.get("asked", torch.tensor(0)))))
            return {"n": torch.tensor(1)}, {"asked": ctx.state.get("asked", torch.tensor(0)) + 1}
        def broadcast(self, server):
            return Broadcast({"n": server.exchange(self.count)["n"]})
        def end_round(self, ctx, trained, steps):
            assert int(ctx.down["n"]) == 3
            return {}, ctx.state
        """
    )
    result = tiny(settings)
    assert seen(settings) == [(k, asked) for asked in range(4) for k in range(3)]
    plain = tiny({"name": "plain"})
    assert result.summary["bytes_up"] - plain.summary["bytes_up"] == 4 * 3 * 8


def test_a_state_that_is_emptied_stays_empty(tiny: Tiny, plugin: Plugin) -> None:
    settings = plugin(
        """
        def end_round(self, ctx, trained, steps):
            SEEN.append((ctx.client, sorted(ctx.state)))
            return {}, ({} if ctx.state else {"a": torch.ones(1)})
        """
    )
    tiny(settings)
    assert [names for client, names in seen(settings) if client == 0] == [[], ["a"], [], ["a"]]


def test_broadcast_arrays_are_seen_by_their_own_strategy_only(tiny: Tiny, plugin: Plugin) -> None:
    body = """
        def broadcast(self, server):
            return Broadcast({"a": torch.tensor(VALUE)})
        def loss(self, step):
            assert step.down["a"].item() == VALUE and len(step.down) == 1
            return {}
        """
    one, two = plugin(body.replace("VALUE", "1.0")), plugin(body.replace("VALUE", "2.0"))
    tiny({"strategy": one["strategy"] + two["strategy"], "plugins": one["plugins"] + two["plugins"]})


# what stays at a client

PRIVATE_HEAD = """
    def share(self, name):
        return "private" if name.startswith("head.") else "shared"
"""


def test_private_parts_never_leave(tiny: Tiny, plugin: Plugin) -> None:
    settings = plugin(
        PRIVATE_HEAD
        + """
    def end_round(self, ctx, trained, steps):
        SEEN.append((ctx.client, ctx.task, ctx.round, ctx.received["head.weight"].clone(), trained["head.weight"].clone()))
        return {}, ctx.state
    """
    )
    shared = tiny({"name": "shared"})
    result = tiny(settings)
    encoder = (64 * 8 + 8) * 8
    assert result.summary["bytes_up"] == result.summary["bytes_down"] == 3 * 4 * encoder < shared.summary["bytes_up"]
    by_client: dict[int, list[Any]] = {}
    for client, *rest in seen(settings):
        by_client.setdefault(client, []).append(rest)
    for rounds in by_client.values():
        for (*_, trained), (task, round_, received, _) in itertools.pairwise(rounds):
            assert torch.equal(received[: len(trained)], trained)  # goes on with its own head, grown in a new task
            assert (len(received) > len(trained)) == (task == 1 and round_ == 0)
    last = [rounds[-1][3] for rounds in by_client.values()]
    assert not torch.equal(last[0], last[1])
    assert not {"head.weight", "head.bias"} & _moved(result)


@pytest.mark.parametrize("test", ["same_mix", "holdout(0.2)"])
def test_private_heads_are_tested_at_their_clients(tiny: Tiny, plugin: Plugin, test: str) -> None:
    settings = plugin(
        PRIVATE_HEAD,
        **{"partition.test": test, "data.limit": 40, "federation.epochs": 4, "scenario.tasks": 1},
    )
    result = tiny(settings)
    personal = result.summary["personal"]
    accuracy = personal["average_accuracy"]
    assert accuracy["weighted_mean"] > result.summary["average_accuracy"] + 0.1  # a head of one's own was trained
    assert 0.0 <= accuracy["worst_decile"] <= accuracy["weighted_mean"] <= 1.0
    assert accuracy["std"] >= 0.0


def test_personal_metrics_without_private_parts_are_of_the_global_model(tiny: Tiny) -> None:
    result = tiny({"partition.test": "holdout(0.2)", "data.limit": 40})
    assert result.summary["personal"]["average_accuracy"]["weighted_mean"] is not None
    assert tiny({"name": "none"}).summary["personal"] is None


def test_a_client_that_comes_late_starts_its_private_head_as_the_others_did(tiny: Tiny, plugin: Plugin) -> None:
    settings = plugin(
        PRIVATE_HEAD
        + """
    def end_round(self, ctx, trained, steps):
        SEEN.append((ctx.client, ctx.task, ctx.received["head.weight"].clone()))
        return {}, ctx.state
    """,
        **{"federation.participation": 0.34, "federation.rounds": 6, "partition.test": "same_mix"},
    )
    tiny(settings)
    first: dict[int, tuple[int, torch.Tensor]] = {}
    for client, task, head in seen(settings):
        first.setdefault(client, (task, head))
    assert len(first) == 3
    width = min(len(head) for _, head in first.values())
    assert all(torch.equal(head[:width], first[0][1][:width]) for _, head in first.values())


def test_frozen_parts_are_not_trained_and_do_not_come_up(tiny: Tiny, plugin: Plugin) -> None:
    settings = plugin('def share(self, name):\n    return "frozen" if name.startswith("encoder.") else "shared"')
    result = tiny(settings)
    assert _moved(result) == {"head.weight", "head.bias"}
    assert result.summary["bytes_up"] == 3 * 2 * ((8 * 5 + 5) + (8 * 10 + 10)) * 8


def test_a_wrong_answer_of_share_is_named(tiny: Tiny, plugin: Plugin) -> None:
    with pytest.raises(RunFailed, match=r"share\('encoder.* returned 'mine'; allowed are shared, private, frozen"):
        tiny(plugin('def share(self, name):\n    return "mine"'))


def test_a_previous_model_works_beside_private_parts(tiny: Tiny, plugin: Plugin) -> None:
    settings = plugin(
        PRIVATE_HEAD
        + """
    needs_previous = True
    def loss(self, step):
        if step.task:
            features = step.forward(step.x, "stage:previous").features
            return {"keep": (step.output.features - features).square().mean()}
        return {}
    """
    )
    result = tiny(settings)
    encoder = (64 * 8 + 8) * 8
    assert result.summary["bytes_down"] == 3 * 4 * encoder  # the teacher's encoder is the model's in its first round


# BatchNorm

BATCH_NORM = {"model.norm": "batch", "federation.batch_min": 2}
RUNNING = ["running_mean", "running_var", "num_batches_tracked"]


def test_average_buffers_move_and_the_servers_are_not_written_by_a_round(tiny: Tiny, plugin: Plugin) -> None:
    settings = plugin(
        """
        def broadcast(self, server):
            SEEN.append({n: a for n, a in server.arrays.items()})
            SEEN.append({n: a.clone() for n, a in server.arrays.items()})
            return Broadcast({})
        """
    )
    result = tiny({**settings, **BATCH_NORM})
    notes = seen(settings)
    for kept, copy in zip(notes[::2], notes[1::2], strict=True):
        assert all(torch.equal(kept[n], copy[n]) for n in kept)
    buffers = dict(result.model.named_buffers())
    assert any(n.endswith("running_mean") and a.abs().max() > 0 for n, a in buffers.items())
    counts = [a for n, a in buffers.items() if n.endswith("num_batches_tracked")]
    assert all(a.dtype == torch.int64 and a > 0 for a in counts)


def test_frozen_buffers_stay(tiny: Tiny) -> None:
    result = tiny({**BATCH_NORM, "model.batch_norm": "frozen"})
    for name, buffer in result.model.named_buffers():
        expected = 1.0 if name.endswith("running_var") else 0.0
        assert (buffer == expected).all(), name


def test_local_buffers_stay_at_their_clients(tiny: Tiny, plugin: Plugin) -> None:
    settings = plugin(
        """
        def end_round(self, ctx, trained, steps):
            name = next(n for n in trained if n.endswith("running_mean"))
            SEEN.append((ctx.client, ctx.received[name].clone(), trained[name].clone()))
            return {}, ctx.state
        """
    )
    result = tiny({**settings, **BATCH_NORM, "model.batch_norm": "local", "partition.test": "same_mix"})
    for client in range(3):
        rounds = [n for n in seen(settings) if n[0] == client]
        assert rounds[0][1].abs().max() == 0
        assert all(torch.equal(a[2], b[1]) for a, b in itertools.pairwise(rounds))
    assert all(
        (buffer == (1.0 if n.endswith("running_var") else 0.0)).all() for n, buffer in result.model.named_buffers()
    )
    assert result.summary["personal"] is not None
