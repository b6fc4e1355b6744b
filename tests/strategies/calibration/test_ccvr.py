"""CCVR: the pooled Gaussians are the union's, and the head is the one of a plain loop on the same draws."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from fedcl.blocks.statistics import class_covariances, class_means
from fedcl.errors import RunFailed, UsageError
from fedcl.strategies.calibration._post_hoc import GaussianHead, Sgd, fit, keep_rows

FEW = {"options.ccvr.draws": 6, "options.ccvr.epochs": 3, "options.ccvr.batch_size": 16}


def expected(tiny_config: Any, oracle: Any, after: Any, settings: dict[str, Any], spread_of: Any, **recipe: Any) -> Any:
    """(final model, head, Gaussians by class) of a run whose moments are those of the union at each task's end."""
    gaussians: dict[int, tuple[np.ndarray, np.ndarray]] = {}
    config = tiny_config(settings)
    world = oracle.World.of(config)

    def end_task(w: Any, local: Any) -> Any:
        found = after.by_class(w, world, local.task)
        for c, rows in found.items():
            spread = np.cov(rows, rowvar=False) if len(rows) > 1 else np.zeros((rows.shape[1],) * 2)
            gaussians[c] = rows.mean(axis=0), spread_of(spread)
        return w

    method = oracle.Method(
        lambda w, x, y, local: oracle.cross_entropy(oracle.logits(w, x), y, local.known), end_task=end_task
    )
    w = oracle.federated(config, method, world)
    means = {c: mean for c, (mean, _) in gaussians.items()}
    spreads = {c: spread + 1e-4 * np.eye(len(spread)) for c, (_, spread) in gaussians.items()}
    x, y = after.draws(means, spreads, 6, *after.key(world), "ccvr", "draws")
    head = after.fitted(
        w, x, y, lambda scores, labels: oracle.cross_entropy(scores, labels, sorted(means)),
        epochs=3, lr=0.01, momentum=0.9, weight_decay=recipe.get("weight_decay", 0.0), batch=16,
        name=(*after.key(world), "ccvr", "order"),
    )  # fmt: skip
    return w, head, gaussians


@pytest.mark.parametrize(
    ("settings", "spread_of"),
    [
        ({}, lambda s: s),
        ({"options.ccvr.covariance": "diagonal", "partition.alpha": 0.1}, lambda s: np.diag(np.diag(s))),
        ({"scenario.tasks": 3, "options.ccvr.weight_decay": 0.1, "model.head_allocate": "all"}, lambda s: s),
    ],
    ids=["default", "diagonal", "three tasks"],
)
def test_whole_run_equals_the_literal_loop(
    tiny: Any, tiny_config: Any, oracle: Any, after: Any, settings: dict[str, Any], spread_of: Any
) -> None:
    settings = {"strategy": ["ccvr"], "seed": 3, **FEW, **settings}
    decay = settings.get("options.ccvr.weight_decay", 0.0)
    w, head, gaussians = expected(tiny_config, oracle, after, settings, spread_of, weight_decay=decay)
    found = after.ended(tiny(settings), "ccvr")
    assert oracle.distance(found.model, w) < 1e-10
    assert oracle.distance({n: a for n, a in found.evaluated.items() if n not in head}, {
        n: a for n, a in w.items() if n not in head
    }) < 1e-10  # fmt: skip
    assert max(float((found.evaluated[n] - head[n]).abs().max()) for n in head) < 1e-9
    assert float((head["head.weight"] - w["head.weight"]).abs().max()) > 1e-3
    means, spreads = class_means(found.state), class_covariances(found.state)
    for c, (mean, spread) in gaussians.items():
        np.testing.assert_allclose(means[c], mean, atol=1e-10)
        own = spreads[c] if spreads.dim() == 3 else torch.diag(spreads[c])
        np.testing.assert_allclose(own, spread, atol=1e-10)


def test_one_client_or_many_pool_to_the_same_gaussians(tiny: Any, after: Any) -> None:
    frozen = {"strategy": ["ccvr"], "optimiser.lr": 1e-300, **FEW}
    states = []
    for clients in (1, 3, 7):
        result = tiny({**frozen, "federation.clients": clients, "partition.min_size": 0})
        states.append(after.ended(result, "ccvr").state)
    for other in states[1:]:
        assert torch.equal(other["counts"], states[0]["counts"])
        torch.testing.assert_close(class_means(other), class_means(states[0]), rtol=0, atol=1e-10)
        torch.testing.assert_close(class_covariances(other), class_covariances(states[0]), rtol=0, atol=1e-10)


def test_the_next_task_starts_from_the_new_head_only_when_asked(tiny: Any, oracle: Any, after: Any) -> None:
    plain = oracle.final(tiny({}))
    kept = after.ended(tiny({"strategy": ["ccvr"], **FEW}), "ccvr")
    assert oracle.identical(kept.model, plain)
    goes_on = after.ended(tiny({"strategy": ["ccvr"], **FEW, "options.ccvr.use": "training"}), "ccvr")
    assert not goes_on.evaluated
    assert float((goes_on.model["encoder.1.weight"] - plain["encoder.1.weight"]).abs().max()) > 1e-6


def test_a_head_for_training_is_evaluated_too_where_a_stage_before_left_its_own(tiny: Any, after: Any) -> None:
    few = {**FEW, "options.ccvr.use": "training"}
    found = after.ended(tiny({"strategy": ["tau_norm", "ccvr"], **few}), "ccvr")
    assert torch.equal(found.evaluated["head.weight"], found.model["head.weight"])
    assert torch.equal(found.evaluated["head.bias"], found.model["head.bias"])


def test_a_task_whose_images_nobody_in_reach_has_makes_room_for_its_classes(tiny: Any) -> None:
    old = {"counts": torch.tensor([2]), "sums": torch.ones(1, 2), "scatter": torch.ones(2, 2)}
    for repeats in (False, True):
        server = SimpleNamespace(
            exchange=lambda f: {}, repeats=repeats, state={**old, "born": torch.tensor([0, 1])}, known=torch.ones(2)
        )
        found = GaussianHead().gathered(server)  # type: ignore[arg-type]
        assert found["counts"].tolist() == [2, 0]
        assert found["sums"].tolist() == [[1.0, 1.0], [0.0, 0.0]]
        assert torch.equal(found["scatter"], old["scatter"])
    few = {"partition.alpha": 0.01, "partition.min_size": 0, "federation.clients": 8, "federation.rounds": 1}
    reached = {**few, "scenario.tasks": 5, "federation.exchange": 1, "options.slca.draws": 4}
    assert tiny({"strategy": ["slca"], **reached}).summary["status"] == "done"


def test_a_head_that_knows_nothing_learns_the_classes_from_the_gaussians(tiny: Any) -> None:
    """With an untrained model the head alone has to do it: ten classes by chance, most of them by CCVR."""
    frozen = {"optimiser.lr": 1e-300, "scenario.tasks": 1, "model.width": 64}
    assert tiny(frozen).summary["average_accuracy"] < 0.3
    for form in ("full", "diagonal", "shared"):
        options = {"options.ccvr.covariance": form, "options.ccvr.lr": 0.1}
        assert tiny({"strategy": ["ccvr"], **frozen, **options}).summary["average_accuracy"] > 0.6


def test_images_seen_once_are_counted_in_their_round(tiny: Any, after: Any) -> None:
    online = {"strategy": ["ccvr"], **FEW, "federation.passes": "once"}
    state = after.ended(tiny(online), "ccvr").state
    whole = after.ended(tiny({"strategy": ["ccvr"], **FEW}), "ccvr").state
    assert torch.equal(state["counts"], whole["counts"])
    assert not torch.allclose(state["sums"], whole["sums"])


def test_old_images_that_are_seen_again_supersede_their_first_moments(tiny: Any, after: Any) -> None:
    state = after.ended(tiny({"strategy": ["cumulative", "ccvr"], **FEW}), "ccvr").state
    plain = after.ended(tiny({"strategy": ["ccvr"], **FEW}), "ccvr").state
    assert torch.equal(state["counts"], plain["counts"])


def test_where_tasks_are_known_classes_compete_within_their_task_only(tiny: Any, after: Any) -> None:
    settings = {"strategy": ["ccvr"], **FEW, "scenario.name": "task_incremental"}
    apart = after.ended(tiny(settings), "ccvr")
    assert apart.state["born"].tolist() == [0] * 5 + [1] * 5
    # The first task's classes have their own draws, and the second's leave their rows alone.
    assert not torch.equal(apart.evaluated["head.weight"], apart.model["head.weight"])
    together = after.ended(tiny({"strategy": ["ccvr"], **FEW}), "ccvr")
    assert not torch.allclose(apart.evaluated["head.weight"], together.evaluated["head.weight"])


@pytest.mark.parametrize("head", ["cosine", "nearest_mean"])
def test_other_heads_are_fitted_too(tiny: Any, after: Any, head: str) -> None:
    found = after.ended(tiny({"strategy": ["ccvr"], "model.head": head, **FEW, "options.ccvr.lr": 1e-4}), "ccvr")
    assert not torch.equal(found.evaluated["head.weight"], found.model["head.weight"])


def test_a_fixed_head_is_refused(tiny: Any) -> None:
    settings = {"strategy": ["ccvr"], "model.head": "simplex", "model.head_allocate": "all", "model.width": 16}
    with pytest.raises(UsageError, match="not a fixed head"):
        tiny(settings)


def test_rows_without_an_image_stay_as_they_are() -> None:
    rows = torch.tensor([True, False])
    assert keep_rows(torch.zeros(2, 2), torch.ones(2, 2), rows).tolist() == [[1.0, 1.0], [0.0, 0.0]]
    assert keep_rows(torch.tensor(1.0), torch.tensor(2.0), rows).item() == 2.0


def test_a_fit_that_diverges_says_so() -> None:
    start = {"w": torch.ones(1, dtype=torch.float64)}
    recipe = Sgd(400, 1e3, 0.0, 0.0, 1, cosine=False)
    with pytest.raises(RunFailed, match="take a smaller one"):
        fit(start, lambda w, places: w["w"].square().sum(), 1, recipe, "name")


def test_no_epoch_and_no_sample_leave_the_head() -> None:
    start = {"w": torch.ones(1)}
    for epochs, count in ((0, 3), (3, 0)):
        found = fit(start, lambda w, p: w["w"].sum(), count, Sgd(epochs, 0.1, 0.9, 0.1, 2, cosine=True), "name")
        assert torch.equal(found["w"], start["w"])


def test_hard_settings(tiny: Any, hard: dict[str, Any]) -> None:
    found = tiny({"strategy": ["ccvr"], **FEW, **hard})
    assert all(value is not None and 0 <= value <= 1 for row in found.matrix for value in row if value is not None)
    assert found.summary["status"] == "done"


def test_the_base_has_no_head_of_its_own() -> None:
    with pytest.raises(NotImplementedError):
        GaussianHead().calibrated(None, {})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("draws", 0), ("epochs", -1), ("lr", 0.0), ("momentum", 1.0), ("weight_decay", -1.0), ("batch_size", 0),
        ("jitter", -1.0), ("covariance", "spherical"), ("use", "both"),
    ],
)  # fmt: skip
def test_wrong_options(tiny: Any, key: str, value: object) -> None:
    with pytest.raises(UsageError) as caught:
        tiny({"strategy": ["ccvr"], f"options.ccvr.{key}": value})
    assert "\n" not in str(caught.value)
    assert key in str(caught.value)
