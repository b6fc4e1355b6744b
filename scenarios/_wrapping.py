"""Scenarios that change the stream of another one: ``scenario.of`` names it."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

from fedcl import config as settings
from fedcl import registry
from fedcl.errors import UsageError
from fedcl.stream import Scenario

if TYPE_CHECKING:
    from fedcl.data.store import Dataset

OF = (
    "scenario.of names the stream that is changed (class_incremental by default), whose own settings apply: "
    "of=[i_blurry]; with two names the first is changed after the second: of=[long_tailed, i_blurry]."
)


class Wrapping(Scenario):
    """Changes what another scenario builds; images are those of the other one."""

    own: ClassVar[tuple[str, ...]] = ()
    """Keys of the section that this scenario reads itself."""

    def __init__(self) -> None:
        self._inner: dict[str, Scenario] = {}

    def inner(self, config: settings.Scenario) -> tuple[Scenario, settings.Scenario]:
        """The scenario that is changed, and its settings.

        Raises:
            UsageError: ``scenario.of`` names no scenario, or this one again.
        """
        found = [registry.load("scenarios", name, "scenario.of") for name in config.of or ["class_incremental"]]
        if type(self) in found:
            raise UsageError("scenario.of", list(config.of), f"other scenarios than {self.name} itself")
        plain, name = settings.Scenario(), found[0].name
        if name not in self._inner:
            self._inner[name] = found[0]()
        reset: dict[str, Any] = {key: getattr(plain, key) for key in self.own}
        return self._inner[name], replace(config, name=name, of=list(config.of[1:]), **reset)

    def dataset(self, config: settings.Scenario, seed: int) -> Dataset | None:
        """The images of the changed scenario's own, if it has some."""
        scenario, settings_ = self.inner(config)
        return scenario.dataset(settings_, seed)

    def images(self, dataset: Dataset, data: settings.Data, config: settings.Scenario, seed: int) -> Dataset:
        """The dataset as the changed scenario shows it."""
        scenario, settings_ = self.inner(config)
        return scenario.images(dataset, data, settings_, seed)
