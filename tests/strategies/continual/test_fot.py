"""FOT against a literal loop with NumPy's SVD, what its rounds leave as it is, and the edges."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedcl import random as counter
from fedcl.build import build
from fedcl.errors import UsageError
from fedcl.federation.call import Call, Header
from fedcl.federation.reduction import Reducer
from fedcl.federation.store import ClientStore
from fedcl.models.arrays import grow_head
from fedcl.records.checkpoint import unpack_tensors
from fedcl.strategies.continual.fot import FOT

LAYER = "encoder.1"


def _sketched(rows: Any, basis: Any, columns: int, config: Any, client: int, task: int) -> Any:
    """(m, s) sum over images of what lies outside of the basis times normal numbers, by the documented stream."""
    name = (config.seed, "client", client, task, config.federation.rounds, "sketch", LAYER)
    generator = torch.Generator().manual_seed(counter.key(*name) & (2**63 - 1))
    total = np.zeros((rows.shape[1], columns))
    for part in torch.split(rows, 32):
        mixing = torch.randn(len(part), columns, generator=generator, dtype=torch.float64)
        for row, numbers in zip(part.numpy(), mixing.numpy(), strict=True):
            total += np.outer(row - basis @ (basis.T @ row), numbers)
    return total


def _method(
    oracle: Any, threshold: float = 0.9, increment: float = 0.001, columns: float = 5.0, ratio: str = "energy",
    rest: str = "average", task: str = "new",
) -> Any:  # fmt: skip
    def loss(w: Any, x: Any, y: Any, local: Any) -> Any:
        return oracle.cross_entropy(oracle.logits(w, x), y, local.new if task == "new" else local.known)

    def join(w: Any, outcomes: Any, local: Any) -> Any:
        new = oracle.mean(w, outcomes, local)
        if "basis" not in local.memory:
            return new
        basis = torch.from_numpy(local.memory["basis"])
        update = w[f"{LAYER}.weight"] - new[f"{LAYER}.weight"]
        update = update - update @ basis @ basis.T
        new[f"{LAYER}.weight"] = w[f"{LAYER}.weight"] - update
        if rest == "hold":
            new[f"{LAYER}.bias"] = w[f"{LAYER}.bias"]
        return new

    def end_task(w: Any, local: Any) -> Any:
        world = local.world
        size = world.x.shape[1]
        basis = local.memory.get("basis", np.zeros((size, 0)))
        sketch, inside, everything, ratios, images = 0.0, 0.0, 0.0, 0.0, 0
        for client, held in enumerate(world.held[local.task]):
            if not held:
                continue
            x = world.x[held]
            sketch = sketch + _sketched(x, basis, round(columns * size), world.config, client, local.task)
            whole = float((x**2).sum())
            covered = float(((x.numpy() @ basis) ** 2).sum())
            inside, everything, images = inside + covered, everything + whole, images + len(held)
            ratios += len(held) * np.sqrt((whole - covered) / whole)
        rho = ratios / images if ratio == "norm" else 1 - inside / everything
        target = (rho - (1 - (threshold + increment * local.task))) / rho
        vectors, values, _ = np.linalg.svd(sketch)
        energies = values**2 / (values**2).sum()
        rank = next(i + 1 for i in range(size) if energies[: i + 1].sum() > target)
        local.memory["basis"] = np.linalg.qr(np.concatenate([basis, vectors[:, :rank]], axis=1))[0]
        return w

    return oracle.Method(loss, end_task=end_task, join=join)


@pytest.mark.parametrize(
    ("settings", "options"),
    [
        ({}, {}),
        ({"scenario.tasks": 3, "federation.weighting": "uniform"}, {"threshold": 0.6, "ratio": "norm"}),
        ({"scenario.tasks": 3}, {"threshold": 0.5, "increment": 0.1, "rest": "hold", "task": "known"}),
        ({"federation.participation": 0.67}, {"threshold": 0.7, "columns_linear": 0.3}),
    ],
    ids=["default", "norms", "rising", "few columns"],
)
def test_whole_run_equals_the_literal_loop(
    tiny: Any, tiny_config: Any, oracle: Any, settings: dict[str, Any], options: dict[str, Any]
) -> None:
    settings = {"strategy": ["fot"], "seed": 5, **settings, **{f"options.fot.{n}": v for n, v in options.items()}}
    options = {n.replace("columns_linear", "columns"): v for n, v in options.items()}
    expected = oracle.federated(tiny_config(settings), _method(oracle, **options))
    assert oracle.distance(oracle.final(tiny(settings)), expected) < 1e-9


@pytest.mark.parametrize("weighting", ["uniform", "samples"])
def test_without_a_threshold_it_is_federated_averaging_bit_for_bit(tiny: Any, oracle: Any, weighting: str) -> None:
    settings = {"federation.weighting": weighting}
    zero = {"strategy": ["fot"], "options.fot.threshold": 0.0, "options.fot.task": "known", **settings}
    plain = oracle.final(tiny({"strategy": ["finetune"], **settings}))
    assert oracle.identical(oracle.final(tiny(zero)), plain)
    assert oracle.distance(oracle.final(tiny({**zero, "options.fot.threshold": 0.5})), plain) > 1e-3


def _features(settings: dict[str, Any], result: Any, config: Any, oracle: Any) -> tuple[Any, Any, Any]:
    """Features of the first task's training images by the model after the first task and by the last, and weights."""
    experiment = build(config)
    rows = torch.from_numpy(np.concatenate(experiment.split.rows[0]))
    x = experiment.node.store.batch(rows, torch.float64)
    final = oracle.final(result)
    early = {
        n: a.to(torch.float64) for n, a in unpack_tensors((result.folder / "base.safetensors").read_bytes()).items()
    }
    early = {n: early.get(n, a) for n, a in final.items()}
    forward = experiment.node.forward
    moved = max(float((final[n] - early[n]).abs().max()) for n in final if n.startswith("encoder.1."))
    return forward(early, x, "eval").features, forward(final, x, "eval").features, moved


@pytest.mark.parametrize(
    ("settings", "spared"),
    [
        ({"model.bias": False, "strategy": ["fot"]}, True),
        ({"options.fot.rest": "hold", "strategy": ["fot"]}, True),
        ({"options.fot.rest": "hold", "model.norm": "batch", "federation.batch_min": 2, "strategy": ["fot"]}, True),
        ({"strategy": ["fot"]}, False),
        ({"model.bias": False, "strategy": ["fot"], "options.fot.threshold": 0.0}, False),
    ],
    ids=["no biases", "biases held", "batchnorm held", "biases averaged", "no threshold"],
)
def test_features_of_old_images_stay_where_the_basis_holds_all_of_them(
    tiny: Any, tiny_config: Any, oracle: Any, settings: dict[str, Any], spared: bool
) -> None:
    settings = {"model.width": 80, "model.depth": 2, "options.fot.threshold": 1.0, **settings}
    # Wider than the task has images, so that no layer's inputs fill their space.
    before, after, moved = _features(settings, tiny(settings), tiny_config(settings), oracle)
    assert moved > 1e-3
    assert ((after - before).abs().max() < 1e-6) == spared


def test_only_the_sketches_are_sent_and_only_at_the_end_of_a_task(tiny: Any) -> None:
    ours, plain = tiny({"strategy": ["fot"]}), tiny({"strategy": ["finetune_masked"]})
    # Two tasks, three clients: a sketch (64, 320) and two numbers of the one layer, float64.
    assert ours.summary["bytes_up"] - plain.summary["bytes_up"] == 2 * 3 * (64 * 320 + 2) * 8
    cut = tiny({"strategy": ["fot"], "options.fot.columns_linear": 0.5})
    assert cut.summary["bytes_up"] - plain.summary["bytes_up"] == 2 * 3 * (64 * 32 + 2) * 8


def test_evaluation_batches_do_not_change_the_training(tiny: Any, oracle: Any) -> None:
    one, other = (tiny({"strategy": ["fot"], "evaluate.batch_size": size}) for size in (3, 1024))
    assert oracle.identical(oracle.final(one), oracle.final(other))


def _asked(config: Any, which: str, encoder: dict[str, Any], folder: Path, task: int = 0) -> dict[str, Any]:
    """What two clients send; ``encoder`` is the global one, or that of client 1's state."""
    experiment = build(config)
    node = replace(experiment.node, clients=ClientStore(folder / f"{which}{task}", 0))
    arrays = grow_head(experiment.initial, node.model, experiment.stream.class_order, 0)
    state = {f"fot/{n}": a for n, a in encoder.items()} | {"fot/task": torch.tensor(task)}
    if which == "state":
        node.clients.put(1, 1, state)
    else:
        arrays |= encoder
    everything = list(range(10))
    header = Header("fot:sketch", [0, 1] if which == "state" else [1], 0, 2, 2, 1, 2, 10, everything, everything)
    rows = {k: torch.arange(k, 60, 2) for k in header.clients}
    reply = node.handle(Call(header, arrays, {}, {}, rows))
    reducer = Reducer(FOT.reductions)
    reducer.merge(reply.arrays, reply.facts)
    return reducer.result()


def test_participants_sketch_the_model_that_they_trained_and_others_nothing(tiny_config: Any, tmp_path: Path) -> None:
    settings = {"strategy": ["fot"], "model.depth": 2, "engine.nodes": 1}
    trained = tiny_config({**settings, "options.fot.of": "trained"})
    initial = build(trained).initial
    other = {n: a + 0.1 for n, a in initial.items() if n.startswith("encoder.")}
    found = _asked(trained, "state", other, tmp_path)
    expected = _asked(tiny_config(settings), "global", other, tmp_path)
    assert set(found) == set(expected)
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=0, atol=1e-12)
    same = {n: initial[n] for n in other}
    unlike = _asked(tiny_config(settings), "global", same, tmp_path)
    assert (unlike["sketch/encoder.3"] - expected["sketch/encoder.3"]).abs().max() > 0.1
    late = _asked(trained, "state", other, tmp_path, task=1)
    assert all(not a.any() for a in late.values())


def test_the_released_sketches_are_of_the_last_rounds_participants(tiny: Any) -> None:
    settings = {"federation.clients": 4, "federation.participation": 0.5}
    plain = tiny({"strategy": ["finetune_masked"], **settings})
    ours = tiny({"strategy": ["fot"], "options.fot.of": "trained", **settings})
    assert ours.summary["bytes_up"] - plain.summary["bytes_up"] == 2 * 2 * (64 * 320 + 2) * 8


def test_convolutions_at_single_precision(tiny: Any, oracle: Any) -> None:
    settings = {"model.name": "simple_cnn", "model.width": None, "model.depth": None, "engine.dtype": "float32"}
    result = tiny({"strategy": ["fot"], "federation.rounds": 1, "data.limit": 4, **settings,
                   "options.fot.columns_linear": 0.1})  # fmt: skip
    assert all(bool(a.isfinite().all()) for a in oracle.final(result).values())


def test_a_full_basis_freezes_the_layer(tiny: Any, oracle: Any) -> None:
    settings = {"strategy": ["fot"], "model.width": 4, "model.depth": 2, "options.fot.threshold": 1.0}
    result = tiny({**settings, "scenario.tasks": 3, "data.limit": 20})
    final, early = oracle.final(result), unpack_tensors((result.folder / "base.safetensors").read_bytes())
    assert (final["encoder.3.weight"] - early["encoder.3.weight"]).abs().max() < 1e-12
    assert (final["encoder.3.bias"] - early["encoder.3.bias"]).abs().max() > 1e-3


def test_hard_settings(tiny: Any, tiny_config: Any, oracle: Any, hard: dict[str, Any]) -> None:
    settings = {"strategy": ["fot"], **hard}
    found = oracle.final(tiny(settings))
    assert all(bool(a.isfinite().all()) for a in found.values())
    assert oracle.distance(found, oracle.federated(tiny_config(settings), _method(oracle))) < 1e-9


def test_idle_participants_of_the_last_round_send_nothing(tiny: Any, oracle: Any) -> None:
    idle = {"data.limit": 4, "federation.clients": 12, "partition.alpha": 0.05, "partition.min_size": 0}
    result = tiny({"strategy": ["fot"], "options.fot.of": "trained", **idle})
    assert all(bool(a.isfinite().all()) for a in oracle.final(result).values())


def test_batchnorm_needs_its_statistics_held(tiny: Any) -> None:
    with pytest.raises(UsageError, match="BatchNorm") as caught:
        tiny({"strategy": ["fot"], "model.norm": "batch", "federation.batch_min": 2})
    assert "options.fot.rest" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_single_pass_leaves_nothing_to_sketch(tiny: Any) -> None:
    with pytest.raises(UsageError, match="sketch"):
        tiny({"strategy": ["fot"], "federation.passes": "once"})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("threshold", -0.1),
        ("threshold", 1.1),
        ("threshold", float("nan")),
        ("increment", -1),
        ("increment", 1.0),
        ("columns_conv", 0),
        ("columns_linear", float("inf")),
        ("ratio", "both"),
        ("of", "all"),
        ("rest", "freeze"),
        ("task", "old"),
        ("epsilon", 1),
    ],
)
def test_wrong_options(tiny_config: Any, name: str, value: Any) -> None:
    with pytest.raises(UsageError, match=r"options\.fot") as caught:
        build(tiny_config({"strategy": ["fot"], f"options.fot.{name}": value}))
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)
