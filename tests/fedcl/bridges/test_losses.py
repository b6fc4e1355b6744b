"""Losses by dotted name: what is found, how it is called, and what is refused with a reason."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fedcl.bridges.losses import OfLabels, OfViews, build, find_class, some_embeddings, takes, try_out
from fedcl.errors import UsageError

KEY = "options.metric_loss.loss"
OWN = """
import torch
from torch import nn


class Near(nn.Module):
    def __init__(self, power=1.0, other=None):
        super().__init__()
        self.power, self.other = power, other

    def forward(self, one, two):
        return (one - two).abs().pow(self.power).sum()


class Steady(nn.Module):
    def forward(self, one, two):
        return one.sum()


class Bank(Steady):
    def __init__(self):
        super().__init__()
        self.register_buffer("bank", torch.zeros(3))

    def forward(self, one, two):
        if one.requires_grad:
            self.bank[0] += 1
        return one.sum()


class Counts(Steady):
    calls = 0

    def forward(self, one, two):
        self.calls += 1
        return one.sum() * self.calls


class Draws(Steady):
    def forward(self, one, two):
        torch.rand(1)
        return one.sum()


class Rows(Steady):
    def forward(self, one, two):
        return one.sum(dim=1)


class Infinite(Steady):
    def forward(self, one, two):
        return one.sum() / 0


class Fails(Steady):
    def forward(self, one, two):
        raise RuntimeError("one line\\nand another")


class Masks(nn.Module):
    def forward(self, one, two, mask):
        return one.sum()


class Lists(nn.Module):
    def forward(self, one: list[torch.Tensor], two: list[torch.Tensor]):
        return one[0].sum()


class One(nn.Module):
    def forward(self, one):
        return one.sum()


class Plain:
    pass


number = 3
"""


@pytest.fixture(autouse=True)
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_losses.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(__import__("sys").modules, "own_losses", raising=False)


def made(name: str, arguments: Mapping[str, Any] | None = None) -> Any:
    return build(name, arguments or {}, KEY)


def line(error: pytest.ExceptionInfo[UsageError]) -> str:
    text = str(error.value)
    assert "\n" not in text
    assert text.startswith(KEY)
    return text


def test_arguments_reach_the_loss_and_objects_are_made_of_mappings() -> None:
    arguments = {"power": 2.0, "other": {"class": "own_losses.Near", "power": 3.0, "other": {"plain": 1}}}
    loss = made("own_losses.Near", arguments)
    assert (loss.power, loss.other.power, loss.other.other) == (2.0, 3.0, {"plain": 1})
    assert type(loss) is type(loss.other) is find_class("own_losses:Near", KEY)
    assert arguments["other"] == {"class": "own_losses.Near", "power": 3.0, "other": {"plain": 1}}


@pytest.mark.parametrize(
    ("name", "arguments", "says"),
    [
        ("own_losses.Nearr", {}, "Did you mean"),
        ("no_such_package.losses.Loss", {}, "there is no module no_such_package"),
        ("Near", {}, "must be the dotted name of a class"),
        ("", {}, "must be the dotted name of a class"),
        ("own_losses.number", {}, "is no class"),
        ("own_losses.Near", {"margin": 1.0}, "it takes power, other"),
        ("own_losses.Near", {"other": {"class": "own_losses.Far"}}, "own_losses has no 'Far'"),
    ],
)
def test_what_cannot_be_made_is_told(name: str, arguments: dict[str, Any], says: str) -> None:
    with pytest.raises(UsageError) as caught:
        made(name, arguments)
    assert says in line(caught)


@pytest.mark.parametrize("package", ["lightly", "pytorch_metric_learning"])
def test_a_library_that_is_missing_is_told_with_the_command(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=rf"{package} is not installed: pip install ") as caught:
        made(f"{package}.losses.Loss")
    line(caught)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("Masks", r"needs other inputs \(one, two, mask\)"), ("Lists", "needs other inputs"),
        ("One", "needs other inputs"), ("Plain", r"no torch\.nn\.Module"),
    ],
)  # fmt: skip
def test_other_inputs_are_refused(name: str, says: str) -> None:
    with pytest.raises(UsageError, match=says) as caught:
        takes(made(f"own_losses.{name}"), KEY)
    line(caught)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("Bank", "keeps a memory"), ("Counts", "gives another value when it is called again"),
        ("Draws", "draws from torch's global generator"), ("Rows", "must give one number"),
        ("Infinite", "gives inf on|gives -inf on"), ("Fails", r"one line and another \(RuntimeError\)"),
    ],
)  # fmt: skip
def test_what_could_not_be_resumed_or_called_is_refused(name: str, says: str) -> None:
    loss = OfViews(made(f"own_losses.{name}"), "views")
    with pytest.raises(UsageError, match=says) as caught:
        try_out(loss, (some_embeddings(4, 3), some_embeddings(4, 3)), f"own_losses.{name}", KEY)
    line(caught)


def test_trying_out_leaves_the_generators_as_they_were() -> None:
    before = torch.get_rng_state()
    with pytest.raises(UsageError):
        try_out(OfViews(made("own_losses.Draws"), "views"), (some_embeddings(4, 3),) * 2, "Draws", KEY)
    assert torch.equal(before, torch.get_rng_state())
    try_out(OfViews(made("own_losses.Near"), "views"), (some_embeddings(4, 3),) * 2, "Near", KEY)


class Noted(nn.Module):
    """Keeps what it was called with."""

    def forward(
        self, embeddings: Tensor, labels: Tensor | None = None, chosen: Any = None, ref_emb: Any = None
    ) -> Tensor:
        self.seen = embeddings, labels, chosen, ref_emb
        return embeddings.sum()


def test_views_are_given_as_the_loss_takes_them() -> None:
    one, other, loss = some_embeddings(2, 3), some_embeddings(4, 3)[2:], Noted()
    assert OfViews(loss, "labels")(one, other).item() == pytest.approx(float(one.sum() + other.sum()))
    assert torch.equal(loss.seen[0], torch.cat([one, other]))
    assert loss.seen[1] is not None
    assert loss.seen[1].tolist() == [0, 1, 0, 1]
    OfViews(loss, "reference")(one, other)
    assert torch.equal(loss.seen[0], one)
    assert torch.equal(loss.seen[3], other)


def test_a_miner_chooses_from_embeddings_without_gradient() -> None:
    class Miner(nn.Module):
        def forward(self, embeddings: Tensor, labels: Tensor) -> tuple[Tensor, bool]:
            return labels, embeddings.requires_grad

    loss, embeddings = Noted(), some_embeddings(2, 3).requires_grad_()
    OfLabels(loss, Miner())(embeddings, torch.tensor([4, 5]))
    chosen = loss.seen[2]
    assert chosen[0].tolist() == [4, 5]
    assert chosen[1] is False
    assert loss.seen[0].requires_grad


HOW = {
    "pytorch_metric_learning.losses.TripletMarginLoss": "labels",
    "pytorch_metric_learning.losses.SupConLoss": "labels",
    "pytorch_metric_learning.losses.VICRegLoss": "reference",
    "pytorch_metric_learning.losses.NormalizedSoftmaxLoss": "labels",
    "lightly.loss.NTXentLoss": "views",
    "lightly.loss.DCLWLoss": "views",
    "lightly.loss.BarlowTwinsLoss": "views",
    "lightly.loss.VICRegLoss": "views",
    "lightly.loss.NegativeCosineSimilarity": "views",
    "lightly.loss.MACLLoss": "views",
    "lightly.loss.hypersphere_loss.HypersphereLoss": "views",
    "lightly.loss.DINOLoss": "",
    "lightly.loss.SwaVLoss": "",
    "lightly.loss.KoLeoLoss": "",
    "lightly.loss.IBOTPatchLoss": "",
}
ARGUMENTS: dict[str, dict[str, Any]] = {
    "pytorch_metric_learning.losses.NormalizedSoftmaxLoss": {"num_classes": 6, "embedding_size": 4},
    "lightly.loss.DINOLoss": {"output_dim": 4},
    "lightly.loss.IBOTPatchLoss": {"output_dim": 4},
}


@pytest.mark.parametrize("name", HOW)
def test_losses_of_the_libraries_are_called_as_they_want(name: str) -> None:
    pytest.importorskip(name.partition(".")[0], reason=f"{name.partition('.')[0]} is not installed")
    loss = made(name, ARGUMENTS.get(name))
    if not HOW[name]:
        with pytest.raises(UsageError, match="needs other inputs"):
            takes(loss, KEY)
        return
    assert takes(loss, KEY) == HOW[name]
    try_out(OfViews(loss, takes(loss, KEY)), (some_embeddings(6, 4), some_embeddings(12, 4)[6:]), name, KEY)


@pytest.mark.parametrize(
    ("name", "arguments", "says"),
    [
        ("lightly.loss.NTXentLoss", {"memory_bank_size": [16, 4]}, "keeps a memory of its own"),
        ("lightly.loss.TiCoLoss", {}, "called again|keeps a memory"),
        ("pytorch_metric_learning.losses.TripletMarginLoss", {"triplets_per_anchor": 1}, "draws from torch's global"),
        ("pytorch_metric_learning.losses.ManifoldLoss", {"l": 4}, "cannot be called"),
    ],
)
def test_losses_of_the_libraries_that_cannot_work_are_refused(name: str, arguments: dict[str, Any], says: str) -> None:
    pytest.importorskip(name.partition(".")[0], reason=f"{name.partition('.')[0]} is not installed")
    loss = made(name, arguments)
    with pytest.raises(UsageError, match=says):
        try_out(OfViews(loss, takes(loss, KEY)), (some_embeddings(6, 4), some_embeddings(12, 4)[6:]), name, KEY)
