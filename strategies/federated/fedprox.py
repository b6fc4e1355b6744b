"""FedProx: a proximal term keeps local models near the global one."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from fedcl.blocks.losses import proximal
from fedcl.cards import Card, option
from fedcl.strategy import Step, Strategy


class FedProx(Strategy):
    """Adds mu/2 ||w - w_t||^2 over the parameters to the local loss."""

    name = "fedprox"
    family = "federated"
    stackable = True
    unlabelled = "sees"
    neutral = {"mu": 0.0}
    card = Card(
        title="Federated Optimization in Heterogeneous Networks",
        authors="Li, Sahu, Zaheer, Sanjabi, Talwalkar, Smith",
        venue="MLSys",
        year=2020,
        bibtex="""@inproceedings{li2020fedprox,
  title = {Federated Optimization in Heterogeneous Networks},
  author = {Li, Tian and Sahu, Anit Kumar and Zaheer, Manzil and Sanjabi, Maziar and Talwalkar, Ameet and
            Smith, Virginia},
  booktitle = {MLSys},
  year = {2020}
}""",
        certainty="Formula certain (textbook). Some released codes leave out the 1/2; here it is as in the paper.",
        cost="As federated averaging; the client keeps the received model during a round.",
    )

    @dataclass(frozen=True)
    class Options:
        mu: float = option(0.01, "weight of the proximal term; the paper tries 0.001, 0.01, 0.1 and 1")

        def __post_init__(self) -> None:
            if not 0 <= self.mu < float("inf"):
                raise ValueError(f"mu must be at least 0, not {self.mu}")

    def loss(self, step: Step) -> dict[str, Tensor]:
        trained = {n: p for n, p in step.params.items() if p.requires_grad}
        return {"proximal": self.options.mu * proximal(trained, step.received)}
