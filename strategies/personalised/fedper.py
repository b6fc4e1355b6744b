"""FedPer: the last layers stay at the client; the others are averaged."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from fedcl.cards import Card, option
from fedcl.errors import UsageError
from fedcl.strategy import Sharing, Strategy

if TYPE_CHECKING:
    from fedcl.models.model import FedModel


def is_below(name: str, prefixes: tuple[str, ...]) -> bool:
    """Whether an array belongs to one of some modules, by dotted names.

    >>> is_below("head.weight", ("head",)), is_below("header.weight", ("head",))
    (True, False)
    """
    return any(name == prefix or name.startswith(f"{prefix}.") for prefix in prefixes)


def check_modules(prefixes: tuple[str, ...], model: FedModel, key: str) -> None:
    """Looks for a misspelt module, which would leave the model shared without a word.

    Raises:
        UsageError: the model has no array below one of ``prefixes``, the value of the setting ``key``.
    """
    names = [*model.state_dict()]
    modules = sorted({name.rpartition(".")[0] for name in names} | {name.partition(".")[0] for name in names})
    for prefix in prefixes:
        if not any(is_below(name, (prefix,)) for name in names):
            raise UsageError(key, prefix, f"a module or array of the model, by name: {', '.join(modules)}", modules)


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
        check_modules(self.options.private, model, f"options.{self.name}.private")
        return "private" if is_below(name, self.options.private) else "shared"
