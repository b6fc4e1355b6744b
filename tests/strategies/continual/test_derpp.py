"""DER++ against literal loops, and what its memory holds."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fedcl.build import build
from fedcl.errors import UsageError
from fedcl.federation.store import ClientStore
from fedcl.strategies.continual.derpp import dark_experience

IMAGE, NUMBER = 64, 8
"""Bytes of a digit, and of a logit in float64."""


def _states(result: Any) -> list[dict[str, torch.Tensor]]:
    store = ClientStore(result.folder / "clients", 0)
    return [store.get(k, 10**6) for k in range(3)]


def test_distance_equals_plain_loops() -> None:
    make = torch.Generator().manual_seed(1)
    logits, stored = (torch.randn(3, 5, generator=make, dtype=torch.float64) for _ in range(2))
    widths = [5, 2, 3]
    squares = [float(logits[i, c] - stored[i, c]) ** 2 for i, width in enumerate(widths) for c in range(width)]
    found = dark_experience(logits, stored, torch.tensor(widths))
    assert found.item() == pytest.approx(sum(squares) / len(squares), rel=1e-12)
    whole = dark_experience(logits, stored, torch.tensor([5, 5, 5]))
    assert whole.item() == pytest.approx(torch.nn.functional.mse_loss(logits, stored).item(), rel=1e-12)


def test_later_outputs_and_the_stored_ones_have_no_gradient() -> None:
    logits, stored = torch.randn(2, 3, requires_grad=True), torch.randn(2, 3, requires_grad=True)
    dark_experience(logits, stored, torch.tensor([1, 2])).backward()
    assert stored.grad is None
    assert logits.grad is not None
    assert (logits.grad != 0).tolist() == [[True, False, False], [True, True, False]]


@pytest.mark.parametrize(
    ("alpha", "beta", "size", "policy"),
    [(0.3, 0.5, 0, "reservoir"), (0.3, 0.0, 3, "class_balanced"), (0.0, 0.7, 0, "reservoir")],
    ids=["DER++", "DER", "labels"],
)
def test_whole_run_equals_the_literal_loop(
    tiny: Any, tiny_config: Any, oracle: Any, rehearsal: Any, alpha: float, beta: float, size: int, policy: str
) -> None:
    def gradient(w: Any, here: Any) -> Any:
        w = oracle.leaves(w)
        loss, draws = here.loss(w, here.stream), list(here.draws)
        if draws and alpha:
            rows = draws.pop(0)
            scores, kept = oracle.logits(w, here.world.x[rows]), [here.kept[r] for r in rows]
            squares = [(s[c] - old[c]) ** 2 for s, old in zip(scores, kept, strict=True) for c in range(len(old))]
            loss = loss + alpha * torch.stack(squares).mean()
        if draws and beta:
            loss = loss + beta * here.loss(w, draws.pop(0))
        return oracle.gradient(loss, w)

    def stored(w: Any, here: Any) -> Any:
        return dict(zip(here.stream, oracle.logits(w, here.world.x[here.stream]).tolist(), strict=True))

    budget = 9 * (IMAGE + 10 * NUMBER)
    settings = {
        "strategy": ["derpp"], "scenario.tasks": 3, "options.derpp.budget": budget, "options.derpp.policy": policy,
        "options.derpp.alpha": alpha, "options.derpp.beta": beta, "options.derpp.batch_size": size,
    }  # fmt: skip
    model, memory = rehearsal.federated(
        oracle, tiny_config(settings), gradient, lambda known: budget // (IMAGE + known * NUMBER + NUMBER),
        policy, (size,) * ((alpha > 0) + (beta > 0)), stored,
    )  # fmt: skip
    result = tiny(settings)
    assert oracle.distance(oracle.final(result), model) < 1e-10
    for state, rows in zip(_states(result), memory.rows, strict=True):
        assert state["derpp/ids"].tolist() == rows
        bytes_held = len(rows) * IMAGE + state["derpp/logits"].nbytes + state["derpp/width"].nbytes
        assert bytes_held <= budget
        for row, logits, width in zip(rows, state["derpp/logits"], state["derpp/width"], strict=True):
            assert logits[: int(width)].tolist() == pytest.approx(memory.kept[row], abs=1e-9)


def test_without_weights_it_is_finetune_bit_for_bit(tiny: Any, oracle: Any) -> None:
    nothing = oracle.final(tiny({"strategy": ["derpp"], "options.derpp.alpha": 0.0, "options.derpp.beta": 0.0}))
    plain = oracle.final(tiny({"strategy": ["finetune"]}))
    assert oracle.identical(nothing, plain)
    assert not oracle.identical(oracle.final(tiny({"strategy": ["derpp"]})), plain)


def test_images_seen_once_are_stored_after_their_round(tiny: Any, oracle: Any) -> None:
    result = tiny({"strategy": ["derpp"], "federation.passes": "once", "federation.rounds": 3})
    assert all(bool(a.isfinite().all()) for a in oracle.final(result).values())
    for state in _states(result):
        assert len(state["derpp/ids"]) == len(state["derpp/logits"]) > 0
        assert sorted(set(state["derpp/width"].tolist())) == [5, 10]


def test_images_seen_once_are_stored_by_those_who_trained_on_them(tiny: Any) -> None:
    part = {
        "scenario.tasks": 1, "federation.passes": "once", "federation.rounds": 3, "federation.participation": 0.34,
    }  # fmt: skip
    found = {}
    for name in ("derpp", "replay"):
        store = ClientStore(tiny({**part, "strategy": [name]}).folder / "clients", 0)
        found[name] = [sorted(store.get(k, 10**6).get(f"{name}/ids", torch.zeros(0)).tolist()) for k in range(3)]
    assert found["derpp"] == found["replay"]
    assert [len(ids) > 0 for ids in found["derpp"]] == [True, False, True]  # the cohorts are 0, 2 and 2


def test_views_of_another_strategy_share_the_stored_logits(tiny: Any, oracle: Any) -> None:
    """Without augmentation both views are the image, so the terms are those of one view."""
    alone, viewed = (
        oracle.final(tiny({"strategy": ["derpp", "supcon"], "options.supcon.weight": 0.0, "options.supcon.views": v}))
        for v in (1, 2)
    )
    assert oracle.distance(alone, viewed) < 1e-9


def test_hard_settings(tiny: Any, oracle: Any, hard: dict[str, Any]) -> None:
    found = oracle.final(tiny({"strategy": ["derpp"], "federation.rounds": 1, **hard}))
    assert all(bool(a.isfinite().all()) for a in found.values())


@pytest.mark.parametrize(("name", "value"), [("alpha", -0.1), ("beta", float("inf")), ("budget", -1), ("gamma", 3)])
def test_wrong_options(tiny_config: Any, name: str, value: Any) -> None:
    with pytest.raises(UsageError, match=r"options\.derpp") as caught:
        build(tiny_config({"strategy": ["derpp"], f"options.derpp.{name}": value}))
    assert "\n" not in str(caught.value)
