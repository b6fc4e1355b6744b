"""FedRoD: a balanced generic head for everybody, and a personal head on top of it for each client."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from fedcl.blocks.class_counts import balanced_softmax
from fedcl.cards import Card
from fedcl.models.heads import Head, LinearHead
from fedcl.strategy import Predictor, Sharing, Step, Strategy, cross_entropy

if TYPE_CHECKING:
    from fedcl.models.model import FedModel


class ZeroHead(LinearHead):
    """A linear head whose rows start at 0: what is added to other logits changes nothing at first."""

    def initial_rows(self, array: str, class_ids: Sequence[int], seed: int) -> Tensor:
        """See :class:`fedcl.models.heads.ClassArrays`."""
        return torch.zeros_like(Head.initial_rows(self, array, class_ids, seed))


class FedRoD(Strategy):
    """The generic head learns with balanced softmax, the personal one what its logits lack at this client."""

    name = "fedrod"
    family = "personalised"
    stackable = True
    card = Card(
        title="On Bridging Generic and Personalized Federated Learning for Image Classification",
        authors="Chen, Chao",
        venue="ICLR",
        year=2022,
        bibtex="""@inproceedings{chen2022bridging,
  title = {On Bridging Generic and Personalized Federated Learning for Image Classification},
  author = {Chen, Hong-You and Chao, Wei-Lun},
  booktitle = {ICLR},
  year = {2022}
}""",
        certainty="Both losses read in two released codes that agree. The paper's variant with a "
        "hypernetwork for the personal head is not here.",
        client_state="its personal head",
        cost="One more linear layer at the client, which does not travel.",
        notes="A client's own prediction is the sum of both heads' logits, the global one's is that of the "
        "generic head. Counts of the client's images a class are used in its loss and do not leave it; a "
        "class without an image counts as one with a single image. The personal head starts at 0.",
    )

    def modules(self, model: FedModel) -> Mapping[str, nn.Module]:
        return {"personal": ZeroHead(model.feature_dim, bias=True)}

    def share(self, name: str, model: FedModel) -> Sharing:
        return "private" if name.startswith("extra.fedrod.") else "shared"

    def task_loss(self, step: Step) -> Tensor:
        return balanced_softmax(step.output.logits, step.y, step.counts, step.among(step.known))

    def loss(self, step: Step) -> dict[str, Tensor]:
        # Detached: the personal head must not change the representation that all share.
        both = step.output.logits.detach() + step.apply("personal", step.output.features.detach())
        return {"personal": cross_entropy(both, step.y, step.among(step.known))}

    def predict(self, predictor: Predictor, x: Tensor) -> Tensor:
        output = predictor.forward(x)
        if predictor.client is None:
            return output.logits
        own: Tensor = predictor.apply("personal", output.features)
        return output.logits + own
