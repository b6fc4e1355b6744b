"""ER-ACE: experience replay in which images of the stream compete only with the classes of their own batch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fedcl.blocks.losses import cross_entropy
from fedcl.blocks.memory import MemoryOptions, Rehearsal, others
from fedcl.cards import Card, option
from fedcl.strategy import ClientContext, Source, Step


def present(labels: Tensor, classes: int) -> Tensor:
    """(C,) bool: the classes that stand among ``labels`` (B,).

    >>> present(torch.tensor([2, 2, 0]), 3).tolist()
    [True, False, True]
    """
    return (labels[:, None] == torch.arange(classes, device=labels.device)).any(dim=0)


def asymmetric_cross_entropy(
    stream: tuple[Tensor, Tensor, Tensor], memory: tuple[Tensor, Tensor, Tensor], among: Literal["batch", "known"]
) -> Tensor:
    """``L_ace = CE(stream, C_curr) + CE(memory, C_old u C_curr)`` (Caccia et al. 2022), each the mean over its part.

    Args:
        stream, memory: (logits (n, C), labels (n,) int64, classes (C,) or (n, C) bool that a softmax may run over);
            a part without images adds nothing, and not both are.
        among: ``batch``: C_curr are the classes present in the stream's part, as published; ``known``: all of its
            ``classes``, which is experience replay.

    >>> logits = torch.tensor([[2.0, 2.0, 9.0]])
    >>> part = logits, torch.tensor([0]), torch.tensor([True, True, True])
    >>> nothing = logits[:0], torch.zeros(0, dtype=torch.int64), part[2]
    >>> asymmetric_cross_entropy(part, nothing, "batch").item()
    0.0
    """
    logits, labels, classes = stream
    if among == "batch":
        stream = logits, labels, classes & present(labels, logits.shape[-1])
    return torch.stack([cross_entropy(*part) for part in (stream, memory) if len(part[1])]).sum()


class ERACE(Rehearsal):
    """Replay with two cross entropies: the stream's over the classes of its batch, the memory's over all known ones."""

    name = "er_ace"
    family = "continual"
    stackable = True
    neutral = {"budget": 0, "stream": "known"}
    card = Card(
        title="New Insights on Reducing Abrupt Representation Change in Online Continual Learning",
        authors="Caccia, Aljundi, Asadi, Tuytelaars, Pineau, Belilovsky",
        venue="ICLR",
        year=2022,
        bibtex="""@inproceedings{caccia2022new,
  title = {New Insights on Reducing Abrupt Representation Change in Online Continual Learning},
  author = {Caccia, Lucas and Aljundi, Rahaf and Asadi, Nader and Tuytelaars, Tinne and Pineau, Joelle and
            Belilovsky, Eugene},
  booktitle = {ICLR},
  year = {2022}
}""",
        certainty="Loss certain: the sum of two means (Avalanche has half of it). The federated form, one memory a "
        "client that never leaves it, is ours and the usual one.",
        leaves_client=(("stored", "1", "sum", "end of a task"),),
        client_state="image ids within the byte budget (the images are the client's own) and their priorities",
        cost="Twice the images a step once the memory is filled. Only the number of stored images leaves a client.",
        notes="A batch of one class has no loss on the stream: a softmax over one class is 1. A client with one class "
        "a task learns from its memory alone, and so does a batch of 1. The memory is that of replay, filled at the "
        "end of a task or of each round where images are seen once; in a round it is drawn from anew with the images "
        "at hand offered to it, as in Avalanche, so that it has the new classes too. It is all images of a step that "
        "are not of the client's stream, also those of another memory of the stack.",
    )

    @dataclass(frozen=True)
    class Options(MemoryOptions):
        stream: Literal["batch", "known"] = option(
            "batch", "classes that an image of the stream competes with: those of its batch, or all known (replay)"
        )

    def sources(self, ctx: ClientContext) -> list[Source]:
        # The images at hand stand in the memory from the start, as online: nothing else sets new classes against old.
        ids = self.remember(ctx)[1]["ids"]
        return [Source(ids, self.options.batch_size or ctx.batch_size)]

    def task_loss(self, step: Step) -> Tensor:
        logits, known = step.output.logits, step.among(step.known).expand(len(step.y), -1)
        parts = [
            (logits[rows], step.y[rows], known[rows]) for rows in (step.batch.rows("stream"), others(step, "stream"))
        ]
        return asymmetric_cross_entropy(parts[0], parts[1], self.options.stream)
