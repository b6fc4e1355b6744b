"""Rounds that a strategy makes itself, arrays for single clients, added modules, and models of the clients' own."""

from __future__ import annotations

import csv
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import pytest
import torch

from fedcl.errors import RunFailed

if TYPE_CHECKING:
    from fedcl.run import RunResult

Tiny = Callable[[Mapping[str, Any]], "RunResult"]
Moved = Callable[["RunResult"], set[str]]

ONE_ROUND = {"scenario.tasks": 1, "federation.rounds": 1, "engine.dtype": "float64", "optimiser.momentum": 0.0}


def arrays_of(result: RunResult) -> dict[str, torch.Tensor]:
    return {n: p.detach() for n, p in result.model.named_parameters()}


def test_a_round_of_its_own_can_be_the_default_one(tiny: Tiny, plugin: Any) -> None:
    body = """
    reductions = {"model/": "stack", "samples": "stack"}

    def fit(self, ctx):
        SEEN.append((ctx.client, float(ctx.down["greeting"]), float(ctx.down["common"])))
        trained = ctx.train(Phase())
        return {f"model/{n}": a for n, a in trained.items()} | {"samples": ctx.counts.sum()}, ctx.state

    def round(self, server):
        each = {c: {"greeting": torch.tensor(float(c))} for c in server.cohort}
        found = server.exchange(self.fit, server.cohort, {"common": torch.tensor(7.0)}, each)
        share = found["samples"].double() / found["samples"].sum()
        stacked = {n.removeprefix("model/"): a for n, a in found.items() if n != "samples"}
        return {n: torch.einsum("k,k...->...", share, a) for n, a in stacked.items()}, server.state

    def after_aggregate(self, server):
        moved = max(float((server.before[n] - a).abs().max()) for n, a in server.arrays.items())
        SEEN.append((list(server.cohort), moved))
        return server.arrays, server.state
    """
    settings = plugin(body, **ONE_ROUND)
    result = tiny(settings)
    plain = tiny({**ONE_ROUND, "engine.path": "sequential"})
    ours, theirs = arrays_of(result), arrays_of(plain)
    assert max(float((ours[n] - theirs[n]).abs().max()) for n in theirs) < 1e-12
    *calls, (cohort, moved) = plugin.seen(settings)
    assert sorted(calls) == [(c, float(c), 7.0) for c in cohort]
    assert moved > 0
    with (result.folder / "costs.csv").open() as lines:
        row = next(csv.DictReader(lines))
    with (plain.folder / "costs.csv").open() as lines:
        usual = next(csv.DictReader(lines))
    assert row["steps"] == usual["steps"]
    assert float(row["flops"]) == float(usual["flops"]) > 0
    clients = len(cohort)
    assert result.summary["bytes_up"] == plain.summary["bytes_up"] + 8 * clients  # the numbers of samples
    assert result.summary["bytes_down"] == plain.summary["bytes_down"] + (4 + 4) * clients


def test_phases_of_an_exchange_cost_what_those_of_a_round_do(tiny: Tiny, plugin: Any) -> None:
    """Each by what it trains: a step of the head alone has no way back through the encoder."""
    head = 'Phase(trains=lambda name: name.startswith("head."), epochs=3)'
    own = f"""
    reductions = {{"none": "sum"}}

    def fit(self, ctx):
        ctx.train(Phase())
        ctx.train({head})
        return {{"none": torch.tensor(0)}}, ctx.state

    def round(self, server):
        server.exchange(self.fit, server.cohort)
        return server.arrays, server.state
    """
    usual = f"""
    def phases(self, ctx):
        second = {head}
        return [Phase(), Phase("head", second.trains, epochs=second.epochs)]
    """
    costs = [tiny(plugin(body, **{**ONE_ROUND, "federation.rounds": 2})).summary["costs"] for body in (own, usual, "")]
    assert costs[0]["flops"] == costs[1]["flops"]
    assert costs[0]["flops_per_client_round"] == costs[1]["flops_per_client_round"]
    assert costs[2]["flops"] < costs[0]["flops"] < 4 * costs[2]["flops"]


def test_only_exchanged_functions_may_train(tiny: Tiny, plugin: Any) -> None:
    body = "def end_round(self, ctx, trained, steps):\n    ctx.train(Phase())\n    return {}, ctx.state"
    with pytest.raises(RunFailed, match=r"calls ctx\.train in a hook; only exchanged functions may"):
        tiny(plugin(body, **ONE_ROUND))


@pytest.mark.parametrize("path", ["sequential", "stacked"])
def test_added_modules_are_trained_averaged_and_grow(tiny: Tiny, plugin: Any, moved: Moved, path: str) -> None:
    settings = plugin(
        """
        class Embeddings(torch.nn.Module):
            class_axis = {"weight": 0}
            fixed = False

            def __init__(self, size):
                super().__init__()
                self.weight = torch.nn.Parameter(torch.zeros(0, size))

            def initial_rows(self, array, class_ids, seed):
                return torch.tensor([[float(c)] for c in class_ids]).expand(-1, self.weight.shape[1]).clone()

            def forward(self, x):
                return x @ self.weight.T

        def modules(self, model):
            size = model.feature_dim
            return {"predictor": torch.nn.Linear(size, size), "classes": self.Embeddings(size)}

        def loss(self, step):
            guess = self.scores(step, step.output.features)
            return {"guess": cross_entropy(guess, step.y, step.known)}

        def scores(self, seen, features):
            return seen.apply("classes", torch.relu(seen.apply("predictor", features)))

        def end_round(self, ctx, trained, steps):
            x, _ = next(ctx.batches())
            SEEN.append(self.scores(ctx, ctx.forward(x).features).shape[1])
            return {}, ctx.state

        def predict(self, predictor, x):
            return self.scores(predictor, predictor.forward(x).features)
        """,
        **{"engine.dtype": "float64"},
    )
    result = tiny({**settings, "engine.path": path})
    name = settings["strategy"][0]
    added = {n for n in moved(result) if n.startswith("extra.")}
    assert added == {f"extra.{name}.{n}" for n in ("predictor.weight", "predictor.bias", "classes.weight")}
    assert set(plugin.seen(settings)) == {5, 10}
    weight = arrays_of(result)[f"extra.{name}.classes.weight"]
    assert weight.shape[0] == 10
    if path == "stacked":
        alone = tiny({**settings, "engine.path": "sequential"})
        ours, theirs = arrays_of(result), arrays_of(alone)
        assert max(float((ours[n] - theirs[n]).abs().max()) for n in theirs) < 1e-10


def test_groups_set_the_optimiser_of_some_parameters(tiny: Tiny, plugin: Any, moved: Moved) -> None:
    body = """
    def groups(self):
        from fedcl.local.optim import Group
        return [Group(lambda n: n.startswith("encoder."), lr_scale=0.0)]
    """
    assert moved(tiny(plugin(body, **ONE_ROUND))) == {"head.weight", "head.bias"}


def test_clients_are_tested_with_models_and_rules_of_their_own(tiny: Tiny, plugin: Any) -> None:
    settings = plugin(
        """
        predicts_by_state = True

        def end_round(self, ctx, trained, steps):
            return {}, {"bias": torch.full_like(trained["head.bias"], float(ctx.client))}

        def personal(self, arrays, state):
            return {**arrays, "head.bias": state["bias"]} if state else arrays

        def predict(self, predictor, x):
            own = predictor.own.get("bias")
            SEEN.append((predictor.client, None if own is None else float(own[0]), predictor.arrays["head.bias"]))
            return predictor.forward(x).logits
        """,
        **{**ONE_ROUND, "partition.test": "same_mix", "evaluate.personal": True},
    )
    result = tiny(settings)
    seen = plugin.seen(settings)
    mine = {client: (own, bias) for client, own, bias in seen if client is not None}
    assert sorted(mine) == list(range(result.summary["num_clients"]))
    for client, (own, bias) in mine.items():
        assert own == client
        assert bool((bias == client).all())
    assert all(own is None for client, own, _ in seen if client is None)
    assert any(client is None for client, *_ in seen)


def test_states_with_axes_before_a_parameters_own_grow_with_it(tiny: Tiny, plugin: Any) -> None:
    """At the client, which grows what it reads, and at the server alike."""
    settings = plugin(
        """
        like_parameters = {"history": "zero"}

        def end_round(self, ctx, trained, steps):
            old = ctx.state.get("history/head.weight")
            if old is not None:
                SEEN.append((ctx.task, tuple(old.shape), float(old[:, :5].min()), float(old[:, 5:].abs().sum())))
            return {}, {"history/head.weight": torch.ones(3, *trained["head.weight"].shape)}
        """,
        **{"federation.rounds": 1},
    )
    tiny(settings)
    assert plugin.seen(settings)
    assert set(plugin.seen(settings)) == {(1, (3, 10, 8), 1.0, 0.0)}
