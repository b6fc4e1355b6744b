"""FedBN: layers are found by type, stay at their client with statistics and parameters, and nothing else does."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fedcl.build import build
from fedcl.errors import UsageError

NET = {
    "strategy": ["fedbn"],
    "model.name": "resnet20",
    "model.width": 2,
    "model.depth": None,
    "engine.dtype": "float32",
}


def test_every_array_of_a_norm_is_private_and_no_other(tiny_config: Any) -> None:
    node = build(tiny_config(NET)).node
    norms = {n for n, m in node.model.named_modules() if isinstance(m, torch.nn.BatchNorm2d)}
    assert norms
    for name, sharing in node.sharing.items():
        assert sharing == ("private" if name.rpartition(".")[0] in norms else "shared"), name


def test_parameters_of_other_norms_stay_when_asked(tiny_config: Any) -> None:
    settings = {**NET, "model.norm": "group"}
    node = build(tiny_config({**settings, "options.fedbn.layers": "all"})).node
    private = {n for n, sharing in node.sharing.items() if sharing == "private"}
    groups = {n for n, m in node.model.named_modules() if isinstance(m, torch.nn.GroupNorm)}
    assert {n.rpartition(".")[0] for n in private} == groups


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"model.norm": "group"}, "normalisation layers to keep"),
        ({"model.batch_norm": "local"}, r"model\.batch_norm"),
        ({"options.fedbn.layers": "some"}, r"options\.fedbn\.layers"),
    ],
)
def test_what_cannot_be_is_refused(tiny_config: Any, settings: dict[str, Any], says: str) -> None:
    with pytest.raises(UsageError, match=says) as caught:
        build(tiny_config({**NET, **settings}))
    assert "\n" not in str(caught.value)


def test_norms_differ_between_clients_and_the_rest_is_averaged(tiny: Any, kept: Any, oracle: Any) -> None:
    once = {"scenario.tasks": 1, "federation.rounds": 1}
    result = tiny({**NET, **once})
    own = kept(result, "private/")
    first, second = own[0], own[1]
    assert any("running_mean" in n for n in first)
    assert any(not torch.equal(a, second[n]) for n, a in first.items() if n.endswith("weight"))
    whole = oracle.final(result)
    assert set(whole) > set(first)
    # One round from one start: shared arrays are those of plain averaging, as nothing has been exchanged before.
    plain = oracle.final(tiny({**NET, **once, "strategy": ["finetune"]}))
    for name, array in whole.items():
        if name not in first:
            assert torch.allclose(array, plain[name], atol=1e-5), name
