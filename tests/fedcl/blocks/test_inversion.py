"""Images for a small teacher that was really trained, and every step of their making against a literal one."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fedcl.blocks import inversion
from fedcl.blocks.generators import Generator
from fedcl.blocks.inversion import Recipe, Student, Teacher, fresh, image_loss, invert, one_batch
from fedcl.build import build
from fedcl.config import load_config
from fedcl.errors import RunFailed
from fedcl.models.arrays import grow_head, initial_arrays, parameter_names
from fedcl.models.model import run

SMALL = Recipe(rounds=6, warmup=6, batch=48, width=16, latent=64, adversarial=0.0)


def untrained(norm: str, classes: list[int], dtype: torch.dtype, folder: Any) -> tuple[Teacher, Any]:
    settings = {
        "strategy": ["finetune"], "data.name": "digits", "data.limit": 30, "data.validation": 0.0, "data.augment": [],
        "scenario.tasks": 1, "model.name": "mlp", "model.width": 32, "model.depth": 1, "model.norm": norm,
        "engine.device": "cpu", "engine.threads": 1, "output.dir": str(folder),
    }  # fmt: skip
    node = build(load_config(None, settings)).node
    arrays = grow_head(initial_arrays(node.model, dtype), node.model, range(10), 0)
    mask = torch.tensor([c in classes for c in range(10)])
    store = node.store
    return Teacher(node.model, arrays, store.mean.to(dtype), store.std.to(dtype), store.shape, mask), store


def trained(teacher: Teacher, store: Any) -> Teacher:
    names = parameter_names(teacher.model)
    params = {n: teacher.arrays[n].requires_grad_() for n in names}
    arrays = {**teacher.arrays, **params}
    optimiser = torch.optim.SGD(list(params.values()), lr=0.1, momentum=0.9)
    draw = torch.Generator().manual_seed(0)
    for _ in range(8):
        for ids in torch.split(torch.randperm(len(store), generator=draw), 50):
            logits = run(teacher.model, arrays, store.batch(ids, torch.float32), train=True).logits
            optimiser.zero_grad()
            F.cross_entropy(logits, store.label_tensor[ids]).backward()  # type: ignore[no-untyped-call]
            optimiser.step()
    return replace(teacher, arrays={n: a.detach() for n, a in arrays.items()})


@pytest.fixture(scope="module")
def learnt(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Teacher]:
    """``learnt("batch")``: a perceptron that knows ten digits, of which images of 1, 4 and 7 are wanted."""
    known: dict[str, Teacher] = {}

    def teacher(norm: str) -> Teacher:
        if norm not in known:
            known[norm] = trained(*untrained(norm, [1, 4, 7], torch.float32, tmp_path_factory.mktemp("runs")))
        return known[norm]

    return teacher


@pytest.fixture
def exact(tmp_path: Any) -> Teacher:
    """An untrained network in float64 with BatchNorm statistics that are not those it starts with."""
    teacher, _ = untrained("batch", [0, 2, 3], torch.float64, tmp_path)
    draw = torch.Generator().manual_seed(7)
    for name in ("running_mean", "running_var"):
        array = teacher.arrays[f"encoder.2.{name}"]
        teacher.arrays[f"encoder.2.{name}"] = torch.rand(len(array), generator=draw, dtype=torch.float64)
    return teacher


def pixels_of(teacher: Teacher, count: int, seed: int = 1) -> Tensor:
    return torch.rand(count, *teacher.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("norm", ["batch", "none"])
@pytest.mark.parametrize("meta", ["fomaml", "reptile"])
def test_images_are_taken_for_the_classes_they_were_made_for(
    learnt: Callable[[str], Teacher], norm: str, meta: Any
) -> None:
    teacher = learnt(norm)
    made = invert(teacher, replace(SMALL, meta=meta), seed=3)
    assert made.images.shape == (6 * 48, 1, 8, 8)
    assert made.images.dtype == torch.uint8
    assert set(made.targets.tolist()) == {1, 4, 7}
    logits = teacher.forward(made.images.float() / 255).logits
    answers = torch.where(teacher.classes, logits, -torch.inf).argmax(dim=1)
    late = (answers == made.targets)[3 * 48 :].float().mean().item()
    assert late > 0.8
    shuffled = (answers == made.targets.roll(1)).float().mean().item()
    assert shuffled < 0.6, "each image is of its own class"


def test_the_statistics_of_the_images_come_near_those_of_the_data(learnt: Callable[[str], Teacher]) -> None:
    teacher = learnt("batch")

    def distance(weight: float) -> float:
        made = invert(teacher, replace(SMALL, rounds=4, steps=20, batch_norm=weight), seed=3)
        pixels = made.images[-48:].float() / 255
        recipe = replace(SMALL, batch_norm=1.0, one_hot=0.0)
        return image_loss(teacher, recipe, pixels, made.targets[-48:], None, {})[0].item()

    assert distance(10.0) < 0.5 * distance(0.0)


def test_same_seed_same_bits_and_the_global_generator_stays_as_it_was(learnt: Callable[[str], Teacher]) -> None:
    teacher, recipe = learnt("batch"), replace(SMALL, rounds=3, warmup=1, adversarial=1.0, student_steps=3)
    torch.default_generator.manual_seed(1)
    before = torch.get_rng_state()
    one = invert(teacher, recipe, seed=5)
    assert torch.equal(before, torch.get_rng_state())
    torch.default_generator.manual_seed(2)
    again, other = invert(teacher, recipe, seed=5), invert(teacher, recipe, seed=6)
    assert torch.equal(one.images, again.images)
    assert torch.equal(one.targets, again.targets)
    assert not torch.equal(one.images, other.images)


def literal_loss(teacher: Teacher, pixels: Tensor, targets: list[int], before: Any, student: Any) -> Tensor:
    """bn 3, oh 0.7, adv 2, momentum 0.6: the loss of a perceptron with one BatchNorm layer, number by number."""
    w = teacher.arrays
    x = ((pixels - teacher.mean) / teacher.std).flatten(1)
    raw = x @ w["encoder.1.weight"].T + w["encoder.1.bias"]
    mean = raw.sum(0) / len(raw)
    var = ((raw - mean) ** 2).sum(0) / len(raw)
    if before is not None:
        mean, var = 0.4 * mean + 0.6 * before[0], 0.4 * var + 0.6 * before[1]
    first, second = w["encoder.2.running_mean"], w["encoder.2.running_var"]
    statistics = ((mean - first) ** 2).sum() ** 0.5 + ((var - second) ** 2).sum() ** 0.5

    def answer(a: dict[str, Tensor]) -> Tensor:
        hidden = x @ a["encoder.1.weight"].T + a["encoder.1.bias"]
        scale = a["encoder.2.weight"] / (a["encoder.2.running_var"] + 1e-5) ** 0.5
        hidden = (hidden - a["encoder.2.running_mean"]) * scale + a["encoder.2.bias"]
        return ((hidden * (hidden > 0)) @ a["head.weight"].T)[:, [0, 2, 3]]

    own = answer(w)
    place = {0: 0, 2: 1, 3: 2}
    entropy = torch.stack([torch.log(row.exp().sum()) - row[place[y]] for row, y in zip(own, targets, strict=True)])
    loss = 3 * statistics + 0.7 * entropy.sum() / len(targets)
    if student is not None:
        terms = torch.zeros((), dtype=torch.float64)
        for t, s in zip(own, answer(student), strict=True):
            if int(t.argmax()) == int(s.argmax()):
                p, q = t.exp() / t.exp().sum(), s.exp() / s.exp().sum()
                terms = terms + (p * torch.log(p / q)).sum()
        loss = loss - 2 * terms / len(targets)
    return loss


@pytest.mark.parametrize("smooth", [False, True])
@pytest.mark.parametrize("rival", [False, True])
def test_loss_of_an_image_and_its_gradient(exact: Teacher, smooth: bool, rival: bool) -> None:
    recipe = Recipe(batch_norm=3.0, one_hot=0.7, adversarial=2.0, momentum=0.6)
    pixels, targets = pixels_of(exact, 6).requires_grad_(), [0, 3, 2, 2, 0, 3]
    before = (torch.full((32,), 0.2, dtype=torch.float64), torch.full((32,), 0.4, dtype=torch.float64))
    student = Student(exact, recipe, seed=2) if rival else None
    found, statistics = image_loss(
        exact, recipe, pixels, torch.tensor(targets), student, {"encoder.2": before} if smooth else {}
    )
    expected = literal_loss(exact, pixels, targets, before if smooth else None, student and student.arrays())
    assert found.item() == pytest.approx(expected.item(), rel=1e-12)
    slopes = [torch.autograd.grad(value, pixels, retain_graph=True)[0] for value in (found, expected)]
    assert torch.allclose(slopes[0], slopes[1], atol=1e-12)
    assert set(statistics) == {"encoder.2"}
    if rival:
        alone = image_loss(exact, recipe, pixels, torch.tensor(targets), None, {})[0]
        assert abs(found.item() - alone.item()) > 1e-4


def test_a_network_without_batch_norm_follows_the_classes_alone(learnt: Callable[[str], Teacher]) -> None:
    teacher = learnt("none")
    pixels, targets = pixels_of(teacher, 4).float(), torch.tensor([1, 4, 7, 7])
    loss, statistics = image_loss(teacher, Recipe(), pixels, targets, None, {})
    logits = teacher.forward(pixels).logits[:, [1, 4, 7]]
    assert statistics == {}
    assert loss.item() == pytest.approx(0.5 * F.cross_entropy(logits, torch.tensor([0, 1, 2, 2])).item(), rel=1e-5)


@pytest.mark.parametrize("meta", ["fomaml", "reptile"])
def test_one_batch_is_the_literal_loop(exact: Teacher, meta: Any) -> None:
    recipe = Recipe(batch=5, steps=4, latent=4, width=2, meta=meta, lr=3.0, lr_latent=0.1)
    generator = Generator(exact.shape, 4, 2).double()
    literal, adapted = copy.deepcopy(generator), copy.deepcopy(generator)
    z = torch.randn(5, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    targets = torch.tensor([0, 2, 3, 3, 0])
    ahead = torch.optim.SGD(generator.parameters(), lr=1.0)
    images, _ = one_batch(exact, recipe, generator, ahead, z.clone(), targets, None, {})

    own = z.clone().requires_grad_()
    inner = torch.optim.Adam([{"params": adapted.parameters(), "lr": 3.0}, {"params": [own], "lr": 0.1}],
                             betas=(0.5, 0.999))  # fmt: skip
    total = [torch.zeros_like(p) for p in adapted.parameters()]
    seen: list[tuple[float, Tensor]] = []
    for _ in range(4):
        pixels = adapted(own)
        loss, _ = image_loss(exact, recipe, pixels, targets, None, {})
        seen.append((loss.item(), pixels.detach()))
        grads = torch.autograd.grad(loss, [*adapted.parameters(), own])
        total = [t + g for t, g in zip(total, grads, strict=False)]
        for p, g in zip([*adapted.parameters(), own], grads, strict=True):
            p.grad = g
        inner.step()
    assert seen[-1][0] > min(seen, key=lambda pair: pair[0])[0], "the best images are not the last ones"
    assert torch.equal(images, (min(seen, key=lambda pair: pair[0])[1] * 255).round().to(torch.uint8))
    way = [67 * (p - a) for p, a in zip(literal.parameters(), adapted.parameters(), strict=True)]
    for p, first, step in zip(
        generator.parameters(), literal.parameters(), total if meta == "fomaml" else way, strict=True
    ):
        assert torch.allclose(p, first - step, atol=1e-12)


def test_the_student_counts_after_the_warm_up_and_not_without_a_weight(
    learnt: Callable[[str], Teacher], monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher, recipe = learnt("batch"), replace(SMALL, rounds=3, warmup=1, adversarial=5.0, student_steps=1, batch=20)
    with_it = torch.split(invert(teacher, recipe, seed=1).images, 20)
    monkeypatch.setattr(inversion, "Student", None)
    without = torch.split(invert(teacher, replace(recipe, adversarial=0.0), seed=1).images, 20)
    assert torch.equal(with_it[0], without[0])
    assert not torch.equal(with_it[1], without[1])


def test_the_student_learns_what_the_teacher_says(learnt: Callable[[str], Teacher]) -> None:
    teacher = learnt("batch")
    student = Student(teacher, Recipe(student_steps=40, rounds=2, warmup=0, batch=32), seed=0)
    images = (pixels_of(teacher, 64) * 255).to(torch.uint8)
    pixels = images.float() / 255

    def apart() -> float:
        logits = [teacher.forward(pixels, a).logits[:, [1, 4, 7]] for a in (student.arrays(), teacher.arrays)]
        return F.kl_div(logits[0].log_softmax(1), logits[1].softmax(1), reduction="batchmean").item()

    before, kept = apart(), {n: a.clone() for n, a in teacher.arrays.items()}
    student.learn(images, turn=0)
    assert apart() < 0.5 * before
    assert all(torch.equal(a, teacher.arrays[n]) for n, a in kept.items()), "the teacher stays as it is"


def test_rate_of_the_student_falls_as_a_cosine(learnt: Callable[[str], Teacher]) -> None:
    student = Student(learnt("none"), Recipe(rounds=7, warmup=3, student_steps=1, batch=2), seed=0)
    images = torch.zeros(2, 1, 8, 8, dtype=torch.uint8)
    rates = []
    for turn in range(3, 7):
        student.learn(images, turn)
        rates.append(student.optimiser.param_groups[0]["lr"])
    assert rates == pytest.approx([0.1 * (1 + math.cos(math.pi * k / 4)) for k in range(4)])


def test_a_fresh_network_is_another_one_of_the_same_kind(exact: Teacher) -> None:
    one, again, other = (fresh(exact.model, exact.arrays, 10, seed) for seed in (1, 1, 2))
    assert {n: (a.shape, a.dtype) for n, a in one.items()} == {n: (a.shape, a.dtype) for n, a in exact.arrays.items()}
    for name in ("encoder.1.weight", "encoder.1.bias", "head.weight"):
        assert torch.equal(one[name], again[name])
        assert not torch.equal(one[name], other[name])
        assert not torch.equal(one[name], exact.arrays[name])
    assert not one["encoder.2.running_mean"].any()
    assert bool((one["encoder.2.running_var"] == 1).all())


def test_a_generator_that_diverges_is_an_error_of_one_line(learnt: Callable[[str], Teacher]) -> None:
    with pytest.raises(RunFailed, match="lower its learning rates") as caught:
        invert(learnt("batch"), replace(SMALL, lr=1e30), seed=0)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "value"),
    [("rounds", 0), ("batch", 1), ("steps", 0), ("warmup", -1), ("latent", 0), ("width", 0), ("student_steps", 0),
     ("lr", 0.0), ("lr_latent", -1.0), ("student_lr", 0), ("student_temperature", 0), ("batch_norm", -1),
     ("one_hot", float("inf")), ("adversarial", -0.1), ("momentum", 1.0), ("momentum", -0.1)],
)  # fmt: skip
def test_wrong_recipes(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=name):
        replace(Recipe(), **{name: value})
