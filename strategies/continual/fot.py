"""FOT: the server keeps the subspace of each layer's old inputs and projects the mean update away from it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from fedcl import random as counter
from fedcl.blocks.losses import cross_entropy
from fedcl.blocks.subspaces import (
    Layer,
    energy,
    input_parts,
    joined,
    leading,
    outside,
    projected,
    wanted_share,
    weight_layers,
)
from fedcl.cards import Card, option
from fedcl.errors import RunFailed, UsageError
from fedcl.models.model import FedModel
from fedcl.strategy import Arrays, ClientContext, Finished, Server, Step, Strategy

from ..federated.finetune import new_or_known

IMAGES = 32
"""Images that are looked at together, whatever the batches of the run: rounding depends on it."""


class FOT(Strategy):
    """Federated orthogonal training: rounds leave what each layer makes of old inputs as it is."""

    name = "fot"
    family = "continual"
    stackable = True
    neutral = {"threshold": 0.0, "task": "known"}
    tried_with = {"options.fot.rest": "hold"}
    yields = ("task_loss",)
    revisits = "to sketch what goes into each layer at the end of the task"
    reductions = {"sketch/": "sum", "left/": "sum", "whole/": "sum"}
    card = Card(
        title="Federated Orthogonal Training: Mitigating Global Catastrophic Forgetting in Continual "
        "Federated Learning",
        authors="Bakman, Yaldiz, Ezzeldin, Avestimehr",
        venue="ICLR",
        year=2024,
        bibtex="""@inproceedings{bakman2024fot,
  title = {Federated Orthogonal Training: Mitigating Global Catastrophic Forgetting in Continual Federated
           Learning},
  author = {Bakman, Yavuz Faruk and Yaldiz, Duygu Nur and Ezzeldin, Yahya H. and Avestimehr, Salman},
  booktitle = {ICLR},
  year = {2024}
}""",
        certainty="Sketch, rank rule and projection read in the released code. There the models that the last round's "
        "participants trained are sketched (`of=trained`); here it is the global model, whose outputs are what is "
        "protected. There the share of energy outside is a ratio of norms (`ratio=norm`), compared with squared norms; "
        "here both are squared. Thresholds are those of the code: 0.87 on split CIFAR-100, 0.90 on mini-ImageNet, "
        "0.94 to 0.96 elsewhere, raised by 0.001 a task.",
        leaves_client=(
            ("sketch", "inputs of a layer x columns, float64, a layer", "sum", "end of a task"),
            ("left", "1 a layer", "sum", "end of a task"),
            ("whole", "1 a layer", "sum", "end of a task"),
        ),
        client_state="none; with of=trained its encoder of the last round that it trained in, until that is sketched",
        server_state="an orthonormal basis a layer, float64",
        cost="At the end of a task one forward pass, a product of each layer's inputs with random columns, and the "
        "upload of the sketches; the bases go down once a task, as the server projects. The server decomposes an (m, "
        "m) matrix a layer.",
        deviations="The released code sends the bases in every round.",
        notes="Protects the weights of all Linear and Conv2d layers of the encoder, not the head: the paper has a head "
        "a task (scenario task_incremental). Elsewhere the rows of old classes are kept out of the softmax "
        "(`task=new`). The paper's layers have no bias (model.bias=false, model.head_bias=false) and its networks no "
        "normalisation: biases, scales and shifts are averaged freely and spoil the protection, unless `rest=hold` "
        "keeps them after the first task. Networks with BatchNorm need it. The paper averages clients uniformly "
        "(federation.weighting=uniform). Only sums of sketches reach the server, so they can be summed securely. A "
        "basis never shrinks: a layer whose basis is full is frozen.",
    )

    @dataclass(frozen=True)
    class Options:
        threshold: float = option(0.9, "epsilon: share of the inputs' energy that is protected; 0 protects nothing")
        increment: float = option(0.001, "what the threshold is raised by after each task")
        columns_conv: float = option(1.0, "columns of a convolution's sketch, in lengths of its input")
        columns_linear: float = option(5.0, "columns of a linear layer's sketch, in lengths of its input")
        ratio: Literal["energy", "norm"] = option(
            "energy", "share outside of the basis: of squared norms, or of norms as in the released code"
        )
        of: Literal["global", "trained"] = option(
            "global", "model that is sketched: the global one, or each participant's own as in the released code"
        )
        rest: Literal["average", "hold"] = option(
            "average", "biases and normalisation of the encoder after the first task: averaged, or held"
        )
        task: Literal["new", "known"] = option("new", "classes of the cross entropy: the new ones, or all known")

        def __post_init__(self) -> None:
            if not 0 <= self.threshold <= 1:
                raise ValueError(f"threshold must be from 0 to 1, not {self.threshold}")
            if not 0 <= self.increment < 1:
                raise ValueError(f"increment must be at least 0 and below 1, not {self.increment}")
            for name in ("columns_conv", "columns_linear"):
                if not 0 < getattr(self, name) < float("inf"):
                    raise ValueError(f"{name} must be above 0, not {getattr(self, name)}")

    # client

    def task_loss(self, step: Step) -> Tensor:
        classes = new_or_known(step) if self.options.task == "new" else step.known
        return cross_entropy(step.output.logits, step.y, step.among(classes))

    def end_round(self, ctx: ClientContext, trained: Arrays, steps: int) -> tuple[Arrays, Arrays]:
        if self.options.of == "global" or not self.options.threshold:
            return {}, ctx.state
        return {}, {n: a for n, a in trained.items() if n.startswith("encoder.")} | {"task": torch.tensor(ctx.task)}

    def sketch(self, ctx: ClientContext) -> tuple[Arrays, Arrays]:
        """Random combinations of this client's inputs of each layer outside of the bases, and how much lies there."""
        layers, nothing = protected(ctx.model), torch.zeros((), dtype=torch.float64, device=ctx.ids.device)
        sketches = {n: nothing.new_zeros(layer.weight[0].numel(), self.columns(layer)) for n, layer in layers.items()}
        left, whole = dict.fromkeys(layers, nothing), dict.fromkeys(layers, nothing)
        random = {n: torch.Generator().manual_seed(counter.key(*ctx.key, "sketch", n) & (2**63 - 1)) for n in layers}
        idle = self.options.of == "trained" and int(ctx.state.get("task", torch.tensor(-1))) != ctx.task
        own = {n: a for n, a in ctx.state.items() if n != "task"}
        for at in range(0, 0 if idle else len(ctx.ids), IMAGES):
            x = ctx.store.batch(ctx.ids[at : at + IMAGES], next(iter(ctx.received.values())).dtype)
            taps = ctx.forward(x, {**ctx.received, **own}, tuple(layers)).taps
            for name, layer in layers.items():
                if name not in taps:
                    raise RunFailed(f"fot cannot see what goes into {name}: the network never calls it")
                for rows in input_parts(layer, taps[name].input, self.columns(layer)):
                    basis = ctx.down.get(f"basis/{name}", rows.new_zeros(rows.shape[1], 0)).to(rows)
                    rest = outside(rows, basis)
                    mixing = torch.randn(len(rows), self.columns(layer), generator=random[name], dtype=rows.dtype)
                    sketches[name] += rest.T @ mixing.to(rows.device)
                    left[name], whole[name] = left[name] + energy(rest), whole[name] + energy(rows)
        if self.options.ratio == "norm":
            images = nothing + (0 if idle else len(ctx.ids))
            left = {n: torch.where(whole[n] > 0, images * (a / whole[n]).sqrt(), 0.0) for n, a in left.items()}
            whole = dict.fromkeys(layers, images)
        out = {f"sketch/{n}": a for n, a in sketches.items()} | {f"left/{n}": a for n, a in left.items()}
        return out | {f"whole/{n}": a for n, a in whole.items()}, {}

    def columns(self, layer: Layer) -> int:
        """Columns of a layer's sketch."""
        factor = self.options.columns_conv if layer.weight.dim() == 4 else self.options.columns_linear
        return max(1, int(factor * layer.weight[0].numel()))

    # server

    def begin_task(self, server: Server) -> Arrays:
        protected(server.model)
        normed = any(isinstance(m, _BatchNorm) for m in server.model.modules())
        if normed and self.options.rest == "average" and self.options.threshold:
            allowed = "hold, or model.norm=group or none: running statistics of BatchNorm are not protected"
            raise UsageError("options.fot.rest", "average", allowed)
        return server.state

    def after_aggregate(self, server: Server) -> tuple[Arrays, Arrays]:
        arrays, before, state = server.arrays, server.before, server.state
        bases = {n.removeprefix("basis/"): a for n, a in state.items() if n != "cohort"}
        for name, basis in bases.items():
            weight = f"{name}.weight"
            arrays = {**arrays, weight: projected(before[weight], arrays[weight], basis)}
        if bases and self.options.rest == "hold":
            others = [n for n in arrays if n.startswith("encoder.") and n.removesuffix(".weight") not in bases]
            arrays = {**arrays, **{n: before[n] for n in others}}
        if self.options.of == "trained" and self.options.threshold:
            state = {**state, "cohort": torch.tensor(sorted(server.cohort), dtype=torch.int64)}
        return arrays, state

    def finish_task(self, server: Server) -> tuple[Finished, Arrays]:
        if not self.options.threshold:
            return Finished(server.arrays), server.state
        bases = {n: a for n, a in server.state.items() if n != "cohort"}
        if self.options.of == "trained":
            found = server.exchange(self.sketch, server.state["cohort"].tolist(), bases)
        else:
            found = server.exchange(self.sketch, down=bases)
        threshold = self.options.threshold + self.options.increment * server.task
        for name in protected(server.model) if found else ():
            precision = server.arrays[f"{name}.weight"].dtype
            left, whole = float(found[f"left/{name}"]), float(found[f"whole/{name}"])
            if left <= whole * torch.finfo(precision).eps:
                continue  # nothing lies outside of the basis, or nobody had an image
            directions = leading(found[f"sketch/{name}"], wanted_share(left / whole, threshold), precision)
            before = bases.get(f"basis/{name}", directions.new_zeros(len(directions), 0))
            bases[f"basis/{name}"] = joined(before, directions)
        return Finished(server.arrays), bases


def protected(model: FedModel) -> dict[str, Layer]:
    """The layers of the encoder that have a basis, by name.

    Raises:
        UsageError: the encoder has a layer of another kind.
    """
    try:
        return weight_layers(model.encoder, "encoder")
    except ValueError as error:
        raise UsageError("strategy", "fot", f"another network: {error}") from error
