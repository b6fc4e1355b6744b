"""What Avalanche trains and on what: the model as a module, and rows of a client's store as a data set.

Images are pixels, uint8, wherever a plugin reads a data set; the model takes these too, and a step of training sees
them augmented and normalised as in any other run. Imports Avalanche, as :mod:`fedcl.bridges.avalanche_loop`.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from avalanche.benchmarks.utils import AvalancheDataset, _make_taskaware_classification_dataset
from avalanche.benchmarks.utils.data_attribute import DataAttribute
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from .. import random as counter
from ..data.store import TensorStore
from ..errors import RunFailed
from ..federation.trainer import Trainer
from ..strategy import Arrays, ClientContext


class Rows(torch.utils.data.Dataset[tuple[Tensor, int]]):
    """Some rows of a client's store: pixels uint8 (C, H, W) and the class position."""

    def __init__(self, store: TensorStore, ids: Tensor) -> None:
        self.store, self.ids = store, ids
        self.labels = store.label_tensor[ids].tolist()

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, place: int) -> tuple[Tensor, int]:
        return self.store.gather(self.ids[place]).cpu(), self.labels[place]


def data_set(store: TensorStore, ids: Tensor) -> AvalancheDataset[Any]:
    """Rows of the store as Avalanche's data set; its attribute ``rows`` still tells which, after any subset of it."""
    rows = Rows(store, ids)
    made = _make_taskaware_classification_dataset(rows, targets=rows.labels, task_labels=[0] * len(rows))
    return made.update_data_attribute("rows", DataAttribute(ids.tolist(), "rows"))


def rows_of(data: AvalancheDataset[Any]) -> list[int]:
    """Which rows of the store a data set holds, of :func:`data_set` or made of such."""
    return [int(row) for row in data.rows] if len(data) else []


class Images:
    """How a model reads pixels, and the seed of what it draws; one for a model and its copies."""

    def __init__(self, ctx: ClientContext) -> None:
        self.meet(ctx)

    def meet(self, ctx: ClientContext) -> None:
        """Begins a client's round; the seed is that of what is not a step."""
        self.node = client_of(ctx).node
        self.seed = torch.tensor(counter.fold(*ctx.key, "avalanche"), device=ctx.store.device)

    def __deepcopy__(self, memo: dict[int, Any]) -> Images:
        return self

    def read(self, x: Tensor) -> Tensor:
        """Normalised images of pixels; others as they are."""
        if x.dtype == torch.uint8:
            x = self.node.store.normalise(x, self.node.dtype)
        return x.contiguous(memory_format=torch.channels_last) if self.node.channels_last else x


class Learner(nn.Module):
    """The model as Avalanche trains it: pixels or images (B, C, H, W) to logits (B, C)."""

    def __init__(self, ctx: ClientContext) -> None:
        super().__init__()
        self.net = copy.deepcopy(ctx.model)
        self.images = Images(ctx)

    def forward(self, x: Tensor) -> Tensor:
        if self.training and len(x) == 1 and x.dtype == torch.uint8:
            self.still()  # a plugin reads a data set whose last batch has one image: training mode would refuse it
            logits: Tensor = self.net(self.images.read(x), seed=self.images.seed).logits
            self.train()
            return logits
        logits = self.net(self.images.read(x), seed=self.images.seed).logits
        return logits

    def still(self) -> None:
        """Lets BatchNorm use its running statistics."""
        for module in self.modules():
            if isinstance(module, _BatchNorm):
                module.training = False

    def train(self, mode: bool = True) -> Learner:
        super().train(mode)
        if self.images.node.config.model.batch_norm == "frozen":
            self.still()
        return self

    def put(self, arrays: Arrays) -> None:
        """Takes copies of the arrays as its parameters and buffers, with a head of any width."""
        trained = set(self.images.node.trainable)
        for name, array in arrays.items():
            path, _, leaf = name.rpartition(".")
            owner, value = self.net.get_submodule(path), array.detach().clone()
            if leaf in owner._parameters:
                owner._parameters[leaf] = nn.Parameter(value, requires_grad=name in trained)
            else:
                owner._buffers[leaf] = value

    def arrays(self) -> Arrays:
        """Copies of its parameters and buffers."""
        return {n: a.detach().clone() for n, a in self.net.state_dict(keep_vars=True).items()}


def client_of(ctx: ClientContext) -> Any:
    """The client behind a context of an exchange.

    Raises:
        RunFailed: the context is that of a hook.
    """
    if not isinstance(ctx.trainer, Trainer):
        raise RunFailed(f"strategy {ctx.strategy!r} trains by Avalanche in a hook; only exchanged functions may")
    return ctx.trainer.client
