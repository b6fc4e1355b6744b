"""FedSelect: masks against a literal selection, the mean entry by entry, plain averaging where nothing is personal."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fedcl.build import build
from fedcl.errors import UsageError
from fedcl.strategies.personalised.fedselect import more_personal, selectable

FAST = {"strategy": ["fedselect"], "options.fedselect.alternations": 1, "options.fedselect.interval": 1}


def test_a_mask_grows_by_what_moved_most() -> None:
    make = torch.Generator().manual_seed(0)
    moved = torch.rand(6, 5, generator=make, dtype=torch.float64)
    mask = torch.rand(6, 5, generator=make) < 0.3
    found = more_personal(mask, moved, 0.25, 0.8)
    shared = [(float(moved[i, j]), (i, j)) for i in range(6) for j in range(5) if not mask[i, j]]
    chosen = {place for _, place in sorted(shared, reverse=True)[: round(0.25 * len(shared))]}
    for i in range(6):
        for j in range(5):
            assert bool(found[i, j]) == (bool(mask[i, j]) or (i, j) in chosen)
    assert torch.equal(more_personal(mask, moved, 0.25, 0.1), mask)  # beyond the limit it stays
    assert bool(more_personal(mask, moved, 1.0, 0.8).all())
    assert more_personal(torch.zeros(0, dtype=torch.bool), torch.zeros(0), 0.5, 0.8).shape == (0,)


def test_weights_are_selected_and_biases_are_not() -> None:
    assert selectable("encoder.1.weight", torch.zeros(2))
    assert not selectable("head.bias", torch.zeros(2))
    assert not selectable("weight_norm.bias", torch.zeros(2))


def test_without_a_share_it_is_uniform_averaging(tiny: Any, oracle: Any) -> None:
    plain = oracle.final(tiny({"federation.weighting": "uniform"}))
    ours = oracle.final(tiny({**FAST, "options.fedselect.share": 0.0}))
    assert oracle.distance(ours, plain) < 1e-12


@pytest.mark.parametrize("path", ["stacked", "sequential"])
def test_an_entry_is_the_mean_over_those_who_share_it(
    tiny: Any, tiny_config: Any, oracle: Any, passes: Any, kept: Any, path: str
) -> None:
    settings = {**FAST, "seed": 1, "scenario.tasks": 1, "federation.rounds": 3, "engine.path": path}
    world = oracle.World.of(tiny_config(settings))
    known = world.known[0]
    w = oracle.grown(world.start, world, len(known))
    weights = [n for n in w if n.endswith("weight")]
    clients = [c for c in range(3) if world.held[0][c]]
    own = {c: dict(w) for c in clients}
    last = {c: dict(w) for c in clients}
    mask = {c: {n: torch.zeros_like(a, dtype=torch.bool) for n, a in w.items()} for c in clients}

    ties: dict[tuple[int, str], Any] = {}

    def loss(model: Any, x: Any, y: Any) -> Any:
        return oracle.cross_entropy(oracle.logits(model, x), y, known)

    for round_ in range(3):
        trained = {}
        for c in clients:
            start = {n: torch.where(mask[c][n], own[c][n], w[n]) for n in w}
            if round_:
                start = masked_pass(oracle, world, c, start, mask[c], loss, round_, place=0)
                shared = {n: ~m for n, m in mask[c].items()}
                trained[c] = masked_pass(oracle, world, c, start, shared, loss, round_, place=1)
            else:
                trained[c] = passes(world, c, 0, start, loss, round_=round_)
        new = {}
        for n in w:
            sent = torch.stack([torch.where(mask[c][n], 0.0, trained[c][n]) for c in clients]).sum(0)
            count = torch.stack([~mask[c][n] for c in clients]).sum(0)
            new[n] = torch.where(count > 0, sent / count.clamp(min=1), w[n])
        for c in clients:
            own[c] = trained[c]
            if round_:
                ties |= {(c, n): (trained[c][n] - last[c][n]).abs() for n in weights}
                for n in weights:
                    mask[c][n] = more_personal(mask[c][n], (trained[c][n] - last[c][n]).abs(), 0.25, 0.8)
                last[c] = trained[c]
        w = new
    result = tiny(settings)
    assert oracle.distance(oracle.final(result), w) < 1e-10
    for c, arrays in kept(result, "fedselect/mask/").items():
        for n in weights:
            assert int(arrays[n].sum()) == int(mask[c][n].sum())
            other = arrays[n] != mask[c][n]  # entries that moved alike to rounding may change places
            assert not other.any() or float(ties[c, n][other].max() - ties[c, n][other].min()) < 1e-9


def masked_pass(
    oracle: Any, world: Any, client: int, start: Any, moves: Any, loss: Any, round_: int, place: int
) -> Any:
    """One epoch of SGD with momentum in which only the entries of a mask move."""
    from fedcl import random as counter

    settings, rows = world.config, world.held[0][client]
    key = (settings.seed, "client", client, 0, round_, *(("phase", place) if place else ()))
    w, velocity = dict(start), {n: torch.zeros_like(a) for n, a in start.items()}
    order = counter.permutation(len(rows), *key, "order", 0).tolist()
    for at in range(0, len(rows), settings.federation.batch_size):
        batch = [rows[i] for i in order[at : at + settings.federation.batch_size]]
        w = oracle.leaves(w)
        grads = oracle.gradient(loss(w, world.x[batch], [world.y[i] for i in batch]), w)
        with torch.no_grad():
            for n in w:
                velocity[n] = settings.optimiser.momentum * velocity[n] + grads[n]
                w[n] = torch.where(moves[n], w[n] - settings.optimiser.lr * velocity[n], w[n])
    return {n: a.detach() for n, a in w.items()}


def test_only_shared_entries_are_charged(tiny: Any) -> None:
    one = {**FAST, "scenario.tasks": 1, "partition.name": "iid", "engine.dtype": "float32"}
    first, second = (tiny({**one, "federation.rounds": r}).summary["bytes_up"] for r in (2, 3))
    entries = 64 * 8 + 8 * 10
    biases = 8 + 10
    bits = 64 * 8 // 8 + 8 * 10 // 8 + 8 // 8 + 2  # a bit an entry of each array, in whole bytes
    personal = round(0.25 * 64 * 8) + round(0.25 * 8 * 10)
    assert first == 3 * 2 * (4 * (entries + biases) + bits)
    assert second - first == 3 * (4 * (entries - personal + biases) + bits)


@pytest.mark.parametrize(("key", "value"), [("alternations", 0), ("interval", 0), ("share", 1.5), ("limit", -0.1)])
def test_wrong_options(tiny_config: Any, key: str, value: Any) -> None:
    with pytest.raises(UsageError, match=r"options\.fedselect"):
        build(tiny_config({"strategy": ["fedselect"], f"options.fedselect.{key}": value}))
