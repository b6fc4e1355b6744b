"""FedLoGe: the encoder learns from a fixed sparse frame, a shared and a private head learn from its features."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedcl import random
from fedcl.cards import Card, option
from fedcl.errors import UsageError
from fedcl.models.heads import LinearHead, SimplexHead
from fedcl.step import Models
from fedcl.strategy import Arrays, ClientContext, Predictor, Sharing, Step, Strategy, cross_entropy

if TYPE_CHECKING:
    from fedcl.config import Config
    from fedcl.models.model import FedModel
    from fedcl.stream import Split, Stream

TRIES = 1000


def frame_loss(rows: Tensor, norm: float) -> Tensor:
    """sum_c (||m_c|| - norm)^2 - mean_c arccos max_{c' != c} cos(m_c, m_c'): one norm, wide angles.

    Args:
        rows: (C, d), none of them zero.

    >>> round(frame_loss(torch.tensor([[0.1, 0.0], [0.0, 0.2]]), 0.1).item(), 4)  # 0.01 - pi / 2
    -1.5608
    """
    norms = torch.linalg.vector_norm(rows, dim=1)
    unit = rows / norms[:, None]
    itself = torch.eye(len(rows), dtype=torch.bool, device=rows.device)
    nearest = (unit @ unit.T).masked_fill(itself, -1.0).max(dim=1).values.clamp(-0.99999, 0.99999)
    loss: Tensor = (norms - norm).square().sum() - torch.arccos(nearest).mean()
    return loss


def spread(start: Tensor, kept: Tensor, norm: float, steps: int) -> Tensor:
    """Rows (C, d) whose kept entries minimise :func:`frame_loss` by Adam with rate 1e-4; all others are 0.

    Args:
        start: (C, d).
        kept: (C, d) bool, an entry in each row at least.
    """
    rows = torch.where(kept, start, 0.0).requires_grad_()
    optimiser = torch.optim.Adam([rows], lr=1e-4)
    for _ in range(steps):
        (slope,) = torch.autograd.grad(frame_loss(rows, norm), rows)
        rows.grad = torch.where(kept, slope, 0.0)
        optimiser.step()
    return rows.detach()


def kept_entries(count: int, dim: int, sparsity: float, seed: int) -> Tensor:
    """(count, dim) bool: all but a random ``sparsity`` of the entries, drawn again until each row keeps one.

    Raises:
        UsageError: so few entries stay that no draw leaves one in each row.
    """
    zeros = int(sparsity * count * dim)
    for attempt in range(TRIES):
        order = random.permutation(count * dim, seed, "init", "fedloge", "entries", attempt)
        kept = torch.ones(count * dim, dtype=torch.bool)
        kept[torch.from_numpy(order[:zeros])] = False
        if bool(kept.view(count, dim).any(dim=1).all()):
            return kept.view(count, dim)
    allowed = f"less: of {count} classes with {dim} features each one must keep an entry"
    raise UsageError("options.fedloge.sparsity", sparsity, allowed)


class SparseFrame(SimplexHead):
    """The static sparse equiangular tight frame classifier (SSE-C): logits = f M^T with rows M that never change."""

    def __init__(self, feature_dim: int, sparsity: float, norm: float, steps: int) -> None:
        super().__init__(feature_dim)
        self.sparsity, self.norm, self.steps = sparsity, norm, steps

    def initial_rows(self, array: str, class_ids: Sequence[int], seed: int) -> Tensor:
        """See :class:`fedcl.models.heads.ClassArrays`; a class's row is that of its rank among the ids.

        Raises:
            UsageError: when the features have fewer than C - 1 dimensions, or each class cannot keep an entry.
        """
        count = len(class_ids)
        if self.feature_dim < count - 1:
            allowed = f"an encoder of {count - 1} features or more for {count} classes, this one has {self.feature_dim}"
            raise UsageError("strategy", "fedloge", allowed)
        ranked = sorted(class_ids)
        frame = super().initial_rows(array, ranked, seed).to(torch.float64)
        if count:
            frame = spread(frame, kept_entries(count, self.feature_dim, self.sparsity, seed), self.norm, self.steps)
        rows: Tensor = frame[[ranked.index(c) for c in class_ids]]
        return rows.to(torch.float32)


class PersonalHead(LinearHead):
    """A client's own head; it starts elsewhere than the model's, which is drawn from the same streams."""

    def initial_rows(self, array: str, class_ids: Sequence[int], seed: int) -> Tensor:
        """See :class:`fedcl.models.heads.ClassArrays`."""
        return super().initial_rows(array, class_ids, random.fold(seed, "fedloge", "personal"))


def realigned(weight: Tensor, norm: float) -> Tensor:
    """All rows of one norm (GLA-FR for the global model); a row of zeros stays.

    >>> realigned(torch.tensor([[3.0, 4.0], [0.0, 0.1]]), 2.0).tolist()
    [[1.2000000476837158, 1.600000023841858], [0.0, 2.0]]
    """
    return norm * F.normalize(weight, dim=1)


def borrowed(weight: Tensor, own: Tensor) -> Tensor:
    """Rows ``psi_c * ||phi_c||`` of the shared head by the norms of a client's own (GLA-FR for a client).

    >>> borrowed(torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 4.0]])).tolist()
    [[5.0, 10.0]]
    """
    scaled: Tensor = weight * torch.linalg.vector_norm(own, dim=1, keepdim=True)
    return scaled


class FedLoGe(Strategy):
    """A fixed sparse classifier forms the encoder; the model's head and a private one learn from what it sees."""

    name = "fedloge"
    family = "heterogeneity"
    stackable = True
    predicts_by_state = True
    tried_with = {"model.head_allocate": "all", "options.fedloge.steps": 20}
    card = Card(
        title="FedLoGe: Joint Local and Generic Federated Learning under Long-tailed Data",
        authors="Xiao, Chen, Liu, Feng, Zhou, Wu, Liu, Yang, Liu",
        venue="ICLR",
        year=2024,
        bibtex="""@inproceedings{xiao2024fedloge,
  title = {{FedLoGe}: Joint Local and Generic Federated Learning under Long-tailed Data},
  author = {Xiao, Zikai and Chen, Zihan and Liu, Liyinglan and Feng, Yang and Zhou, Joey Tianyi and Wu, Jian and
            Liu, Wanlu and Yang, Howard Hao and Liu, Zuozhu},
  booktitle = {ICLR},
  year = {2024}
}""",
        certainty="Frame, three losses and both realignments read in the released code; the paper was not available. A "
        "stream of tasks is ours.",
        client_state="its private head, and which classes it has held images of",
        cost="The frame down once and some seconds to make it at the start; two more linear layers a step, one of "
        "which stays at the client.",
        notes="Needs model.head_allocate=all: the frame of all classes of the stream is made before the first task. "
        "The model's head is the shared auxiliary one. The global model predicts with its rows at one norm (gamma), a "
        "client with the shared head by the norms of its own one, plus its own one, among the classes that it has held "
        "images of, in any task; one that has never trained predicts as the global model does. Realignment happens "
        "when a model is tested; training goes on from what it was. Loss terms of other strategies that read the "
        "head's logits move the encoder by way of a head that no longer moves it here. Rows of norm 0.1 give weak "
        "gradients: with a small network and few rounds the encoder stays far behind plain averaging, and a larger "
        "options.fedloge.norm learns faster.",
        deviations="One joint step stands for the released three: their gradients do not meet, unless they are clipped "
        "together. The released frame keeps the random bias of a linear layer, here it has none. Entries to drop are "
        "drawn again where a class would lose all of them. A class absent at a client is masked, in the released code "
        "its rows are -1e10. The optional tuning of realigned local heads is left out; it is off there, too.",
    )

    @dataclass(frozen=True)
    class Options:
        sparsity: float = option(0.6, "part of the frame's entries that is 0")
        norm: float = option(0.1, "norm of each class's row of the frame")
        steps: int = option(10000, "steps of Adam that spread the sparse frame")
        gamma: float = option(1.7, "norm of the rows of the realigned global head")

        def __post_init__(self) -> None:
            if not 0 <= self.sparsity < 1:
                raise ValueError(f"sparsity must be at least 0 and below 1, not {self.sparsity}")
            if self.steps < 0:
                raise ValueError(f"steps must be at least 0, not {self.steps}")
            for name in ("norm", "gamma"):
                if not 0 < getattr(self, name) < float("inf"):
                    raise ValueError(f"{name} must be above 0, not {getattr(self, name)}")

    def check(self, config: Config, stream: Stream, split: Split) -> None:
        if config.model.head != "linear":
            raise UsageError("model.head", config.model.head, f"linear: {self.name} scales the rows of a linear head")
        if config.model.head_allocate != "all":
            allowed = f"all: {self.name} makes its frame for all classes before the first task"
            raise UsageError("model.head_allocate", config.model.head_allocate, allowed)

    def modules(self, model: FedModel) -> Mapping[str, nn.Module]:
        d, o = model.feature_dim, self.options
        return {"frame": SparseFrame(d, o.sparsity, o.norm, o.steps), "personal": PersonalHead(d, bias=True)}

    def share(self, name: str, model: FedModel) -> Sharing:
        return "private" if name.startswith("extra.fedloge.personal.") else "shared"

    # client

    def task_loss(self, step: Step) -> Tensor:
        logits = step.apply("frame", step.output.features)
        return cross_entropy(logits, step.y, step.among(step.known))

    def loss(self, step: Step) -> dict[str, Tensor]:
        # Detached: only the frame forms the features.
        features, classes = step.output.features.detach(), step.among(step.known)
        shared = head_logits(step.models, {**step.params, **step.buffers}, features)
        own = step.apply("personal", features)
        return {"shared": cross_entropy(shared, step.y, classes), "personal": cross_entropy(own, step.y, classes)}

    def end_round(self, ctx: ClientContext, trained: Arrays, steps: int) -> tuple[Arrays, Arrays]:
        here = ctx.counts > 0
        return {}, {"held": ctx.state["held"] | here if ctx.state else here}

    # anywhere

    def predict(self, predictor: Predictor, x: Tensor) -> Tensor:
        arrays, features = predictor.arrays, predictor.forward(x).features
        weight = arrays["head.weight"]
        if "held" not in predictor.own:
            even = {**arrays, "head.weight": realigned(weight, self.options.gamma)}
            return head_logits(predictor.models, even, features)
        scaled = borrowed(weight, arrays["extra.fedloge.personal.weight"])
        logits = head_logits(predictor.models, {**arrays, "head.weight": scaled}, features)
        logits = logits + predictor.apply("personal", features)
        return torch.where(predictor.own["held"], logits, torch.finfo(logits.dtype).min)


def head_logits(models: Models, arrays: Arrays, features: Tensor) -> Tensor:
    """(B, C) of the model's head in ``arrays``, on given features (B, d)."""
    logits: Tensor = models.apply("head", arrays, (features,), "eval")
    return logits
