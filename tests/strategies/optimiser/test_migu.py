"""MIGU: magnitudes and masks by hand, rows that do not move, and plain training where nothing is masked."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fedcl.build import build
from fedcl.errors import UsageError
from fedcl.strategies.optimiser.migu import MIGU, magnitudes, strongest

PLAIN = {"optimiser.momentum": 0.0, "federation.rounds": 1}


def random(*shape: int) -> Any:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


@pytest.mark.parametrize(("shape", "axis"), [((4, 3), -1), ((4, 5, 3), -1), ((4, 3, 2, 5), 1), ((4, 2, 5, 3), -1)])
def test_magnitudes_are_their_formula(shape: tuple[int, ...], axis: int) -> None:
    h = random(*shape)
    units = h.movedim(axis, -1).reshape(-1, 3)
    mean = [sum(abs(float(v)) for v in units[:, j]) / len(units) for j in range(3)]
    assert magnitudes(h, axis).tolist() == pytest.approx([m / sum(mean) for m in mean], rel=1e-12)
    assert not magnitudes(torch.zeros(2, 3)).isnan().any()


def test_the_strongest_are_those_above_the_quantile() -> None:
    values = random(10)
    ranked = sorted(values.tolist())
    for quantile in (0.0, 0.25, 0.7, 0.95):
        kept = strongest(values, quantile)
        assert kept.tolist() == [v >= ranked[int(quantile * 10 + 1e-9)] for v in values.tolist()]
    assert strongest(torch.zeros(4), 0.7).all()  # all alike: none is weaker than another


@pytest.mark.parametrize("path", ["sequential", "stacked"])
def test_masked_rows_do_not_move_in_later_tasks(tiny: Any, oracle: Any, path: str) -> None:
    settings = {**PLAIN, "strategy": ["migu"], "federation.clients": 1, "federation.epochs": None,
                "federation.steps": 1, "engine.path": path}  # fmt: skip
    first = oracle.final(tiny({**settings, "scenario.first": 1}))
    both = oracle.final(tiny(settings))
    moved = (both["encoder.1.weight"] != first["encoder.1.weight"]).any(dim=1)
    assert 0 < int(moved.sum()) <= 3  # the strongest of 8 units; a unit that no image activates has no gradient
    assert torch.equal(both["encoder.1.bias"] != first["encoder.1.bias"], moved)
    assert not torch.equal(both["head.weight"][:5], first["head.weight"])
    plain = oracle.final(tiny({**settings, "strategy": ["finetune"], "scenario.first": 1}))
    assert oracle.identical(first, plain)  # the first task is trained whole


def test_quantile_zero_is_plain_training(tiny: Any, oracle: Any) -> None:
    ours = oracle.final(tiny({"strategy": ["migu"], "options.migu.quantile": 0.0}))
    assert oracle.identical(ours, oracle.final(tiny({})))


def test_random_rows_are_others(tiny: Any, oracle: Any) -> None:
    ours, drawn = (oracle.final(tiny({"strategy": ["migu"], "options.migu.by": by})) for by in ("magnitude", "random"))
    assert not oracle.identical(ours, drawn)


class Stub(MIGU):
    """Layers as networks of torchvision have them: linear over places (ConvNeXt), one never called by itself (ViT)."""

    def layers(self, step: Any, grads: Any) -> list[str]:
        return ["wide", "hidden"]


def test_linear_layers_over_places_and_layers_that_are_never_called() -> None:
    places = torch.tensor([[[[1.0, -9.0, 2.0]]], [[[1.0, 9.0, -2.0]]]])  # (2, 1, 1, 3)
    grads = {"wide.weight": torch.ones(3, 2), "wide.bias": torch.ones(3), "hidden.weight": torch.ones(4, 2)}
    step: Any = SimpleNamespace(
        task=1, x=places, forward=lambda *_: SimpleNamespace(taps={"wide": SimpleNamespace(output=places)})
    )
    found = Stub(MIGU.Options(quantile=0.5)).edit_gradients(step, grads)
    assert found["wide.bias"].tolist() == [0.0, 1.0, 1.0]
    assert torch.equal(found["wide.weight"], found["wide.bias"][:, None].expand(3, 2))
    assert torch.equal(found["hidden.weight"], grads["hidden.weight"])


@pytest.mark.parametrize(("key", "value"), [("quantile", 1.0), ("quantile", -0.1), ("by", "size")])
def test_wrong_options(tiny_config: Any, key: str, value: Any) -> None:
    with pytest.raises(UsageError, match=r"options\.migu"):
        build(tiny_config({"strategy": ["migu"], f"options.migu.{key}": value}))
