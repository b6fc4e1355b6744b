"""Training of one client by Avalanche's own loop, with a plugin of Avalanche's in it.

Imports Avalanche, which takes seconds: get it by :func:`fedcl.bridges.avalanche_state.loops`. An experience is a
client's task.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from avalanche.benchmarks import DatasetExperience
from avalanche.training.templates import SupervisedTemplate
from torch import Tensor, nn

from .. import random as counter
from ..blocks.losses import cross_entropy
from ..config import Optimiser
from ..errors import Interrupted, RunFailed
from ..federation.trainer import Trainer
from ..local.order import plan
from ..local.phases import epoch_length
from ..local.rates import schedule
from ..local.training import not_finite
from ..strategy import ClientContext
from .avalanche_model import Learner, client_of, data_set


def optimiser_of(config: Optimiser, params: list[nn.Parameter]) -> torch.optim.Optimizer:
    """The optimiser of the settings; its rate is set before each step."""
    decay, betas = config.weight_decay, (config.betas[0], config.betas[1])
    if config.name == "sgd":
        return torch.optim.SGD(params, 1.0, config.momentum, weight_decay=decay, nesterov=config.nesterov)
    if config.name == "adam":
        return torch.optim.Adam(params, 1.0, betas, config.eps, decay)
    return torch.optim.AdamW(params, 1.0, betas, config.eps, decay)


class Planned:
    """The batches of a client's round, one epoch each time it is iterated over."""

    def __init__(self) -> None:
        self.epochs: Iterator[list[list[Tensor]]] = iter(())
        self.length = 0

    def plan(self, ctx: ClientContext, batches: list[Any], length: int) -> None:
        """Takes a new round's batches, places among the client's images."""
        self.length = length

        def batch(places: Any) -> list[Tensor]:
            ids = ctx.ids[torch.from_numpy(places).to(ctx.ids.device)]
            return [ctx.store.gather(ids), ctx.store.label_tensor[ids], torch.zeros_like(ids)]

        self.epochs = ([batch(b) for b in batches[at : at + length]] for at in range(0, len(batches), length))

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[list[Tensor]]:
        return iter(next(self.epochs, []))


class Loop(SupervisedTemplate):  # type: ignore[misc]
    """Avalanche's supervised loop for the rounds of one client, with the batches, rates and images of the run.

    Args:
        plugin: of Avalanche's.
        housed: gives the parameters fresh memory before each step, for a plugin that keeps views of the old ones.
    """

    def __init__(self, ctx: ClientContext, plugin: Any, housed: bool) -> None:
        self.ctx = ctx
        federation = client_of(ctx).node.config.federation
        model = Learner(ctx)
        super().__init__(
            model=model, optimizer=optimiser_of(client_of(ctx).node.config.optimiser, list(model.parameters())),
            criterion=self.supervised, train_mb_size=federation.batch_size, train_epochs=federation.epochs or 1,
            device=ctx.store.device, plugins=[plugin], evaluator=None,
        )  # fmt: skip
        self.plugin, self.housed, self.planned = plugin, housed, Planned()
        self.batches: list[Any] = []
        self.done = self.limit = self.dropped = 0
        self.sums = torch.zeros(2)

    def supervised(self, output: Tensor, labels: Tensor) -> Tensor:
        """The cross entropy over the known classes, or over those of each image's task where that is known."""
        return cross_entropy(output, labels, self.ctx.among(self.ctx.known, labels))

    def enter(self, ctx: ClientContext, experiences: int) -> None:
        """Comes to a client's round, or to the end of its task: the received model and the task's images."""
        self.ctx, client = ctx, client_of(ctx)
        self.model.images.meet(ctx)
        self.model.put(ctx.received)
        self.optimizer = optimiser_of(client.node.config.optimiser, list(self.model.parameters()))
        self.clock.train_exp_counter = experiences
        self.is_training = True
        self.model.train()
        data = data_set(ctx.store, ctx.ids)
        self.experience = DatasetExperience(dataset=data, current_experience=experiences)
        self.experience.classes_in_this_experience = sorted(set(ctx.labels.tolist()))
        self.batches, self.dropped = plan(len(ctx.ids), client.node.config, client.key)
        length = epoch_length(client, self.batches)
        self.batches = self.batches[: client.most_steps(None)]
        self.planned.plan(ctx, self.batches, length)
        self.done, self._stop_training = 0, False
        self.sums = torch.zeros(2, dtype=client.node.dtype, device=ctx.store.device)

    def begin(self, begins: bool, drop_last: bool) -> None:
        """What comes before the epochs.

        Args:
            begins: the experience begins; else it goes on, and no hook is called.
            drop_last: given to plugins that make a data loader of their own.
        """
        if begins:
            self._before_training()
            self._before_training_exp(drop_last=drop_last)
            return
        self.train_dataset_adaptation()
        self.make_train_dataloader()
        self.check_model_and_optimizer()

    def make_train_dataloader(self, drop_last: bool = False) -> None:
        self.dataloader = self.planned

    def check_model_and_optimizer(self, reset_optimizer_state: bool = True, drop_last: bool = False) -> None:
        self.optimized_param_id = None  # the parameters are new in each round
        super().check_model_and_optimizer(reset_optimizer_state=reset_optimizer_state)

    def run(self) -> None:
        """The epochs of a round."""
        config, client = client_of(self.ctx).node.config, client_of(self.ctx)
        if self.dataloader is self.planned:
            self.limit = len(self.batches)
        else:
            wanted = config.federation.steps or len(self.dataloader) * self.train_epochs
            self.limit = client.most_steps(wanted)
        while self.done < self.limit:
            before = self.done
            self._before_training_epoch()
            if not self._stop_training:
                self.training_epoch()
                self._after_training_epoch()
            if self._stop_training or self.done == before:
                break
        self.told()

    def told(self) -> None:
        """Adds the round to what the run measures.

        Raises:
            RunFailed: a loss is not finite.
        """
        client, trainer = client_of(self.ctx), self.ctx.trainer
        assert isinstance(trainer, Trainer)
        task, whole = (self.sums / max(self.done, 1)).tolist()
        losses = {"task": task, f"{self.ctx.strategy}.plugin": whole - task}
        if not all(math.isfinite(v) for v in losses.values()):
            raise RunFailed(not_finite(client, losses))
        trainer.record(self.done, self.dropped, losses if self.done else {})

    def end(self) -> None:
        """The end of the experience: importances, memories, previous models are made."""
        self.train_dataset_adaptation()
        self.make_train_dataloader()
        self.check_model_and_optimizer()
        self._after_training_exp()
        self._after_training()

    def _unpack_minibatch(self) -> None:
        super()._unpack_minibatch()
        node = client_of(self.ctx).node
        if node.stop():
            raise Interrupted("interrupted during local training")
        key = torch.tensor(counter.fold(*client_of(self.ctx).key), device=node.store.device)
        self.model.images.seed = counter.step_seed(key, torch.tensor(self.done, device=node.store.device))
        if self.mbatch[0].dtype == torch.uint8:
            self.mbatch[0] = node.images(self.mbatch[0], self.model.images.seed)

    def criterion(self) -> Tensor:
        loss: Tensor = super().criterion()
        self.sums[0] += loss.detach()
        return loss

    def backward(self) -> None:
        super().backward()
        params = [p for p in self.model.parameters() if p.requires_grad]
        for p in params:
            if p.grad is None:  # as in any other run: what the loss does not depend on has the gradient 0
                p.grad = torch.zeros_like(p)
        clip = client_of(self.ctx).node.config.optimiser.clip
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(params, clip)

    def optimizer_step(self) -> None:
        client, config = client_of(self.ctx), client_of(self.ctx).node.config
        self.sums[1] += self.loss.detach().sum()
        rate = schedule(
            config.optimiser, step=self.done, round=client.header.round, task=client.header.task,
            total=client.node.schedule_total(self.limit, client.header),
        )  # fmt: skip
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        if self.housed:
            for p in self.model.parameters():
                p.data = p.data.clone()
        super().optimizer_step()
        self.done += 1
        if self.done >= self.limit:
            self.stop_training()
