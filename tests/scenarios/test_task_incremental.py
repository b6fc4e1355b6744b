"""Task-incremental streams: heads of their own in the loss and at test, against literal loops."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from fedcl.build import build
from fedcl.errors import UsageError

if TYPE_CHECKING:
    from fedcl.config import Config
    from fedcl.run import RunResult

Configure = Callable[[Mapping[str, Any]], "Config"]
Run = Callable[[Mapping[str, Any]], "RunResult"]

TIL = {"scenario.name": "task_incremental", "scenario.tasks": 3}
DEFAULT = {
    "strategy": ["fedlwf", "nearest_mean", "supcon", "weight_aligning"],
    "options.weight_aligning.clip": False,
    "model.head_bias": False,
}


def own(world: Any, task: int, label: int) -> list[int]:
    """The classes of the task that first shows a class."""
    return next(world.new[t] for t in range(task + 1) if label in world.new[t])


def masked(oracle: Any, scores: Any, y: list[int], local: Any) -> Any:
    """Cross entropy, each image among the classes of its own task."""
    parts = [
        oracle.cross_entropy(scores[i : i + 1], [label], own(local.world, local.task, label))
        for i, label in enumerate(y)
    ]
    return torch.stack(parts).mean()


def by_heads(oracle: Any, local: Any, x: Any, scores: Any, form: Callable[..., Any]) -> Any:
    """A term summed over the heads of the earlier tasks."""
    teacher = oracle.logits(local.previous, x)
    return sum(form(scores, teacher, local.world.new[t]) for t in range(local.task))


@pytest.mark.parametrize("strategy", ["finetune", "finetune_masked", "fedlwf", "fedlwf, known", "weight_aligning"])
def test_whole_run_equals_the_literal_loop(tiny: Run, tiny_config: Configure, oracle: Any, strategy: str) -> None:
    def lwf(scores: Any, teacher: Any, classes: list[int]) -> Any:
        return oracle.soft_cross_entropy(scores, teacher, classes, 2.0)

    def kl(scores: Any, teacher: Any, classes: list[int]) -> Any:
        return 4.0 * (lwf(scores, teacher, classes) - oracle.entropy(teacher, classes, 2.0))

    def loss(w: Any, x: Any, y: list[int], local: Any) -> Any:
        scores = oracle.logits(w, x)
        value = masked(oracle, scores, y, local)
        if local.task == 0 or strategy.startswith("finetune"):
            return value
        if strategy.startswith("fedlwf"):
            return value + 3.0 * by_heads(oracle, local, x, scores, lwf)
        share = len(local.old) / len(local.known)
        return (1 - share) * value + share * by_heads(oracle, local, x, scores, kl)

    name, _, task = strategy.partition(", ")
    settings = {**TIL, "strategy": [name]} | ({"options.fedlwf.task": task} if task else {})
    settings |= {"options.weight_aligning.clip": False} if name == "weight_aligning" else {}
    expected = oracle.federated(tiny_config(settings), oracle.Method(loss))
    assert oracle.distance(oracle.final(tiny(settings)), expected) < 1e-10


def test_images_of_a_memory_keep_their_own_head(oracle: Any) -> None:
    """A step with images of three tasks, and its gradient: a head without an image of its task has none."""
    from fedcl.strategy import Strategy

    w = oracle.leaves(oracle.model(5, 4, 7, 0))
    x = torch.randn(4, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    step = oracle.step(w, x, [0, 3, 1, 3], known=list(range(7)), new=[5, 6], task=2)
    object.__setattr__(step, "heads", torch.tensor([0, 0, 1, 1, 1, 2, 2]))
    scores = oracle.logits(w, x)
    groups = [[0, 1], [2, 3, 4], [0, 1], [2, 3, 4]]
    parts = [oracle.cross_entropy(scores[i : i + 1], [y], groups[i]) for i, y in enumerate([0, 3, 1, 3])]
    found = Strategy().task_loss(step)
    assert found.item() == pytest.approx(torch.stack(parts).mean().item(), abs=1e-12)
    rows = torch.autograd.grad(found, w["head.weight"])[0]
    assert bool((rows[:5] != 0).any(dim=1).all())
    assert not rows[5:].any()


@pytest.mark.parametrize("stack", [["finetune"], ["replay"], ["nearest_mean"], ["fedewc"]])
def test_every_column_is_among_the_classes_of_its_task(
    tiny: Run, tiny_config: Configure, oracle: Any, stack: list[str]
) -> None:
    """The last row of the matrix by hand, and that the row before differs where a task is not learned yet."""
    settings = {**TIL, "strategy": stack, "federation.rounds": 3}
    result, experiment = tiny(settings), build(tiny_config(settings))
    w = {n: a.to(torch.float64) for n, a in oracle.final(result).items()}
    for stage in experiment.stream.stages:
        images = experiment.test.batch(torch.from_numpy(stage.test_ids), torch.float64).flatten(1)
        labels = experiment.stream.test_labels[stage.test_ids].tolist()
        scores = oracle.logits(w, images)
        guessed = [max(stage.classes, key=lambda c: float(row[c])) for row in scores]
        right = np.mean([g == y for g, y in zip(guessed, labels, strict=True)])
        if stack != ["nearest_mean"]:
            assert result.matrix[-1][stage.index] == pytest.approx(right, abs=1e-12)
    if stack == ["nearest_mean"]:
        assert [row[j] for i, row in enumerate(result.matrix) for j in range(i + 1, 3)] == [0.0] * 3
        assert "forward_transfer" in result.summary["undefined"]
    else:
        assert result.summary["forward_transfer"] is not None


def test_a_task_that_is_not_learned_yet_is_scored_by_initial_rows(
    tiny: Run, tiny_config: Configure, oracle: Any
) -> None:
    """With a learning rate of nearly 0 nothing is learned: every row of the matrix is the untrained model's."""
    settings = {**TIL, "optimiser.lr": 1e-300, "model.head_bias": False}
    result, config = tiny(settings), tiny_config(settings)
    experiment, world = build(config), oracle.World.of(config)
    w = oracle.grown(world.start, world, 10)
    row = []
    for stage in experiment.stream.stages:
        images = experiment.test.batch(torch.from_numpy(stage.test_ids), torch.float64).flatten(1)
        labels = experiment.stream.test_labels[stage.test_ids].tolist()
        guessed = [max(stage.classes, key=lambda c: float(s[c])) for s in oracle.logits(w, images)]
        row.append(float(np.mean([g == y for g, y in zip(guessed, labels, strict=True)])))
    assert result.matrix == [pytest.approx(row, abs=1e-12)] * 3
    assert min(row) > 0
    assert result.summary["forward_transfer"] == 0.0


@pytest.mark.parametrize("settings", [{}, DEFAULT, {"strategy": ["replay"]}, {"evaluate.every": 1}])
def test_one_task_is_class_incremental_with_one_task(tiny: Run, settings: dict[str, Any]) -> None:
    one = {**settings, "scenario.tasks": 1, "partition.test": "same_mix", "data.validation": 0.2}
    plain, known = tiny(one), tiny({**one, "scenario.name": "task_incremental"})
    differ = {"scenario", "wall_seconds", "costs", "measured"}
    assert {k: v for k, v in known.summary.items() if k not in differ} == {
        k: v for k, v in plain.summary.items() if k not in differ
    }
    assert known.matrix == plain.matrix


@pytest.mark.parametrize("settings", [DEFAULT, {"strategy": ["replay", "fedewc"]}, {"strategy": ["joint"]}])
def test_stacked_is_one_by_one(tiny: Run, oracle: Any, settings: dict[str, Any]) -> None:
    one, many = (tiny({**TIL, **settings, "engine.path": path}) for path in ("sequential", "stacked"))
    assert oracle.distance(oracle.final(one), oracle.final(many)) < 1e-9
    assert one.matrix == many.matrix


def test_own_test_sets_newcomers_and_held_out_images_know_their_task_too(tiny: Run) -> None:
    """All three are of the images' own task: never worse than with all classes, and better somewhere."""
    settings = {**TIL, "strategy": ["nearest_mean"], "partition.test": "same_mix", "partition.held_out": 1,
                "data.validation": 0.3, "federation.clients": 4, "data.limit": 24}  # fmt: skip
    known, plain = (tiny({**settings, "scenario.name": n}).summary for n in ("task_incremental", "class_incremental"))
    for part in ("personal", "newcomers"):
        mine, other = (s[part]["average_accuracy"]["mean"] for s in (known, plain))
        assert mine > other
    assert known["validation_accuracy"] > plain["validation_accuracy"]
    assert known["average_accuracy"] > plain["average_accuracy"]


def test_spatial_forgetting_of_one_client_is_zero(tiny: Run) -> None:
    one = {**TIL, "federation.clients": 1, "partition.name": "iid", "partition.test": "holdout(0.3)"}
    assert tiny(one).summary["spatial_forgetting"] == 0.0


@pytest.mark.parametrize("of", ["long_tailed", "noisy_labels", "few_shot", "cumulative"])
def test_other_streams_with_known_tasks(tiny: Run, of: str) -> None:
    more = {"few_shot": {"scenario.base": 4, "scenario.increment": 3}, "long_tailed": {"scenario.imbalance": 3.0}}
    result = tiny({**TIL, "scenario.of": [of], **more.get(of, {})})
    assert result.summary["status"] == "done"
    assert result.summary["scenario"] == "task_incremental"


def test_changed_again_the_tasks_stay_known(tiny_config: Configure) -> None:
    for name in ("long_tailed", "cumulative"):
        settings = {"scenario.name": name, "scenario.of": ["task_incremental"], "scenario.imbalance": 3.0}
        if name == "cumulative":
            del settings["scenario.imbalance"]
        stream = build(tiny_config({**settings, "scenario.tasks": 3})).stream
        assert stream.heads == [0] * 4 + [1] * 3 + [2] * 3


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"scenario.of": ["i_blurry"], "scenario.blurred": 0.5}, "i_blurry shows old classes in task 2"),
        ({"scenario.of": ["new_instances"]}, "new_instances shows old classes in task 2"),
        ({"scenario.of": ["domain_incremental"], "scenario.shift": "permuted"}, "shows old classes in task 2"),
        ({"scenario.of": ["task_incremental"]}, "other scenarios than task_incremental itself"),
    ],
)
def test_streams_that_share_classes_are_refused(tiny_config: Configure, settings: dict[str, Any], text: str) -> None:
    with pytest.raises(UsageError) as caught:
        build(tiny_config({**TIL, **settings}))
    assert caught.value.key == "scenario.of"
    assert text in str(caught.value)


@pytest.mark.parametrize("order", ["asynchronous", "client_specific"])
def test_orders_of_the_clients_own_are_refused(tiny_config: Configure, order: str) -> None:
    with pytest.raises(UsageError, match="must be common with task_incremental"):
        tiny_config({**TIL, "time.order": order})


def test_the_head_is_probed_among_the_classes_of_the_task(tiny: Run) -> None:
    """The accuracy that calibration is of is that of the matrix."""
    settings = {
        **TIL,
        "evaluate.probes": ["calibration", "collapse"],
        "evaluate.probe_samples": 0,
        "federation.rounds": 4,
    }
    summary = tiny(settings).summary
    assert summary["probes"]["calibration"]["accuracy"] == pytest.approx(summary["average_accuracy_weighted"])
    assert 0 <= summary["probes"]["collapse"]["nc4"] < 1


def test_a_whole_head_from_the_start_gives_the_same_accuracies(tiny: Run) -> None:
    """Rows that wait for their task get no gradient: their softmax is never asked."""
    grow, whole = (tiny({**TIL, "model.head_allocate": allocate}) for allocate in ("grow", "all"))
    assert grow.matrix == whole.matrix


def test_in_another_process_the_same(tiny: Run, tiny_config: Configure) -> None:
    """A header keeps its heads on the wire."""
    from fedcl.federation.call import Header

    header = Header("train", [0], 1, 0, 2, 3, 1, 4, [0, 1, 2, 3], [2, 3], heads=[0, 0, 1, 1])
    assert Header.from_json(header.to_json()) == header
