"""Cumulative and joint streams: all images so far, with the same clients, and how they stand to the bounds."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from fedcl import config as settings
from fedcl import registry
from fedcl.build import build
from fedcl.errors import UsageError
from fedcl.partitioning import partition_stream
from fedcl.scenarios.cumulative import Cumulative, Joint
from fedcl.scenarios.new_instances import NewInstances
from fedcl.stream import DatasetLabels

if TYPE_CHECKING:
    from fedcl.config import Config
    from fedcl.run import RunResult

Configure = Callable[[Mapping[str, Any]], "Config"]
Run = Callable[[Mapping[str, Any]], "RunResult"]


def streams(seed: int, tasks: int, of: str) -> list[Any]:
    """The plain stream, and the cumulative and the joint one of it."""
    data = DatasetLabels(np.arange(120) % 10, np.arange(40) % 10, 10)
    config = settings.Scenario(name=of, tasks=tasks)
    plain = registry.load("scenarios", of)().build(data, config, 0.2, seed)
    changed = [
        cls().build(data, settings.Scenario(name=cls.name, of=[of], tasks=tasks), 0.2, seed)
        for cls in (Cumulative, Joint)
    ]
    return [plain, *changed]


@hypothesis_settings(max_examples=12, deadline=None)
@given(seed=st.integers(0, 2**40), tasks=st.integers(1, 5), of=st.sampled_from(["class_incremental", "new_instances"]))
def test_rows_and_columns(seed: int, tasks: int, of: str) -> None:
    plain, cumulative, joint = streams(seed, tasks, of)
    everything: set[int] = set()
    for before, after in zip(plain.stages, cumulative.stages, strict=True):
        everything |= set(before.train_ids.tolist())
        assert after.train_ids.tolist() == sorted(everything)
        assert after.test_ids.tolist() == before.test_ids.tolist()
        assert after.validation_ids.tolist() == before.validation_ids.tolist()
        assert after.classes == before.classes
    (whole,) = joint.stages
    assert whole.train_ids.tolist() == sorted(everything)
    assert whole.classes == plain.known(tasks - 1)
    for name in ("test_ids", "validation_ids"):
        assert getattr(whole, name).tolist() == sorted(
            np.concatenate([getattr(s, name) for s in plain.stages]).tolist()
        )
    assert plain.class_order == cumulative.class_order == joint.class_order
    assert cumulative.repeats == (tasks > 1)
    assert not plain.repeats
    assert not joint.repeats


@hypothesis_settings(max_examples=15, deadline=None)
@given(
    seed=st.integers(0, 2**40), rule=st.sampled_from(["iid", "dirichlet", "shards", "quantity_skew", "natural"]),
    clients=st.integers(1, 5),
)  # fmt: skip
def test_a_client_keeps_its_images(seed: int, rule: str, clients: int) -> None:
    plain, cumulative, _ = streams(seed, 3, "class_incremental")
    partition = registry.load("partitions", rule)()
    config = settings.Partition(name=rule, column="writer" if rule == "natural" else "")
    columns = {"writer": np.arange(120) * 7 % 11}
    before, after = (
        partition_stream(stream, partition, config, clients, seed, columns).rows for stream in (plain, cumulative)
    )
    for task in range(3):
        for client in range(clients):
            held = np.concatenate([before[t][client] for t in range(task + 1)])
            assert after[task][client].tolist() == np.sort(held).tolist()


def test_with_finetune_it_is_the_bound(tiny: Run) -> None:
    scenario = tiny({"scenario.name": "cumulative", "scenario.tasks": 3})
    bound = tiny({"strategy": ["cumulative"], "scenario.tasks": 3})
    assert scenario.matrix == bound.matrix
    assert scenario.summary["model_sha256"] == bound.summary["model_sha256"]
    assert scenario.summary["bytes_up"] == bound.summary["bytes_up"]


def test_means_of_old_images_are_superseded(tiny: Run, tiny_config: Configure) -> None:
    from fedcl.records.checkpoint import load_newest

    overrides = {"scenario.name": "cumulative", "scenario.tasks": 3, "strategy": ["nearest_mean"]}
    found = load_newest(tiny(overrides).folder / "checkpoints", lambda text: None)
    assert found is not None
    stream = build(tiny_config(overrides)).stream
    counts = np.bincount(stream.train_labels[stream.stages[-1].train_ids])
    assert found.arrays["strategy/nearest_mean/counts"].tolist() == counts.tolist()


def test_joint_is_one_task_of_all_clients(tiny: Run) -> None:
    joint, plain = tiny({"scenario.name": "joint", "scenario.tasks": 5}), tiny({"scenario.tasks": 1})
    assert joint.summary["model_sha256"] == plain.summary["model_sha256"]
    assert (joint.summary["num_tasks"], joint.summary["num_clients"]) == (1, 3)
    assert joint.summary["bytes_up"] > 0
    assert {"forgetting", "backward_transfer"} <= set(joint.summary["undefined"])


@pytest.mark.parametrize(
    ("overrides", "key", "text"),
    [
        ({"partition.test": "holdout(0.2)"}, "partition.test", "a later task trains on the images again"),
        ({"partition.size": 5, "partition.name": "iid"}, "partition.size", "whose tasks hold images of earlier ones"),
        ({"scenario.name": "noisy_labels", "scenario.of": ["cumulative"]}, "scenario.of", "of=[noisy_labels]"),
        ({"scenario.of": ["cumulative"]}, "scenario.of", "other scenarios than cumulative itself"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(
    tiny_config: Configure, overrides: dict[str, Any], key: str, text: str
) -> None:
    with pytest.raises(UsageError) as caught:
        build(tiny_config({"scenario.name": "cumulative", **overrides}))
    assert caught.value.key == key
    assert text in str(caught.value)


def test_a_long_tail_over_it_thins_each_class_once(tiny_config: Configure) -> None:
    overrides = {"scenario.imbalance": 4.0, "scenario.tasks": 2}
    both = [
        build(tiny_config({"scenario.name": name, "scenario.of": [of], **overrides})).stream
        for name, of in (("long_tailed", "cumulative"), ("cumulative", "long_tailed"))
    ]
    for one, other in zip(both[0].stages, both[1].stages, strict=True):
        assert one.train_ids.tolist() == other.train_ids.tolist()


def test_instances_are_dealt_once() -> None:
    data = DatasetLabels(np.arange(60) % 6, np.arange(12) % 6, 6)
    plain = NewInstances().build(data, settings.Scenario(name="new_instances", tasks=2), 0.0, 0)
    assert not plain.repeats
