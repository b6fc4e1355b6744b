"""The workloads by name, and the settings that say what every contestant of one has to do."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from ..config import Config, load_config
from ..errors import UsageError

PACKAGE = "fedcl.experiments.bench"
STANDARD = ("mlp-100", "lenet-100", "cnn-50")
"""What ``--workload all`` stands for."""

SCALING = "scaling"
NAMES = (*STANDARD, "resnet18", SCALING)
CHOICES = (*NAMES, "all")

Override = str | tuple[str, Any]

COHORTS = (10, 30, 100, 300)
WIDTHS = (32, 128, 512, 2048)
SCALED = "mlp-100"
IMAGES = 50  # of each client in the standard workloads
CLASSES = 10


def of_cohort(clients: int) -> list[Override]:
    """Overrides of a standard workload for another number of clients with as many images each.

    >>> of_cohort(10)
    [('federation.clients', 10), ('data.limit', 50)]
    """
    return [("federation.clients", clients), ("data.limit", clients * IMAGES // CLASSES)]


def chosen(name: str) -> tuple[str, ...]:
    """The workloads that ``--workload`` means.

    Raises:
        UsageError: there is none of this name.
    """
    if name not in CHOICES:
        raise UsageError("--workload", name, f"must be one of {', '.join(CHOICES)}", CHOICES)
    return STANDARD if name == "all" else (name,)


def settings(workload: str, overrides: Sequence[Override] = ()) -> Config:
    """The settings of a workload that is no :data:`SCALING`.

    Raises:
        UsageError: an override that does not fit.
    """
    return load_config(Path(str(resources.files(PACKAGE).joinpath(f"{workload}.yaml"))), overrides)


def engine_only(overrides: Sequence[str]) -> list[str]:
    """The user's overrides, which may say how ours computes but not what.

    Raises:
        UsageError: a key outside the section ``engine``.
    """
    for text in overrides:
        if not text.startswith("engine."):
            raise UsageError("override", text, "only keys of engine may be set: every contestant does the same work")
    return list(overrides)
