"""ER-ACE against literal loops and Avalanche's criterion, and what becomes of it at the edges."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fedcl.blocks.losses import cross_entropy
from fedcl.build import build
from fedcl.errors import UsageError
from fedcl.strategies.continual.er_ace import asymmetric_cross_entropy

IMAGE = 64
"""Bytes of a digit."""


def _parts() -> tuple[tuple[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]:
    make = torch.Generator().manual_seed(3)
    known = torch.tensor([True, True, True, True, False])
    stream, memory = (torch.randn(n, 5, generator=make, dtype=torch.float64) for n in (4, 3))
    return (stream, torch.tensor([2, 3, 3, 2]), known), (memory, torch.tensor([0, 1, 3]), known)


@pytest.mark.parametrize("among", ["batch", "known"])
def test_loss_equals_plain_loops(oracle: Any, among: Any) -> None:
    stream, memory = _parts()
    current = [2, 3] if among == "batch" else [0, 1, 2, 3]
    expected = oracle.cross_entropy(stream[0], stream[1].tolist(), current)
    expected = expected + oracle.cross_entropy(memory[0], memory[1].tolist(), [0, 1, 2, 3])
    assert asymmetric_cross_entropy(stream, memory, among).item() == pytest.approx(expected.item(), rel=1e-12)


def test_it_is_twice_avalanches_criterion() -> None:
    regularization = pytest.importorskip("avalanche.training.regularization")
    stream, memory = ((logits[:, :4], labels, torch.ones(4, dtype=torch.bool)) for logits, labels, _ in _parts())
    theirs = regularization.ACECriterion()(stream[0], stream[1], memory[0], memory[1])
    assert asymmetric_cross_entropy(stream, memory, "batch").item() == pytest.approx(2 * theirs.item(), rel=1e-12)


def test_a_batch_of_all_classes_without_memory_has_the_cross_entropy() -> None:
    (logits, _, known), (nothing, none, _) = _parts()
    labels = torch.tensor([0, 1, 2, 3])
    found = asymmetric_cross_entropy((logits, labels, known), (nothing[:0], none[:0], known), "batch")
    assert torch.equal(found, cross_entropy(logits, labels, known))


def test_the_stream_leaves_the_outputs_of_absent_classes_alone() -> None:
    (logits, labels, known), (nothing, none, _) = _parts()
    logits.requires_grad_()
    (slope,) = torch.autograd.grad(
        asymmetric_cross_entropy((logits, labels, known), (nothing[:0], none[:0], known), "batch"), logits
    )
    assert torch.equal(slope[:, [0, 1, 4]], torch.zeros(4, 3, dtype=torch.float64))
    assert bool((slope[:, [2, 3]] != 0).all())


def test_a_batch_of_one_class_teaches_nothing_but_the_memory_does() -> None:
    (logits, _, known), memory = _parts()
    one = (logits, torch.full((4,), 2), known)
    assert asymmetric_cross_entropy(one, memory, "batch").item() == cross_entropy(*memory).item()


@pytest.mark.parametrize("among", ["batch", "known"])
def test_whole_run_equals_the_literal_loop(
    tiny: Any, tiny_config: Any, oracle: Any, rehearsal: Any, among: str
) -> None:
    def gradient(w: Any, here: Any) -> Any:
        w = oracle.leaves(w)
        current = sorted(set(here.labels(here.stream))) if among == "batch" else here.known
        loss = here.loss(w, here.stream, current)
        for draw in here.draws:
            loss = loss + here.loss(w, draw)
        return oracle.gradient(loss, w)

    settings = {
        "strategy": ["er_ace"], "options.er_ace.stream": among, "options.er_ace.budget": 9 * IMAGE,
        "options.er_ace.batch_size": 5, "scenario.tasks": 3,
    }  # fmt: skip
    model, _ = rehearsal.federated(oracle, tiny_config(settings), gradient, lambda known: 9, sizes=(5,), present=True)
    assert oracle.distance(oracle.final(tiny(settings)), model) < 1e-10


def test_hard_settings(tiny: Any, oracle: Any, hard: dict[str, Any]) -> None:
    found = oracle.final(tiny({"strategy": ["er_ace"], "federation.rounds": 1, **hard}))
    assert all(bool(a.isfinite().all()) for a in found.values())


@pytest.mark.parametrize(("name", "value"), [("stream", "new"), ("budget", -1), ("size", 3)])
def test_wrong_options(tiny_config: Any, name: str, value: Any) -> None:
    with pytest.raises(UsageError, match=r"options\.er_ace") as caught:
        build(tiny_config({"strategy": ["er_ace"], f"options.er_ace.{name}": value}))
    assert "\n" not in str(caught.value)
