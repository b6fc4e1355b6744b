"""cRT: class-balanced samples over all clients, and the head that a plain loop over the clients gives."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedcl import random as counter
from fedcl.errors import UsageError
from fedcl.strategies.calibration._balanced import BalancedHead, oversampled


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 3), min_size=1, max_size=40), st.integers(1, 4), st.integers(0, 99))
def test_clients_samples_together_hold_every_class_alike(labels: list[int], clients: int, seed: int) -> None:
    """Each image stands n_max / n_c times, rounded to one of the whole numbers beside it."""
    y = torch.tensor(labels)
    counts = torch.bincount(y, minlength=5)
    for client in range(clients):
        own = y[client::clients]
        times = Counter(oversampled(own, counts, seed, client).tolist())
        for place, label in enumerate(own.tolist()):
            wanted = int(counts.max()) / int(counts[label])
            assert math.floor(wanted) <= times[place] <= math.ceil(wanted)


def test_the_rounding_is_right_on_average_and_exact_where_it_can_be() -> None:
    labels, counts = torch.tensor([0] * 5 + [1] * 2 + [2]), torch.tensor([5, 2, 1])
    drawn = [Counter(labels[oversampled(labels, counts, seed)].tolist()) for seed in range(400)]
    assert all(one[0] == 5 and one[2] == 5 for one in drawn)
    assert {one[1] for one in drawn} <= {4, 5, 6}
    assert sum(one[1] for one in drawn) / 400 == pytest.approx(5.0, abs=0.15)


def test_classes_that_nobody_has_counted_are_left_out() -> None:
    assert oversampled(torch.tensor([0, 1]), torch.tensor([3, 0]), "name").tolist() == [0]
    assert oversampled(torch.tensor([1]), torch.tensor([0, 0]), "name").tolist() == []


@pytest.mark.parametrize(
    "changes",
    [
        {"scenario.tasks": 1, "scenario.name": "long_tailed", "scenario.imbalance": 6},
        {"federation.clients": 1, "scenario.tasks": 1},
        {},
    ],
    ids=["long tail", "one client", "two tasks"],
)
def test_crt_equals_the_literal_loop(
    tiny: Any, tiny_config: Any, oracle: Any, after: Any, changes: dict[str, Any]
) -> None:
    run = {"strategy": ["crt"], "options.crt.epochs": 2, **changes}
    world, w = after.trained(tiny_config, oracle, run)
    task = len(world.known) - 1
    rows = world.new[task]
    seed = counter.fold(*after.key(world), "crt", "rows")
    start = {n: w[n].clone() for n in ("head.weight", "head.bias")}
    for c in rows:
        width = w["head.weight"].shape[1]
        for n, size in (("weight", width), ("bias", 1)):
            drawn = (2 * counter.uniform(size, seed, "init", "head", n, c) - 1) / math.sqrt(width)
            start[f"head.{n}"][c] = torch.from_numpy(drawn.astype(np.float32)).squeeze().to(torch.float64)
    fitted = after.retrained(
        world, w, task, 2, "crt", start,
        lambda leaf, z: leaf["head.weight"] @ z + leaf["head.bias"], 2, 5e-4,
    )  # fmt: skip
    found = after.ended(tiny(run), "crt")
    assert oracle.distance(found.model, w) < 1e-10
    for n in fitted:
        torch.testing.assert_close(found.evaluated[n][rows], fitted[n][rows], rtol=0, atol=1e-9)
        others = [c for c in world.known[task] if c not in rows]
        assert torch.equal(found.evaluated[n][others], found.model[n][others])
    assert float((found.evaluated["head.weight"] - found.model["head.weight"])[rows].abs().min()) > 1e-6


def test_no_epoch_draws_a_new_head(tiny: Any, after: Any) -> None:
    found = after.ended(tiny({"strategy": ["crt"], "options.crt.epochs": 0}), "crt")
    assert float(found.evaluated["head.weight"][5:].abs().max()) <= 1 / math.sqrt(8)
    assert not torch.equal(found.evaluated["head.weight"][5:], found.model["head.weight"][5:])
    assert torch.equal(found.evaluated["encoder.1.weight"], found.model["encoder.1.weight"])


def test_a_cosine_head_is_trained_again(tiny: Any, after: Any) -> None:
    found = after.ended(tiny({"strategy": ["crt"], "model.head": "cosine", "options.crt.epochs": 1}), "crt")
    assert not torch.equal(found.evaluated["head.weight"], found.model["head.weight"])


def test_the_next_task_starts_from_the_new_head_when_asked(tiny: Any, oracle: Any, after: Any) -> None:
    found = after.ended(tiny({"strategy": ["crt"], "options.crt.use": "training"}), "crt")
    assert not found.evaluated
    assert not torch.allclose(found.model["encoder.1.weight"], oracle.final(tiny({}))["encoder.1.weight"])


def test_a_task_whose_images_have_passed_is_refused(tiny: Any) -> None:
    with pytest.raises(UsageError, match="train the head again"):
        tiny({"strategy": ["crt"], "federation.passes": "once"})


def test_hard_settings(tiny: Any, hard: dict[str, Any]) -> None:
    found = tiny({"strategy": ["crt"], "options.crt.epochs": 1, **hard})
    assert all(value is None or 0 <= value <= 1 for row in found.matrix for value in row)
    assert found.summary["status"] == "done"


@pytest.mark.parametrize(("key", "value"), [("epochs", -1), ("lr", 0.0), ("batch_size", -1), ("use", "both")])
def test_wrong_options(tiny: Any, key: str, value: object) -> None:
    with pytest.raises(UsageError) as caught:
        tiny({"strategy": ["crt"], f"options.crt.{key}": value})
    assert "\n" not in str(caught.value)
    assert key in str(caught.value)


def test_the_base_fits_nothing_of_its_own() -> None:
    for hook in (BalancedHead().start, BalancedHead().joined):
        with pytest.raises(NotImplementedError):
            hook(None, {}, None)  # type: ignore[arg-type]
