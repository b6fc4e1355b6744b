"""The page of one run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..plots import KINDS
from ..records.runs import Broken, Run
from .amounts import Figure, all_numbers, key_figures
from .breakdowns import class_parts, client_parts, matrix_table
from .diary import Diary, diary_of, origin_of
from .figures import Drawn, Picture, pictures_of
from .layout import Limits
from .parts import Chooser, Table
from .rounds import rounds_table, tasks_table
from .settings import Section, sections_of

NO_CLASSES = "This run did not record accuracy by class."
NO_CLIENTS = "No client has test images of its own: partition.test=same_mix or holdout(p) gives them some."


@dataclass(frozen=True)
class Breakdown:
    """Classes or clients: what is chosen from and its table, or why there is none."""

    name: str
    heading: str
    found: tuple[Chooser, Table] | None
    missing: str


@dataclass(frozen=True)
class RunPage:
    """What ``run.html`` shows, but for what is cut where the page would get too large."""

    run: Run
    left_out: tuple[Broken, ...]
    drawn: Drawn
    diary: Diary
    figures: list[Figure]
    numbers: Table
    tasks: Table
    sections: tuple[Section, ...]
    origin: tuple[tuple[str, str], ...]
    events: list[dict[str, object]]
    template: str = "run.html"

    @property
    def title(self) -> str:
        """Of the page."""
        return f"{self.run.name}, seed {self.run.seed}"

    @property
    def lead(self) -> str:
        """What the run was, as far as its summary tells."""
        about = self.run.summary
        tasks = self.run.num_tasks
        stream = f"{about.get('scenario') or 'a'} stream".replace("_", "-")
        found = [f"{stream} of {about['dataset']}" if about.get("dataset") else stream]
        found.append(f"{tasks} task{'' if tasks == 1 else 's'}")
        found += [f"{about[key]} {noun}" for key, noun in (("num_clients", "clients"), ("rounds", "rounds"))
                  if about.get(key)]  # fmt: skip
        if about.get("protocol"):
            found.append(f"protocol {about['protocol']}")
        return f"{', '.join(found)}."

    @property
    def pictures(self) -> tuple[Picture, ...]:
        """All that are drawn."""
        return self.drawn.pictures

    def parts(self, limits: Limits) -> dict[str, object]:
        """What the template gets beside this page."""
        classes, clients = class_parts(self.run, limits.rows), client_parts(self.run, limits.rows)
        return {
            "matrix": matrix_table(self.run, limits.rows),
            "rounds": rounds_table(self.events, limits.rows),
            "breakdowns": [
                Breakdown("classes", "Classes", classes, NO_CLASSES),
                Breakdown("clients", "Clients", clients, NO_CLIENTS),
            ],
            "choosers": [found[0] for found in (classes, clients) if found],
        }


def run_page(run: Run, left_out: Sequence[Broken]) -> RunPage:
    """Everything about one run; ``left_out`` are other folders that were given."""
    events = run.events()
    kinds = [kind for kind in KINDS if kind != "memory"]  # one run has one budget
    unwanted = []
    if run.settings.get("data.download"):
        kinds.remove("split")
        why = "a report uses no network, which data.download=true may: `fedcl plot split RUN_DIR` draws it"
        unwanted.append(("split", why))
    drawn = pictures_of([run], kinds)
    return RunPage(
        run, tuple(left_out), Drawn(drawn.pictures, (*drawn.missing, *unwanted)), diary_of(events), key_figures(run),
        all_numbers(run), tasks_table(run), sections_of(run), origin_of(run), events,
    )  # fmt: skip
