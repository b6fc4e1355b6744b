"""Progress below the cell of a Jupyter notebook: one line that is written over, without a terminal's cursor."""

from __future__ import annotations

import html
import sys
import time
from typing import Any

from .progress import Clock, Pace, Progress, QuietProgress, Standing, duration, percent, size


def in_notebook() -> bool:
    """Whether this process is the kernel of a notebook; IPython in a terminal is none."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None and hasattr(ipython, "get_ipython") else None
    return shell is not None and getattr(shell, "kernel", None) is not None


def notebook_progress() -> Progress:
    """A line below the cell in a notebook, nothing elsewhere."""
    return NotebookProgress() if in_notebook() else QuietProgress()


def show_figures() -> None:
    """Makes a notebook show matplotlib figures as pictures, also those that pyplot has not made; nothing elsewhere."""
    if not in_notebook():
        return
    from IPython.core.pylabtools import select_figure_formats
    from matplotlib.figure import Figure

    shell = sys.modules["IPython"].get_ipython()
    formatters = shell.display_formatter.formatters
    # The user may have chosen another format.
    if not any(Figure in formatters[kind].type_printers for kind in ("image/png", "image/svg+xml", "application/pdf")):
        select_figure_formats(shell, {"png"})


class NotebookProgress:
    """A bar with accuracy, forgetting and time left in the output of a cell; finished tasks stay as lines above it.

    Args:
        clock: seconds, from any start.
    """

    kept = 30
    """Lines that stay; older ones give way, so that a long run does not fill the page."""

    def __init__(self, clock: Clock = time.monotonic) -> None:
        self._clock, self._pace = clock, Pace(0, 0, clock)
        self._tasks = self._rounds = 0
        self._lines: list[str] = []
        self._bar = ""
        self._display: Any = None

    def start(self, title: str, tasks: int, rounds: int, done: int) -> None:
        """See :class:`fedcl.tell.progress.Progress`."""
        self._tasks, self._rounds = tasks, rounds
        self._pace = Pace(tasks * rounds, done, self._clock)
        self.message(title)

    def round(self, task: int, round: int, standing: Standing) -> None:
        """See :class:`fedcl.tell.progress.Progress`."""
        pace = self._pace
        pace.done = task * self._rounds + round + 1
        where = f"task {task + 1}/{self._tasks} round {round + 1}/{self._rounds}"
        story = f"{where}, {self._story(standing)}, {duration(pace.left())} left"
        self._bar = f"<progress value='{pace.done}' max='{pace.total}'></progress> {html.escape(story)}"
        self._show()

    def task_done(self, task: int, standing: Standing) -> None:
        """See :class:`fedcl.tell.progress.Progress`."""
        self.message(f"task {task + 1}/{self._tasks}: {self._story(standing)}")

    def message(self, text: str) -> None:
        """See :class:`fedcl.tell.progress.Progress`."""
        self._lines = [*self._lines, html.escape(text)][-self.kept :]
        self._show()

    def finish(self) -> None:
        """See :class:`fedcl.tell.progress.Progress`."""
        if self._bar:
            self._bar = ""
            self._show()

    @staticmethod
    def _story(standing: Standing) -> str:
        return (
            f"accuracy {percent(standing.accuracy)}, forgetting {percent(standing.forgetting)}, "
            f"sent {size(standing.bytes_sent)}"
        )

    def _show(self) -> None:
        from IPython.display import HTML, display

        shown = HTML("<br>".join([*self._lines, *([self._bar] if self._bar else [])]))
        if self._display is None:
            self._display = display(shown, display_id=True)
        else:
            self._display.update(shown)
