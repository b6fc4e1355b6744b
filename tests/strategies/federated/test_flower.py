"""Flower's strategies through the engine: whole runs, from one client to twenty."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from fedcl.build import build
from fedcl.config import Config
from fedcl.errors import Interrupted, UsageError
from fedcl.records.checkpoint import load_newest
from fedcl.run import RunResult, execute, resume
from fedcl.strategies.federated.flower import ALL, cohort_sizes
from fedcl.tell.progress import QuietProgress

Configure = Callable[[Mapping[str, Any]], Config]
Run = Callable[[Mapping[str, Any]], RunResult]

NAMES = [cls.name for cls in ALL]
GROWING = {
    "scenario.base": 1, "scenario.increment": 7, "model.norm": "batch", "federation.rounds": 2,
    "federation.batch_min": 2,
}  # fmt: skip
"""Three tasks of 1, 7 and 2 classes, on a network with BatchNorm, which a batch of one image cannot train."""
MANY = {"federation.clients": 20, "partition.min_size": 0, "partition.alpha": 0.3, "data.limit": 12}
"""Twenty clients on few images: some hold none."""


def plain(client: list[dict[str, Tensor]], weights: list[float]) -> dict[str, Tensor]:
    """The weighted mean of models."""
    return {
        n: sum(w * c[n] for w, c in zip(weights, client, strict=True)) / sum(weights)  # type: ignore[misc]
        for n in client[0]
    }


def rounds(result: RunResult) -> list[dict[str, Any]]:
    """What the run logged of each round."""
    events = [json.loads(line) for line in (result.folder / "events.jsonl").read_text().splitlines()]
    return [e for e in events if e["event"] == "round"]


def sound(model: dict[str, Tensor]) -> None:
    """Finite, and a variance is not negative."""
    assert all(bool(torch.isfinite(a).all()) for a in model.values())
    variances = [a for n, a in model.items() if n.endswith("running_var")]
    assert variances
    assert all(bool((a >= 0).all()) for a in variances)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("clients", [1, 2, 20])
def test_three_growing_tasks_with_batch_norm(tiny: Run, oracle: ModuleType, name: str, clients: int) -> None:
    how = MANY if clients == 20 else {"federation.clients": clients, "partition.min_size": 0}
    overrides = {"strategy": [name], **GROWING, **how}
    if (name == "bulyan" and clients < 20) or (name == "multikrum" and clients == 1):
        with pytest.raises(UsageError, match=name):
            tiny(overrides)
        return
    result = tiny(overrides)
    model = oracle.final(result)
    sound(model)
    assert model["head.weight"].shape[0] == 10
    assert all(value is not None for value in result.matrix[-1])
    assert any(e["empty_clients"] for e in rounds(result)) is (clients == 20)


@pytest.mark.parametrize("name", NAMES)
def test_part_of_the_clients_in_each_round(tiny: Run, oracle: ModuleType, name: str) -> None:
    half = {**GROWING, "scenario.base": 4, "scenario.increment": 3, "federation.participation": 0.5}
    spread = {"federation.clients": 20, "partition.name": "iid", "data.limit": 24}
    result = tiny({"strategy": [name], **half, **spread})
    sound(oracle.final(result))
    assert all(e["clients"] == 10 for e in rounds(result))


@pytest.mark.parametrize("weighting", ["samples", "uniform"])
def test_flowers_fedavg_is_finetune(tiny: Run, oracle: ModuleType, weighting: str) -> None:
    how = {**GROWING, **MANY, "federation.participation": 0.4, "federation.weighting": weighting}
    flower, ours = (oracle.final(tiny({"strategy": [s], **how})) for s in ("flower_fedavg", "finetune"))
    assert oracle.distance(flower, ours) < 1e-10


ADAPTIVE = ["fedadam", "fedyogi", "fedadagrad"]


@pytest.mark.parametrize("name", ["fedmedian", "fedtrimmedavg", "krum", "multikrum", "flower_fedavg", *ADAPTIVE])
def test_one_round_is_the_rule_on_the_clients_models(tiny_config: Configure, oracle: ModuleType, name: str) -> None:
    from fedcl.run import run

    config = tiny_config(
        {
            "strategy": [name], "scenario.tasks": 1, "federation.rounds": 1, "federation.clients": 5,
            "data.limit": 12, **({"options.fedtrimmedavg.beta": 0.2} if name == "fedtrimmedavg" else {}),
        }
    )  # fmt: skip
    world = oracle.World.of(config)
    start = oracle.grown(world.start, world, 10)
    method = oracle.Method(lambda w, x, y, local: oracle.cross_entropy(oracle.logits(w, x), y, local.known))
    local = oracle.Local(world, 0, start, None, {})
    models = [oracle.train(k, 0, local, method) for k in range(5)]
    weights = [float(len(world.held[0][k])) for k in range(5)]
    stacked = {n: torch.stack([m[n] for m in models]) for n in start}
    mean = plain(models, weights)
    if name == "flower_fedavg":
        expected = mean
    elif name == "fedmedian":
        expected = {n: a.sort(dim=0).values[2] for n, a in stacked.items()}
    elif name == "fedtrimmedavg":
        expected = {n: a.sort(dim=0).values[1:-1].mean(dim=0) for n, a in stacked.items()}
    elif name in ("krum", "multikrum"):
        flat = torch.stack([torch.cat([m[n].flatten() for n in start]) for m in models])
        gaps = [sorted(float((a - b).square().sum()) for b in flat) for a in flat]
        scores = [sum(row[1 : 1 + 5 - 0 - 2]) for row in gaps]  # the n - f - 2 nearest others
        best = sorted(range(5), key=scores.__getitem__)[: 1 if name == "krum" else 2]
        expected = plain([models[k] for k in best], [weights[k] for k in best])
    else:
        step = {n: mean[n] - start[n] for n in start}
        adagrad = name == "fedadagrad"
        first = {n: (1.0 if adagrad else 0.1) * d for n, d in step.items()}
        second = {n: (1.0 if adagrad else 1 - 0.99) * d.square() for n, d in step.items()}  # Yogi's too, from v = 0
        eta = 0.01 if name == "fedyogi" else 0.1
        # Flower corrects Adam's bias in the rate, with t = 2 in the first round, and Yogi's not at all.
        scale = (1 - 0.99**2) ** 0.5 / (1 - 0.9**2) if name == "fedadam" else 1.0
        expected = {n: start[n] + eta * scale * first[n] / (second[n].sqrt() + 1e-3) for n in start}
    assert oracle.distance(oracle.final(run(config)), expected) < 1e-9


def test_adam_goes_on_over_rounds_and_tasks(tiny_config: Configure, oracle: ModuleType) -> None:
    config = tiny_config({"strategy": ["fedadam"], "scenario.tasks": 2})
    world = oracle.World.of(config)
    method = oracle.Method(lambda w, x, y, local: oracle.cross_entropy(oracle.logits(w, x), y, local.known))
    w, m, v, t = world.start, {}, {}, 1
    for task in range(2):
        w = oracle.grown(w, world, len(world.known[task]))
        for old in (m, v):
            for n, a in w.items():
                wider = torch.zeros_like(a)
                if n in old:
                    wider[: len(old[n])] = old[n]
                old[n] = wider
        for round_ in range(2):
            t += 1
            models = [oracle.train(k, round_, oracle.Local(world, task, w, None, {}), method) for k in range(3)]
            mean = plain(models, [float(len(rows)) for rows in world.held[task]])
            eta = 0.1 * (1 - 0.99**t) ** 0.5 / (1 - 0.9**t)
            for n in w:
                m[n] = 0.9 * m[n] + 0.1 * (mean[n] - w[n])
                v[n] = 0.99 * v[n] + 0.01 * (mean[n] - w[n]).square()
            w = {n: a + eta * m[n] / (v[n].sqrt() + 1e-3) for n, a in w.items()}
    assert oracle.distance(oracle.final(execute(config, progress=QuietProgress())), w) < 1e-9


def test_momentum_goes_on_over_rounds_and_tasks(tiny_config: Configure, oracle: ModuleType) -> None:
    """Hsu et al. 2019: v <- beta v + (w - mean), w <- w - rate v; new rows of the head start with v = 0."""
    options = {"options.fedavgm.server_momentum": 0.5, "options.fedavgm.server_learning_rate": 0.7}
    config = tiny_config({"strategy": ["fedavgm"], **options})
    v: dict[str, Tensor] = {}

    def join(w: Any, outcomes: Any, local: Any) -> Any:
        mean = oracle.mean(w, outcomes, local)
        for n, a in w.items():
            old = torch.zeros_like(a)
            if n in v:
                old[: len(v[n])] = v[n]
            v[n] = 0.5 * old + (a - mean[n])
        return {n: a - 0.7 * v[n] for n, a in w.items()}

    method = oracle.Method(lambda w, x, y, local: oracle.cross_entropy(oracle.logits(w, x), y, local.known), join=join)
    got = oracle.final(execute(config, progress=QuietProgress()))
    assert oracle.distance(got, oracle.federated(config, method)) < 1e-9


def test_momentum_0_and_all_models_are_plain_averaging(tiny: Run, oracle: ModuleType) -> None:
    mean, still, every = (
        oracle.final(tiny({"strategy": [name], **options}))
        for name, options in (
            ("finetune", {}),
            ("fedavgm", {"options.fedavgm.server_momentum": 0.0}),
            ("multikrum", {"options.multikrum.num_nodes_to_select": 3}),
        )
    )
    assert oracle.distance(still, mean) < 1e-10
    assert oracle.distance(every, mean) < 1e-10


MOMENTS = dict.fromkeys(ADAPTIVE, ("m_t", "v_t")) | {"fedavgm": ("momentum_vector",)}


@pytest.mark.parametrize("name", MOMENTS)
def test_moments_grow_with_the_head_and_are_saved(tiny: Run, name: str) -> None:
    result = tiny({"strategy": [name], **GROWING})
    found = load_newest(result.folder / "checkpoints", lambda text: None)
    assert found is not None
    for moment in MOMENTS[name]:
        assert found.arrays[f"strategy/{name}/{moment}/head.weight"].shape == (10, 8)
    assert not any("running" in n for n in found.arrays if n.startswith("strategy/"))


class StopAt(QuietProgress):
    """Presses Ctrl-C after a number of rounds."""

    def __init__(self, rounds: int) -> None:
        self.left = rounds

    def round(self, task: int, round: int, standing: Any) -> None:
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt


@pytest.mark.parametrize("name", NAMES)
def test_a_resumed_run_ends_the_same(tiny_config: Configure, name: str) -> None:
    spread = {"federation.clients": 7, "partition.min_size": 0, "partition.alpha": 5.0}
    overrides = {"strategy": [name], **GROWING, **spread}
    whole = execute(tiny_config(overrides), progress=QuietProgress())
    config = tiny_config(overrides)
    with pytest.raises(Interrupted):
        execute(config, progress=StopAt(3))  # in the middle of the second task
    (folder,) = Path(config.output.dir).glob("*/seed-*")
    again = resume(folder, progress=QuietProgress())
    assert again.summary["model_sha256"] == whole.summary["model_sha256"]
    assert again.summary["state_sha256"] == whole.summary["state_sha256"]
    assert again.matrix == whole.matrix


@pytest.mark.parametrize(
    ("name", "malicious", "clients"),
    [("krum", 1, 4), ("multikrum", 2, 6), ("bulyan", 0, 2), ("bulyan", 1, 6), ("krum", 2, 6)],
)
def test_too_few_clients_are_refused_before_anything_runs(
    tiny_config: Configure, name: str, malicious: int, clients: int
) -> None:
    few = {
        "strategy": [name],
        f"options.{name}.num_malicious_nodes": malicious,
        "federation.clients": clients,
    }
    config = tiny_config(few)
    with pytest.raises(UsageError, match=f"options.{name}.num_malicious_nodes") as caught:
        execute(config, progress=QuietProgress())
    assert "\n" not in str(caught.value)
    assert not Path(config.output.dir).exists()
    enough = {**few, "federation.clients": clients + 1, "federation.rounds": 1}
    assert execute(tiny_config(enough), progress=QuietProgress()).summary["status"] == "done"


@pytest.mark.parametrize(
    "how",
    [
        {"partition.alpha": 0.05, "partition.min_size": 0, "federation.clients": 8},
        {"federation.clients": 6, "federation.participation": 0.5},
        {"federation.clients": 7, "federation.drop_last": True},
    ],
    ids=["empty clients", "participation", "idle clients"],
)
def test_clients_that_cannot_train_do_not_count(tiny_config: Configure, how: dict[str, Any]) -> None:
    config = tiny_config({"strategy": ["bulyan"], "options.bulyan.num_malicious_nodes": 1, **how})
    with pytest.raises(UsageError, match=r"options\.bulyan\.num_malicious_nodes"):
        execute(config, progress=QuietProgress())
    assert not Path(config.output.dir).exists()


def test_cohorts_are_counted_as_the_server_draws_them(tiny_config: Configure) -> None:
    config = tiny_config({**MANY, "federation.participation": 0.3, "federation.batch_min": 2, "scenario.tasks": 3})
    result = execute(config, progress=QuietProgress())
    counted = [e["clients"] - len(e["empty_clients"]) - len(e["idle_clients"]) for e in rounds(result)]
    assert list(cohort_sizes(config, build(config).split)) == counted
    assert len(set(counted)) > 1


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "odd",
    [{"federation.batch_size": 1}, {"data.limit": 1, "partition.name": "iid", "scenario.tasks": 1}],
    ids=["batch of one", "one sample a class"],
)
def test_odd_input(tiny: Run, oracle: ModuleType, name: str, odd: dict[str, Any]) -> None:
    result = tiny({"strategy": [name], "federation.rounds": 1, **odd})
    assert all(bool(torch.isfinite(a).all()) for a in oracle.final(result).values())


def test_a_task_whose_cohorts_hold_nothing_leaves_the_model(tiny: Run, oracle: ModuleType) -> None:
    # One class a task and an image of it: only one client of twelve has anything to train on.
    nothing = {
        "data.limit": 1, "federation.clients": 12, "partition.min_size": 0, "federation.participation": 0.09,
    }  # fmt: skip
    result = tiny({"strategy": ["fedadam"], "scenario.tasks": 10, "federation.rounds": 1, **nothing})
    assert result.summary["empty_rounds"] > 0
    assert all(bool(torch.isfinite(a).all()) for a in oracle.final(result).values())


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        ("fedadam", "eta", 0.0),
        ("fedadam", "beta_1", 1.0),
        ("fedyogi", "tau", -1.0),
        ("fedadagrad", "tau", 0.0),
        ("fedavgm", "server_momentum", 1.0),
        ("fedavgm", "server_learning_rate", 0.0),
        ("multikrum", "num_nodes_to_select", 4),
        ("fedtrimmedavg", "beta", 0.5),
        ("krum", "num_malicious_nodes", -1),
        ("bulyan", "num_malicious_nodes", 0.5),
        ("fedmedian", "beta", 0.1),
    ],
)
def test_wrong_options(tiny: Run, name: str, key: str, value: object) -> None:
    with pytest.raises(UsageError) as caught:
        tiny({"strategy": [name], f"options.{name}.{key}": value})
    assert "\n" not in str(caught.value)
    assert f"options.{name}" in str(caught.value)
