"""TensorBoard and Weights & Biases as callbacks. Both are optional extras; ``events.jsonl`` is always written."""

from __future__ import annotations

import hashlib
import json
import os
from importlib.util import find_spec
from typing import Any

from ..errors import UsageError
from .callbacks import Answer, Callback, Event

PACKAGES = {"tensorboard": "tensorboard", "wandb": "wandb"}


def make_logger(name: str) -> Callback:
    """A logger by its name in ``output.loggers``.

    Raises:
        UsageError: its package is not installed.
    """
    if find_spec(PACKAGES[name]) is None:
        allowed = f"{name} is not installed; it comes with the extra: pip install 'fedcl-sim[{name}]'"
        raise UsageError("output.loggers", name, allowed)
    return TensorBoard() if name == "tensorboard" else WandB()


class TensorBoard(Callback):
    """Scalars under ``RUN_DIR/tensorboard``: ``round/...``, ``task/...`` and ``summary/...`` over rounds."""

    def __init__(self) -> None:
        self._writer: Any = None

    def run_start(self, event: Event) -> Answer:
        """See :class:`fedcl.tell.callbacks.Callback`."""
        from torch.utils.tensorboard import SummaryWriter

        # What an attempt that broke off wrote after the checkpoint is told again, and must not be drawn twice.
        self._writer = SummaryWriter(str(event.folder / "tensorboard"), purge_step=event.step + 1)
        self._writer.add_text("settings", "```\n" + json.dumps(event.settings, indent=1) + "\n```", event.step)
        return None

    def round_done(self, event: Event) -> Answer:
        """See :class:`fedcl.tell.callbacks.Callback`."""
        return self._add("round", event)

    def task_done(self, event: Event) -> Answer:
        """See :class:`fedcl.tell.callbacks.Callback`."""
        return self._add("task", event)

    def run_end(self, event: Event) -> Answer:
        """See :class:`fedcl.tell.callbacks.Callback`."""
        if self._writer is not None:
            self._add("summary", event)
            self._writer.close()
        return None

    def _add(self, group: str, event: Event) -> Answer:
        for name, value in event.metrics.items():
            self._writer.add_scalar(f"{group}/{name}", value, event.step)
        self._writer.flush()
        return None


class WandB(Callback):
    """A run of Weights & Biases under ``RUN_DIR/wandb``.

    Nothing is sent unless ``WANDB_MODE=online`` is set: ``wandb sync`` uploads it later. The project is
    ``WANDB_PROJECT`` or ``fedcl``.
    """

    def __init__(self) -> None:
        self._run: Any = None

    def run_start(self, event: Event) -> Answer:
        """See :class:`fedcl.tell.callbacks.Callback`."""
        import wandb

        settings = wandb.Settings(
            console="off", disable_git=True, disable_code=True, disable_job_creation=True, silent=True,
            x_disable_stats=True, x_disable_meta=True,
        )  # fmt: skip
        name, seed = event.settings["name"], event.settings["seed"]
        # The same folder is the same run, also after a resume.
        key = hashlib.sha256(str(event.folder.absolute()).encode()).hexdigest()[:16]
        self._run = wandb.init(
            dir=str(event.folder), project=os.environ.get("WANDB_PROJECT", "fedcl"), group=name,
            name=f"{name} seed {seed}", id=key, resume="allow", config=event.settings, settings=settings,
            mode="online" if os.environ.get("WANDB_MODE") == "online" else "offline",
        )  # fmt: skip
        return None

    def round_done(self, event: Event) -> Answer:
        """See :class:`fedcl.tell.callbacks.Callback`."""
        self._run.log(self._named("round", event), commit=True)
        return None

    def task_done(self, event: Event) -> Answer:
        """See :class:`fedcl.tell.callbacks.Callback`."""
        self._run.log(self._named("task", event), commit=True)
        return None

    def run_end(self, event: Event) -> Answer:
        """See :class:`fedcl.tell.callbacks.Callback`."""
        if self._run is not None:
            self._run.summary.update({**event.metrics, "status": event.status})
            self._run.finish(exit_code=0 if event.status in ("done", "stopped") else 1)
        return None

    @staticmethod
    def _named(group: str, event: Event) -> dict[str, float]:
        return {f"{group}/{name}": value for name, value in event.metrics.items()} | {"step": float(event.step)}
