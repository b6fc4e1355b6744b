"""FedRep: a personal head is trained first, with the shared encoder fixed; then the encoder, with the head fixed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fedcl.cards import Card, option
from fedcl.strategy import ClientContext, Phase, Sharing, Strategy

from .fedper import check_modules, is_below

if TYPE_CHECKING:
    from fedcl.models.model import FedModel


class FedRep(Strategy):
    """Each round some epochs on the personal head alone, then some on the shared representation alone."""

    name = "fedrep"
    family = "personalised"
    stackable = True
    unlabelled = "sees"
    card = Card(
        title="Exploiting Shared Representations for Personalized Federated Learning",
        authors="Collins, Hassani, Mokhtari, Shakkottai",
        venue="ICML",
        year=2021,
        bibtex="""@inproceedings{collins2021exploiting,
  title = {Exploiting Shared Representations for Personalized Federated Learning},
  author = {Collins, Liam and Hassani, Hamed and Mokhtari, Aryan and Shakkottai, Sanjay},
  booktitle = {ICML},
  year = {2021}
}""",
        certainty="Order and lengths of the two parts: textbook, not read again in the paper. Fresh "
        "momentum in each part is ours.",
        client_state="its personal head",
        cost="head_epochs + body_epochs passes over the client's images a round in place of "
        "federation.epochs; the head does not travel.",
        notes="federation.epochs and federation.steps are not read. Statistics of BatchNorm move in both "
        "parts. Read the personal accuracies, as of fedper. With federation.passes=once both parts go through the "
        "images of a round, in one pass each whatever their epochs are.",
    )

    @dataclass(frozen=True)
    class Options:
        private: tuple[str, ...] = option(("head",), "modules that stay at the client, by name")
        head_epochs: int = option(10, "passes over a client's images with the representation fixed", unit="epochs")
        body_epochs: int = option(1, "passes after these with the head fixed", unit="epochs")

        def __post_init__(self) -> None:
            if self.head_epochs < 0 or self.body_epochs < 0 or self.head_epochs + self.body_epochs == 0:
                raise ValueError("head_epochs and body_epochs must be at least 0, and not both 0")
            if not self.private:
                raise ValueError("private must name a module; without one this is finetune")

    def share(self, name: str, model: FedModel) -> Sharing:
        check_modules(self.options.private, model, f"options.{self.name}.private")
        return "private" if is_below(name, self.options.private) else "shared"

    def phases(self, ctx: ClientContext) -> Sequence[Phase]:
        def personal(name: str) -> bool:
            return is_below(name, self.options.private)

        both = [
            Phase("head", personal, epochs=self.options.head_epochs),
            Phase("body", lambda name: not personal(name), epochs=self.options.body_epochs),
        ]
        return [phase for phase in both if phase.epochs]
