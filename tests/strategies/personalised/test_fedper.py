"""FedPer against a literal loop, and against plain averaging where nothing is personal."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fedcl.build import build
from fedcl.errors import UsageError


def is_head(name: str) -> bool:
    return name.startswith("head.")


def test_whole_run_equals_the_literal_loop(
    tiny: Any, tiny_config: Any, oracle: Any, passes: Any, private_heads: Any, kept: Any
) -> None:
    settings = {"strategy": ["fedper"], "seed": 3, "federation.epochs": 2}
    world = oracle.World.of(tiny_config(settings))

    def train(client: int, task: int, start: Any, loss: Any, round_: int) -> Any:
        return passes(world, client, task, start, loss, round_=round_, epochs=2)

    w, heads = private_heads(world, train)
    result = tiny(settings)
    found = oracle.final(result)
    encoder = {n: a for n, a in found.items() if not is_head(n)}
    assert oracle.distance(encoder, {n: w[n] for n in encoder}) < 1e-10
    own = kept(result, "private/")
    assert {c: set(arrays) for c, arrays in own.items()} == {c: {"head.weight", "head.bias"} for c in own}
    for client, arrays in own.items():
        assert oracle.distance(arrays, heads[client]) < 1e-10
    assert not torch.allclose(own[0]["head.weight"], own[1]["head.weight"])


def test_with_nothing_private_it_is_federated_averaging(tiny: Any, oracle: Any) -> None:
    plain = oracle.final(tiny({}))
    assert oracle.identical(oracle.final(tiny({"strategy": ["fedper"], "options.fedper.private": []})), plain)


def test_heads_do_not_travel(tiny: Any) -> None:
    plain, ours = tiny({}).summary, tiny({"strategy": ["fedper"]}).summary
    heads = 3 * 2 * 8 * ((8 + 1) * 5 + (8 + 1) * 10)  # clients, rounds, bytes, then the rows of both tasks
    assert plain["bytes_up"] - ours["bytes_up"] == heads


def test_wrong_options(tiny_config: Any) -> None:
    with pytest.raises(UsageError, match="private") as caught:
        build(tiny_config({"strategy": ["fedper"], "options.fedper.private": [3]}))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["fedper", "fedrep"])
@pytest.mark.parametrize("private", [["haed"], ["head", "header"], ["head.weigh"], [""]])
def test_a_misspelt_module_is_refused_and_not_shared_in_silence(tiny: Any, name: str, private: list[str]) -> None:
    with pytest.raises(UsageError, match=r"by name: encoder.*head") as caught:
        tiny({"strategy": [name], f"options.{name}.private": private})
    assert f"options.{name}.private={private[-1]!r}" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["fedewc", "si", "mas"])
def test_importances_of_private_parts_stay_at_their_client(tiny: Any, name: str) -> None:
    from fedcl.records.checkpoint import load_newest

    def kept(stack: list[str]) -> list[str]:
        found = load_newest(tiny({"strategy": stack}).folder / "checkpoints", lambda text: None)
        assert found is not None
        return [n for n in found.arrays if n.startswith(f"strategy/{name}/")]

    assert any("head." in n for n in kept([name]))
    beside = kept([name, "fedper"])
    assert any("encoder." in n for n in beside)
    assert not any("head." in n for n in beside)
