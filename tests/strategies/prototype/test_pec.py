"""PEC against literal loops with torch.optim, one student a class; and what the federated mean weighs them by."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fedcl import random as counter
from fedcl.build import build
from fedcl.errors import UsageError
from fedcl.records.checkpoint import load_newest
from fedcl.strategies.prototype.pec import network, prediction_error

Arrays = dict[str, Tensor]
SMALL = {
    "strategy": ["pec"], "options.pec.width": 4, "options.pec.wider": 8, "options.pec.outputs": 3,
    "optimiser.name": "adam", "optimiser.lr": 0.01, "optimiser.schedule": "linear", "optimiser.per": "step",
    "federation.rounds": 1, "federation.batch_size": 4,
}  # fmt: skip


def answers(w: Arrays, x: Tensor) -> Tensor:
    """(B, p) of a perceptron, by hand."""
    hidden = x.flatten(1) @ w["1.weight"].T + w["1.bias"]
    hidden = (hidden - hidden.mean(1, keepdim=True)) / (hidden.var(1, correction=0, keepdim=True) + 1e-5).sqrt()
    hidden = hidden * w["2.weight"] + w["2.bias"]
    hidden = hidden * 0.5 * (1 + torch.erf(hidden / 2**0.5))
    return hidden @ w["4.weight"].T + w["4.bias"]


def module(arrays: Arrays, name: str) -> Arrays:
    """The arrays of the student or the teacher."""
    prefix = f"extra.pec.{name}."
    return {n.removeprefix(prefix): a for n, a in arrays.items() if n.startswith(prefix)}


def literal(config: Any, tasks: int) -> tuple[dict[int, Arrays], Arrays]:
    """Students by class after whole tasks, and the teacher."""
    experiment = build(config)
    store, arrays = experiment.node.store, experiment.initial
    teacher, start = module(arrays, "teacher"), module(arrays, "student")
    students: dict[int, Arrays] = {}
    for task in range(tasks):
        for round_ in range(config.federation.rounds):
            trained: dict[int, list[tuple[int, Arrays]]] = {}
            for client in range(config.federation.clients):
                own = torch.from_numpy(experiment.split.train[task][client])
                for c in sorted(set(store.label_tensor[own].tolist())):
                    rows = own[store.label_tensor[own] == c]
                    w = {n: a.clone().requires_grad_() for n, a in students.get(c, start).items()}
                    order = counter.permutation(len(rows), config.seed, "client", client, task, round_, "order", 0)
                    batches = torch.split(rows[torch.from_numpy(order)], config.federation.batch_size)
                    optimiser = torch.optim.Adam(w.values(), lr=config.optimiser.lr)
                    rates = torch.optim.lr_scheduler.LinearLR(optimiser, 1.0, 0.0, total_iters=len(batches))
                    for batch in batches:
                        x = store.batch(batch, torch.float64)
                        errors = [
                            ((answers(w, image[None]) - answers(teacher, image[None])) ** 2).sum() / 3 for image in x
                        ]
                        optimiser.zero_grad()
                        (torch.stack(errors).sum() / len(batch)).backward()
                        optimiser.step()
                        rates.step()
                    trained.setdefault(c, []).append((len(rows), {n: a.detach() for n, a in w.items()}))
            for c, found in trained.items():
                total = sum(count for count, _ in found)
                students[c] = {n: sum(count * w[n] for count, w in found) / total for n in start}  # type: ignore[misc]
    return students, teacher


def state_of(result: Any) -> Arrays:
    """The server's state of the strategy."""
    found = load_newest(result.folder / "checkpoints", lambda text: None)
    assert found is not None
    return {n.removeprefix("strategy/pec/"): a for n, a in found.arrays.items() if n.startswith("strategy/pec/")}


@pytest.mark.parametrize(
    "settings",
    [
        {"federation.rounds": 2},
        {"federation.batch_size": 1, "federation.clients": 1, "data.limit": 5},
        {"partition.alpha": 0.1, "partition.min_size": 0, "federation.clients": 5},
    ],
    ids=["two rounds", "as published", "skewed"],
)
def test_students_and_accuracies_are_those_of_literal_loops(
    tiny: Any, tiny_config: Any, settings: dict[str, Any]
) -> None:
    settings = {**SMALL, **settings}
    config, result = tiny_config(settings), tiny(settings)
    students, teacher = literal(config, 2)
    state, experiment = state_of(result), build(config)
    assert sorted(students) == list(range(10))
    assert bool(state["trained"].all())
    for c, student in students.items():
        for n, a in student.items():
            torch.testing.assert_close(state[f"students/{n}"][c], a, rtol=0, atol=1e-9)
    for j, stage in enumerate(experiment.stream.stages):
        x = experiment.test.batch(torch.from_numpy(stage.test_ids), torch.float64)
        errors = torch.stack(
            [((answers(students[c], x) - answers(teacher, x)) ** 2).sum(1) / 3 for c in range(10)], dim=1
        )
        right = float((errors.argmin(1).numpy() == experiment.stream.test_labels[stage.test_ids]).mean())
        assert result.matrix[1][j] == pytest.approx(right, abs=1e-12)


def test_the_convolution_is_the_literal_one() -> None:
    torch.manual_seed(0)
    net = network("cnn", (2, 6, 6), 3, 5, 2).double()
    w = {n: a.detach().normal_() for n, a in net.named_parameters()}
    x = torch.randn(4, 2, 6, 6, dtype=torch.float64)
    patches = F.unfold(x, 3).transpose(1, 2)  # (4, 16, 18)
    hidden = (patches @ w["0.weight"].reshape(3, -1).T + w["0.bias"]).transpose(1, 2)
    hidden = (hidden - hidden.mean(2, keepdim=True)) / (hidden.var(2, correction=0, keepdim=True) + 1e-5).sqrt()
    hidden = (hidden * w["1.weight"][:, None] + w["1.bias"][:, None]).clamp(min=0).reshape(4, 3, 2, 2, 2, 2)
    pooled = hidden.mean(dim=(3, 5)).flatten(1)
    torch.testing.assert_close(net(x), pooled @ w["5.weight"].T + w["5.bias"], rtol=0, atol=1e-12)


def test_students_of_old_classes_and_the_model_stay_as_they_are(tiny: Any, oracle: Any) -> None:
    first, second = (tiny({**SMALL, "scenario.first": n}) for n in (1, 2))
    one, two = state_of(first), state_of(second)
    assert one["trained"].tolist() == [True] * 5
    assert all(torch.equal(a, two[n][:5]) for n, a in one.items())
    assert not any(torch.equal(two[n][:5], two[n][5:]) for n in two if n.startswith("students/"))
    before, after = oracle.final(first), oracle.final(second)
    assert all(torch.equal(a, after[n][: len(a)] if n.startswith("head.") else after[n]) for n, a in before.items())


def test_where_nothing_is_learned_nothing_changes(tiny: Any) -> None:
    state = state_of(tiny({**SMALL, "optimiser.lr": 1e-300}))
    for n, a in state.items():
        if n.startswith("students/"):
            torch.testing.assert_close(a, a[:1].expand_as(a), rtol=0, atol=1e-15)


def test_students_may_see_features(tiny: Any, tiny_config: Any) -> None:
    settings = {**SMALL, "options.pec.on": "features", "federation.clients": 1}
    result, experiment = tiny(settings), build(tiny_config(settings))
    assert state_of(result)["students/1.weight"].shape == (10, 4, 8)
    arrays, state, stage = experiment.initial, state_of(result), experiment.stream.stages[1]
    x = experiment.test.batch(torch.from_numpy(stage.test_ids), torch.float64)
    grown = {**arrays, **{n: arrays[n].new_zeros(10, *arrays[n].shape[1:]) for n in arrays if n.startswith("head.")}}
    f = experiment.node.forward(grown, x, "eval").features.detach()
    students = [{n.removeprefix("students/"): a[c] for n, a in state.items() if "/" in n} for c in range(10)]
    target = answers(module(arrays, "teacher"), f)
    errors = torch.stack([((answers(w, f) - target) ** 2).mean(1) for w in students], dim=1)
    right = float((errors.argmin(1).numpy() == experiment.stream.test_labels[stage.test_ids]).mean())
    assert result.matrix[1][1] == pytest.approx(right, abs=1e-12)


def test_a_class_without_a_student_is_never_predicted(tiny: Any, tmp_path: Any) -> None:
    # In the second task, clients of the first have nothing more to say; a class that nobody trained has no student.
    result = tiny({**SMALL, "federation.participation": 0.34, "partition.name": "classes_per_client",
                   "partition.classes": 1, "scenario.tasks": 2, "federation.clients": 5})  # fmt: skip
    trained = state_of(result)["trained"]
    assert 0 < int(trained.sum()) < 10
    assert all(v is not None for t, row in enumerate(result.matrix) for v in row[: t + 1])


def test_prediction_error_of_several_students() -> None:
    students, teacher = torch.arange(12.0).reshape(2, 3, 2), torch.zeros(3, 2)
    assert prediction_error(students, teacher).tolist() == [[0.5, 6.5, 20.5], [42.5, 72.5, 110.5]]


def test_hard_settings(tiny: Any, hard: dict[str, Any]) -> None:
    matrix = tiny({**SMALL, **hard}).matrix
    assert all(v is not None and 0 <= v <= 1 for t, row in enumerate(matrix) for v in row[: t + 1])


@pytest.mark.parametrize(("key", "value"), [("width", 0), ("wider", -1), ("arch", "vit"), ("on", "both"), ("side", 0)])
def test_wrong_options(tiny_config: Any, key: str, value: Any) -> None:
    with pytest.raises(UsageError, match=r"options\.pec") as caught:
        build(tiny_config({"strategy": ["pec"], f"options.pec.{key}": value}))
    assert "\n" not in str(caught.value)


def test_convolutions_run_and_need_some_pixels(tiny: Any, tiny_config: Any) -> None:
    settings = {**SMALL, "options.pec.arch": "cnn", "options.pec.side": 2, "data.limit": 4}
    result = tiny(settings)
    assert state_of(result)["students/0.weight"].shape == (10, 4, 1, 3, 3)
    assert result.summary["status"] == "done"
    with pytest.raises(UsageError, match=r"options\.pec\.arch"):
        build(tiny_config({**settings, "data.size": 3}))


def test_features_have_no_pixels_to_convolve(tiny_config: Any) -> None:
    with pytest.raises(UsageError, match="mlp with on=features"):
        build(tiny_config({"strategy": ["pec"], "options.pec.arch": "cnn", "options.pec.on": "features"}))
