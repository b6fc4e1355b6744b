"""TARGET against a literal loop over the images that it made, against finetune_masked at weight 0, and at the edges."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from fedcl import random
from fedcl.blocks import inversion
from fedcl.build import build
from fedcl.errors import UsageError
from fedcl.records.checkpoint import load_newest
from fedcl.strategies.continual import target
from fedcl.strategies.continual.target import Target, batch_for_an_epoch

SMALL: dict[str, Any] = {
    "strategy": ["target"],
    **{f"options.target.{name}": value for name, value in {
        "images": 6, "batch_size": 6, "rounds": 3, "warmup": 1, "batch": 8, "steps": 2, "latent": 4, "width": 2,
        "student_steps": 2,
    }.items()},
}  # fmt: skip
"""All six images in each step, so that their order does not matter."""


def kept(result: Any) -> dict[str, torch.Tensor]:
    """The server's state at the end of a run."""
    found = load_newest(result.folder / "checkpoints", lambda text: None)
    assert found is not None
    prefix = "strategy/target/"
    return {n.removeprefix(prefix): a for n, a in found.arrays.items() if n.startswith(prefix)}


def seen_by_a_model(images: torch.Tensor, config: Any) -> torch.Tensor:
    """Pixels as the literal perceptron wants them."""
    store = build(config).node.store
    pixels = store.gather(torch.arange(len(store))).to(torch.float64) / 255
    return ((images.to(torch.float64) / 255 - pixels.mean()) / pixels.std(correction=0)).flatten(1)


def literal(oracle: Any, x: torch.Tensor, weight: float = 25.0, temperature: float = 2.0, task: str = "new") -> Any:
    def loss(w: Any, real: Any, y: Any, local: Any) -> Any:
        value = oracle.cross_entropy(oracle.logits(w, real), y, local.new if task == "new" else local.known)
        if local.previous is None:
            return value
        student, teacher = oracle.logits(w, x), oracle.logits(local.previous, x)
        return value + weight * oracle.soft_cross_entropy(student, teacher, local.old, temperature)

    return oracle.Method(loss)


@pytest.mark.parametrize(
    ("settings", "options"),
    [
        ({}, {}),
        ({"engine.path": "stacked", "federation.epochs": 2}, {"weight": 2.0, "temperature": 0.7, "task": "known"}),
        ({"federation.clients": 6, "partition.alpha": 0.1, "partition.min_size": 0, "model.head_allocate": "all"}, {}),
        ({"data.limit": 3, "federation.batch_size": 1, "optimiser.lr": 0.02}, {}),
    ],
    ids=["default", "stacked", "clients without images", "one image a step"],
)
def test_whole_run_equals_the_literal_loop_with_its_images(
    tiny: Any, tiny_config: Any, oracle: Any, settings: dict[str, Any], options: dict[str, Any]
) -> None:
    settings = {**SMALL, **settings, **{f"options.target.{n}": v for n, v in options.items()}}
    config = tiny_config(settings)
    if config.federation.clients == 6:
        assert not all(len(ids) for ids in build(config).split.train[1]), "some client has nothing but made images"
    result = tiny(settings)
    x = seen_by_a_model(kept(result)["images"], config)
    assert oracle.distance(oracle.final(result), oracle.federated(config, literal(oracle, x, **options))) < 1e-10


def test_weight_zero_is_finetune_masked_bit_for_bit(tiny: Any, oracle: Any) -> None:
    norm = {"model.norm": "batch", "model.dropout": 0.3}
    result = tiny({**SMALL, **norm, "options.target.weight": 0.0})
    assert "images" not in kept(result)
    masked = oracle.final(tiny({"strategy": ["finetune_masked"], **norm}))
    assert oracle.identical(oracle.final(result), masked)
    assert oracle.distance(oracle.final(tiny({**SMALL, **norm})), masked) > 1e-3


def test_term_and_its_gradient_are_of_the_made_images_alone(oracle: Any) -> None:
    w, previous = oracle.leaves(oracle.model(3, 2, 5, seed=0)), oracle.leaves(oracle.model(3, 2, 5, seed=1))
    x = torch.randn(5, 2, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    old = torch.tensor([True, True, True, False, False])
    down = {"images": torch.zeros(2, 1, 1, 2, dtype=torch.uint8), "old": old}
    step = oracle.step(w, x, [3, 3, 4, 3, 3], known=[0, 1, 2, 3, 4], new=[3, 4], previous=previous, down=down)
    source = torch.tensor([0, 1, 0, 1, 0])
    batch = replace(step.batch, source=source, names=("stream", "target"), hidden=(1,))
    step = replace(step, y=torch.where(source == 1, -1, step.y), batch=batch)

    def term(weight: float) -> Any:
        return Target(Target.Options(weight=weight)).loss(step)["distillation"]

    made = x[[1, 3]]
    expected = oracle.soft_cross_entropy(oracle.logits(w, made), oracle.logits(previous, made).detach(), [0, 1, 2], 2.0)
    slope = (term(1e-3) - term(0.0)) / 1e-3
    assert slope.item() == pytest.approx(expected.item(), rel=1e-10)
    found, wanted = oracle.gradient(slope, w), oracle.gradient(expected, w)
    assert all(torch.allclose(found[n], wanted[n], atol=1e-10) for n in w)
    assert not found["head.weight"][3:].any()
    assert all(not g.any() for g in oracle.gradient(term(1.0), previous).values()), "the teacher is not trained"
    task = Target(Target.Options()).task_loss(step.labelled())
    assert task.item() == pytest.approx(oracle.cross_entropy(oracle.logits(w, x[[0, 2, 4]]), [3, 4, 3], [3, 4]).item())


def test_no_term_before_there_are_images(oracle: Any) -> None:
    w = oracle.model(3, 2, 2, seed=0)
    step = oracle.step(w, torch.ones(1, 2, dtype=torch.float64), [0], known=[0, 1], new=[0, 1], task=0)
    assert Target().loss(step) == {}


def test_batch_norm_sees_real_and_made_images_apart(tiny: Any, tiny_config: Any, oracle: Any) -> None:
    one_step = {"federation.clients": 1, "federation.rounds": 1, "federation.batch_size": 100, "model.norm": "batch"}
    first = oracle.final(tiny({**SMALL, **one_step, "scenario.first": 1}))
    result = tiny({**SMALL, **one_step})
    config = tiny_config({**SMALL, **one_step})
    world = oracle.World.of(config)
    running = first["encoder.2.running_mean"]
    for x in (world.x[world.held[1][0]], seen_by_a_model(kept(result)["images"], config)):
        inputs = x @ first["encoder.1.weight"].T + first["encoder.1.bias"]
        running = 0.9 * running + 0.1 * inputs.mean(dim=0)
    assert torch.allclose(oracle.final(result)["encoder.2.running_mean"], running, atol=1e-12)


def test_images_are_made_once_a_task_from_the_model_before_it(
    tiny: Any, oracle: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[inversion.Teacher] = []

    def invert(teacher: inversion.Teacher, recipe: Any, seed: int) -> inversion.Synthesis:
        asked.append(teacher)
        return inversion.invert(teacher, recipe, seed)

    monkeypatch.setattr(target, "invert", invert)
    settings = {**SMALL, "scenario.tasks": 3, "scenario.first": 3, "data.limit": 6}
    result = tiny(settings)
    assert [t.classes.tolist() for t in asked] == [[True] * 4, [True] * 7], "none after the last task"
    monkeypatch.undo()
    after_one = oracle.final(tiny({**settings, "scenario.first": 1}))
    assert oracle.identical(after_one, dict(asked[0].arrays))
    state = kept(result)
    assert state["images"].shape == (6, 1, 8, 8)
    assert state["images"].dtype == torch.uint8
    assert state["old"].tolist() == [True] * 7 + [False] * 3
    assert result.summary["costs"]["exemplar_bytes"]["server"] == 6 * 64


def test_draws_are_named_by_seed_and_task(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def invert(teacher: inversion.Teacher, recipe: Any, seed: int) -> inversion.Synthesis:
        asked.append(seed)
        return inversion.Synthesis(torch.zeros(8, 1, 8, 8, dtype=torch.uint8), torch.zeros(8, dtype=torch.int64))

    monkeypatch.setattr(target, "invert", invert)
    settings = {**SMALL, "scenario.tasks": 3, "scenario.first": 3, "data.limit": 6}
    for seed in (0, 1):
        tiny({**settings, "seed": seed})
    assert asked == [random.fold(seed, "server", task, 0, "target") for seed in (0, 1) for task in (1, 2)]
    assert len(set(asked)) == 4


def test_images_and_teacher_go_down_once_a_client_and_task(tiny: Any) -> None:
    found = tiny(SMALL).summary["bytes_down"] - tiny({"strategy": ["fedlwf"]}).summary["bytes_down"]
    assert found == 3 * (6 * 64 + 10 + 8), "beside the previous model, which fedlwf sends too"


def test_an_epoch_of_a_mean_client_sees_each_image(tiny: Any) -> None:
    assert batch_for_an_epoch(1000, 100.0, 100) == 1000
    assert batch_for_an_epoch(1000, 100.1, 100) == 500
    assert batch_for_an_epoch(3, 1e6, 1) == 2
    state = kept(tiny({**SMALL, "options.target.batch_size": 0}))
    assert state["held"].tolist() == [2 * 120, 2 * 2 * 3], "two rounds of each task, by three clients"
    assert state["per_client"].item() == 60 / 3


def test_the_released_schedule_has_no_student(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inversion, "Student", None)
    settings = {**SMALL, "options.target.schedule": "released", "options.target.images": 500}
    assert len(kept(tiny(settings))["images"]) == 10 * 8


@pytest.mark.parametrize(
    "settings",
    [
        {"federation.passes": "once"},
        {"scenario.name": "task_incremental"},
        {"scenario.name": "new_instances"},
        {"scenario.tasks": 10, "scenario.first": 3, "options.target.task": "known"},
        {"labels.rate": 0.5, "strategy": ["target", "simclr"], "options.simclr.weight": 0.1},
        {"model.name": "simple_cnn", "model.width": None, "model.depth": None, "model.norm": "batch"},
    ],
    ids=["once", "tasks known", "no new class", "one class a task", "hidden labels", "convolutions"],
)
def test_other_streams_stay_finite_and_use_the_images(tiny: Any, oracle: Any, settings: dict[str, Any]) -> None:
    found = oracle.final(tiny({**SMALL, **settings}))
    assert all(bool(a.isfinite().all()) for a in found.values())
    without = oracle.final(tiny({**SMALL, **settings, "options.target.weight": 0.0}))
    assert oracle.distance(found, without) > 1e-6


@pytest.mark.parametrize(
    ("name", "value"),
    [("weight", -1), ("temperature", 0), ("images", 1), ("images", 25), ("batch_size", 1), ("warmup", 3),
     ("schedule", "paper"), ("task", "old"), ("batch", 1), ("lr", 0.0), ("nums", 1)],
)  # fmt: skip
def test_wrong_options(tiny_config: Any, name: str, value: Any) -> None:
    with pytest.raises(UsageError, match=r"options\.target") as caught:
        build(tiny_config({**SMALL, f"options.target.{name}": value}))
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)
