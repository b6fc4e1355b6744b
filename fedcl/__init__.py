"""Simulator for federated continual learning of image representations."""

from __future__ import annotations

import os
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

# Flower reads these when it is first imported; nothing here may contact the network.
os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("FLWR_DISABLE_UPDATE_CHECK", "1")

# Read when torch loads GNU OpenMP. By default a thread that waits for others spins for milliseconds: where another
# process needs the processor meanwhile, a round of small networks took ten times as long.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

if TYPE_CHECKING:
    from .records.frames import frames
    from .run import RunResult, load, run
    from .strategy import Strategy
    from .tell.callbacks import Callback, Event

__version__ = "0.1.0"
__all__ = ["Callback", "Event", "RunResult", "Strategy", "__version__", "frames", "load", "run"]

# Looked up on first use: torch takes seconds to import, and ``fedcl --help`` must not pay for it.
_LAZY = {
    "run": "run", "load": "run", "RunResult": "run", "Strategy": "strategy", "Callback": "tell.callbacks",
    "Event": "tell.callbacks", "frames": "records.frames",
}  # fmt: skip


class _Package(ModuleType):
    def __setattr__(self, name: str, value: Any) -> None:
        # Importing the submodule ``fedcl.run`` binds it here; users call ``fedcl.run(...)``.
        if name == "run" and isinstance(value, ModuleType):
            value = value.run
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'fedcl' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f"{__name__}.{_LAZY[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})
