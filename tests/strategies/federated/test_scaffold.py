"""SCAFFOLD against a literal loop with option II as the paper writes it, and what its variates add up to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from fedcl.blocks.updates import under
from fedcl.build import build
from fedcl.check.lab import read
from fedcl.errors import UsageError

PLAIN = {"strategy": ["scaffold"], "optimiser.momentum": 0.0}


def _method(oracle: Any, clients: int, server_lr: float = 1.0) -> Any:
    def zeros(w: Any) -> Any:
        return {n: torch.zeros_like(a) for n, a in w.items()}

    def variate(local: Any, key: Any, w: Any) -> Any:
        """A variate, with zeros for the rows of the head that have come since."""
        out = zeros(w)
        for n, a in local.memory.get(key, {}).items():
            out[n][: len(a)] = a
        return out

    def loss(w: Any, x: Any, y: Any, local: Any) -> Any:
        return oracle.cross_entropy(oracle.logits(w, x), y, local.known)

    def edit(grads: Any, w: Any, local: Any) -> Any:
        own, server = variate(local, local.client, w), variate(local, "server", w)
        return {n: g - own[n] + server[n] for n, g in grads.items()}

    def join(w: Any, outcomes: Any, local: Any) -> Any:
        lr, server = local.world.config.optimiser.lr, variate(local, "server", w)
        new, total = zeros(w), zeros(w)
        for o in outcomes:
            own = variate(local, o.client, w)
            local.memory[o.client] = {n: own[n] - server[n] + (w[n] - o.trained[n]) / (o.steps * lr) for n in w}
            for n in w:
                total[n] = total[n] + local.memory[o.client][n] - own[n]
                new[n] = new[n] + (o.trained[n] - w[n]) / len(outcomes)
        local.memory["server"] = {n: server[n] + total[n] / clients for n in w}
        return {n: w[n] + server_lr * new[n] for n in w}

    return oracle.Method(loss, edit=edit, join=join)


def states(folder: Path) -> tuple[dict[str, Any], dict[int, dict[str, Any]]]:
    """The variates of the server and of each client at the end of a run."""
    ended = read(folder)
    server = under(under(ended.server, "strategy/scaffold"), "variate")
    return server, {c: under(under(arrays, "scaffold"), "variate") for c, arrays in ended.clients.items()}


@pytest.mark.parametrize(
    "settings",
    [
        {"scenario.tasks": 3},
        {"options.scaffold.server_lr": 0.5, "federation.rounds": 4, "federation.participation": 0.67},
    ],
    ids=["default", "sampled"],
)
def test_whole_run_equals_the_literal_loop(tiny: Any, tiny_config: Any, oracle: Any, settings: dict[str, Any]) -> None:
    settings = {**PLAIN, "seed": 4, **settings}
    expected = oracle.federated(
        tiny_config(settings), _method(oracle, 3, settings.get("options.scaffold.server_lr", 1.0))
    )
    assert oracle.distance(oracle.final(tiny(settings)), expected) < 1e-10


def test_the_mean_of_the_clients_variates_is_the_servers(tiny: Any) -> None:
    server, clients = states(tiny({**PLAIN, "federation.rounds": 3, "scenario.tasks": 1}).folder)
    assert len(clients) == 3
    assert set(server) == {"encoder.1.weight", "encoder.1.bias", "head.weight", "head.bias"}
    for name, variate in server.items():
        mean = sum(own[name] for own in clients.values()) / 3
        torch.testing.assert_close(variate, mean, rtol=0, atol=1e-12)
        assert float(variate.abs().max()) > 1e-3


def test_first_round_is_averaging_with_equal_weights(tiny: Any, oracle: Any) -> None:
    once = {"federation.rounds": 1, "scenario.tasks": 1, "optimiser.momentum": 0.0}
    ours = oracle.final(tiny({**PLAIN, **once}))
    assert oracle.distance(ours, oracle.final(tiny({**once, "federation.weighting": "uniform"}))) < 1e-12
    assert oracle.distance(ours, oracle.final(tiny(once))) > 1e-5


def test_identical_clients_are_averaged(tiny: Any, oracle: Any) -> None:
    """With one full batch a round and one client, the variates of server and client cancel."""
    same = {"federation.clients": 1, "federation.rounds": 3, "optimiser.momentum": 0.0}
    ours = oracle.final(tiny({**PLAIN, **same}))
    assert oracle.distance(ours, oracle.final(tiny(same))) < 1e-12


def test_statistics_of_batch_norm_are_left_alone(tiny: Any, oracle: Any) -> None:
    common = {"model.norm": "batch", "scenario.tasks": 1, "federation.rounds": 1, "optimiser.momentum": 0.0}
    ours = oracle.final(tiny({**PLAIN, **common, "options.scaffold.server_lr": 2.0}))
    plain = oracle.final(tiny({**common, "federation.weighting": "uniform"}))
    for name in (n for n in plain if "running" in n):
        torch.testing.assert_close(ours[name], plain[name], rtol=0, atol=1e-12)
    assert oracle.distance(ours, plain) > 1e-4


def test_stacked_is_one_by_one_with_batch_norm(tiny: Any, oracle: Any) -> None:
    settings = {**PLAIN, "model.norm": "batch", "federation.batch_min": 2, "federation.rounds": 3}
    one, other = (oracle.final(tiny({**settings, "engine.path": path})) for path in ("sequential", "stacked"))
    assert oracle.distance(one, other) < 1e-8


def test_private_parameters_have_no_variates(tiny: Any) -> None:
    """Nothing of a private head is kept, sent or corrected."""
    run = tiny({**PLAIN, "strategy": ["scaffold", "fedper"], "federation.rounds": 2})
    server, clients = states(run.folder)
    assert len(clients) == 3
    assert all(set(found) == {"encoder.1.weight", "encoder.1.bias"} for found in (server, *clients.values()))
    assert all(float(a.abs().max()) > 0 for a in server.values())


@pytest.mark.parametrize("name", ["scaffold", "feddyn"])
def test_clients_that_share_nothing_train_by_themselves(tiny: Any, oracle: Any, name: str) -> None:
    alone = {"optimiser.momentum": 0.0, "options.fedper.private": ["encoder", "head"], "federation.rounds": 2}
    kept = [
        {c: under(arrays, "private") for c, arrays in read(tiny({**alone, "strategy": stack}).folder).clients.items()}
        for stack in ([name, "fedper"], ["fedper"])
    ]
    assert set(kept[0]) == set(kept[1]) == {0, 1, 2}
    assert all(oracle.distance(kept[0][c], kept[1][c]) == 0 for c in kept[0])


def test_hard_settings(tiny: Any, tiny_config: Any, oracle: Any, hard: dict[str, Any]) -> None:
    settings = {**PLAIN, **hard}
    found = oracle.final(tiny(settings))
    assert all(bool(a.isfinite().all()) for a in found.values())
    clients = settings.get("federation.clients", 3)
    assert oracle.distance(found, oracle.federated(tiny_config(settings), _method(oracle, clients))) < 1e-10


@pytest.mark.parametrize(
    ("key", "value"),
    [("optimiser.momentum", 0.9), ("optimiser.name", "adam"), ("optimiser.clip", 1.0)],
)
def test_what_breaks_the_variates_is_refused(tiny_config: Any, key: str, value: object) -> None:
    with pytest.raises(UsageError, match=key) as caught:
        build(tiny_config({**PLAIN, key: value}))
    assert "scaffold" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("value", [0.0, -1.0, float("inf")])
def test_wrong_server_rate(tiny_config: Any, value: float) -> None:
    with pytest.raises(UsageError, match=r"options\.scaffold"):
        build(tiny_config({**PLAIN, "options.scaffold.server_lr": value}))
