"""Federated averaging without anything against forgetting: the floor of every table."""

from __future__ import annotations

import torch
from torch import Tensor

from fedcl.cards import Card
from fedcl.strategy import Step, Strategy, cross_entropy

_BIBTEX = """@inproceedings{mcmahan2017fedavg,
  title = {Communication-Efficient Learning of Deep Networks from Decentralized Data},
  author = {McMahan, Brendan and Moore, Eider and Ramage, Daniel and Hampson, Seth and
            {Ag{\\"u}era y Arcas}, Blaise},
  booktitle = {AISTATS},
  year = {2017}
}"""


def new_or_known(step: Step) -> Tensor:
    """(B, C) mask: samples of new classes compete among the new ones, others (of a memory) among all known.

    In a stream that brings no new class every sample competes among all known.
    """
    return torch.where(step.new[step.y][:, None], step.new, step.known)


class Finetune(Strategy):
    """Federated averaging with cross entropy over all classes seen so far."""

    name = "finetune"
    aliases = ("fedavg",)
    family = "federated"
    stackable = True
    card = Card(
        title="Communication-Efficient Learning of Deep Networks from Decentralized Data",
        authors="McMahan, Moore, Ramage, Hampson, Aguera y Arcas",
        venue="AISTATS",
        year=2017,
        bibtex=_BIBTEX,
        certainty="Certain: standard algorithm. Weighting, local epochs and BatchNorm buffers are settings.",
        cost="One model down and one up per client and round.",
        notes="The naive baseline of a class-incremental stream: the softmax covers all known classes.",
    )


class FinetuneMasked(Strategy):
    """Federated averaging with cross entropy over the new classes only (the labels trick)."""

    name = "finetune_masked"
    family = "federated"
    stackable = True
    card = Card(
        title="Communication-Efficient Learning of Deep Networks from Decentralized Data",
        authors="McMahan, Moore, Ramage, Hampson, Aguera y Arcas",
        venue="AISTATS",
        year=2017,
        bibtex=_BIBTEX,
        certainty="Certain: read in the code of several class-incremental methods, under the name finetune.",
        cost="One model down and one up per client and round.",
        notes="A different and often much stronger baseline than finetune: report both. Samples of old "
        "classes (from a memory) keep the softmax over all known classes.",
    )

    def task_loss(self, step: Step) -> Tensor:
        return cross_entropy(step.output.logits, step.y, step.among(new_or_known(step)))
