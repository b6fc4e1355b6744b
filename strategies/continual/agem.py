"""A-GEM: where a step would raise the loss on the memory, its gradient is projected so that it does not."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.func import grad

from fedcl.blocks.losses import cross_entropy
from fedcl.blocks.memory import MemoryOptions, Rehearsal, others
from fedcl.cards import Card, option
from fedcl.strategy import Arrays, Step


def projected(grads: Arrays, reference: Arrays) -> Arrays:
    """``g - (g.r / r.r) r`` where ``g.r < 0``, else ``g`` (Chaudhry et al. 2019); products over all parameters.

    >>> projected({"w": torch.tensor([1.0, -1.0])}, {"w": torch.tensor([0.0, 2.0])})["w"].tolist()
    [1.0, 0.0]
    >>> projected({"w": torch.tensor([1.0, 1.0])}, {"w": torch.tensor([0.0, 2.0])})["w"].tolist()
    [1.0, 1.0]
    """
    along = torch.stack([(g * reference[n]).sum() for n, g in grads.items()]).sum()
    length = torch.stack([r.square().sum() for r in reference.values()]).sum()
    against = along < 0  # then the reference is not zero
    factor = torch.where(against, along / torch.where(against, length, 1.0), 0.0)
    return {n: g - factor * reference[n] for n, g in grads.items()}


class AGEM(Rehearsal):
    """Averaged gradient episodic memory: a step may not, to first order, raise the loss on a batch of the memory."""

    name = "agem"
    aliases = ("a_gem",)
    family = "continual"
    stackable = True
    neutral = {"budget": 0}
    card = Card(
        title="Efficient Lifelong Learning with A-GEM",
        authors="Chaudhry, Ranzato, Rohrbach, Elhoseiny",
        venue="ICLR",
        year=2019,
        bibtex="""@inproceedings{chaudhry2019agem,
  title = {Efficient Lifelong Learning with {A-GEM}},
  author = {Chaudhry, Arslan and Ranzato, Marc'Aurelio and Rohrbach, Marcus and Elhoseiny, Mohamed},
  booktitle = {ICLR},
  year = {2019}
}""",
        certainty="Projection certain. Of the reference batch the specification says 64 or 256 images; 256 is the "
        "default. The federated form, one memory a client that never leaves it, is ours and the usual one.",
        leaves_client=(("stored", "1", "sum", "end of a task"),),
        client_state="image ids within the byte budget (the images are the client's own) and their priorities",
        cost="The memory's images go through the network twice a step: with the others, and for the reference "
        "gradient.",
        notes="The memory gives a direction only: its images have no term in the loss. The gradient that is projected "
        "is the one after clipping; what momentum and weight decay add later is not. The memory is that of replay: "
        "filled at the end of a task, or of each round where images are seen once. A client without exemplars trains "
        "as without the method.",
    )

    @dataclass(frozen=True)
    class Options(MemoryOptions):
        batch_size: int = option(
            256, "memory images of a reference gradient; 0 takes federation.batch_size", unit="images"
        )

    def task_loss(self, step: Step) -> Tensor:
        rows = others(step, self.name)
        logits = step.output.logits
        if not len(rows):
            return logits.sum() * 0.0  # none of the stream's images has a label
        known = step.among(step.known).expand(len(step.y), -1)
        return cross_entropy(logits[rows], step.y[rows], known[rows])

    def edit_gradients(self, step: Step, grads: Arrays) -> Arrays:
        rows = step.batch.rows(self.name)
        if not len(rows):
            return grads
        return projected(grads, self.reference(step, rows, list(grads)))

    def reference(self, step: Step, rows: Tensor, names: list[str]) -> Arrays:
        """The gradient of the cross entropy over the memory's images."""
        x, y = step.x[rows], step.y[rows]
        known = step.among(step.known).expand(len(step.y), -1)[rows]
        params = {n: p.detach() for n, p in step.params.items()}

        def loss(some: Arrays) -> Tensor:
            # In training mode, as the loss; what it writes to the running statistics is dropped.
            buffers = {n: b.clone() for n, b in step.buffers.items()}
            # With a seed of its own: step.forward counts the calls of the losses too, where these share the step.
            output = step.models(x, {**params, **buffers, **some}, "train", (), step.seed - 1)
            return cross_entropy(output.logits, y, known)

        found: Arrays = grad(loss)({n: params[n] for n in names})
        return found
