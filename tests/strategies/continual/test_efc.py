"""EFC and what it shares with EFC++ against literal loops; what it keeps after a task; the edges."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from fedcl import random as counter
from fedcl.build import build
from fedcl.errors import RunFailed, UsageError
from fedcl.models.rotation import RotationHead, turned
from fedcl.records.checkpoint import load_newest, unpack_tensors
from fedcl.strategies.continual.efc import EFC

PLAIN = {"rotation": False, "rehearsal": 0}
SIGMA = 0.2


def features(w: Any, x: Any) -> Any:
    hidden = x @ w["encoder.1.weight"].T + w["encoder.1.bias"]
    return hidden * (hidden > 0)


def end_of_task(w: Any, local: Any) -> None:
    """Gaussians and feature matrix of the task's images, all clients' together, by loops."""
    memory, world = local.memory, local.world
    rows = [i for held in world.held[local.task] for i in held]
    now = features(w, world.x[rows])
    if "matrix" in memory:
        before = features(local.previous, world.x[rows])
        near = {
            (c, j): -float((f - p) @ memory["matrix"] @ (f - p))
            for c, (p, _) in memory["gaussians"].items()
            for j, f in enumerate(before)
        }
        low, high = min(near.values()), max(near.values())
        for c, (p, spread) in list(memory["gaussians"].items()):
            weights = [math.exp((near[c, j] - low) / (high - low) / (2 * SIGMA**2)) for j in range(len(rows))]
            moved = sum(v * (now[j] - before[j]) for j, v in enumerate(weights)) / sum(weights)
            memory["gaussians"][c] = (p + moved, spread)
    gaussians = memory.setdefault("gaussians", {})
    for c in local.new:
        own = [j for j, i in enumerate(rows) if world.y[i] == c]
        if own:
            z = now[own]
            spread = (
                torch.from_numpy(np.cov(z.numpy(), rowvar=False)) if len(own) > 1 else torch.zeros(len(z[0]), len(z[0]))
            )
            gaussians[c] = (z.mean(0), spread.to(torch.float64))
    weight, bias = w["head.weight"][local.known], w["head.bias"][local.known]
    total = torch.zeros_like(torch.outer(now[0], now[0]))
    for f in now:
        jacobian = torch.autograd.functional.jacobian(lambda f: torch.log_softmax(weight @ f + bias, 0), f)
        p = torch.softmax(weight @ f + bias, 0)
        total += sum(p[c] * torch.outer(jacobian[c], jacobian[c]) for c in range(len(p)))
    memory["matrix"] = total / len(rows)


def method(oracle: Any, weight: float = 10.0, damping: float = 0.1, task: str = "new") -> Any:
    def loss(w: Any, x: Any, y: Any, local: Any) -> Any:
        value = oracle.cross_entropy(oracle.logits(w, x), y, local.new if task == "new" else local.known)
        if "matrix" not in local.memory:
            return value
        penalty = weight * local.memory["matrix"] + damping * torch.eye(
            len(local.memory["matrix"]), dtype=torch.float64
        )
        for f, old in zip(features(w, x), features(local.previous, x).detach(), strict=True):
            value = value + (f - old) @ penalty @ (f - old) / len(x)
        return value

    def end_task(w: Any, local: Any) -> Any:
        end_of_task(w, local)
        return w

    return oracle.Method(loss, end_task=end_task)


def kept(result: Any, name: str = "efc") -> dict[str, Any]:
    found = load_newest(result.folder / "checkpoints", lambda text: None)
    assert found is not None
    start = f"strategy/{name}/"
    return {n.removeprefix(start): a for n, a in found.arrays.items() if n.startswith(start)}


def compare(state: dict[str, Any], memory: dict[str, Any], jitter: float = 1e-5) -> None:
    torch.testing.assert_close(state["matrix"], memory["matrix"], rtol=0, atol=1e-9)
    assert torch.nonzero(state["counts"]).flatten().tolist() == sorted(memory["gaussians"])
    for c, (mean, spread) in memory["gaussians"].items():
        torch.testing.assert_close(state["means"][c], mean, rtol=0, atol=1e-9)
        factor = state["factors"][c]
        expected = spread + jitter * torch.eye(len(mean), dtype=torch.float64)
        torch.testing.assert_close(factor @ factor.T, expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    ("settings", "options"),
    [
        ({"scenario.tasks": 3}, {}),
        ({"federation.weighting": "uniform"}, {"weight": 3.0, "damping": 0.0, "task": "known"}),
        ({"scenario.tasks": 3, "federation.participation": 0.67, "model.head_allocate": "all"}, {"weight": 0.0}),
    ],
    ids=["three tasks", "no damping", "whole head"],
)
def test_whole_run_and_statistics_equal_the_literal_loop(
    tiny: Any, tiny_config: Any, oracle: Any, settings: dict[str, Any], options: dict[str, Any]
) -> None:
    settings = {"strategy": ["efc"], "seed": 5, "optimiser.lr": 0.02, "data.limit": 6, **settings}
    settings |= {f"options.efc.{n}": v for n, v in {**PLAIN, **options}.items()}
    literal = method(oracle, **options)
    seen: dict[str, Any] = {}
    inner = literal.end_task
    literal.end_task = lambda w, local: (inner(w, local), seen.update(local.memory))[0]
    result = tiny(settings)
    assert oracle.distance(oracle.final(result), oracle.federated(tiny_config(settings), literal)) < 1e-9
    compare(kept(result), seen)


def test_any_partition_gives_the_same_statistics(tiny: Any) -> None:
    frozen = {"strategy": ["efc"], "optimiser.lr": 1e-300, "scenario.tasks": 3, "partition.min_size": 0}
    one, many = (kept(tiny({**frozen, "federation.clients": k})) for k in (1, 5))
    for name in one:
        torch.testing.assert_close(many[name], one[name], rtol=0, atol=1e-10)


def test_the_elastic_term_alone_is_left_out_at_weight_zero_bit_for_bit(tiny: Any, oracle: Any) -> None:
    none = {f"options.efc.{n}": v for n, v in {**PLAIN, "weight": 0.0, "damping": 0.0}.items()}
    masked = oracle.final(tiny({"strategy": ["finetune_masked"]}))
    assert oracle.identical(oracle.final(tiny({"strategy": ["efc"], **none})), masked)
    assert oracle.distance(oracle.final(tiny({"strategy": ["efc"], **none, "options.efc.weight": 1.0})), masked) > 1e-4
    turned_on = {**none, "options.efc.rehearsal": 8}
    assert oracle.distance(oracle.final(tiny({"strategy": ["efc"], **turned_on})), masked) > 1e-4


def _rehearsed(oracle: Any, learned: list[bool], new: list[int], heads: Any = None) -> tuple[Any, Any, Any]:
    """The term of a step made by hand, the literal one, and the parameters."""
    classes, size = 5, 3
    w = oracle.leaves(oracle.model(size, size, classes, seed=0))
    means = oracle.model(size, size, 4, seed=1)["head.weight"]
    root = torch.randn(4, size, size, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    factors = torch.linalg.cholesky(root @ root.mT)
    down = {"matrix": torch.zeros(size, size, dtype=torch.float64), "means": means, "factors": factors,
            "learned": torch.tensor(learned)}  # fmt: skip
    x, y = oracle.model(size, 2, 1, seed=3)["encoder.1.weight"].T.contiguous(), [new[0], new[-1]]
    known = [0, 1, 2, 3, 4]
    step = oracle.step(w, x, y, known=known, new=new, down=down, previous=w)
    step = step if heads is None else replace(step, heads=torch.tensor(heads))
    found = EFC(EFC.Options(rehearsal=16)).loss(step)["prototypes"]
    seed = torch.tensor(0)
    slots = counter.counter_uniform(seed, counter.fold("slots"), (16,), torch.float64)
    noise = counter.counter_normal(seed, counter.fold("prototypes"), (16, size), torch.float64)
    current = counter.counter_integers(seed, counter.fold("current"), 2, (16,))
    wanted = [c for c in known if c in new or (c < 4 and learned[c])]
    total, drawn = 0.0, []
    for i in range(16):
        c = wanted[int(float(slots[i]) * len(wanted))]
        if c in new:
            f, label = x[int(current[i])], y[int(current[i])]
        else:
            f, label = means[c] + factors[c] @ noise[i], c
        drawn.append(c)
        scores = torch.stack([w["head.weight"][k] @ f + w["head.bias"][k] for k in range(classes)])
        among = known if heads is None else [k for k in known if heads[k] == heads[label]]
        total = total + oracle.cross_entropy(scores[None], [label], among) / 16
    assert len({c in new for c in drawn}) == 2
    return found, total, w


@pytest.mark.parametrize("heads", [None, [0, 0, 0, 1, 1]])
def test_prototypes_and_current_samples_share_a_cross_entropy(oracle: Any, heads: Any) -> None:
    found, expected, w = _rehearsed(oracle, [True, True, False, False], [3, 4], heads)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=0)
    slopes, wanted = oracle.gradient(found, w), oracle.gradient(expected, w)
    assert wanted["head.weight"].abs().max() > 0.01
    assert all(torch.allclose(slopes[n], wanted[n], atol=1e-10) for n in w)


def test_rotations_are_classes_of_their_own_in_the_first_task(tiny: Any, tiny_config: Any, oracle: Any) -> None:
    settings = {"strategy": ["efc"], "scenario.tasks": 1, "data.limit": 3}
    config = tiny_config(settings)
    name, width = "extra.efc.rotation.weight", 8

    def loss(w: Any, x: Any, y: Any, local: Any) -> Any:
        total = 0.0
        for image, label in zip(x, y, strict=True):
            for turns in range(4):
                # 90 degrees at a time, by indices: what stands at (i, j) is what stood at (j, 7 - i).
                seen = image.reshape(8, 8)
                for _ in range(turns):
                    seen = torch.stack([torch.stack([seen[j, 7 - i] for j in range(8)]) for i in range(8)])
                f = features(w, seen.reshape(1, 64))[0]
                scores = [w["head.weight"][c] @ f + w["head.bias"][c] for c in range(10)]
                scores += [w[name][c, r] @ f for r in range(3) for c in range(10)]
                right = turns * 10 + label
                total = total + oracle.cross_entropy(torch.stack(scores)[None], [right], range(40)) / (4 * len(y))
        return total

    world = oracle.World.of(config)
    drawn = [counter.uniform(3 * width, config.seed, "init", "rotation", c) for c in world.order]
    rows = (2.0 * torch.from_numpy(np.stack(drawn)) - 1.0) / math.sqrt(width)
    world.start[name] = rows.reshape(10, 3, width).to(torch.float32).to(torch.float64)
    world.config.federation.rounds = 1
    result = tiny({**settings, "federation.rounds": 1})
    assert oracle.distance(oracle.final(result), oracle.federated(config, oracle.Method(loss), world)) < 1e-10


def test_the_rotation_head_grows_with_the_classes_and_rests_after_the_first_task(tiny: Any, oracle: Any) -> None:
    result = tiny({"strategy": ["efc"], "optimiser.weight_decay": 0.1})
    final, early = oracle.final(result), unpack_tensors((result.folder / "base.safetensors").read_bytes())
    name = "extra.efc.rotation.weight"
    assert final[name].shape == (10, 3, 8)
    torch.testing.assert_close(final[name][:5], early[name], rtol=0, atol=1e-12)
    head = RotationHead(8)
    assert torch.equal(head.initial_rows("weight", [3, 7], 1)[1], head.initial_rows("weight", [7], 1)[0])
    assert head.initial_rows("weight", [], 1).shape == (0, 3, 8)
    x = torch.arange(18).reshape(2, 1, 3, 3)
    assert torch.equal(torch.rot90(turned(x)[2:4], -1, (2, 3)), x)


def test_batchnorm_keeps_its_statistics_after_the_first_task(tiny: Any, oracle: Any) -> None:
    settings = {"strategy": ["efc"], "model.norm": "batch", "federation.batch_min": 2}
    for which, same in (("eval", True), ("same", False)):
        result = tiny({**settings, "options.efc.batch_norm": which})
        final, early = oracle.final(result), unpack_tensors((result.folder / "base.safetensors").read_bytes())
        statistics = [n for n in final if n.endswith(("running_mean", "running_var"))]
        assert statistics
        assert (max(float((final[n] - early[n]).abs().max()) for n in statistics) < 1e-12) == same


def test_gaussians_go_down_once_a_task_and_only_of_old_classes(tiny: Any) -> None:
    plain = {f"options.efc.{n}": v for n, v in {"rotation": False}.items()}
    ours = tiny({"strategy": ["efc"], **plain})
    # What leaves in two tasks of three clients: counts, sums and outer products of five classes of 8 features each
    # time, the matrix and a count, and in the second the extremes, five numerators and denominators.
    task = 5 * (1 + 8 + 64) + 64 + 1
    extra = 8 * 3 * (2 * task + 2 + 5 * 9)
    assert ours.summary["bytes_up"] - tiny({"strategy": ["finetune_masked"]}).summary["bytes_up"] == extra


def test_hard_settings(tiny: Any, oracle: Any, hard: dict[str, Any]) -> None:
    result = tiny({"strategy": ["efc"], **hard})
    assert all(bool(a.isfinite().all()) for a in oracle.final(result).values())
    assert all(bool(a.isfinite().all()) for a in kept(result).values())


@pytest.mark.parametrize("name", ["efc", "efc_pp"])
def test_exchanges_that_reach_nobody_with_images_leave_what_was(
    tiny: Any, tiny_config: Any, oracle: Any, name: str
) -> None:
    settings = {
        "strategy": [name], "federation.clients": 12, "partition.alpha": 0.05, "partition.min_size": 0,
        "federation.exchange": 1, "scenario.tasks": 5, "federation.rounds": 1, "data.limit": 4,
    }  # fmt: skip
    assert any(not len(ids) for task in build(tiny_config(settings)).split.train for ids in task)
    result = tiny(settings)
    assert all(bool(a.isfinite().all()) for a in oracle.final(result).values())
    assert all(bool(a.isfinite().all()) for a in kept(result, name).values())


def test_convolutions_at_single_precision_with_known_tasks(tiny: Any, oracle: Any) -> None:
    settings = {"model.name": "simple_cnn", "model.width": None, "model.depth": None, "engine.dtype": "float32"}
    result = tiny({"strategy": ["efc"], "scenario.name": "task_incremental", "federation.rounds": 1, "data.limit": 4,
                   **settings})  # fmt: skip
    assert all(bool(a.isfinite().all()) for a in oracle.final(result).values())


def test_a_covariance_without_jitter_is_refused_in_one_line(tiny: Any) -> None:
    with pytest.raises(RunFailed, match=r"options\.efc\.jitter=0") as caught:
        tiny({"strategy": ["efc"], "options.efc.jitter": 0.0})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("key", "value"), [("model.head", "cosine"), ("model.feature_norm", "l2"), ("federation.passes", "once")]
)
def test_settings_that_it_cannot_work_with(tiny: Any, key: str, value: str) -> None:
    with pytest.raises(UsageError) as caught:
        tiny({"strategy": ["efc"], key: value})
    assert "efc" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("weight", -1),
        ("damping", float("inf")),
        ("sigma", 0.02),
        ("jitter", -1e-5),
        ("rehearsal", -1),
        ("rehearsal", 1.5),
        ("batch_norm", "train"),
        ("rotation", "maybe"),
        ("lambda", 1),
    ],
)
def test_wrong_options(tiny_config: Any, name: str, value: Any) -> None:
    with pytest.raises(UsageError, match=r"options\.efc") as caught:
        build(tiny_config({"strategy": ["efc"], f"options.efc.{name}": value}))
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)
