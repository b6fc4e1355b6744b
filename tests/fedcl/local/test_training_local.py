"""What stays at a client or is not trained: private and frozen parts, and the buffers of BatchNorm."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import pytest
import torch

from fedcl.errors import RunFailed

if TYPE_CHECKING:
    from fedcl.run import RunResult

Tiny = Callable[[Mapping[str, Any]], "RunResult"]
Moved = Callable[["RunResult"], set[str]]

PRIVATE_HEAD = """
    def share(self, name, model):
        return "private" if name.startswith("head.") else "shared"
"""


def test_private_parts_never_leave(tiny: Tiny, plugin: Any, moved: Moved) -> None:
    settings = plugin(
        PRIVATE_HEAD
        + """
    def end_round(self, ctx, trained, steps):
        received, own = ctx.received["head.weight"].clone(), trained["head.weight"].clone()
        SEEN.append((ctx.client, ctx.task, ctx.round, received, own))
        return {}, ctx.state
    """
    )
    shared = tiny({"name": "shared"})
    result = tiny(settings)
    encoder = (64 * 8 + 8) * 8
    assert result.summary["bytes_up"] == result.summary["bytes_down"] == 3 * 4 * encoder < shared.summary["bytes_up"]
    by_client: dict[int, list[Any]] = {}
    for client, *rest in plugin.seen(settings):
        by_client.setdefault(client, []).append(rest)
    for rounds in by_client.values():
        for (*_, trained), (task, round_, received, _) in itertools.pairwise(rounds):
            assert torch.equal(received[: len(trained)], trained)  # goes on with its own head, grown in a new task
            assert (len(received) > len(trained)) == (task == 1 and round_ == 0)
    last = [rounds[-1][3] for rounds in by_client.values()]
    assert not torch.equal(last[0], last[1])
    assert not {"head.weight", "head.bias"} & moved(result)


@pytest.mark.parametrize("test", ["same_mix", "holdout(0.2)"])
def test_private_heads_are_tested_at_their_clients(tiny: Tiny, plugin: Any, test: str) -> None:
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


def test_a_client_that_comes_late_starts_its_private_head_as_the_others_did(tiny: Tiny, plugin: Any) -> None:
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
    for client, task, head in plugin.seen(settings):
        first.setdefault(client, (task, head))
    assert len(first) == 3
    width = min(len(head) for _, head in first.values())
    assert all(torch.equal(head[:width], first[0][1][:width]) for _, head in first.values())


def test_frozen_parts_are_not_trained_and_do_not_come_up(tiny: Tiny, plugin: Any, moved: Moved) -> None:
    settings = plugin('def share(self, name, model):\n    return "frozen" if name.startswith("encoder.") else "shared"')
    result = tiny(settings)
    assert moved(result) == {"head.weight", "head.bias"}
    assert result.summary["bytes_up"] == 3 * 2 * ((8 * 5 + 5) + (8 * 10 + 10)) * 8


def test_a_wrong_answer_of_share_is_named(tiny: Tiny, plugin: Any) -> None:
    with pytest.raises(RunFailed, match=r"share\('encoder.* returned 'mine'; allowed are shared, private, frozen"):
        tiny(plugin('def share(self, name, model):\n    return "mine"'))


def test_a_previous_model_works_beside_private_parts(tiny: Tiny, plugin: Any) -> None:
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


def test_average_buffers_move_and_the_servers_are_not_written_by_a_round(tiny: Tiny, plugin: Any) -> None:
    settings = plugin(
        """
        def broadcast(self, server):
            SEEN.append({n: a for n, a in server.arrays.items()})
            SEEN.append({n: a.clone() for n, a in server.arrays.items()})
            return Broadcast({})
        """
    )
    result = tiny({**settings, **BATCH_NORM})
    notes = plugin.seen(settings)
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


def test_local_buffers_stay_at_their_clients(tiny: Tiny, plugin: Any) -> None:
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
        rounds = [n for n in plugin.seen(settings) if n[0] == client]
        assert rounds[0][1].abs().max() == 0
        assert all(torch.equal(a[2], b[1]) for a, b in itertools.pairwise(rounds))
    last = torch.stack([[n for n in plugin.seen(settings) if n[0] == client][-1][2] for client in range(3)])
    mean = next(a for n, a in result.model.named_buffers() if n.endswith("running_mean"))
    assert (mean >= last.amin(dim=0) - 1e-9).all()  # the global model is evaluated with their mean
    assert (mean <= last.amax(dim=0) + 1e-9).all()
    assert not torch.equal(last[0], last[1])
    assert result.summary["personal"] is not None
