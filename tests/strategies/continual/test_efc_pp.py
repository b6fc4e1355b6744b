"""EFC++: the re-balanced heads against a literal Adam, rows of old classes in local training, the edges."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fedcl import random as counter
from fedcl.build import build
from fedcl.errors import RunFailed, UsageError
from fedcl.records.checkpoint import load_newest, unpack_tensors
from fedcl.strategies.continual.efc_pp import EFCPlusPlus

QUIET = {"strategy": ["efc_pp"], "options.efc_pp.rotation": False}


def normal(*shape: int, seed: int = 0) -> Any:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def made(counts: list[int], task: int = 1, bias: bool = True, **options: Any) -> tuple[Any, Any, Any]:
    """A strategy, a server of two features and as many classes as counts, and the Gaussians of its classes."""
    classes, root = len(counts), normal(len(counts), 2, 2)
    arrays = {"head.weight": normal(classes, 2, seed=1), "head.bias": normal(classes, seed=2), "encoder.w": normal(3)}
    if not bias:
        del arrays["head.bias"]
    state = {"counts": torch.tensor(counts), "means": 3 * normal(classes, 2, seed=3),
             "factors": torch.linalg.cholesky(root @ root.mT + 0.1 * torch.eye(2, dtype=torch.float64))}  # fmt: skip
    server = SimpleNamespace(arrays=arrays, known=torch.ones(classes, dtype=torch.bool), task=task, key=(0, task))
    return EFCPlusPlus(EFCPlusPlus.Options(**options)), server, state


@pytest.mark.parametrize("bias", [True, False])
def test_heads_are_trained_on_draws_of_all_classes_with_adam(bias: bool) -> None:
    strategy, server, state = made([4, 0, 7], bias=bias, epochs=3, lr=0.05, batch_size=3)
    found = strategy.rebalanced(server, state, images=7)
    w = {n: a.clone() for n, a in server.arrays.items() if n.startswith("head.")}
    first, second = ({n: torch.zeros_like(a) for n, a in w.items()} for _ in range(2))
    generator = torch.Generator().manual_seed(counter.key(0, 1, "efc_pp") & (2**63 - 1))
    labels = [0, 2] * 4  # seven images over two classes, rounded up
    steps = 0
    for _ in range(3):
        order = torch.randperm(8, generator=generator).tolist()
        for at in range(0, 8, 3):
            batch = [labels[i] for i in order[at : at + 3]]
            noise = torch.randn(len(batch), 2, generator=generator, dtype=torch.float64)
            steps += 1
            grads = {n: torch.zeros_like(a) for n, a in w.items()}
            for c, e in zip(batch, noise, strict=True):
                f = state["means"][c] + state["factors"][c] @ e
                scores = w["head.weight"] @ f + (w["head.bias"] if bias else 0)
                exps = [math.exp(float(scores[k])) for k in (0, 2)]
                for k, value in zip((0, 2), exps, strict=True):
                    slope = (value / sum(exps) - (k == c)) / len(batch)
                    grads["head.weight"][k] += slope * f
                    if bias:
                        grads["head.bias"][k] += slope
            for n in w:
                first[n] = 0.9 * first[n] + 0.1 * grads[n]
                second[n] = 0.999 * second[n] + 0.001 * grads[n] ** 2
                unbiased = first[n] / (1 - 0.9**steps), second[n] / (1 - 0.999**steps)
                w[n] = w[n] - 0.05 * unbiased[0] / (unbiased[1].sqrt() + 1e-8)
    assert set(found) == set(w)
    for n in w:
        torch.testing.assert_close(found[n], w[n], rtol=0, atol=1e-10)
        assert torch.equal(found[n][1], server.arrays[n][1])
        assert (found[n] - server.arrays[n]).abs().max() > 0.05


def test_the_first_task_and_no_epochs_leave_the_head() -> None:
    for options, task, images in (({}, 0, 5), ({"epochs": 0}, 1, 5), ({}, 1, 0)):
        strategy, server, state = made([4, 3], task=task, **options)
        assert strategy.rebalanced(server, state, images) == {}


def test_diverging_is_told_in_one_line() -> None:
    strategy, server, state = made([4, 3], lr=1e308, epochs=9)
    with pytest.raises(RunFailed, match=r"options\.efc_pp\.lr") as caught:
        strategy.rebalanced(server, state, 9)
    assert "\n" not in str(caught.value)


def test_rebalancing_changes_the_head_at_the_end_of_a_task_and_the_matrix_is_of_it(
    tiny: Any, tiny_config: Any, oracle: Any
) -> None:
    settings = {**QUIET, "options.efc_pp.batch_size": 16}
    on, off = (tiny({**settings, "options.efc_pp.epochs": e}) for e in (5, 0))
    final, before = oracle.final(on), oracle.final(off)
    changed = {n for n in final if not torch.equal(final[n], before[n])}
    assert changed == {"head.weight", "head.bias"}
    found = load_newest(on.folder / "checkpoints", lambda text: None)
    assert found is not None
    experiment = build(tiny_config(settings))
    rows = torch.cat([torch.from_numpy(r) for r in experiment.split.rows[1]])
    logits = experiment.node.forward(final, experiment.node.store.batch(rows, torch.float64), "eval").logits
    total = torch.zeros(8, 8, dtype=torch.float64)
    for p in logits.softmax(1):
        total += final["head.weight"].T @ (torch.diag(p) - torch.outer(p, p)) @ final["head.weight"]
    torch.testing.assert_close(found.arrays["strategy/efc_pp/matrix"], total / len(rows), rtol=0, atol=1e-10)


@pytest.mark.parametrize("old_heads", ["keep", "train"])
def test_rows_of_old_classes_are_no_part_of_local_training(tiny: Any, oracle: Any, old_heads: str) -> None:
    settings = {**QUIET, "options.efc_pp.epochs": 0, "optimiser.weight_decay": 0.1}
    result = tiny({**settings, "options.efc_pp.old_heads": old_heads})
    final, early = oracle.final(result), unpack_tensors((result.folder / "base.safetensors").read_bytes())
    for name in ("head.weight", "head.bias"):
        moved = float((final[name][:5] - early[name]).abs().max())
        assert moved < 1e-12 if old_heads == "keep" else moved > 1e-4
    assert (final["encoder.1.weight"] - early["encoder.1.weight"]).abs().max() > 1e-3


def test_without_anything_it_is_finetune_masked_bit_for_bit(tiny: Any, oracle: Any) -> None:
    none = {"weight": 0.0, "damping": 0.0, "epochs": 0, "old_heads": "train"}
    ours = oracle.final(tiny({**QUIET, **{f"options.efc_pp.{n}": v for n, v in none.items()}}))
    assert oracle.identical(ours, oracle.final(tiny({"strategy": ["finetune_masked"]})))


def test_only_the_matrix_goes_down_beside_the_models(tiny: Any) -> None:
    one, other = (tiny({"strategy": [n], f"options.{n}.rotation": False}) for n in ("efc_pp", "efc"))
    # The Gaussians of five classes, float64, and a byte a class that says whether there is one.
    assert other.summary["bytes_down"] - one.summary["bytes_down"] + 3 * (10 * 8 + 10) * 8 == 3 * (5 * (8 + 64) * 8 + 5)


def test_hard_settings(tiny: Any, oracle: Any, hard: dict[str, Any]) -> None:
    found = oracle.final(tiny({"strategy": ["efc_pp"], **hard}))
    assert all(bool(a.isfinite().all()) for a in found.values())


@pytest.mark.parametrize(
    ("name", "value"),
    [("epochs", -1), ("lr", 0), ("lr", float("nan")), ("batch_size", 0), ("old_heads", "yes"), ("rehearsal", 64)],
)
def test_wrong_options(tiny_config: Any, name: str, value: Any) -> None:
    with pytest.raises(UsageError, match=r"options\.efc_pp") as caught:
        build(tiny_config({"strategy": ["efc_pp"], f"options.efc_pp.{name}": value}))
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)
