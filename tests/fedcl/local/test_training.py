"""Local training: batches, sources, randomness and what a step sees."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from fedcl.config import Config, Federation
from fedcl.local.order import cycle, epoch_batches, plan
from fedcl.strategy import Source

if TYPE_CHECKING:
    from fedcl.run import RunResult

Tiny = Callable[[Mapping[str, Any]], "RunResult"]


def config(**federation: Any) -> Config:
    return Config(federation=Federation(**{"epochs": 1, **federation}))


# batches


def test_an_epoch_takes_every_image_once() -> None:
    batches = epoch_batches(10, 4, 1, False, 0)
    assert [len(b) for b in batches] == [4, 4, 2]
    assert sorted(np.concatenate(batches).tolist()) == list(range(10))


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
    assert all(np.array_equal(a, b) for a, b in zip(batches, epochs, strict=True))
    first, second = np.concatenate(batches[:3]), np.concatenate(batches[3:])
    assert sorted(first.tolist()) == sorted(second.tolist()) == list(range(10))
    assert not np.array_equal(first, second)


def test_cycle_goes_on_for_ever_and_repeats_nothing_within_a_batch() -> None:
    source = Source(torch.arange(100, 107), 3)
    drawn = list(itertools.islice(cycle(source, 0, "source"), 20))
    assert all(len(set(b.tolist())) == 3 for b in drawn)
    passes = [torch.cat(drawn[i : i + 2]).tolist() for i in range(0, 20, 2)]
    assert all(len(set(p)) == 6 for p in passes)  # a pass repeats nothing
    assert set(itertools.chain(*passes)) == set(range(7))
    again = list(itertools.islice(cycle(source, 0, "source"), 20))
    assert all(torch.equal(a, b) for a, b in zip(drawn, again, strict=True))


def test_a_source_smaller_than_its_batch_is_taken_whole() -> None:
    batch = next(cycle(Source(torch.tensor([4, 9]), 32), 0))
    assert sorted(batch.tolist()) == [0, 1]


# what a step sees


def test_clients_without_a_large_enough_batch_are_idle_and_reported(tiny: Tiny) -> None:
    from fedcl.records.runfolder import RunFolder

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


def test_sources_are_appended_and_marked(tiny: Tiny, plugin: Any) -> None:
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
    for source, ids, images, labels in plugin.seen(settings):
        stream = source.count(0)
        assert source == [0] * stream + [1] * 2 + [2] * 3  # the empty source in between leaves no number
        assert images == len(ids) == len(labels) == stream + 5


def test_views_are_blocks_of_the_same_images_augmented_apart(tiny: Tiny, plugin: Any) -> None:
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
    notes = plugin.seen(settings)
    assert all(note[:3] == (2, True, True) for note in notes)
    assert sum(note[3] for note in notes) / len(notes) < 0.3  # one of 25 crops is drawn twice now and then


def test_draws_differ_between_clients_tasks_rounds_steps_and_tags_and_repeat_within_a_step(
    tiny: Tiny, plugin: Any
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
    tiny({**settings, "evaluate.flops": False})  # a step that is done again draws the same
    assert len(plugin.seen(settings)) > 20
    assert len(set(plugin.seen(settings))) == len(plugin.seen(settings))


def test_two_passes_of_one_step_drop_other_features(tiny: Tiny, plugin: Any) -> None:
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
    assert set(plugin.seen(settings)) == {(False, True)}


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
