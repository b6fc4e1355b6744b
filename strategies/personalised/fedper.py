"""FedPer: the last layers stay at the client; the others are averaged."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from fedcl.cards import Card, option
from fedcl.strategy import Sharing, Strategy

if TYPE_CHECKING:
    from fedcl.models.model import FedModel


def is_below(name: str, prefixes: tuple[str, ...]) -> bool:
    """Whether an array belongs to one of some modules, by dotted names.

    >>> is_below("head.weight", ("head",)), is_below("header.weight", ("head",))
    (True, False)
    """
    return any(name == prefix or name.startswith(f"{prefix}.") for prefix in prefixes)


class FedPer(Strategy):
    """Base layers are shared and averaged, personal ones never leave their client; both are trained together."""

    name = "fedper"
    family = "personalised"
    stackable = True
    unlabelled = "sees"
    neutral = {"private": ()}
    card = Card(
        title="Federated Learning with Personalization Layers",
        authors="Arivazhagan, Aggarwal, Singh, Choudhary",
        venue="arXiv:1912.00818",
        year=2019,
        bibtex="""@article{arivazhagan2019federated,
  title = {Federated Learning with Personalization Layers},
  author = {Arivazhagan, Manoj Ghuhan and Aggarwal, Vinay and Singh, Aaditya Kumar and Choudhary, Sunav},
  journal = {arXiv:1912.00818},
  year = {2019}
}""",
        certainty="Certain (textbook). Which layers are personal is a choice of the paper's experiments; "
        "here the head.",
        client_state="its personal layers",
        cost="Less traffic than averaging: personal layers do not travel.",
        notes="Read the personal accuracies (partition.test=same_mix or holdout(p)): the global model has "
        "personal layers that nobody has trained, so that its own accuracies say little. New classes get "
        "their rows of a personal head at every client alike. With nothing private it is federated "
        "averaging.",
    )

    @dataclass(frozen=True)
    class Options:
        private: tuple[str, ...] = option(("head",), "modules that stay at the client, by name")

    def share(self, name: str, model: FedModel) -> Sharing:
        return "private" if is_below(name, self.options.private) else "shared"
